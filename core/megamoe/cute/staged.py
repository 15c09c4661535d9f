"""What tiles that are staged in shared memory need: copies that arrive by themselves, products read along the rows.

Both operands of the product lie as `attention_mma` has them, rows of 64 values that are k: what was written token by
token, summed over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int64

from megamoe.cute import asm


def mma_by_rows(acc: Sequence[Float32], a: Int64, b: Int64, dtype: str = "f16") -> list[Float32]:
    """acc + a b of a warpgroup, of a (64, 16) and b (16, n), both MN-major in shared memory; asynchronous.

    Args:
        acc: n / 2 values, placed as `wgmma.mma`.
        a: `attention_mma.transposed`, of a block of 64 columns.
        b: `attention_mma.transposed`.
        dtype: Of a and b, "bf16" or "f16".
    """
    count = len(acc)
    names = ", ".join(f"${i}" for i in range(count))
    kind = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{dtype}.{dtype}"
    text = f"{kind} {{{names}}}, ${2 * count}, ${2 * count + 1}, 1, 1, 1, 1, 1;"
    return asm.values([Float32] * count, text, *acc, a, b, kept=count)
