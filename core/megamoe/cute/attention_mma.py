"""What attention on sm_90a is made of: warpgroup products with operands in shared memory, waits, powers of two.

Operands in shared memory are blocks of 64 columns: a row of a block is 128 bytes, its 16-byte chunks swizzled as in
`wgmma`. Read along the columns (keys: k is the head dim) a block is K-major; read along the rows (values: k is the
token) the same bytes are MN-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Int32, Int64, Uint32

from megamoe.cute import arith, asm, warp
from megamoe.cute.arith import Target
from megamoe.cute.wgmma import ROW_BYTES, SWIZZLE_ROWS

CHUNK = 16  # bytes
_EIGHT_ROWS = SWIZZLE_ROWS * ROW_BYTES >> 4  # descriptors count in 16 bytes
_SWIZZLE = 1 << 62  # of 128 bytes


def transposed(address: Int32, block_bytes: int) -> Int64:
    """The descriptor of rows that are k, from a multiple of 1024 on; 128 more is the next 16 rows.

    Args:
        address: Of the first block of 64 columns in shared memory.
        block_bytes: From one block of 64 columns to the next.
    """
    return Int64(address >> 4) | Int64(_SWIZZLE | _EIGHT_ROWS << 32 | block_bytes >> 4 << 16)


def mma_shared(acc: Sequence[Float32], a: Int64, b: Int64, dtype: str = "bf16") -> list[Float32]:
    """acc + a b, of a (64, 16) and b (16, n), both K-major in shared memory; asynchronous and placed as `wgmma.mma`.

    Args:
        acc: n / 2 values.
        a: `wgmma.descriptor`.
        b: `wgmma.descriptor`.
        dtype: Of a and b, "bf16" or "f16".
    """
    return _mma(acc, [a, b], "${0}, ${1}, 1, 1, 1, 0, 0", dtype)


def first_shared(count: int, a: Int64, b: Int64, dtype: str = "bf16") -> list[Float32]:
    """a b as `mma_shared` has them, added to nothing: `count` = n / 2 values that need not be made zero before."""
    text = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{dtype}.{dtype}"
    names = ", ".join(f"${i}" for i in range(count))
    text = f"{text} {{{names}}}, ${count}, ${count + 1}, 0, 1, 1, 0, 0;"
    return asm.values([Float32] * count, text, a, b)


def mma_transposed(acc: Sequence[Float32], a: Sequence[Uint32], b: Int64, dtype: str = "bf16") -> list[Float32]:
    """acc + a b, of a (64, 16) in registers as for `wgmma.mma` and b (16, n) MN-major in shared memory.

    Args:
        acc: n / 2 values.
        a: Four words, not to be changed before `wgmma.wait`.
        b: `transposed`.
        dtype: Of a and b, "bf16" or "f16".
    """
    return _mma(acc, [*a, b], "{{${0}, ${1}, ${2}, ${3}}}, ${4}, 1, 1, 1, 1", dtype)


def mma_shared_transposed(acc: Sequence[Float32], a: Int64, b: Int64, dtype: str = "bf16") -> list[Float32]:
    """acc + a b, of a (64, 16) K-major and b (16, n) MN-major, both in shared memory.

    Args:
        acc: n / 2 values.
        a: `wgmma.descriptor`.
        b: `transposed`.
        dtype: Of a and b, "bf16" or "f16".
    """
    return _mma(acc, [a, b], "${0}, ${1}, 1, 1, 1, 0, 1", dtype)


def mma_by_rows(acc: Sequence[Float32], a: Int64, b: Int64, dtype: str = "f16") -> list[Float32]:
    """acc + a b of a warpgroup, of a (64, 16) and b (16, n), both MN-major in shared memory; asynchronous.

    Args:
        acc: n / 2 values, placed as `wgmma.mma`.
        a: `transposed`, of a block of 64 columns.
        b: `transposed`.
        dtype: Of a and b, "bf16" or "f16".
    """
    count = len(acc)
    names = ", ".join(f"${i}" for i in range(count))
    kind = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{dtype}.{dtype}"
    text = f"{kind} {{{names}}}, ${2 * count}, ${2 * count + 1}, 1, 1, 1, 1, 1;"
    return asm.values([Float32] * count, text, *acc, a, b, kept=count)


def _mma(acc: Sequence[Float32], operands: Sequence[Uint32 | Int64], tail: str, dtype: str = "bf16") -> list[Float32]:
    count = len(acc)
    names = ", ".join(f"${i}" for i in range(count))
    rest = tail.format(*(2 * count + i for i in range(len(operands))))
    text = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{dtype}.{dtype} {{{names}}}, {rest};"
    return asm.values([Float32] * count, text, *acc, *operands, kept=count)


def fence(values: Sequence[Float32 | Uint32]) -> list[Float32 | Uint32]:
    """`wgmma.fence` that values which the next products use stand before."""
    return _tied("wgmma.fence.sync.aligned;", values)


def wait(values: Sequence[Float32], groups: int = 0) -> list[Float32]:
    """`wgmma.wait` for sums that are to be used behind it."""
    return _tied(f"wgmma.wait_group.sync.aligned {groups};", values)


def wait_behind(
    sums: Sequence[Float32], others: Sequence[Float32], totals: Sequence[Float32]
) -> tuple[list[Float32], list[Float32]]:
    """`wait` for all groups, and not before the arithmetic that makes `others` is done.

    ptxas moves a plain wait in front of all arithmetic that does not need it, and nothing is left to do meanwhile. It
    moves no wait across an exit that depends on that arithmetic, and does not know that this one is never taken.

    Args:
        sums: What is waited for.
        others: What was computed meanwhile.
        totals: Two values made from all of them, never below 0.
    """
    count = 2 * (len(sums) + len(others))
    leave = f"min.f32 m, ${count}, ${count + 1}; setp.lt.f32 p, m, 0fBF800000; @p exit;"
    text = f"{{.reg .pred p; .reg .f32 m; {leave} wgmma.wait_group.sync.aligned 0;}}"
    done = _tied(text, [*sums, *others], totals)
    return done[: len(sums)], done[len(sums) :]


def _tied(text: str, values: Sequence[Any], operands: Sequence[Float32] = ()) -> list[Any]:
    """An instruction that keeps its place among what makes and uses the values."""
    return asm.values([type(value) for value in values], text, *values, *operands, kept=len(values))


def exp2(x: Float32) -> Float32:
    """2^x to about 2^-22, 0 for -inf."""
    out: Float32 = arith.ptx(Float32, "ex2.approx.ftz.f32 $0, $1;", x)
    return out


def log2(x: Float32) -> Float32:
    """The base-2 logarithm, to about 2^-22; -inf for 0."""
    out: Float32 = arith.ptx(Float32, "lg2.approx.f32 $0, $1;", x)
    return out


def max_of_four(x: Float32) -> Float32:
    """The largest over four neighbouring lanes, in each of them."""
    pair = arith.maximum(x, warp.from_lane(x, 1), Target.SM90)
    return arith.maximum(pair, warp.from_lane(pair, 2), Target.SM90)
