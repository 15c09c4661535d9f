"""Pairs of bf16 in a 32-bit word, the earlier value in the low half."""

from __future__ import annotations

from cutlass import Float32, Uint32

from megamoe.cute import arith
from megamoe.cute.arith import Target, bits, number, ptx

_QUIET_NAN = 0x7FFF


def unpack(word: Uint32) -> tuple[Float32, Float32]:
    """The two values as fp32, exact."""
    return number(word << 16), number(word & Uint32(0xFFFF0000))


def pack(low: Float32, high: Float32, target: Target) -> Uint32:
    """Two fp32 rounded to nearest even; NaN becomes 0x7FFF."""
    if not target.host:
        return ptx(Uint32, "cvt.rn.bf16x2.f32 $0, $2, $1;", low, high)
    return _rounded(low) | _rounded(high) << 16


def _rounded(x: Float32) -> Uint32:
    b = bits(x)
    half = (b + 0x7FFF + (b >> 16 & 1)) >> 16
    return arith.select((b & 0x7FFFFFFF) > 0x7F800000, Uint32(_QUIET_NAN), half)
