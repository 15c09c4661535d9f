"""From the `hopper` layout of `numerics.fragments` to operands of bf16 tensor cores, in registers.

Everything that comes out is exactly 2^-7 of E2M1 * E4M3 (`convert.DECODED_UNIT`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cutlass import Uint32

from megamoe.cute import arith, convert
from megamoe.cute.arith import Target

_VALUE = 0x81C081C0  # sign and magnitude of a decoded pair, as bf16 times 2^-126
_SCALE = 0x0FF00FF0  # S0E5M3 codes in a pair of bf16
_SCALE_BIAS = 0x70007000
_X_OF_Z = 0xC180C180
_OR, _AND_OR, _SELECT = 0xFC, 0xEA, 0xE4  # look-up tables of a | b, a & b | c, c ? a : b


class Masks(NamedTuple):
    """Two masks that `decode_pair` combines three words with: in one instruction each if the masks are registers.

    Attributes:
        scale: Of S0E5M3 codes in a pair of bf16.
        x_of_z: Of the bits of z that x holds.
    """

    scale: Uint32
    x_of_z: Uint32


MASKS = Masks(Uint32(_SCALE), Uint32(_X_OF_Z))


def masks(target: Target) -> Masks:
    """MASKS in registers: the compiler does not know them, or it would write constants into two instructions each."""
    zero = Uint32(arith.hidden_zero(target))
    scale, x_of_z = (_lop3(zero, Uint32(mask), Uint32(0), _OR, target) for mask in (_SCALE, _X_OF_Z))
    return Masks(scale, x_of_z)


def scale_pairs(word: Uint32, mask: Uint32, target: Target) -> tuple[Uint32, Uint32]:
    """The scales of rows g and g + 8 of a k32 group: bf16 pairs (block 0, block 1), times 2^119."""
    low, high = (_lop3(w, mask, Uint32(_SCALE_BIAS), _AND_OR, target) for w in (word, (word << 8) | (word >> 24)))
    return low, high


def decode_pair(x: Uint32, y: Uint32, scales: Uint32, target: Target, given: Masks = MASKS) -> list[Uint32]:
    """A lane's left operands of the two k16 steps of a k32 group, each of one scale block.

    Args:
        x: First word of codes.
        y: Second word.
        scales: The word of scale codes.
        target: What to compile for.
        given: `masks` for a loop that decodes much.

    Returns:
        a0..a3 of the first step, then of the second: rows g, g + 8, g, g + 8 of m16k16.
    """
    low, high = scale_pairs(scales, given.scale, target)
    z = _lop3(x, y, given.x_of_z, _SELECT, target)
    first = (x << 6, x << 2, _rotate_right(x, 4), y << 4)
    second = (y, _rotate_right(y, 6), _rotate_right(z, 2), _rotate_right(z, 8))
    return [
        _mul_by_half(form & _word(_VALUE), high if i % 2 else low, i // 4, target)
        for i, form in enumerate((*first, *second))
    ]


def _mul_by_half(a: Uint32, b: Uint32, half: int, target: Target) -> Uint32:
    """A pair of bf16 times one of a pair, the lower (0) or the upper; ptxas makes the selection part of the product."""
    if not target.host:
        text = "{.reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, $2; mov.b32 d, {%s, %s}; mul.rn.bf16x2 $0, $1, d;}"
        return arith.ptx(Uint32, text % (("h", "h") if half else ("l", "l")), a, b)
    both = (b >> 16) | (b & _word(0xFFFF0000)) if half else (b & 0xFFFF) | (b << 16)
    return convert.mul_bf16x2(a, both, target)


def _lop3(a: Uint32, b: Uint32, c: Uint32, table: int, target: Target) -> Uint32:
    """Any function of three bits, for each bit: `table` holds it at 4 a + 2 b + c: PTX lop3.b32."""
    if not target.host:
        return arith.ptx(Uint32, f"lop3.b32 $0, $1, $2, $3, {table};", a, b, c)
    out = Uint32(0)
    for place in range(8):
        if table >> place & 1:
            out = out | ((a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c))
    return out


def activation_pairs(codes: Sequence[Uint32], scale: Uint32, target: Target) -> list[Uint32]:
    """NVFP4 activations of one block as words of two neighbouring values, 2^-7 of E2M1 * E4M3.

    Args:
        codes: Eight codes each.
        scale: The E4M3 byte of the block, not NaN.
        target: What to compile for.
    """
    factor = convert.bf16_factor(scale, target)
    return [word for some in codes for word in convert.decode_e2m1_to_bf16(some, factor, target)]


def operand_order(words: Sequence[Uint32]) -> list[list[Uint32]]:
    """16 words of a token, 32 k, as the right operands of lanes t = 0..3: two steps of (b0, b1) each."""
    return [[words[t + 4 * i] for i in range(4)] for t in range(4)]


def _rotate_right(word: Uint32, by: int) -> Uint32:
    return (word >> by) | (word << (32 - by))


def _word(pattern: int) -> Uint32:
    return Uint32(pattern & 0xFFFFFFFF)
