from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import dequantize
from megamoe.testing.compare import compare, leaves
from megamoe_stages.inverse_rope_quant import STAGE, contract
from megamoe_stages.inverse_rope_quant.cases import CASES, make
from megamoe_stages.inverse_rope_quant.fallback import inverse_rope_quant as fallback
from megamoe_stages.inverse_rope_quant.reference import inverse_rope_quant as reference
from tests.stages import oracle

SMALL = [name for name, case in CASES.items() if not case.gpu_only]


def _inputs(**params: Any) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(0), **params)


def test_stage_names_what_exists() -> None:
    assert STAGE.id == "inverse_rope_quant"
    targets = {v.target for v in STAGE.variants if not v.archs}
    assert targets == {f"{f.__module__}:{f.__name__}" for f in (reference, fallback)}
    assert {str(arch) for v in STAGE.variants for arch in v.archs} == {"sm_90", "sm_100"}


@pytest.mark.parametrize("name", SMALL)
def test_fallback_gives_the_bytes_of_the_reference(name: str) -> None:
    inputs = CASES[name].inputs(name)
    for result in compare(leaves(fallback(**inputs)), leaves(reference(**inputs)), contract.BOUNDS):
        assert result.passed, result.reason


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_hf_rotation_and_numpy_quantisation(dtype: torch.dtype, scale_layout: str) -> None:
    inputs = _inputs(tokens=37, heads=6, groups=3, dtype=dtype, scale_layout=scale_layout)
    rows = inputs["positions"]
    turned = apply_rotary_pos_emb(inputs["o"].float(), inputs["cos"][rows], -inputs["sin"][rows])
    got = reference(**inputs)
    assert got.shape == (3, 37, 256)
    for group in range(3):
        values = turned[:, 2 * group : 2 * group + 2].reshape(37, 256).numpy()  # head h belongs to group h // 2
        codes, scales = oracle.quantize(values, float(inputs["global_scale_enc"]))
        assert np.array_equal(oracle.nibbles(got.codes)[group], codes)
        assert np.array_equal(oracle.scale_bytes(got)[group], scales)
    assert torch.equal(got.global_scale_dec, 1 / inputs["global_scale_enc"])


def test_padding_of_each_group_is_zero() -> None:
    got = reference(**_inputs(tokens=130, scale_layout="128x4"))
    assert got.scales.shape == (2, 256, 16)
    raw = got.scales.view(torch.uint8)
    assert int((raw != 0).sum()) == int((got.linear_scales().view(torch.uint8) != 0).sum())


def test_it_matters_that_nothing_is_rounded_before() -> None:
    """Rounding the turned values to bf16 first, as HF does, gives other codes: the fp32 path is not a detail."""
    inputs = _inputs(tokens=200)
    rows = inputs["positions"]
    rounded = apply_rotary_pos_emb(inputs["o"], inputs["cos"][rows], -inputs["sin"][rows])
    still = {**inputs, "o": rounded, "positions": torch.zeros_like(rows)}
    assert not torch.equal(reference(**inputs).codes, reference(**still).codes)


def test_values_come_back() -> None:
    inputs = _inputs(tokens=50, dtype=torch.float32)
    rows = inputs["positions"]
    turned = apply_rotary_pos_emb(inputs["o"], inputs["cos"][rows], -inputs["sin"][rows])
    back = dequantize(fallback(**inputs)).transpose(0, 1).reshape(turned.shape)
    assert ((back - turned).norm() / turned.norm()).item() < 0.12  # 0.095 is what NVFP4 costs on normal data


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "o_dtype": ("o", {"o": torch.zeros(5, 4, 128, dtype=torch.float64)}),
    "o_rank": ("o", {"o": torch.zeros(5, 512, dtype=torch.bfloat16)}),
    "o_strides": ("o", {"o": torch.zeros(5, 128, 4, dtype=torch.bfloat16).transpose(1, 2)}),
    "head_dim": ("o", {"o": torch.zeros(5, 4, 136, dtype=torch.bfloat16)}),
    "not_a_tensor": ("o", {"o": [1.0]}),
    "positions_length": ("positions", {"positions": torch.zeros(4, dtype=torch.int64)}),
    "positions_dtype": ("positions", {"positions": torch.zeros(5)}),
    "cos_dtype": ("cos", {"cos": torch.zeros(600, 32, dtype=torch.bfloat16)}),
    "rope_dim": ("cos", {"cos": torch.zeros(600, 12), "sin": torch.zeros(600, 12)}),
    "rope_dim_too_large": ("cos", {"cos": torch.zeros(600, 72), "sin": torch.zeros(600, 72)}),
    "sin_shape": ("sin", {"sin": torch.zeros(599, 32)}),
    "scale_dtype": ("global_scale_enc", {"global_scale_enc": torch.ones((), dtype=torch.float64)}),
    "scale_shape": ("global_scale_enc", {"global_scale_enc": torch.ones(2)}),
    "scale_device": ("global_scale_enc", {"global_scale_enc": torch.ones((), device="meta")}),
    "groups_uneven": ("groups", {"groups": 3}),
    "groups_none": ("groups", {"groups": 0}),
    "scale_layout": ("scale_layout", {"scale_layout": "swizzled"}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("variant", [reference, fallback])
def test_bad_arguments_are_named(name: str, variant: Any) -> None:
    argument, change = BAD[name]
    with pytest.raises(ArgumentError) as caught:
        variant(**{**_inputs(tokens=5), **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("name", ["no_tokens_128x4", "two_row_tiles_128x4", "float32"])
def test_fake_has_the_form_of_the_result(name: str) -> None:
    inputs = CASES[name].inputs(name)
    want = reference(**inputs)
    with FakeTensorMode() as mode:
        fakes: dict[str, Any] = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        got = contract.fake(**fakes)
    for a, b in ((got.codes, want.codes), (got.scales, want.scales), (got.global_scale_dec, want.global_scale_dec)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    assert got.scale_layout == want.scale_layout


def test_problem_counts_rows_in_buckets() -> None:
    inputs = _inputs(tokens=100)
    facts = contract.problem(**inputs)
    assert facts == contract.problem(**_inputs(tokens=128))
    assert facts != contract.problem(**_inputs(tokens=129))
    assert (facts.rows, facts.rope_dim, facts.groups) == (128, 64, 2)
