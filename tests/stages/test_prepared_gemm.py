"""Gathered rows, prepared weights and interleaved gates: what the ops mean by them, and what the kernels refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics.gate_up import interleave
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe_stages.grouped_gemm import cases as gemm_cases
from megamoe_stages.grouped_gemm import contract as gemm_contract
from megamoe_stages.grouped_gemm import fallback as gemm_fallback
from megamoe_stages.grouped_gemm import limits
from megamoe_stages.grouped_gemm import reference as gemm_reference
from megamoe_stages.swiglu_quant import cases, contract, fallback, gemm_limits, reference

GEMMS = [gemm_reference.grouped_gemm, gemm_fallback.grouped_gemm]
SWIGLUS = [reference.swiglu_quant, fallback.swiglu_quant]
ROWS = (3, 0, 1, 40, 17)
Gemm = Callable[..., Tensor]
Swiglu = Callable[..., NVFP4Tensor]


def gemm_inputs(**params: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    return gemm_cases.make(generator, **{"rows": ROWS, "n": 48, "k": 80, **params})


def swiglu_inputs(**params: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(12)
    return cases.make(generator, **{"rows": ROWS, "intermediate": 48, "k": 80, **params})


def gathered(a: Tensor | NVFP4Tensor, index: Tensor) -> Tensor | NVFP4Tensor:
    """The rows as a copy."""
    if isinstance(a, Tensor):
        return a[index]
    scales = a.linear_scales().view(torch.uint8)[index].view(torch.float8_e4m3fn)
    return NVFP4Tensor(a.codes[index], scales, a.global_scale_dec)


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))


@pytest.mark.parametrize("variant", GEMMS)
@pytest.mark.parametrize("a", ["bf16", "fp32", "nvfp4"])
@pytest.mark.parametrize("a_layout", ["linear", "128x4"])
def test_a_row_index_stands_for_a_copy(variant: Gemm, a: str, a_layout: str) -> None:
    kw = gemm_inputs(a=a, a_layout=a_layout, indexed=True)
    assert kw["row_index"].shape[0] == sum(ROWS) > kw["a"].shape[0]
    copied = {**kw, "a": gathered(kw["a"], kw["row_index"]), "row_index": None}
    assert torch.equal(variant(**kw), variant(**copied))


@pytest.mark.parametrize("variant", GEMMS)
@pytest.mark.parametrize("sizes", [{"n": 48, "k": 80}, {"n": 64, "k": 128}])
def test_prepared_weights_are_the_same_weights(variant: Gemm, sizes: dict[str, int]) -> None:
    kw = gemm_inputs(a="nvfp4", alphas=2, **sizes)
    prepared = {**kw, "weights": kw["weights"].with_layout("hopper")}
    assert torch.equal(variant(**prepared), variant(**kw))


@pytest.mark.parametrize("variant", SWIGLUS)
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("alphas", [None, 1, 2])
def test_interleaved_weights_give_the_same_bytes(variant: Swiglu, order: str, hopper: bool, alphas: int | None) -> None:
    kw = swiglu_inputs(a="nvfp4", order=order, alphas=alphas, weighted=True)
    mixed = interleave(kw["weights"], order)
    prepared = mixed.with_layout("hopper") if hopper else mixed
    assert same(variant(**{**kw, "weights": prepared, "order": "interleaved"}), variant(**kw))


@pytest.mark.parametrize("variant", SWIGLUS)
def test_swiglu_gathers_rows_but_not_their_weights(variant: Swiglu) -> None:
    kw = swiglu_inputs(a="nvfp4", indexed=True, weighted=True)
    assert kw["row_weight"].shape == kw["row_index"].shape
    copied = {**kw, "a": gathered(kw["a"], kw["row_index"]), "row_index": None}
    assert same(variant(**kw), variant(**copied))


def test_fakes_and_problems_know_logical_sizes() -> None:
    kw = gemm_inputs(a="nvfp4", layout="hopper", indexed=True)
    assert kw["weights"].scale_layout == "hopper:48x80"
    facts = gemm_contract.problem(**kw)
    assert (facts.n, facts.k, facts.scale_layout, facts.indexed) == (48, 80, "hopper", True)
    assert gemm_contract.fake(**kw).shape == (sum(ROWS), 48)
    swiglu = swiglu_inputs(a="nvfp4", layout="hopper", order="interleaved", indexed=True)
    assert contract.problem(**swiglu).weights_scale_layout == "hopper"
    assert contract.fake(**swiglu).shape == (sum(ROWS), 48)


def test_cases_of_random_prepared_weights_hold_what_they_say() -> None:
    """Whole slabs are drawn in hopper order at once; their scales must lie in the range asked for."""
    weights = gemm_cases.random_nvfp4(torch.Generator().manual_seed(1), (2, 64, 256), layout="hopper")
    values = dequantize(weights).abs()
    assert weights.scale_layout == "hopper"
    assert values[values > 0].min() == 0.5 * 0.5
    assert 6 < values.max() < 6 * 2


@pytest.mark.parametrize("wrong", ["dtype", "device-less", "shape"])
def test_wrong_row_indices_are_named(wrong: str) -> None:
    kw = gemm_inputs(indexed=True)
    index = {"dtype": kw["row_index"].long(), "device-less": kw["row_index"].tolist(), "shape": kw["row_index"][None]}
    for variant in GEMMS:
        with pytest.raises(ArgumentError, match="row_index"):
            variant(**{**kw, "row_index": index[wrong]})


def test_activations_have_no_hopper_layout() -> None:
    kw = gemm_inputs(a="nvfp4", rows=(64,), k=128)
    for variant in GEMMS:
        with pytest.raises(ArgumentError, match=r"a\.scale_layout"):
            variant(**{**kw, "a": kw["a"].with_layout("hopper")})


def test_weights_of_another_size_than_their_layout_says() -> None:
    kw = gemm_inputs(layout="hopper")
    with pytest.raises(ArgumentError, match=r"weights\.codes"):
        gemm_reference.grouped_gemm(**{**kw, "weights": replace(kw["weights"], scale_layout="hopper:100x80")})


def test_what_the_kernels_leave_to_the_fallback() -> None:
    fine: dict[str, str | int | float | bool] = {"scale_layout": "hopper", "dtype": "bfloat16", "rows": 4096}
    assert limits.supports(fine) == []
    assert "128x4" in limits.supports({**fine, "scale_layout": "128x4"})[0]
    assert "float16" in limits.supports({**fine, "dtype": "float16"})[0]
    assert "rows" in limits.supports({**fine, "rows": 2**22})[0]
    assert "experts" in limits.supports({**fine, "experts": 769})[0]
    assert "global scale" in limits.supports({**fine, "part_rows": 12})[0]
    swiglu: dict[str, str | int | float | bool] = {"weights_scale_layout": "hopper", "order": "interleaved"}
    assert gemm_limits.supports(swiglu) == []
    assert "gate_up" in gemm_limits.supports({**swiglu, "order": "gate_up"})[0]
    assert "linear" in gemm_limits.supports({**swiglu, "weights_scale_layout": "linear"})[0]
