"""Orders of gate and up rows."""

from __future__ import annotations

import pytest
import torch

from megamoe.errors import ArgumentError
from megamoe.numerics.gate_up import deinterleave, interleave
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize


def weights(parts: tuple[int, ...] = (2,), layout: str = "linear") -> NVFP4Tensor:
    """(3, 64, 32), 32 gate rows before 32 up rows."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (3, 64, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0x30, 0x40, (3, 64, 2), generator=generator, dtype=torch.uint8)
    dec = 1 + torch.rand((3, *parts), generator=generator)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), dec).with_layout(layout)


@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_eight_gates_then_their_ups(layout: str) -> None:
    plain = weights(layout=layout)
    mixed = interleave(plain, "gate_up")
    assert mixed.scale_layout == layout
    before, after = dequantize(plain, apply_global=False), dequantize(mixed, apply_global=False)
    for j in range(4):
        assert torch.equal(after[:, 16 * j : 16 * j + 8], before[:, 8 * j : 8 * j + 8])
        assert torch.equal(after[:, 16 * j + 8 : 16 * j + 16], before[:, 32 + 8 * j : 32 + 8 * j + 8])
    assert torch.equal(mixed.global_scale_dec, plain.global_scale_dec)


def test_up_rows_first_come_to_the_same() -> None:
    plain = weights()
    swapped = NVFP4Tensor(
        plain.codes.roll(32, dims=1),
        plain.scales.view(torch.uint8).roll(32, dims=1).view(torch.float8_e4m3fn),
        plain.global_scale_dec.flip(-1),
    )
    one, other = interleave(plain, "gate_up"), interleave(swapped, "up_gate")
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))
    assert torch.equal(one.global_scale_dec, other.global_scale_dec)


@pytest.mark.parametrize("parts", [(), (2,)])
@pytest.mark.parametrize("layout", ["linear", "128x4", "hopper"])
def test_the_way_back(parts: tuple[int, ...], layout: str) -> None:
    plain = weights(parts)
    back = deinterleave(interleave(plain, "gate_up").with_layout(layout)).with_layout("linear")
    assert torch.equal(back.codes, plain.codes)
    assert torch.equal(back.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    assert torch.equal(back.global_scale_dec, plain.global_scale_dec)


def test_wrong_orders_and_rows_are_named() -> None:
    with pytest.raises(ArgumentError, match="order"):
        interleave(weights(), "interleaved")
    odd = weights()
    odd = NVFP4Tensor(odd.codes[:, :48].contiguous(), odd.scales[:, :48].contiguous(), odd.global_scale_dec)
    with pytest.raises(ArgumentError, match="48 rows"):
        interleave(odd, "gate_up")
