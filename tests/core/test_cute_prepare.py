"""The kernel that prepares weights, in the PTX emulator: the bytes that plain torch makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe import emulation
from megamoe.cute import prepare
from megamoe.errors import ArgumentError
from megamoe.model import Arch
from megamoe.numerics.gate_up import interleave
from megamoe.numerics.nvfp4 import NVFP4Tensor
from tests.core.test_nn_weights import assert_same, random


@pytest.fixture(autouse=True)
def fresh() -> Any:
    prepare._launcher.cache_clear()
    yield
    prepare._launcher.cache_clear()


def emulated(weights: NVFP4Tensor, order: str | None = None) -> NVFP4Tensor:
    emulator = emulation.Emulator(Arch.parse("sm_90"))
    out = emulator.run(prepare.prepare, "eager", 0, weights=weights, order=order)
    assert len(emulator.reports) == 1
    assert isinstance(out, NVFP4Tensor)
    return out


@pytest.mark.parametrize("shape", [(2, 64, 128), (3, 40, 96), (1, 65, 288), (128, 160)])
def test_rows_in_place(shape: tuple[int, ...]) -> None:
    weights = random(shape)
    weights.codes[..., 0, :8] = 0x80
    weights.scales.view(torch.uint8)[..., 0, :1] = 0
    assert_same(emulated(weights), weights.with_layout("hopper"))


@pytest.mark.parametrize(("order", "parts"), [("gate_up", 2), ("up_gate", 2), ("up_gate", None)])
@pytest.mark.parametrize("rows", [64, 96])
def test_gate_and_up_interleaved(order: str, parts: int | None, rows: int) -> None:
    weights = random((2, rows, 160), parts=parts)
    assert_same(emulated(weights, order), interleave(weights, order).with_layout("hopper"))


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0x81, 0xFF])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 39, 5), (0, 17, 2)])
def test_scales_without_a_form_are_refused(byte: int, place: tuple[int, int, int]) -> None:
    weights = random((2, 40, 96))
    weights.scales.view(torch.uint8)[place] = byte
    with pytest.raises(ArgumentError, match="scales"):
        emulated(weights)


@pytest.mark.parametrize("nibble", range(16))
def test_codes_under_a_zero_scale_are_refused(nibble: int) -> None:
    weights = random((2, 40, 96))
    block = nibble % 6
    weights.scales.view(torch.uint8)[1, 9 + nibble, block] = 0
    codes = weights.codes[1, 9 + nibble, block * 8 : block * 8 + 8]
    codes.copy_(torch.tensor([0x88, 0x08, 0x80, 0, 0, 0x80, 0x08, 0x88], dtype=torch.uint8))
    assert_same(emulated(weights), weights.with_layout("hopper"))
    codes[nibble // 2] |= 1 << (nibble % 2 * 4 + nibble % 3)
    with pytest.raises(ArgumentError, match="codes"):
        emulated(weights)


def test_what_it_leaves_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random((2, 64, 128))
    assert not prepare.takes(weights), "not on a GPU"
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert prepare.takes(weights)
    assert not prepare.takes(weights.with_layout("128x4"))
    assert not prepare.takes(random((2, 64, 48))), "rows of codes that no 16-byte load can read"
    codes = weights.codes.transpose(0, 1).contiguous().transpose(0, 1)
    assert not prepare.takes(NVFP4Tensor(codes, weights.scales, weights.global_scale_dec))
