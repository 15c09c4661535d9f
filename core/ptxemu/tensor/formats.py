"""Number formats of the tensor units: tables that decode every code, and correctly rounded encoders.

Sources: PTX ISA 5.2.3 (alternate floating-point formats), 9.7.9.22 (cvt); OCP Microscaling Formats 1.0 for e2m1,
e2m3, e3m2 and ue8m0. All functions are pure NumPy on codes (unsigned integers) and values (float64, which holds
every value exactly).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rounding = Literal["rn", "rna", "rz", "rp", "rm"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of at most 16 bits.

    Attributes:
        name: As PTX spells it.
        bits: Of a code, the sign included.
        exponent: Bits of the exponent field.
        mantissa: Bits of the stored significand.
        signed: Whether the top bit is a sign.
        specials: "ieee": the top exponent holds infinities and NaNs; "nan": only the all-ones code is a NaN; "none".
    """

    name: str
    bits: int
    exponent: int
    mantissa: int
    signed: bool = True
    specials: Literal["ieee", "nan", "none"] = "ieee"

    @property
    def bias(self) -> int:
        """Of the exponent."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def sign(self) -> int:
        """Mask of the sign bit, 0 for an unsigned format."""
        return 1 << (self.exponent + self.mantissa) if self.signed else 0


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("f16", 16, 5, 10),
        Format("bf16", 16, 8, 7),
        Format("e5m2", 8, 5, 2),
        Format("e4m3", 8, 4, 3, specials="nan"),
        Format("ue4m3", 8, 4, 3, signed=False, specials="nan"),
        Format("ue8m0", 8, 8, 0, signed=False, specials="nan"),
        Format("e2m3", 6, 2, 3, specials="none"),
        Format("e3m2", 6, 3, 2, specials="none"),
        Format("e2m1", 4, 2, 1, specials="none"),
    )
}


def _value(fmt: Format, code: int) -> float:
    """The number that one code stands for."""
    magnitude = code & ((1 << (fmt.exponent + fmt.mantissa)) - 1)
    field, fraction = magnitude >> fmt.mantissa, magnitude & ((1 << fmt.mantissa) - 1)
    top = (1 << fmt.exponent) - 1
    if fmt.name == "ue8m0":
        return float("nan") if code == 255 else 2.0 ** (code - 127)
    if fmt.specials == "nan" and magnitude == (1 << (fmt.exponent + fmt.mantissa)) - 1:
        value = float("nan")
    elif fmt.specials == "ieee" and field == top:
        value = float("nan") if fraction else float("inf")
    elif field == 0:
        value = float(np.ldexp(float(fraction), 1 - fmt.bias - fmt.mantissa))
    else:
        value = float(np.ldexp(float(fraction | 1 << fmt.mantissa), field - fmt.bias - fmt.mantissa))
    return -value if code & fmt.sign else value


@cache
def table(name: str) -> npt.NDArray[np.float64]:
    """Value of every code of a format: float64 (2 ** bits,); ue4m3 has 256 entries whose top bit is ignored."""
    fmt = FORMATS[name]
    values = np.array([_value(fmt, code) for code in range(1 << fmt.bits)], np.float64)
    values.setflags(write=False)
    return values


@cache
def _magnitudes(name: str) -> npt.NDArray[np.float64]:
    """Finite values of the codes without sign, ascending: the code is the position."""
    fmt = FORMATS[name]
    values = table(name)[: 1 << (fmt.exponent + fmt.mantissa)]
    return values[np.isfinite(values)]


def decode(name: str, codes: Array) -> npt.NDArray[np.float64]:
    """Values of codes, float64, exact.

    Args:
        name: A format of `FORMATS`, or "tf32" (32-bit codes whose low 13 bits are ignored) or "f32".
        codes: Unsigned integers; bits above the format's are ignored.
    """
    if name in ("tf32", "f32"):
        bits = codes.astype(np.uint32) & np.uint32(0xFFFFE000 if name == "tf32" else 0xFFFFFFFF)
        return bits.view(np.float32).astype(np.float64)
    values = table(name)
    return np.asarray(values[codes & (len(values) - 1)])


def _round_to_grid(fmt: Format, x: npt.NDArray[np.float64], rounding: Rounding) -> npt.NDArray[np.float64]:
    """Non-negative finite numbers to multiples of the spacing of a format, with no upper bound."""
    _, exponent = np.frexp(x)
    spacing = np.maximum(exponent - 1, 1 - fmt.bias) - fmt.mantissa
    if fmt.name == "ue8m0":
        spacing = np.maximum(exponent - 1, -127)
    scaled = np.ldexp(x, -spacing)
    if rounding == "rn":
        steps = np.rint(scaled)
    elif rounding == "rna":
        steps = np.floor(scaled + 0.5)
    else:
        steps = np.ceil(scaled) if rounding == "rp" else np.floor(scaled)
    return np.asarray(np.ldexp(steps, spacing), np.float64)


def encode(name: str, values: Array, *, rounding: Rounding = "rn", saturate: bool = True) -> npt.NDArray[np.uint16]:
    """Codes of values, uint16.

    Args:
        name: A format of `FORMATS`.
        values: Floating-point numbers; float64 keeps every f32 exact.
        rounding: "rn" to nearest even, "rna" to nearest away, "rz" towards zero, "rp" up, "rm" down.
        saturate: `.satfinite`: what is too large, and infinities, become the largest finite number. Without it an
            overflow
            becomes infinity where the format has one, NaN in formats with a NaN only, and the largest number otherwise.

    NaN becomes the canonical NaN (all bits but the sign); in formats without NaN, the positive largest number, as PTX
    says for `.satfinite`.
    """
    fmt = FORMATS[name]
    x = np.asarray(values, np.float64)
    magnitudes = _magnitudes(name)
    largest = len(magnitudes) - 1
    nan, negative = np.isnan(x), np.signbit(x)
    absolute = np.where(np.isfinite(x), np.abs(x), 0.0)
    if not fmt.signed:
        absolute = np.where(negative, 0.0, absolute)
    mode: Rounding = rounding
    if rounding in ("rp", "rm"):  # directed rounding of a magnitude depends on the sign
        away = negative == (rounding == "rm")
        grid = np.where(away, _round_to_grid(fmt, absolute, "rp"), _round_to_grid(fmt, absolute, "rz"))
    else:
        grid = _round_to_grid(fmt, absolute, mode)
    code = np.searchsorted(magnitudes, np.minimum(grid, magnitudes[-1])).astype(np.int64)
    over = (grid > magnitudes[-1]) | np.isinf(x) & (fmt.signed | ~negative)
    nan_code = (1 << (fmt.exponent + fmt.mantissa)) - 1 if fmt.specials != "none" else largest
    if saturate:
        code = np.where(over, largest, code)
    else:
        beyond = {"ieee": ((1 << fmt.exponent) - 1) << fmt.mantissa, "nan": nan_code, "none": largest}[fmt.specials]
        code = np.where(over, beyond, code)
    code = np.where(negative & ~nan, code | fmt.sign, code) if fmt.signed else code
    return np.where(nan, nan_code, code).astype(np.uint16)


def round_tf32(bits: Array, *, rounding: Rounding = "rna") -> npt.NDArray[np.uint32]:
    """f32 codes rounded to tf32 (10 bits of significand, the other 13 zero): `cvt.{rna,rn,rz}.tf32.f32`."""
    b = np.asarray(bits, np.uint32).astype(np.uint64)
    finite = (b & 0x7F800000) != 0x7F800000
    half: Array = np.uint64(0x1000) * np.ones_like(b)
    if rounding == "rz":
        half = np.zeros_like(b)
    elif rounding == "rn":
        half = np.uint64(0xFFF) + (b >> np.uint64(13) & np.uint64(1))
    return np.where(finite, (b + half) & np.uint64(0xFFFFE000), b).astype(np.uint32)


@cache
def _pairs(name: str) -> npt.NDArray[np.float64]:
    """For a 4-bit format: the two values of every byte, the low nibble first, float64 (256, 2)."""
    values = table(name)
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], -1)


def unpack_nibbles(name: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Values of packed 4-bit codes: uint8 (..., n) to float64 (..., 2 n), the low nibble first."""
    return _pairs(name)[data].reshape(*data.shape[:-1], -1)


def unpack_six(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Packed 6-bit codes: uint8 (..., 3 n) to uint8 (..., 4 n), little endian."""
    triple = data.reshape(*data.shape[:-1], -1, 3).astype(np.uint32)
    word = triple[..., 0] | triple[..., 1] << 8 | triple[..., 2] << 16
    codes = np.stack([word >> (6 * i) & 63 for i in range(4)], -1)
    return codes.reshape(*data.shape[:-1], -1).astype(np.uint8)


ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "s8": 8, "u8": 8} | {
    n: f.bits for n, f in FORMATS.items()
}


def decode_bytes(name: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Values of a dense row of elements in memory order: uint8 (..., n) to float64 (..., 8 n / bits).

    Args:
        name: A format of `FORMATS`, "tf32", "f32", "s8" or "u8"; sub-byte formats are packed without gaps.
        data: The bytes; the last axis must be contiguous in memory.
    """
    if name == "f16":
        return data.view(np.float16).astype(np.float64)
    if name == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if name in ("tf32", "f32"):
        return decode(name, data.view(np.uint32))
    if name in ("s8", "u8"):
        return data.view(np.int8 if name == "s8" else np.uint8).astype(np.float64)
    if name == "e2m1":
        return unpack_nibbles(name, data)
    if name in ("e2m3", "e3m2"):
        return decode(name, unpack_six(data))
    return table(name)[data]


def decode_padded(name: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Values of 16-byte chunks of 16 elements, as kinds f8f6f4 and mxf8f6f4 read shared memory.

    8-bit formats fill the chunk; 6-bit ones its first 12 bytes, 4-bit ones its first 8, the rest is padding (PTX ISA
    9.7.16.5.2, U6_ALIGN16B and U4_ALIGN16B of the tensor map).

    Args:
        name: A format of at most 8 bits.
        data: uint8 (..., 16 n).

    Returns:
        float64 (..., 16 n).
    """
    bits = ELEMENT_BITS[name]
    if bits == 8:
        return decode_bytes(name, data)
    chunks = data.reshape(*data.shape[:-1], -1, 16)[..., : 2 * bits]
    return decode_bytes(name, np.ascontiguousarray(chunks)).reshape(*data.shape[:-1], -1)
