"""Formats against torch and ml_dtypes, code by code, and encoders against a search over all codes."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ptxemu.tensor import formats

ORACLES = {
    "f16": (np.uint16, np.float16),
    "bf16": (np.uint16, ml_dtypes.bfloat16),
    "e4m3": (np.uint8, ml_dtypes.float8_e4m3fn),
    "e5m2": (np.uint8, ml_dtypes.float8_e5m2),
    "e2m3": (np.uint8, ml_dtypes.float6_e2m3fn),
    "e3m2": (np.uint8, ml_dtypes.float6_e3m2fn),
    "e2m1": (np.uint8, ml_dtypes.float4_e2m1fn),
    "ue8m0": (np.uint8, ml_dtypes.float8_e8m0fnu),
}


def _codes(name: str) -> np.ndarray:
    return np.arange(1 << formats.FORMATS[name].bits)


@pytest.mark.parametrize("name", ORACLES)
def test_decode_every_code(name: Any) -> None:
    integer, kind = ORACLES[name]
    codes = _codes(name)
    expected = codes.astype(integer).view(kind).astype(np.float64)
    np.testing.assert_array_equal(formats.decode(name, codes), expected)
    assert (np.signbit(formats.decode(name, codes)) == np.signbit(expected))[~np.isnan(expected)].all()


def test_ue4m3_is_e4m3_without_a_sign() -> None:
    codes = np.arange(256)
    np.testing.assert_array_equal(formats.decode("ue4m3", codes), formats.decode("e4m3", codes & 127))


def test_e4m3_and_e5m2_agree_with_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for name, kind in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        expected = codes.view(kind).double().numpy()
        np.testing.assert_array_equal(formats.decode(name, codes.numpy()), expected)


def _samples(rng: np.random.Generator) -> np.ndarray:
    scale = 2.0 ** rng.integers(-30, 20, 4000)
    return np.concatenate([(rng.standard_normal(4000) * scale).astype(np.float32).astype(np.float64), [0.0, -0.0, 1.0]])


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "f16", "bf16"])
def test_encode_to_nearest_is_the_nearest_code_and_even_on_ties(name: Any) -> None:
    """By exhaustive search: no code may be nearer, and of two equally near ones the even one is taken."""
    values = formats.decode(name, _codes(name))
    positive = np.sort(values[np.isfinite(values) & ~np.signbit(values)])
    middles = (positive[1:] + positive[:-1]) / 2
    x = np.concatenate([_samples(np.random.default_rng(1)), middles, -middles, positive, positive[-1:] * 4])
    codes = formats.encode(name, x)
    below = np.clip(np.searchsorted(positive, np.abs(x), side="right") - 1, 0, len(positive) - 1)
    above = np.clip(below + 1, 0, len(positive) - 1)
    down, up = np.abs(x) - positive[below], positive[above] - np.abs(x)
    expected = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    expected = np.where(np.abs(x) >= positive[-1], len(positive) - 1, expected)
    sign = formats.FORMATS[name].sign
    np.testing.assert_array_equal(codes, np.where(np.signbit(x), expected | sign, expected))


@pytest.mark.parametrize(("rounding", "expected"), [("rn", 2.0), ("rz", 2.0), ("rp", 2.25), ("rm", 2.0)])
def test_directed_rounding(rounding: Any, expected: Any) -> None:
    down = {"rn": -2.0, "rz": -2.0, "rp": -2.0, "rm": -2.25}[rounding]
    codes = formats.encode("e4m3", np.array([2.1, -2.1]), rounding=rounding)
    np.testing.assert_array_equal(formats.decode("e4m3", codes), [expected, down])


def test_encode_specials() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1e9])
    np.testing.assert_array_equal(formats.encode("e4m3", x), [0x7F, 0x7E, 0xFE, 0x7E])
    np.testing.assert_array_equal(formats.encode("e4m3", x, saturate=False), [0x7F, 0x7F, 0xFF, 0x7F])
    np.testing.assert_array_equal(formats.encode("e5m2", x, saturate=False), [0x7F, 0x7C, 0xFC, 0x7C])
    np.testing.assert_array_equal(formats.encode("e2m1", x), [7, 7, 15, 7])
    np.testing.assert_array_equal(
        formats.encode("ue8m0", np.array([1.0, 1.5, 0.0, np.nan]), rounding="rp"), [127, 128, 0, 255]
    )
    np.testing.assert_array_equal(
        formats.encode("ue8m0", np.array([1.0, 1.5, 2.0**-127]), rounding="rz"), [127, 127, 0]
    )


def test_round_tf32_is_to_nearest() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal(1000).astype(np.float32)
    for rounding in ("rn", "rna", "rz"):
        got = formats.round_tf32(x.view(np.uint32), rounding=rounding).view(np.float32).astype(np.float64)
        spacing = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 10)
        steps = np.abs(x.astype(np.float64)) / spacing
        expected = {"rn": np.rint(steps), "rna": np.floor(steps + 0.5), "rz": np.floor(steps)}[rounding] * spacing
        np.testing.assert_array_equal(np.abs(got), expected)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3"])
def test_padded_chunks_hold_sixteen_elements(name: Any) -> None:
    rng = np.random.default_rng(3)
    bits = formats.ELEMENT_BITS[name]
    codes = rng.integers(0, 1 << bits, (5, 48))
    chunks = np.full((5, 3, 16), 0xA5, np.uint8)
    for row in range(5):
        for chunk in range(3):
            word = sum(int(c) << bits * i for i, c in enumerate(codes[row, 16 * chunk : 16 * chunk + 16]))
            chunks[row, chunk, : 2 * bits] = list(word.to_bytes(2 * bits, "little"))
    got = formats.decode_padded(name, chunks.reshape(5, 48))
    np.testing.assert_array_equal(got, formats.decode(name, codes))
