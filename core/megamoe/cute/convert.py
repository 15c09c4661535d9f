"""Encoding and decoding of E4M3 and E2M1: the same bits as `megamoe.numerics.nvfp4` for every fp32 input.

sm_90a and sm_100a have E4M3 conversions, sm_100a E2M1 ones too; elsewhere integer and fp32 operations stand in.
"""

from __future__ import annotations

from cutlass import Float32, Uint32

from megamoe.cute import arith
from megamoe.cute.arith import Target, bits, number, ptx, select

_MAGIC = 2.0**23  # fp32 values from here to 2^24 are the integers: adding it rounds to one, ties to even
MAGIC_BITS = 0x4B000000
_SIX_BITS = 0x40C00000
BOUND = 7.0  # magnitudes that `code_of_bounded` accepts lie below
DECODED_UNIT = 2.0**7  # what one in the result of `decode_e2m1_to_bf16` stands for


def encode_e4m3(x: Float32, target: Target) -> Uint32:
    """The E4M3 byte of x: rounded to nearest even, saturating, NaN of either sign 0x7F."""
    if not target.host:
        pair = "{.reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, $1; cvt.u32.u16 $0, h;}"
        return ptx(Uint32, pair, x)
    b = bits(x)
    magnitude, sign = b & 0x7FFFFFFF, (b >> 24) & 0x80
    # normal: round the mantissa to 3 bits and rebias the exponent from 127 to 7
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the values are the multiples of 2^-9: 2^14 has that for its last place
    subnormal = bits(number(magnitude) + Float32(2.0**14)) - 0x46800000
    code = select(magnitude < 0x3C800000, subnormal, normal)
    code = select(magnitude > 0x43E00000, Uint32(0x7E), code)  # above 448
    return select(magnitude > 0x7F800000, Uint32(0x7F), code | sign)


def decode_e4m3(byte: Uint32, target: Target) -> Float32:
    """The fp32 value of an E4M3 byte (bits 8 and up must be 0), exact."""
    if not target.host:
        text = (
            "{.reg .b16 h, l, u; .reg .b32 p; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 p, h;"
            " mov.b32 {l, u}, p; cvt.f32.f16 $0, l;}"
        )
        return ptx(Float32, text, byte)
    low = byte & 0x7F
    value = number(low << 20) * Float32(2.0**120)  # E4M3's exponent field is 120 above fp32's for the same value
    signed = number(bits(value) | (byte & 0x80) << 24)
    return select(low == 0x7F, number(Uint32(0x7FC00000)), signed)


def code_of_bounded(magnitude: Float32, target: Target) -> Uint32:
    """The E2M1 code 0..7 of 0 <= magnitude < BOUND, in the low bits of an integer that has MAGIC above them.

    The code is a piecewise linear function of the magnitude a, rounded to an integer, ties to even: 2a below 2, a + 2
    below 4, a/2 + 4 above; each line lies above the others outside its own range, so their least counts.
    """
    fine = arith.scale_add(magnitude, 2.0, _MAGIC, target)
    middle = arith.add(magnitude, Float32(_MAGIC + 2), target)
    coarse = arith.scale_add(magnitude, 0.5, _MAGIC + 4, target)
    return arith.umin(arith.umin(bits(fine), bits(middle), target), bits(coarse), target)


def encode_e2m1(x: Float32, target: Target) -> Uint32:
    """The E2M1 code 0..15 of any fp32: rounded once, to nearest even, saturating; NaN 0x7, the sign of zero kept."""
    if target.native_e2m1:
        return encode_e2m1_pair(x, Float32(0.0), target) & 0xF
    b = bits(x)
    magnitude = b & 0x7FFFFFFF
    bounded = arith.umin(magnitude, Uint32(_SIX_BITS), target)  # infinity and NaN too: they lie above as integers
    code = code_of_bounded(number(bounded), target) & 7
    return code | select(magnitude > 0x7F800000, Uint32(0), (b >> 28) & 8)


def encode_e2m1_pair(low: Float32, high: Float32, target: Target) -> Uint32:
    """A byte of two E2M1 codes, each as `encode_e2m1`."""
    if target.native_e2m1:
        text = "{.reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, $2, $1; cvt.u32.u8 $0, c;}"
        return ptx(Uint32, text, low, high)
    return encode_e2m1(low, target) | encode_e2m1(high, target) << 4


def decode_e2m1(code: Uint32) -> Float32:
    """The fp32 value of an E2M1 code 0..15, exact; 0x8 is -0."""
    value = number((code & 7) << 22) * Float32(2.0**126)  # fp32's bias is 126 above; 0.5 starts as a subnormal
    return number(bits(value) | (code & 8) << 28)


def bf16_factor(scale: Uint32, target: Target) -> Uint32:
    """What `decode_e2m1_to_bf16` multiplies by: an E4M3 scale that is not NaN, times 2^119, as bf16 in both halves."""
    half = bits(decode_e4m3(scale, target) * Float32(2.0**119)) >> 16  # exact: E4M3 has 4 significant bits
    return half | half << 16


def decode_e2m1_to_bf16(codes: Uint32, factor: Uint32, target: Target) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """Eight E2M1 codes times their block scale times 1/DECODED_UNIT, exact in bf16.

    A code shifted into a bf16 is its value * 2^-126 (0.5 is a subnormal, which mul.bf16x2 keeps), so one product
    decodes and scales. The missing 2^7 is a power of two: the caller folds it into the fp32 factor of its epilogue.

    Args:
        codes: Eight nibbles, the first in the lowest.
        factor: From `bf16_factor`.
        target: What to compile for.

    Returns:
        Four words of two bf16 each, the earlier value in the low half.
    """
    words: list[Uint32] = []
    for byte in (0, 2):
        spread = (byte + 1) << 12 | 4 << 8 | byte << 4 | 4  # bytes [0, codes[byte], 0, codes[byte + 1]]
        even, odd = (
            _on_top_to_bf16(arith.permute(nibbles, Uint32(0), spread, target), factor, target)
            for nibbles in (codes << 4, codes)
        )
        words += [arith.permute(even, odd, 0x5410, target), arith.permute(even, odd, 0x7632, target)]
    return words[0], words[1], words[2], words[3]


def _on_top_to_bf16(codes: Uint32, factor: Uint32, target: Target) -> Uint32:
    """Decodes the code on top of each half."""
    return mul_bf16x2((codes & Uint32(0x80008000)) | (codes >> 6 & 0x01C001C0), factor, target)


def mul_bf16x2(a: Uint32, b: Uint32, target: Target) -> Uint32:
    """The products of two pairs of bf16, each rounded; on the CPU only for products that a bf16 holds."""
    if not target.host:
        return ptx(Uint32, "mul.rn.bf16x2 $0, $1, $2;", a, b)
    low = number(a << 16) * number(b << 16)  # products of E2M1 and E4M3 fit a bf16
    high = number(a & Uint32(0xFFFF0000)) * number(b & Uint32(0xFFFF0000))
    return bits(low) >> 16 | bits(high) & Uint32(0xFFFF0000)
