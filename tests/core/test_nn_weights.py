"""A weight of a layer: back bit for bit from its prepared form, and its state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megamoe.errors import ArgumentError
from megamoe.nn.weights import Weight, given, keep
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize, pack_nibbles


def random(shape: tuple[int, ...], *, parts: int | None = None, layout: str = "linear", seed: int = 1) -> NVFP4Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = pack_nibbles(torch.randint(16, shape, dtype=torch.uint8, generator=generator))
    scales = torch.randint(1, 0x7F, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8, generator=generator)
    dec = torch.rand(shape[0] if parts is None else (shape[0], parts), generator=generator)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), dec).with_layout(layout)


def assert_same(got: NVFP4Tensor, want: NVFP4Tensor) -> None:
    assert got.scale_layout == want.scale_layout
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales.view(torch.uint8), want.scales.view(torch.uint8))
    assert torch.equal(got.global_scale_dec, want.global_scale_dec)


@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize(("order", "parts"), [(None, None), ("gate_up", 2), ("up_gate", 2), ("up_gate", None)])
def test_prepared_and_back(layout: str, order: str | None, parts: int | None) -> None:
    tensor = random((3, 96, 80), parts=parts, layout=layout)
    weight = Weight(tensor, order)
    assert weight.order == order
    assert_same(weight.given, tensor)
    named = weight.as_if_prepared
    weight.prepare()
    assert (named.scale_layout, named.shape) == (weight.scale_layout, weight.operand.shape)
    assert weight.shape == tensor.shape
    assert weight.order == (order and "interleaved")
    assert_same(weight.given, tensor)
    if order is None:
        assert torch.equal(dequantize(weight.operand), dequantize(tensor))


def test_state_of_a_layer() -> None:
    def layer(seed: int) -> nn.Module:
        module = nn.Module()
        keep(module, "w", random((2, 64, 48), seed=seed), "gate_up")
        keep(module, "plain", torch.full((3,), float(seed)))
        return module

    source, target = layer(1), layer(2)
    source.w.prepare()  # type: ignore[union-attr, operator]
    target.load_state_dict(source.state_dict())
    for name in ("w", "plain"):
        got, want = given(target, name), given(source, name)
        if isinstance(got, NVFP4Tensor):
            assert isinstance(want, NVFP4Tensor)
            assert_same(got, want)
        else:
            assert torch.equal(got, want)  # type: ignore[arg-type]
    other = nn.Module()
    keep(other, "w", random((2, 32, 48)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(source.state_dict(), strict=False)


@pytest.mark.parametrize(("order", "rows", "k"), [("gate_up", 96, 80), ("up_gate", 64, 128), (None, 40, 48)])
def test_prepared_weights_live_in_a_safetensors_file(tmp_path: Path, order: str | None, rows: int, k: int) -> None:
    """Padded or not: what comes back is the prepared form, and from it the weights as they were given."""

    def layer(seed: int) -> nn.Module:
        module = nn.Module()
        keep(module, "w", random((2, rows, k), parts=2 if order else None, seed=seed), order)
        return module

    source, target = layer(1), layer(2)
    want = given(source, "w")
    source.w.prepare()  # type: ignore[union-attr, operator]
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    target.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert isinstance(source.w, Weight)
    assert isinstance(target.w, Weight)
    assert target.w.prepared
    assert target.w.order == source.w.order
    assert_same(target.w.operand, source.w.operand)
    got = given(target, "w")
    assert isinstance(got, NVFP4Tensor)
    assert isinstance(want, NVFP4Tensor)
    assert_same(got, want)


def test_what_has_no_prepared_form_is_refused() -> None:
    tensor = random((2, 64, 48))
    tensor.scales.view(torch.uint8)[0, 0, 0] = 0x7F
    with pytest.raises(ArgumentError, match="scales"):
        Weight(tensor).prepare()


def test_prepared_weights_of_an_older_layout_are_refused() -> None:
    """Their bytes would be read as other weights; such a state said no version."""

    def with_state(weight: Weight, **changes: object) -> dict[str, torch.Tensor]:
        state = weight.state_dict()
        known = {**json.loads(bytes(state["_extra_state"].tolist())), **changes}
        if known["version"] is None:
            del known["version"]
        return {**state, "_extra_state": torch.tensor(list(json.dumps(known).encode()), dtype=torch.uint8)}

    source, target = Weight(random((2, 64, 48))), Weight(random((2, 64, 48), seed=2))
    target.load_state_dict(with_state(source, version=None))
    kept = target.given
    source.prepare()
    for prepared in (source, Weight(source.operand)):
        for version in (None, 1):
            with pytest.raises(ArgumentError, match="version 1 of the hopper layout, expected version 2"):
                target.load_state_dict(with_state(prepared, version=version))
            assert_same(target.given, kept)
