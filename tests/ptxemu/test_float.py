"""Floating-point instructions and conversions against numpy, exact rationals and the numerics of the formats."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.ptxemu.micro import apply

F32 = NDArray[np.float32]
_BITS = [
    *(0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F800001, 0x7F7FFFFF, 0xFF7FFFFF),
    *(0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0x33800000, 0x4B000001, 0x4B800000, 0x477FE000),
    *(
        0x477FF000,
        0x38800000,
        0x33000000,
        0x33000001,
        0x3F000000,
        0x40490FDB,
        0x5F000000,
        0xCF000000,
        0x4F000000,
        0x42FE0000,
    ),
]
EDGES: F32 = np.array(_BITS, np.uint32).view(np.float32)
NAN = 0x7FFFFFFF


def words(values: F32) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def spread(seed: int, count: int = 512) -> F32:
    """The edges and bit patterns over the whole range."""
    random = np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([EDGES, random])


def pairs() -> tuple[F32, F32]:
    a, b = zip(*itertools.product(EDGES, EDGES), strict=True)
    return np.concatenate([np.array(a, np.float32), spread(1)]), np.concatenate([np.array(b, np.float32), spread(2)])


def canonical(values: F32) -> NDArray[np.uint32]:
    return np.where(np.isnan(values), np.uint32(NAN), words(values))


def flush(values: F32) -> F32:
    return np.where(np.abs(values) < 2.0**-126, np.copysign(np.float32(0), values), values)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@np.errstate(all="ignore")
def test_arithmetic(name: str) -> None:
    oracle = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
    a, b = pairs()
    got = apply(f"{name}.rn.f32 d, a, b", "b32", ("b32", words(a)), ("b32", words(b)))
    np.testing.assert_array_equal(got, canonical(oracle(a, b)))
    flushed = apply(f"{name}.rn.ftz.f32 d, a, b", "b32", ("b32", words(a)), ("b32", words(b)))
    np.testing.assert_array_equal(flushed, canonical(flush(oracle(flush(a), flush(b)))))


def exact(value: Fraction, mode: str) -> float:
    """A rational rounded to f32 in a direction; within the range of normal numbers."""
    if not value:
        return 0.0
    exponent = math.frexp(abs(value.numerator) / value.denominator)[1] - 24
    unit = Fraction(2) ** exponent
    scaled = value / unit
    down = math.floor(scaled)
    up = down + (scaled != down)
    chosen = {"rm": down, "rp": up, "rz": down if value > 0 else up}[mode]
    return float(chosen * unit)


EXACT: dict[str, Callable[[Fraction, Fraction, Fraction], Fraction]] = {
    "add": lambda x, y, z: x + y,
    "mul": lambda x, y, z: x * y,
    "fma": lambda x, y, z: x * y + z,
}


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    rng = np.random.default_rng(3)
    a, b, c = (rng.normal(size=400).astype(np.float32) for _ in range(3))
    for name, oracle in EXACT.items():
        sources = "a, b, c" if name == "fma" else "a, b"
        got = apply(f"{name}.{mode}.f32 d, {sources}", "b32", *(("b32", words(v)) for v in (a, b, c))).view(np.float32)
        for x, y, z, found in zip(a, b, c, got, strict=True):
            assert float(found) == exact(oracle(Fraction(float(x)), Fraction(float(y)), Fraction(float(z))), mode)


@np.errstate(all="ignore")
def test_fma_rounds_once() -> None:
    libm = ctypes.CDLL("libm.so.6")
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b = pairs()
    c = np.resize(spread(5), a.size)
    oracle = np.array([libm.fmaf(float(x), float(y), float(z)) for x, y, z in zip(a, b, c, strict=True)], np.float32)
    operands = [("b32", words(v)) for v in (a, b, c)]
    np.testing.assert_array_equal(apply("fma.rn.f32 d, a, b, c", "b32", *operands), canonical(oracle))
    packed = (
        "mov.b64 %d4, {a, a}; mov.b64 %d5, {b, b}; mov.b64 %d6, {c, c}; "
        "fma.rn.f32x2 %d7, %d4, %d5, %d6; mov.b64 {_, d}, %d7"
    )
    np.testing.assert_array_equal(apply(packed, "b32", *operands), canonical(oracle))


@np.errstate(all="ignore")
def test_saturation() -> None:
    a, b = pairs()
    got = apply("add.rn.sat.f32 d, a, b", "b32", ("b32", words(a)), ("b32", words(b))).view(np.float32)
    total = a + b
    np.testing.assert_array_equal(got, np.where(np.isnan(total), 0, np.clip(total, 0, 1)))
    got = apply("cvt.sat.f32.f32 d, a", "b32", ("b32", words(a))).view(np.float32)
    np.testing.assert_array_equal(got, np.where(np.isnan(a), 0, np.clip(a, 0, 1)))


def choose(a: float, b: float, most: bool, propagate: bool) -> int:
    """The bits of min or max of two f32, as the PTX ISA defines them."""
    if math.isnan(a) or math.isnan(b):
        if propagate or (math.isnan(a) and math.isnan(b)):
            return NAN
        return int(words(np.array([b if math.isnan(a) else a], np.float32))[0])
    key = (lambda x: (x, math.copysign(1, x)))  # fmt: skip  # noqa: E731
    return int(words(np.array([(max if most else min)(a, b, key=key)], np.float32))[0])


@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
def test_min_and_max(name: str) -> None:
    a, b = pairs()
    got = apply(f"{name}.f32 d, a, b", "b32", ("b32", words(a)), ("b32", words(b)))
    expected = [choose(float(x), float(y), name.startswith("max"), "NaN" in name) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


def test_signs_and_special_values() -> None:
    a, b = pairs()
    x, y = words(a), words(b)
    for name, bits in (("neg", x ^ np.uint32(1 << 31)), ("abs", x & np.uint32((1 << 31) - 1))):
        expected = np.where(np.isnan(a), np.uint32(0x7FFFFFFF), bits)
        np.testing.assert_array_equal(apply(f"{name}.f32 d, a", "b32", ("b32", x)), expected)
    got = apply("copysign.f32 d, a, b", "b32", ("b32", x), ("b32", y))
    np.testing.assert_array_equal(got, x & np.uint32(1 << 31) | y & np.uint32((1 << 31) - 1))
    for name, oracle in {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}.items():
        got = apply(f"testp.{name}.f32 %p2, a; selp.b32 d, 1, 0, %p2", "b32", ("b32", x))
        np.testing.assert_array_equal(got, oracle(a).astype(np.uint32))


ORDERED: dict[str, Callable[[F32, F32], NDArray[np.bool_]]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_comparisons(name: str) -> None:
    a, b = pairs()
    nan = np.isnan(a) | np.isnan(b)
    for suffix, expected in {"": ORDERED[name](a, b), "u": ORDERED[name](a, b) | nan}.items():
        got = apply(
            f"setp.{name}{suffix}.f32 %p2, a, b; selp.b32 d, 1, 0, %p2", "b32", ("b32", words(a)), ("b32", words(b))
        )
        np.testing.assert_array_equal(got.astype(bool), expected)
    got = apply("setp.nan.f32 %p2, a, b; selp.b32 d, 1, 0, %p2", "b32", ("b32", words(a)), ("b32", words(b)))
    np.testing.assert_array_equal(got.astype(bool), nan)


@pytest.mark.parametrize("name", ["ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"])
@np.errstate(all="ignore")
def test_approximate_functions_are_within_their_bounds(name: str) -> None:
    """One unit in the last place of the correctly rounded result is inside what the PTX ISA allows for all of them."""
    x = np.concatenate([np.random.default_rng(4).uniform(-20, 20, 500).astype(np.float32), EDGES])
    x = x[np.isfinite(x)] if name in {"sin", "cos"} else x
    oracle: dict[str, Callable[[Any], Any]] = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "rsqrt": lambda v: 1 / np.sqrt(v),
    }
    function = oracle.get(name) or getattr(np, name)
    got = apply(f"{name}.approx.f32 d, a", "b32", ("b32", words(x))).view(np.float32)
    expected = function(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite & ~np.isnan(expected)], expected[~finite & ~np.isnan(expected)])
    assert np.all(np.abs(got[finite] - expected[finite]) <= np.abs(np.spacing(expected[finite])))


@np.errstate(all="ignore")
def test_f64() -> None:
    rng = np.random.default_rng(6)
    a, b, c = (rng.normal(size=300) * 10.0 ** rng.integers(-200, 200, 300) for _ in range(3))
    for name, oracle in {"add": np.add, "mul": np.multiply, "div": np.divide}.items():
        got = apply(f"{name}.rn.f64 d, a, b", "b64", ("b64", a.view(np.uint64)), ("b64", b.view(np.uint64)))
        np.testing.assert_array_equal(got, oracle(a, b).view(np.uint64))
    got = apply("cvt.rn.f32.f64 d, a", "b32", ("b64", a.view(np.uint64)))
    np.testing.assert_array_equal(got, words(a.astype(np.float32)))
    got = apply("cvt.f64.f32 d, a", "b64", ("b32", words(EDGES[np.isfinite(EDGES)])))
    np.testing.assert_array_equal(got.view(np.float64), EDGES[np.isfinite(EDGES)].astype(np.float64))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@np.errstate(all="ignore")
def test_mixed_precision(kind: str) -> None:
    dtype = HALVES[kind]
    rng = np.random.default_rng(17)
    a, b = (rng.normal(size=200).astype(dtype) for _ in range(2))
    c = (rng.normal(size=200) * 100).astype(np.float32)
    x, y, z = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)
    half = [("b16", v.view(np.uint16)) for v in (a, b)]
    for text, expected in (
        (f"add.rn.f32.{kind} d, a, b", x + z),
        (f"sub.rn.f32.{kind} d, a, b", x - z),
    ):
        got = apply(text, "b32", half[0], ("b32", words(c)))
        np.testing.assert_array_equal(got, words(expected.astype(np.float32)))
    got = apply(f"fma.rn.f32.{kind} d, a, b, c", "b32", *half, ("b32", words(c)))
    np.testing.assert_array_equal(got, words((x * y + z).astype(np.float32)))


HALVES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", HALVES)
@np.errstate(all="ignore")
def test_half_precision_arithmetic(kind: str) -> None:
    """In double, then rounded once: exact for products and for these sums."""
    dtype = HALVES[kind]
    rng = np.random.default_rng(7)
    edges = np.array(
        [0, 0x8000, 1, 0x03FF, 0x0400, 0x3C00, 0x3F80, 0x7BFF, 0x7F7F, 0x7C00, 0x7F80, 0x7FFF, 0xFC00], np.uint16
    )
    a, b = (np.concatenate([np.resize(edges, 169), rng.integers(0, 1 << 16, 700).astype(np.uint16)]) for _ in range(2))
    a[:169] = np.repeat(edges, 13)
    x, y = a.view(dtype).astype(np.float64), b.view(dtype).astype(np.float64)
    if kind == "bf16":  # keep sums exact in double
        keep = np.isnan(x) | np.isnan(y) | (np.abs(np.frexp(x)[1] - np.frexp(y)[1]) < 40)
        a, b, x, y = a[keep], b[keep], x[keep], y[keep]
    for name, value in {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + x}.items():
        source = "a, b, a" if name == "fma" else "a, b"
        got = apply(f"{name}.rn.{kind} d, {source}", "b16", ("b16", a), ("b16", b))
        expected = value.astype(np.float32).astype(dtype) if name != "fma" and kind == "bf16" else value.astype(dtype)
        if name == "fma" or (kind == "bf16" and name in {"add", "sub"}):  # numpy may round twice on its way to bf16
            expected = np.array([round_to(v, dtype) for v in value], dtype)
        np.testing.assert_array_equal(
            got, np.where(np.isnan(expected.astype(np.float32)), 0x7FFF, expected.view(np.uint16))
        )


def round_to(value: float, dtype: np.dtype[Any]) -> Any:
    """The nearest value of a 16-bit format, ties to even, by exact comparison."""
    if not math.isfinite(value) or value == 0:
        return dtype.type(value)
    guess = int(np.array(value, np.float32).astype(dtype).view(np.uint16))
    codes = [c for c in range(max(guess - 1, 0), guess + 2) if math.isfinite(float(np.uint16(c).view(dtype)))]
    largest = max(abs(float(np.uint16(c).view(dtype))) for c in codes)
    if math.isinf(float(np.uint16(guess).view(dtype))) and abs(value) >= largest:
        return np.uint16(guess).view(dtype)
    return np.uint16(
        min(codes, key=lambda c: (abs(Fraction(float(np.uint16(c).view(dtype))) - Fraction(value)), c & 1))
    ).view(dtype)


INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("kind", INTEGERS)
def test_float_to_integer_saturates(kind: str) -> None:
    x = np.concatenate(
        [
            EDGES,
            np.random.default_rng(8).normal(size=200).astype(np.float32) * 300,
            np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32),
        ]
    )
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    modes: dict[str, Callable[[float], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, oracle in modes.items():
        target = f"b{max(bits, 16)}"
        got = apply(f"cvt.{mode}.{kind}.f32 d, a", target, ("b32", words(x)))
        for value, found in zip(x, got, strict=True):
            if math.isnan(value):
                expected = 1 << 63 if bits == 64 else 0
            else:
                expected = (
                    max(low, min(high, oracle(float(value)))) if math.isfinite(value) else (high if value > 0 else low)
                )
            assert int(found) == expected & ((1 << int(target[1:])) - 1), (mode, value)


def test_integer_to_float_and_between_widths() -> None:
    x = np.array([0, 1, 2**24 + 1, 2**24 + 3, 2**31, 2**32 - 1, 0x7FFFFFFF, 0x80000001], np.uint32)
    np.testing.assert_array_equal(apply("cvt.rn.f32.u32 d, a", "b32", ("b32", x)), words(x.astype(np.float32)))
    np.testing.assert_array_equal(
        apply("cvt.rn.f32.s32 d, a", "b32", ("b32", x)), words(x.view(np.int32).astype(np.float32))
    )
    up = apply("cvt.rp.f32.u32 d, a", "b32", ("b32", x)).view(np.float32)
    assert all(int(f) >= int(v) for f, v in zip(up, x, strict=True))
    np.testing.assert_array_equal(
        apply("cvt.s32.s8 d, a", "b32", ("b32", x)), x.astype(np.int8).astype(np.int32).view(np.uint32)
    )
    np.testing.assert_array_equal(apply("cvt.u64.u16 d, a", "b64", ("b32", x)), x.astype(np.uint16).astype(np.uint64))
    clipped = np.clip(x.view(np.int32), -128, 127).astype(np.int32).view(np.uint32)
    np.testing.assert_array_equal(apply("cvt.sat.s8.s32 d, a", "b32", ("b32", x)), clipped)


@pytest.mark.parametrize("kind", HALVES)
@np.errstate(all="ignore")
def test_f32_to_halves(kind: str) -> None:
    dtype = HALVES[kind]
    a = np.concatenate([spread(9, 2000), np.random.default_rng(10).normal(size=2000).astype(np.float32)])
    b = a[::-1].copy()

    def oracle(v: F32) -> NDArray[np.uint16]:
        return np.where(np.isnan(v), 0x7FFF, v.astype(dtype).view(np.uint16)).astype(np.uint16)

    got = apply(f"cvt.rn.{kind}.f32 d, a", "b16", ("b32", words(a)))
    np.testing.assert_array_equal(got, oracle(a))
    packed = apply(f"cvt.rn.{kind}x2.f32 d, a, b", "b32", ("b32", words(a)), ("b32", words(b)))
    np.testing.assert_array_equal(packed, oracle(a).astype(np.uint32) << 16 | oracle(b))
    codes = np.arange(1 << 16).astype(np.uint16)
    back = apply(f"cvt.f32.{kind} d, a", "b32", ("b16", codes)).view(np.float32)
    np.testing.assert_array_equal(back, codes.view(dtype).astype(np.float32))


SMALL = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


@pytest.mark.parametrize("kind", SMALL)
@np.errstate(all="ignore")
def test_small_formats(kind: str) -> None:
    rng = np.random.default_rng(11)
    values = [
        EDGES,
        rng.normal(size=1500).astype(np.float32) * 4,
        np.arange(-8, 8, 0.125, dtype=np.float32),
        spread(12, 800),
    ]
    a = np.concatenate([*values, np.linspace(-500, 500, 2001, dtype=np.float32)])
    b = a[::-1].copy()

    def oracle(v: F32) -> NDArray[np.uint32]:
        clipped = np.clip(v, -LARGEST[kind], LARGEST[kind])
        codes = np.where(np.isnan(v), 0, clipped).astype(SMALL[kind]).view(np.uint8)
        return np.where(np.isnan(v), 0x7 if kind == "e2m1" else 0x7F, codes).astype(np.uint32)

    width = 4 if kind == "e2m1" else 8
    if kind == "e2m1":
        text = "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, a, b; cvt.u16.u8 d, t; }"
    else:
        text = f"cvt.rn.satfinite.{kind}x2.f32 d, a, b"
    got = apply(text, "b16", ("b32", words(a)), ("b32", words(b)))
    np.testing.assert_array_equal(got, oracle(a) << width | oracle(b))

    codes = np.arange(1 << 2 * width).astype(np.uint16)
    back = (
        "{ .reg .b8 t; cvt.u8.u16 t, a; cvt.rn.f16x2.e2m1x2 d, t; }"
        if kind == "e2m1"
        else f"cvt.rn.f16x2.{kind}x2 d, a"
    )
    halves = apply(back, "b32", ("b16", codes))
    for shift, found in ((0, halves & 0xFFFF), (width, halves >> 16)):
        expected = (codes >> shift & ((1 << width) - 1)).astype(np.uint8).view(SMALL[kind]).astype(np.float16)
        np.testing.assert_array_equal(found.astype(np.uint16).view(np.float16), expected)


def test_powers_of_two() -> None:
    """ue8m0: the next power of two in the direction asked for."""
    x = np.array([1, 1.5, 2, 3, 0.75, 2.0**-126, 2.0**-127, 1e-44, 0, 2.0**127, 3e38, np.inf, np.nan], np.float32)
    low = apply("cvt.rz.satfinite.ue8m0x2.f32 d, a, a", "b16", ("b32", words(x))) & 0xFF
    np.testing.assert_array_equal(low, [127, 127, 128, 128, 126, 1, 0, 0, 0, 254, 254, 254, 255])
    high = apply("cvt.rp.satfinite.ue8m0x2.f32 d, a, a", "b16", ("b32", words(x))) >> 8
    np.testing.assert_array_equal(high, [127, 128, 128, 129, 127, 1, 0, 0, 0, 254, 254, 254, 255])
    codes = np.arange(256).astype(np.uint16)
    got = apply("cvt.rn.bf16x2.ue8m0x2 d, a", "b32", ("b16", codes)) & 0xFFFF
    expected = codes.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal((got.astype(np.uint32) << 16).view(np.float32), expected)


def test_tf32() -> None:
    x = np.concatenate([EDGES[np.isfinite(EDGES)], spread(13)[:300]])
    x = x[np.isfinite(x) & (np.abs(x) < 3e38)]
    got = apply("cvt.rna.tf32.f32 d, a", "b32", ("b32", words(x)))
    np.testing.assert_array_equal(got, (words(x) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
