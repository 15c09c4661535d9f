"""Upstream's primitives, and what its half-step scheme gets wrong."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics import nvfp4, upstream

# The ways to send the half steps 5, 7, 9, 10, 11 to a magnitude, and where each is wrong: an interval (low, high) with
# its ends, what one rounding gives there and what two give. nvfp4_numerics.md section 2b.
MAPS = {
    "ties to even": ((2, 4, 4, 4, 6), [("(2.5, 2.75)", 3, 2), ("(3.25, 3.5)", 3, 4), ("(5, 5.25]", 6, 4)]),
    "ties up": ((3, 4, 4, 6, 6), [("(2.25, 2.5]", 2, 3), ("(3.25, 3.5)", 3, 4), ("[4.75, 5]", 4, 6)]),
    "floor": ((2, 3, 4, 4, 4), [("(2.5, 2.75)", 3, 2), ("[3.5, 3.75)", 4, 3), ("(5, 5.75)", 6, 4)]),
    "mixed": ((2, 3, 4, 4, 6), [("(2.5, 2.75)", 3, 2), ("[3.5, 3.75)", 4, 3), ("(5, 5.25]", 6, 4)]),
}


def table(targets: tuple[int, ...]) -> Tensor:
    """Magnitude of every half step 0..12 when 5, 7, 9, 10 and 11 go to `targets`."""
    five, seven, nine, ten, eleven = targets
    return torch.tensor([0, 0.5, 1, 1.5, 2, five, 3, seven, 4, nine, ten, eleven, 6])


def half_steps(x: Tensor) -> Tensor:
    return (x.abs() * 2).round().clamp(max=12).to(torch.uint8)


def magnitude(x: Tensor) -> Tensor:
    return nvfp4.decode_e2m1(upstream.quantize_e2m1_nibble(x.abs()))


def inside(interval: str, x: Tensor) -> Tensor:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = x > low if interval[0] == "(" else x >= low
    return above & (x < high if interval[-1] == ")" else x <= high)


def dense_magnitudes() -> Tensor:
    """[0, 7] in steps of 2^-12, and both neighbours of each."""
    grid = torch.arange(7 * 4096 + 1).float() / 4096
    return torch.cat((grid, grid.nextafter(torch.tensor(torch.inf)), grid.nextafter(torch.tensor(0.0))))


def normal_blocks() -> Tensor:
    """Elements of N(0, 1) blocks as they meet the E2M1 rounding, block maximum near 6."""
    x = torch.randn(32768, 16, generator=torch.Generator().manual_seed(11))
    enc = nvfp4.global_scale_enc(nvfp4.amax(x))
    _, o = nvfp4.block_scale(nvfp4.block_amax(x), enc)
    return x * o


@pytest.mark.parametrize("name", MAPS)
def test_a_half_step_map_is_wrong_exactly_in_these_intervals(name: str) -> None:
    targets, intervals = MAPS[name]
    x = dense_magnitudes()
    once, twice = magnitude(x), table(targets)[half_steps(x).long()]
    expected = torch.zeros_like(x, dtype=torch.bool)
    for interval, right, wrong in intervals:
        here = inside(interval, x)
        assert (once[here] == right).all() and (twice[here] == wrong).all(), interval
        expected |= here
    assert torch.equal(once != twice, expected)


@pytest.mark.parametrize(
    ("name", "percent"), [("ties to even", 9.2), ("ties up", 9.7), ("floor", 11.2), ("mixed", 8.8)]
)
def test_a_tenth_of_the_codes_of_normal_blocks_are_wrong(name: str, percent: float) -> None:
    y = normal_blocks()
    wrong = magnitude(y) != table(MAPS[name][0])[half_steps(y).long()]
    # 524288 codes: one standard deviation of the share is 0.04 percent
    assert wrong.float().mean().item() * 100 == pytest.approx(percent, abs=0.25)


def test_half_step_map_is_the_one_with_ties_to_even() -> None:
    steps = torch.arange(13, dtype=torch.uint8)
    index = upstream.half_step_to_e2m1_idx(steps)
    assert index.dtype == torch.uint8
    assert torch.equal(torch.tensor(nvfp4.E2M1_VALUES)[index.long()], table(MAPS["ties to even"][0]))


def test_half_steps_cost_a_third_more_error_than_one_rounding() -> None:
    y = normal_blocks()
    twice = torch.tensor(nvfp4.E2M1_VALUES)[upstream.half_step_to_e2m1_idx(half_steps(y)).long()]
    ratio = (twice - y.abs()).square().mean() / (magnitude(y) - y.abs()).square().mean()
    assert ratio == pytest.approx(1.34, abs=0.03)


def test_a_half_step_out_of_range_is_refused() -> None:
    for bad in (-1, 13):
        with pytest.raises(ArgumentError, match="half_step"):
            upstream.half_step_to_e2m1_idx(torch.tensor([0, bad]))


def test_nibble_rounds_once() -> None:
    x = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).float()
    numbers = x[~x.isnan()]
    want = numbers.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(upstream.quantize_e2m1_nibble(numbers).numpy(), want)
    assert (upstream.quantize_e2m1_nibble(x[x.isnan()]) == 7).all()


def test_e4m3_bytes_survive_the_round_trip() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    number = (byte & 0x7F) != 0x7F
    decoded = upstream.fp8_e4m3_to_float32(byte)
    np.testing.assert_array_equal(decoded.numpy(), byte.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert torch.equal(upstream.fp8_e4m3_from_float32(decoded)[number], byte[number])
    assert (upstream.fp8_e4m3_from_float32(decoded)[~number] == 0x7F).all()


def test_e4m3_saturates() -> None:
    x = torch.tensor([448.0, 464.0, 480.0, torch.inf, -torch.inf])
    assert upstream.fp8_e4m3_from_float32(x).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0xFE]


def test_e4m3_bytes_must_be_bytes() -> None:
    with pytest.raises(ArgumentError, match="uint8"):
        upstream.fp8_e4m3_to_float32(torch.zeros(3))
