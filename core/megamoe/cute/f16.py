"""NVFP4 to fp16 operands of tensor cores, from codes in their plain order and raw E4M3 scales, in registers.

The bits of an E2M1 magnitude, its last one the first of an fp16's fraction, are its value * 2^-14 (0.5 is a subnormal).
The product with any E4M3 scale is a multiple of 2^-24, fp16's smallest number, with at most 6 significant bits: exact,
so one instruction converts two scales and one product decodes two values. The missing 2^14 is the epilogue's.
"""

from __future__ import annotations

from cutlass import Float32, Uint32

from megamoe.cute import arith, asm
from megamoe.cute.arith import Target

DECODED_UNIT = 2.0**14  # what one in the result of a decode stands for
_MAGNITUDES = 0x0E0E0E0E  # in the upper byte of an fp16
_SIGNS = 0x80808080
_LOWER_PAIR, _UPPER_PAIR = 0x1404, 0x3424  # bytes 0, 1 or 2, 3 above zero bytes


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


def transpose(pair: Uint32) -> Uint32:
    """An (8, 8) of 16 bits, two columns a lane, turned over: lane (g, t) gets rows 2t and 2t + 1 of column g."""
    return Uint32(asm.value(Uint32, "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pair))
