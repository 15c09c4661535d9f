"""NVFP4 matrices as ModelOpt and compressed-tensors store them: the bytes stay, a divisor is turned over once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError, UnknownNameError
from megamoe.nn.experts import Experts
from megamoe.nn.stored import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Convention,
    activation_amax,
    convention_named,
    decode_scale,
    join_gate_up,
    matrix,
    stack,
)
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize, global_scale_enc, quantize

BOTH = pytest.mark.parametrize("convention", [MODELOPT, COMPRESSED_TENSORS], ids=lambda c: c.name)


def values(rows: int = 32, k: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def stored(x: Tensor, convention: Convention) -> dict[str, Tensor]:
    """What a file holds: quantised by the format's own arithmetic, the global scale computed as each of them does."""
    amax = x.abs().max()
    q = quantize(x, global_scale_enc(amax))
    number = 2688 / amax.reshape(1) if convention.encodes else amax / 2688
    return {convention.codes: q.codes, convention.scales: q.scales, convention.global_scale: number}


@BOTH
def test_codes_and_scales_are_the_stored_bytes(convention: Convention) -> None:
    x = values()
    fields = stored(x, convention)
    got = matrix(fields, convention, (32, 48))
    assert got.codes is fields[convention.codes]
    assert got.scales is fields[convention.scales]
    assert got.global_scale_dec.shape == ()
    assert (dequantize(got) - x).norm() / x.norm() < 0.12


def test_the_decode_scale_is_the_stored_number_or_its_reciprocal() -> None:
    numbers = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3e-3 + 1e-5
    for number in numbers:
        assert torch.equal(decode_scale(number, MODELOPT), number)
        turned = decode_scale(number[None], COMPRESSED_TENSORS)
        assert turned.shape == ()
        assert float(turned) == float((1 / number.double()).float()), "rounded once"


def test_a_converted_checkpoint_means_the_same_but_for_one_rounding() -> None:
    """ModelOpt to compressed-tensors is a renaming and a reciprocal, which fp32 cannot always undo."""
    fields = stored(values(), MODELOPT)
    renamed = dict(zip(COMPRESSED_TENSORS.fields[:3], fields.values(), strict=True))
    renamed[COMPRESSED_TENSORS.global_scale] = 1 / renamed[COMPRESSED_TENSORS.global_scale]
    one, other = matrix(fields, MODELOPT), matrix(renamed, COMPRESSED_TENSORS)
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.global_scale_dec, other.global_scale_dec, rtol=2**-23, atol=0)


def test_taking_one_convention_for_the_other_does_not_pass_silently() -> None:
    fields = stored(values(), COMPRESSED_TENSORS)
    with pytest.raises(ArgumentError, match="weight: got nothing, expected a tensor: modelopt stores one of that name"):
        matrix(fields, MODELOPT)


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no scales": (lambda f: f.pop("weight_scale"), "weight_scale: got nothing"),  # type: ignore[dict-item]
    "codes of another dtype": (lambda f: f.update(weight=f["weight"].int()), "weight: got int32, expected uint8"),
    "another size": (lambda f: f.update(weight=f["weight"][:16]), r"weight: got shape (16, 24), expected (32, 24)"),
    "scales in bytes": (
        lambda f: f.update(weight_scale=f["weight_scale"].view(torch.uint8)),
        "weight_scale: got uint8, expected float8_e4m3fn",
    ),
    "scales of another size": (
        lambda f: f.update(weight_scale=f["weight_scale"].view(torch.uint8)[:, :2].clone().view(torch.float8_e4m3fn)),
        "weight_scale: got shape (32, 2), expected (32, 3)",
    ),
    "two global scales": (lambda f: f.update(weight_scale_2=torch.ones(2)), "weight_scale_2: got torch.float32 (2,)"),
    "half a global scale": (lambda f: f.update(weight_scale_2=torch.ones(()).half()), "weight_scale_2: got torch.fl"),
    "a negative one": (lambda f: f.update(weight_scale_2=torch.tensor(-1.0)), "weight_scale_2: got -1.0, expected a p"),
    "NaN": (lambda f: f.update(weight_scale_2=torch.tensor(torch.nan)), "weight_scale_2: got nan, expected a positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_its_field(name: str) -> None:
    damage, message = BAD[name]
    fields = stored(values(), MODELOPT)
    damage(fields)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        matrix(fields, MODELOPT, (32, 48))


@BOTH
def test_the_largest_activation(convention: Convention) -> None:
    amaxes = torch.tensor([3.0, 7.0, 5.0])
    numbers = 2688 / amaxes if convention.encodes else amaxes / 2688
    assert activation_amax(list(numbers), convention) == pytest.approx(7.0)
    assert activation_amax([], convention) is None


def test_an_unknown_convention() -> None:
    assert convention_named("modelopt") is MODELOPT
    with pytest.raises(UnknownNameError, match="did you mean 'compressed-tensors'"):
        convention_named("compressed_tensors")


def projections(convention: Convention, order: str) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """gate_up (4, 64, 48) and down (4, 48, 32) of four experts; up's values are a hundred times smaller."""
    gate, up, down = (
        stack(matrix(stored(size * values(*shape, seed=10 * part + e), convention), convention) for e in range(4))
        for part, (shape, size) in enumerate((((32, 48), 1.0), ((32, 48), 0.01), ((48, 32), 1.0)))
    )
    return join_gate_up(gate, up, order), down


@BOTH
def test_a_layer_is_the_same_in_either_order_and_comes_back_from_prepared(convention: Convention) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 48, generator=generator).bfloat16()
    indices = torch.rand(5, 4, generator=generator).topk(2).indices.int()
    weights = torch.rand(5, 2, generator=generator)
    outs = []
    for order in ("gate_up", "up_gate"):
        gate_up, down = projections(convention, order)
        assert gate_up.global_scale_dec.shape == (4, 2)
        layer = Experts(gate_up, down, limit=10.0, activation_scale_enc=torch.tensor(2688.0), order=order)
        outs.append(layer(x, indices, weights))
        back = layer.prepare(always=True).weight("gate_up")
        assert isinstance(back, NVFP4Tensor)
        for name in ("codes", "scales", "global_scale_dec"):
            one, other = getattr(gate_up, name), getattr(back, name)
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(*outs)
    assert outs[0].abs().max() > 0


def test_gate_and_up_must_be_alike() -> None:
    gate_up, down = projections(MODELOPT, "gate_up")
    with pytest.raises(ArgumentError, match=r"up: got \(4, 48, 32\) .* expected \(4, 64, 48\)"):
        join_gate_up(gate_up, down)
    with pytest.raises(ArgumentError, match="order: got 'w13', expected 'gate_up' or 'up_gate'"):
        join_gate_up(down, down, "w13")
    with pytest.raises(ArgumentError, match="up.scale_layout: got '128x4', expected 'linear'"):
        join_gate_up(down, down.with_layout("128x4"))


def test_a_stack_is_of_matrices_that_are_alike() -> None:
    one, other = (matrix(stored(values(rows), MODELOPT), MODELOPT) for rows in (32, 48))
    with pytest.raises(ArgumentError, match="matrices: got none"):
        stack([])
    with pytest.raises(ArgumentError, match=r"matrices\[1\].codes: got shape \(48, 24\), expected \(32, 24\)"):
        stack([one, other])
    with pytest.raises(ArgumentError, match=r"matrices\[1\].scale_layout: got '128x4'"):
        stack([one, one.with_layout("128x4")])
