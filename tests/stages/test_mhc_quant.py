from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4RMSNorm

from megamoe.errors import ArgumentError
from megamoe.numerics import nvfp4
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.testing.cases import Bound
from megamoe.testing.compare import compare, leaves
from megamoe_stages.mhc_quant import STAGE, contract
from megamoe_stages.mhc_quant.cases import CASES, make
from megamoe_stages.mhc_quant.fallback import mhc_quant as fallback
from megamoe_stages.mhc_quant.reference import mhc_quant as reference

SMALL = [name for name, case in CASES.items() if not case.gpu_only]
VARIANTS = {"reference": reference, "fallback": fallback}


def _inputs(**params: Any) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(0), **params)


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_stage_names_what_exists() -> None:
    assert STAGE.id == "mhc_quant"
    named = {v.target for v in STAGE.variants if not v.archs}
    assert named == {f"{f.__module__}:{f.__name__}" for f in VARIANTS.values()}


@pytest.mark.parametrize("name", SMALL)
def test_fallback_is_within_bounds_of_the_reference(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(name)
    bounds = {**contract.BOUNDS, **case.bounds}
    for result in compare(leaves(fallback(**inputs)), leaves(reference(**inputs)), bounds):
        assert result.passed, result.reason


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["odd_tokens_128x4", "float16", "trouble_float32_128x4"])
def test_quantized_is_the_recipe_on_its_own_normed(name: str, variant: str) -> None:
    inputs = CASES[name].inputs(name)
    out = VARIANTS[variant](**inputs)
    want = nvfp4.quantize(out.normed, inputs["global_scale_enc"], scale_layout=inputs["scale_layout"])
    assert torch.equal(out.quantized.codes, want.codes)
    assert torch.equal(out.quantized.scales.view(torch.uint8), want.scales.view(torch.uint8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_hf_modules(variant: str) -> None:
    """post as in DeepseekV4DecoderLayer, then DeepseekV4HyperConnection and DeepseekV4RMSNorm, all in fp32."""
    inputs = _inputs(tokens=40, dtype=torch.float32)
    site = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=256))
    norm = DeepseekV4RMSNorm(256, eps=1e-6)
    with torch.no_grad():
        for parameter, name in ((site.fn, "fn"), (site.base, "base"), (site.scale, "scale")):
            parameter.copy_(inputs[name])
        norm.weight.copy_(inputs["norm_weight"])
        x, f, post, comb = (inputs[k][None] for k in ("x", "f", "post", "comb"))
        streams = post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
        want_post, want_comb, y = site(streams)
        want = {"residual": streams, "normed": norm(y), "post": want_post, "comb": want_comb}
    out = VARIANTS[variant](**inputs)
    for name, value in want.items():
        assert rel_l2(getattr(out, name), value[0]) < 1e-6, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuted_streams_move_one_way(variant: str) -> None:
    inputs = _inputs(tokens=9, permute=True)
    out = VARIANTS[variant](**inputs)
    assert torch.equal(out.residual, inputs["x"].roll(1, dims=1))  # comb[i, i + 1] = 1: stream i goes to i + 1


def _wrong(**change: Any) -> Any:
    """A variant with one mistake."""

    def variant(**inputs: Any) -> contract.MhcOutput:
        changed = {**inputs, **{k: v(inputs) if callable(v) else v for k, v in change.items()}}
        return fallback(**changed)

    return variant


MISTAKES = {
    "comb_not_transposed": ("odd_tokens", _wrong(comb=lambda i: i["comb"].mT.contiguous()), "residual"),
    "post_without_factor_2": ("odd_tokens", _wrong(post=lambda i: i["post"] / 2), "residual"),
    "post_in_bf16": ("odd_tokens", _wrong(post=lambda i: i["post"].bfloat16().float()), "residual"),
    "ten_sinkhorn_iterations": ("float32", _wrong(sinkhorn_iters=10), "comb"),
    "nineteen_sinkhorn_iterations": ("float32", _wrong(sinkhorn_iters=19), "comb"),
    "no_norm_weight": ("odd_tokens", _wrong(norm_weight=torch.ones(256)), "normed"),
    "scales_exchanged": ("odd_tokens", _wrong(scale=lambda i: i["scale"].flip(0)), "comb"),
    "scale_off": ("odd_tokens", _wrong(global_scale_enc=lambda i: i["global_scale_enc"] * 0.97), "quantized"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bounds_catch_mistakes(mistake: str) -> None:
    name, variant, output = MISTAKES[mistake]
    case = CASES[name]
    inputs = case.inputs(name)
    bounds: dict[str, Bound] = {**contract.BOUNDS, **case.bounds}
    failed = {r.name for r in compare(leaves(variant(**inputs)), leaves(reference(**inputs)), bounds) if not r.passed}
    assert output in failed


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "x_dtype": ("x", {"x": torch.zeros(5, 4, 32, dtype=torch.float64)}),
    "x_rank": ("x", {"x": torch.zeros(5, 128, dtype=torch.bfloat16)}),
    "x_strides": ("x", {"x": torch.zeros(4, 5, 32, dtype=torch.bfloat16).transpose(0, 1)}),
    "no_streams": ("x", {"x": torch.zeros(5, 0, 32, dtype=torch.bfloat16)}),
    "hidden": ("x", {"x": torch.zeros(5, 4, 40, dtype=torch.bfloat16)}),
    "f_dtype": ("f", {"f": torch.zeros(5, 32)}),
    "f_shape": ("f", {"f": torch.zeros(4, 32, dtype=torch.bfloat16)}),
    "post_dtype": ("post", {"post": torch.zeros(5, 4, dtype=torch.bfloat16)}),
    "comb_shape": ("comb", {"comb": torch.zeros(5, 16)}),
    "fn_shape": ("fn", {"fn": torch.zeros(24, 32)}),
    "base_shape": ("base", {"base": torch.zeros(4)}),
    "scale_shape": ("scale", {"scale": torch.zeros(1)}),
    "norm_weight_dtype": ("norm_weight", {"norm_weight": torch.zeros(32, dtype=torch.float16)}),
    "enc_shape": ("global_scale_enc", {"global_scale_enc": torch.ones(1)}),
    "device": ("fn", {"fn": torch.zeros(24, 128, device="meta")}),
    "iterations": ("sinkhorn_iters", {"sinkhorn_iters": 0}),
    "hc_eps": ("hc_eps", {"hc_eps": -1e-6}),
    "norm_eps": ("norm_eps", {"norm_eps": float("nan")}),
    "scale_layout": ("scale_layout", {"scale_layout": "8x4"}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_arguments_are_named(name: str, variant: str) -> None:
    argument, change = BAD[name]
    with pytest.raises(ArgumentError) as caught:
        VARIANTS[variant](**{**_inputs(tokens=5, hidden=32), **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("name", ["no_tokens_128x4", "odd_tokens_128x4", "float32"])
def test_fake_has_the_form_of_the_result(name: str) -> None:
    inputs = CASES[name].inputs(name)
    want = leaves(reference(**inputs))
    with FakeTensorMode() as mode:
        fakes: dict[str, Any] = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        got = leaves(contract.fake(**fakes))
    for key, value in want.items():
        pairs = [(got[key], value)]
        if isinstance(value, NVFP4Tensor):
            fake = got[key]
            assert isinstance(fake, NVFP4Tensor)
            assert fake.scale_layout == value.scale_layout
            pairs = [(getattr(fake, n), getattr(value, n)) for n in ("codes", "scales", "global_scale_dec")]
        for a, b in pairs:
            assert isinstance(a, Tensor)
            assert isinstance(b, Tensor)
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_problem_counts_rows_in_buckets() -> None:
    inputs = _inputs(tokens=100)
    facts = contract.problem(**inputs)
    assert facts == contract.problem(**_inputs(tokens=128))
    assert facts != contract.problem(**_inputs(tokens=100, norm_dtype=torch.bfloat16))
    assert (facts.rows, facts.streams, facts.hidden) == (128, 4, 256)


def test_one_sinkhorn_iteration_less_is_caught_in_bf16() -> None:
    inputs = CASES["slow_sinkhorn"].inputs("slow_sinkhorn")
    right, wrong = reference(**inputs), reference(**{**inputs, "sinkhorn_iters": 19})
    bound = CASES["slow_sinkhorn"].bounds["comb"].rel_l2
    assert float((wrong.comb - right.comb).norm() / right.comb.norm()) > 100 * bound
