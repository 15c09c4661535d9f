"""The fused mhc_quant kernel as far as it goes without a GPU: who owns what, what it refuses, what compiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megamoe.cute import compiler, inspect
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe_stages.mhc_quant import launch, limits, places, sm90, sm100
from megamoe_stages.mhc_quant.cases import CASES, make

SHARED_MEMORY = 227 * 1024  # of a CTA on both architectures
HIDDEN = 2 * places.UNIT  # two warps' worth


def _inputs(**params: Any) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(0), **{"tokens": 3, "hidden": 32, **params})


def _shared_fn(fn: torch.Tensor) -> torch.Tensor:
    """fn (24, 4 * HIDDEN) as a CTA of two warps a team keeps it: (slots, 4)."""
    slots = torch.full((2 * places.UNIT_FN // 4, 4), torch.nan, dtype=fn.dtype)
    for i, lane in itertools.product(range(2 * places.COPIES), range(32)):
        row, stream, dim, slot = places.fn_piece(i, lane)
        assert slots[slot].isnan().all()  # written once
        slots[slot] = fn[row, stream * HIDDEN + dim : stream * HIDDEN + dim + 4]
    assert not slots.isnan().any()
    return slots


def test_operands_are_where_mma_wants_them() -> None:
    """Follows each lane's values of the streams and of fn through `mma.m16n8k8` as PTX lays it out."""
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(places.GROUP, 4, HIDDEN, generator=generator, dtype=torch.float64)
    fn = torch.randn(24, 4 * HIDDEN, generator=generator, dtype=torch.float64)
    slots, dots = _shared_fn(fn), torch.zeros(places.GROUP, 24, dtype=torch.float64)
    for unit, stream, chunk, half, tile, step in itertools.product(
        range(2), range(4), range(2), range(2), range(3), range(2)
    ):
        a, b = torch.zeros(16, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
        for g, q in itertools.product(range(8), range(4)):
            dim = unit * places.UNIT + chunk * places.CHUNK + q * 8 + half * 4 + step * 2  # of the lane's word
            for token in (g, g + 8):
                a[token, q], a[token, q + 4] = streams[token, stream, dim], streams[token, stream, dim + 1]
            right = slots[places.fn_fragment(unit, stream, chunk, half, tile) * 32 + g * 4 + q]
            b[q, g], b[q + 4, g] = right[2 * step], right[2 * step + 1]
        dots[:, tile * 8 : tile * 8 + 8] += a @ b
    assert torch.allclose(dots, streams.flatten(1) @ fn.T)


@pytest.mark.parametrize("hidden", [16, 32, 208, 256, 512, 528, 2048, 4080, 4096, 4112, 7152, 7168])
def test_a_cluster_covers_the_hidden_dims_and_fits(hidden: int) -> None:
    shape = launch.cut(hidden)
    assert shape.covers >= hidden and shape.whole == (shape.covers == hidden)
    assert shape.shared_bytes <= SHARED_MEMORY
    assert shape.owned * shape.ctas == places.GROUP
    assert shape.team > places.SHARED_SUMS * places.GROUP  # the rest of the team sends what the owners need


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"streams": 2}, "2 streams"),
        ({"hidden": limits.MAX_HIDDEN + 16}, "H = 7184"),
        ({"rows": 2**17, "hidden": 4096}, "about 131072 tokens"),
    ],
)
def test_limits_name_the_reason(facts: dict[str, Any], reason: str) -> None:
    (found,) = limits.supports(facts)
    assert reason in found


def test_limits_take_the_models() -> None:
    assert limits.supports({}) == []
    for hidden in (4096, 7168):
        facts: dict[str, str | int] = {"dtype": "bfloat16", "streams": 4, "hidden": hidden, "rows": 8192}
        assert limits.supports(facts) == []


@pytest.mark.parametrize("variant", [sm90.mhc_quant, sm100.mhc_quant])
@pytest.mark.parametrize(
    ("params", "reason"),
    [({"dtype": torch.float16}, "float16"), ({"streams": 2}, "2 streams"), ({"hidden": 7184}, "H = 7184")],
)
def test_what_the_kernel_cannot_do_is_refused_before_a_launch(
    variant: Any, params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ArgumentError, match=reason):
        variant(**_inputs(**params))


@pytest.mark.parametrize("name", ["x", "f", "post", "comb", "fn", "norm_weight"])
def test_unaligned_data_is_refused_by_name(name: str) -> None:
    inputs = _inputs()
    tensor = inputs[name]
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    with pytest.raises(ArgumentError, match=f"{name}.*multiple of 16"):
        sm90.mhc_quant(**{**inputs, name: moved.copy_(tensor)})


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
def test_no_tokens_need_no_launch(scale_layout: str) -> None:
    inputs = _inputs(tokens=0, scale_layout=scale_layout)
    out = sm90.mhc_quant(**inputs)
    assert out.residual.shape == (0, 4, 32) and out.quantized.codes.shape == (0, 16)
    assert out.quantized.global_scale_dec == 1 / inputs["global_scale_enc"]


def test_every_bf16_case_of_four_streams_is_supported() -> None:
    for name, case in CASES.items():
        params = dict(case.params)
        dtype = str(params.get("dtype", torch.bfloat16)).removeprefix("torch.")
        facts: dict[str, Any] = {
            "dtype": dtype,
            "streams": params.get("streams", 4),
            "hidden": params.get("hidden", 256),
        }
        assert (not limits.supports(facts)) == (dtype == "bfloat16" and facts["streams"] == 4), name


@pytest.mark.parametrize("module", [sm90, sm100])
def test_declared_kernels_have_names_of_their_own(module: Any) -> None:
    names = [spec.name for spec in module.kernels()]
    assert len(set(names)) == len(names)
    assert {spec.arch for spec in module.kernels()} == {"sm_90a" if module is sm90 else "sm_100a"}


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100])
def test_the_kernel_for_flash_compiles_without_spills(target: Target) -> None:
    (spec, *_) = launch.kernels(target)
    artifact = compiler.compile_kernel(spec)
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 65536 // (places.TEAMS * launch.cut(4096).team)
    assert "st.async" in artifact.ptx and "mma.sync.aligned.m16n8k8" in artifact.ptx
