"""MXFP4 to NVFP4: exact where it can be, an error or a bounded loss where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics.mxfp4 import dequantize_mxfp4, mxfp4_to_nvfp4
from megamoe.numerics.nvfp4 import dequantize

BIAS = 127


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    """uint8 (..., K/2)."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_exponents(low: int, high: int, *shape: int, seed: int = 1) -> Tensor:
    """E8M0 bytes (..., K/32) of 2^low..2^high, both ends present."""
    k = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    flat = k.reshape(-1)
    flat[0], flat[1] = low, high
    return (k + BIAS).to(torch.uint8)


def test_dequantise_is_the_product_of_both_formats() -> None:
    codes, exponents = random_codes(4, 64), random_exponents(-120, 120, 4, 4)
    nibbles = np.stack((codes.numpy() & 15, codes.numpy() >> 4), -1).reshape(4, 128)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = exponents.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    want = values * np.repeat(scales, 32, -1)
    np.testing.assert_array_equal(dequantize_mxfp4(codes, exponents).numpy(), want)
    as_stored = dequantize_mxfp4(codes.view(torch.int8), exponents.view(torch.float8_e8m0fnu))
    np.testing.assert_array_equal(as_stored.numpy(), want)


@pytest.mark.parametrize("spread", [0, 1, 9, 16, 17])
@pytest.mark.parametrize("top", [-100, -9, 0, 40, 120])
def test_seventeen_binades_convert_without_loss(spread: int, top: int) -> None:
    codes, exponents = random_codes(8, 64), random_exponents(top - spread, top, 8, 4)
    out = mxfp4_to_nvfp4(codes, exponents)
    assert torch.equal(out.codes, codes)
    assert out.global_scale_dec == 2.0 ** (top - 8)
    assert torch.equal(dequantize(out), dequantize_mxfp4(codes, exponents))


def test_the_smallest_scales_convert_without_loss() -> None:
    codes, exponents = random_codes(8, 64), random_exponents(-127, -118, 8, 4)
    out = mxfp4_to_nvfp4(codes, exponents)
    assert out.global_scale_dec == 2.0**-126  # not below, where fp32 turns subnormal and its inverse infinite
    assert torch.equal(dequantize(out), dequantize_mxfp4(codes, exponents))


def test_eighteen_binades_are_refused_by_name() -> None:
    codes, exponents = random_codes(8, 64), random_exponents(-18, 0, 8, 4)
    with pytest.raises(ArgumentError, match="18 binades below") as caught:
        mxfp4_to_nvfp4(codes, exponents)
    assert caught.value.argument == "exponents"


@pytest.mark.parametrize("spread", [18, 24, 60, 180])
def test_the_lossy_option_moves_only_what_lies_below(spread: int) -> None:
    codes, exponents = random_codes(32, 128), random_exponents(60 - spread, 60, 32, 8)
    out = mxfp4_to_nvfp4(codes, exponents, lossy=True)
    want, got = dequantize_mxfp4(codes, exponents), dequantize(out)
    below = (exponents.int() - BIAS < 60 - 17).repeat_interleave(32, -1)
    assert torch.equal(got[~below], want[~below])
    # a quarter, half the smallest step of E2M1, times the smallest scale 2^-9
    assert (got - want)[below].abs().max() <= 2.0**-11 * out.global_scale_dec
    assert (got != want)[below].any()


def test_blocks_of_zeros_do_not_count() -> None:
    codes, exponents = random_codes(8, 64), random_exponents(-3, 0, 8, 4)
    codes[0, :16], exponents[0, 0] = 0, 0  # how checkpoints mark it
    codes[1, 16:32], exponents[1, 1] = 0x80, 254  # negative zeros under a huge scale
    out = mxfp4_to_nvfp4(codes, exponents)
    assert out.global_scale_dec == 2.0**-8
    assert torch.equal(dequantize(out), dequantize_mxfp4(codes, exponents))
    assert out.scales.float()[0, :2].eq(0).all() and out.scales.float()[1, 2:4].eq(0).all()


def test_a_tensor_of_zeros_converts() -> None:
    out = mxfp4_to_nvfp4(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8))
    assert out.global_scale_dec == 1 and not dequantize(out).any()


def test_each_expert_and_part_has_its_own_scale() -> None:
    codes = random_codes(3, 8, 64)
    tops = torch.tensor([[0, -30], [5, 5], [-60, 50]])
    exponents = random_exponents(-10, 0, 3, 8, 4).int() + tops.repeat_interleave(4, -1)[..., None]
    exponents[:, ::4, 0] = BIAS + tops  # the largest of each part is there
    out = mxfp4_to_nvfp4(codes, exponents.to(torch.uint8), parts=2)
    assert torch.equal(out.global_scale_dec, (tops - 8).float().exp2())
    assert torch.equal(dequantize(out), dequantize_mxfp4(codes, exponents.to(torch.uint8)))
    assert mxfp4_to_nvfp4(codes[1:2], exponents[1:2].to(torch.uint8)).global_scale_dec.shape == (1,)


def test_int8_codes_and_e8m0_exponents_are_taken_as_stored() -> None:
    codes, exponents = random_codes(8, 64), random_exponents(-3, 0, 8, 4)
    out = mxfp4_to_nvfp4(codes.view(torch.int8), exponents.view(torch.float8_e8m0fnu))
    assert out.codes.dtype == torch.uint8 and torch.equal(out.codes, codes)


def test_no_rows_convert() -> None:
    out = mxfp4_to_nvfp4(torch.empty(0, 32, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.uint8))
    assert out.shape == (0, 64) and out.global_scale_dec == 1


CODES, EXPONENTS = random_codes(4, 32), random_exponents(0, 1, 4, 2)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("codes", lambda: mxfp4_to_nvfp4(CODES.float(), EXPONENTS)),
        ("codes", lambda: mxfp4_to_nvfp4(CODES[:, :24], EXPONENTS)),
        ("codes", lambda: mxfp4_to_nvfp4(CODES[0], EXPONENTS[0])),
        ("exponents", lambda: mxfp4_to_nvfp4(CODES, EXPONENTS.int())),
        ("exponents", lambda: mxfp4_to_nvfp4(CODES, EXPONENTS[:, :1])),
        ("exponents", lambda: mxfp4_to_nvfp4(CODES, torch.full_like(EXPONENTS, 255))),
        ("parts", lambda: mxfp4_to_nvfp4(CODES, EXPONENTS, parts=3)),
        ("parts", lambda: mxfp4_to_nvfp4(CODES, EXPONENTS, parts=0)),
    ],
)
def test_a_wrong_argument_is_named(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument == argument
