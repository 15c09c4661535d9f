"""Warpgroup matrix products with the left operand in registers (sm_90a), and the shared memory descriptor of the right.

The four warps of a warpgroup own 16 rows each of a 64-row tile; within a warp the registers lie as those of
mma.m16n8k16. The right operand is K-major in shared memory, 64 bf16 of k a row, its 16-byte chunks swizzled: chunk c of
row r lies at chunk c ^ (r % 8).
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Int64, Uint32

from megamoe.cute import asm

K_STEP = 16  # of one product
SWIZZLE_ROWS = 8
ROW_BYTES = 128  # of shared memory: 64 bf16
_NEXT_ROWS = SWIZZLE_ROWS * ROW_BYTES >> 4  # from eight rows to the next, in units of 16 bytes
_DESCRIPTOR = 1 << 62 | _NEXT_ROWS << 32 | 1 << 16  # 128-byte swizzle


def descriptor(address: Int32) -> Int64:
    """Of rows that start at a shared memory address, a multiple of 1024; + 2 is the next K_STEP values of k."""
    return Int64(address >> 4) | Int64(_DESCRIPTOR)


def mma(acc: Sequence[Float32], a: Sequence[Uint32], b: Int64, dtype: str = "bf16") -> list[Float32]:
    """acc + a b, of a (64, 16) and b (16, n), asynchronously: `commit` and `wait` before the result is used.

    Args:
        acc: n / 2 values: of each 8 columns (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), where a lane's place
            is (g, t) = (lane // 4, lane % 4).
        a: Pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); not to be changed before `wait`.
        b: `descriptor`.
        dtype: Of a and b, "bf16" or "f16".

    Returns:
        Placed as acc.
    """
    count = len(acc)
    names = ", ".join(f"${i}" for i in range(count))
    left = ", ".join(f"${2 * count + i}" for i in range(4))
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{dtype}.{dtype}"
        f" {{{names}}}, {{{left}}}, ${2 * count + 4}, 1, 1, 1, 0;"
    )
    return asm.values([Float32] * count, text, *acc, *a, b, kept=count)


def zeros(count: int) -> list[Float32]:
    """A fresh accumulator; plain zeros would be kept in registers from one piece of work to the next."""
    return asm.values([Float32] * count, " ".join(f"mov.f32 ${i}, 0f00000000;" for i in range(count)))


def fence() -> None:
    """Before the first `mma` after registers it uses were written otherwise."""
    asm.effect("wgmma.fence.sync.aligned;")


def commit() -> None:
    """Closes the group of the products since the last one."""
    asm.effect("wgmma.commit_group.sync.aligned;")


def wait(groups: int) -> None:
    """Until at most so many groups of this warpgroup are not done."""
    asm.effect(f"wgmma.wait_group.sync.aligned {groups};")
