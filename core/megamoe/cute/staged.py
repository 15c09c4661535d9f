"""What tiles that are staged in shared memory need: copies that arrive by themselves, products read along the rows.

Both operands of the product lie as `attention_mma` has them, rows of 64 values that are k: what was written token by
token, summed over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm


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
    out = llvm.inline_asm(
        llvm.StructType.get_literal([Float32.mlir_type] * count),
        [operand.ir_value() for operand in (*acc, a, b)],
        f"{kind} {{{names}}}, ${2 * count}, ${2 * count + 1}, 1, 1, 1, 1, 1;",
        ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l", "l"]),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    place = [ir.DenseI64ArrayAttr.get([i]) for i in range(count)]
    return [Float32(llvm.extractvalue(Float32.mlir_type, out, p)) for p in place]
