"""What the 32 lanes of a warp do together: exchange values, and multiply matrices.

A bf16 operand keeps 8 significant bits. An fp32 number is split into terms of bf16: its product with values that are
bf16 is accurate to about 2^-25 with three of them, 2^-17 with two. The tensor cores cut off what they add, so a long
sum of leading terms is made of short ones: a few steps of an mma, then an fp32 addition that rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Numeric, Uint32, cute

from megamoe.cute import arith, asm, bf16
from megamoe.cute.arith import Target

WARP = 32
_MOST_THREADS = 1024


def thread() -> Int32:
    """The thread's number in its CTA, read anew, so that what follows from it need not wait in registers."""
    return Int32(asm.value(Int32, "mov.u32 $0, %tid.x;")) & (_MOST_THREADS - 1)  # the range makes divisions shifts


def ctas() -> Int32:
    """CTAs of the grid, read anew."""
    return Int32(asm.value(Int32, "mov.u32 $0, %nctaid.x;"))


def warp_number() -> Int32:
    """The warp's number in its CTA, by a reduction: it comes in a uniform register, of which there are plenty."""
    wide = thread() // WARP
    return Int32(asm.value(Int32, "redux.sync.min.u32 $0, $1, 0xffffffff;", wide)) & (_MOST_THREADS // WARP - 1)


def split_bf16(low: Float32, high: Float32, target: Target) -> list[Uint32]:
    """Three words of two bf16 each that add up to the two numbers, the largest terms first."""
    words = []
    for _ in range(3):
        words.append(bf16.pack(low, high, target))
        low, high = (_minus(x, y, target) for x, y in zip((low, high), bf16.unpack(words[-1]), strict=True))
    return words


def _minus(a: Float32, b: Float32, target: Target) -> Float32:
    return a - b if target.host else arith.ptx(Float32, "sub.rn.f32 $0, $1, $2;", a, b)


def mma(a: Sequence[Uint32], b: Sequence[Uint32], c: Sequence[Float32], dtype: str = "bf16") -> list[Float32]:
    """c + a b, one warp, of a (16, 16), b (16, 8) and c (16, 8) fp32; a lane's place is (g, t) = (lane // 4, lane % 4).

    Args:
        a: A lane's (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its neighbour to the right.
        b: (2t, g), (2t + 8, g), each with the one below.
        c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
        dtype: Of a and b, "bf16" or "f16".

    Returns:
        Placed as c.
    """
    return _mma(f"m16n8k16.row.col.f32.{dtype}.{dtype}.f32", a, b, c, effects=False)


def mma_k8(a: Sequence[Uint32], b: Uint32, c: Sequence[Float32]) -> list[Float32]:
    """`mma` of bf16 a (16, 8) and b (8, 8): the first halves of its operands."""
    return _mma("m16n8k8.row.col.f32.bf16.bf16.f32", a, [b], c)


def _mma(
    kind: str, a: Sequence[Uint32], b: Sequence[Uint32], c: Sequence[Float32], effects: bool = True
) -> list[Float32]:
    count, names = 0, []
    for registers in (c, a, b, c):
        names.append("{" + ", ".join(f"${count + i}" for i in range(len(registers))) + "}")
        count += len(registers)
    return asm.values([Float32] * len(c), f"mma.sync.aligned.{kind} {', '.join(names)};", *a, *b, *c, effects=effects)


def from_lane(value: Numeric, lane_xor: int) -> Numeric:
    """The value of the lane whose number differs in the bits `lane_xor`."""
    return cute.arch.shuffle_sync_bfly(value, offset=lane_xor)


def sum_of_four(x: Float32, target: Target) -> Float32:
    """The sum over four neighbouring lanes, the same bits in each of them."""
    pair = arith.add(x, from_lane(x, 1), target)
    return arith.add(pair, from_lane(pair, 2), target)
