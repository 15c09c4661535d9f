"""NVFP4 to fp16 operands of tensor cores, from codes in their plain order and raw E4M3 scales, in registers.

The bits of an E2M1 magnitude, its last one the first of an fp16's fraction, are its value * 2^-14 (0.5 is a subnormal).
The product with any E4M3 scale is a multiple of 2^-24, fp16's smallest number, with at most 6 significant bits: exact,
so one instruction converts two scales and one product decodes two values. The missing 2^14 is the epilogue's.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int64, Uint32

from megamoe.cute import arith, asm
from megamoe.cute.arith import Target

DECODED_UNIT = 2.0**14  # what one in the result of a decode stands for
_MAGNITUDES = 0x0E0E0E0E  # in the upper byte of an fp16
_SIGNS = 0x80808080
_LOWER_PAIR, _UPPER_PAIR = 0x1404, 0x3424  # bytes 0, 1 or 2, 3 above zero bytes
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


def pack(low: Float32, high: Float32) -> Uint32:
    """Two fp32 rounded to fp16, the first in the low half."""
    word: Uint32 = arith.ptx(Uint32, "cvt.rn.f16x2.f32 $0, $2, $1;", low, high)
    return word


def multiply(a: Uint32, b: Uint32) -> Uint32:
    """The products of two pairs of fp16, subnormals kept."""
    word: Uint32 = arith.ptx(Uint32, "mul.rn.f16x2 $0, $1, $2;", a, b)
    return word


def scale_pair(pair: Uint32) -> Uint32:
    """The two E4M3 in the lower half of a word as fp16, exact."""
    text = "{.reg .b16 h, u; mov.b32 {h, u}, $1; cvt.rn.f16x2.e4m3x2 $0, h;}"
    word: Uint32 = arith.ptx(Uint32, text, pair)
    return word


def both_halves(pair: Uint32, upper: bool) -> Uint32:
    """One half of a pair in both halves: a modifier of the product that it goes into, where the compiler sees one."""
    half = "h" if upper else "l"
    word: Uint32 = arith.ptx(Uint32, f"{{.reg .b16 l, h; mov.b32 {{l, h}}, $1; mov.b32 $0, {{{half}, {half}}};}}", pair)
    return word


def spread(codes: Uint32) -> tuple[Uint32, Uint32]:
    """Eight codes as upper bytes of fp16, values * 2^-14: the even ones, the odd ones, each in their order."""
    magnitudes, signs = Uint32(_MAGNITUDES), Uint32(_SIGNS)
    even = (codes << 4 & signs) | (codes << 1 & magnitudes)
    odd = (codes & signs) | (codes >> 3 & magnitudes)
    return even, odd


def widen(upper: Uint32) -> tuple[Uint32, Uint32]:
    """Four upper bytes as two pairs of fp16 whose lower bytes are 0."""
    zero = Uint32(0)
    first, second = (arith.permute(upper, zero, pair, Target.SM90) for pair in (_LOWER_PAIR, _UPPER_PAIR))
    return first, second


def mma(a: Sequence[Uint32], b: Sequence[Uint32], c: Sequence[Float32]) -> list[Float32]:
    """c + a b, one warp, of a (16, 16) and b (16, 8) fp16 and c (16, 8) fp32; (g, t) = (lane // 4, lane % 4).

    Args:
        a: A lane's (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its neighbour to the right.
        b: (2t, g), (2t + 8, g), each with the one below.
        c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).

    Returns:
        Placed as c.
    """
    return asm.values([Float32] * 4, _MMA, *a, *b, *c, effects=False)


def transpose(pair: Uint32) -> Uint32:
    """An (8, 8) of 16 bits, two columns a lane, turned over: lane (g, t) gets rows 2t and 2t + 1 of column g."""
    return Uint32(asm.value(Uint32, "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pair))


def mma_group(acc: Sequence[Float32], a: Sequence[Uint32], b: Int64) -> list[Float32]:
    """`wgmma.mma` of fp16: acc + a b of a warpgroup, a (64, 16) in registers, b K-major in shared memory."""
    count = len(acc)
    names = ", ".join(f"${i}" for i in range(count))
    left = ", ".join(f"${2 * count + i}" for i in range(4))
    kind = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.f16.f16"
    text = f"{kind} {{{names}}}, {{{left}}}, ${2 * count + 4}, 1, 1, 1, 0;"
    return asm.values([Float32] * count, text, *acc, *a, b, kept=count)
