from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear, apply_rotary_pos_emb

from megamoe.dispatch import NoVariantError
from megamoe.errors import ArgumentError, ConfigError
from megamoe.model import Decision
from megamoe.nn import attention
from megamoe.nn.attention import attend, attend_quantized
from megamoe.nn.attention_output import AttentionOutput
from megamoe.numerics import nvfp4
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe.numerics.rope import inverse_frequencies, rope_tables
from megamoe.ops import Op, use

TOKENS, HEADS, DIM, GROUPS, RANK, HIDDEN = 11, 6, 64, 3, 32, 80
K = HEADS // GROUPS * DIM


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights() -> tuple[Tensor, Tensor]:
    return _randn(1, GROUPS, RANK, K) / K**0.5, _randn(2, 1, HIDDEN, GROUPS * RANK) / (GROUPS * RANK) ** 0.5


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = torch.tensor([0, 5, 3, 3, 99, 42, 7, 8, 9, 10, 98])
    return _randn(3, TOKENS, HEADS, DIM).to(dtype), positions, *rope_tables(100, inverse_frequencies(32, 1e4))


def _hf(o: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor) -> Tensor:
    """The tail of DeepseekV4Attention.forward."""
    o_a, o_b = DeepseekV4GroupedLinear(K, GROUPS * RANK, GROUPS), nn.Linear(GROUPS * RANK, HIDDEN, bias=False)
    with torch.no_grad():
        o_a.weight.copy_(wo_a.flatten(0, 1))
        o_b.weight.copy_(wo_b[0])
        turned = apply_rotary_pos_emb(o.float(), cos[positions], -sin[positions])
        out: Tensor = o_b(o_a(turned.reshape(1, TOKENS, GROUPS, -1)).flatten(2))[0]
    return out


def _nvfp4(weight: Tensor) -> NVFP4Tensor:
    return nvfp4.quantize(weight, nvfp4.global_scale_enc(nvfp4.amax(weight)))


def _quantised(**changes: Any) -> AttentionOutput:
    wo_a, wo_b = _weights()
    scales = {"o_scale_enc": torch.tensor(2688 / 5.0), "z_scale_enc": torch.tensor(2688 / 5.0)}
    return AttentionOutput(_nvfp4(wo_a), _nvfp4(wo_b), **{**scales, **changes})


def test_exact_mode_is_hf() -> None:
    wo_a, wo_b = _weights()
    assert rel_l2(AttentionOutput(wo_a, wo_b)(*_inputs()), _hf(*_inputs(), wo_a, wo_b)) < 1e-6


def test_exact_mode_keeps_the_dtype() -> None:
    wo_a, wo_b = _weights()
    got = AttentionOutput(wo_a.bfloat16(), wo_b.bfloat16())(*_inputs(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    # four roundings to bf16 (turned heads, weights, z, result), each at most 2^-8
    assert rel_l2(got, _hf(*_inputs(torch.bfloat16), wo_a, wo_b)) < 4 * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_mode_is_fake_quantised_hf(dtype: torch.dtype) -> None:
    """Every operand of the two GEMMs quantised and decoded again, the rest in float64."""
    layer, (o, positions, cos, sin) = _quantised(), _inputs(dtype)
    assert layer.o_scale_enc is not None
    assert layer.z_scale_enc is not None
    turned = apply_rotary_pos_emb(o.float(), cos[positions], -sin[positions])
    a = dequantize(nvfp4.quantize(turned.view(TOKENS, GROUPS, K).transpose(0, 1).contiguous(), layer.o_scale_enc))
    wo_a, wo_b = (dequantize(_nvfp4(w)).double() for w in _weights())
    z = torch.bmm(a.double(), wo_a.mT).transpose(0, 1).flatten(1).bfloat16()
    want = dequantize(nvfp4.quantize(z, layer.z_scale_enc)).double() @ wo_b[0].T
    got = layer(o, positions, cos, sin)
    assert got.dtype == dtype
    assert rel_l2(got, want) < 2**-8  # the result's rounding to bf16; a bf16 of z that flips moves less
    assert rel_l2(got, _hf(o, positions, cos, sin, *_weights())) < 0.25  # four operands at about 0.095 each


@pytest.mark.parametrize("which", ["wo_a", "wo_b"])
def test_one_weight_may_stay_plain(which: str) -> None:
    wo_a, wo_b = _weights()
    scale = torch.tensor(2688 / 5.0)
    layer = (
        AttentionOutput(wo_a, _nvfp4(wo_b), z_scale_enc=scale)
        if which == "wo_a"
        else AttentionOutput(_nvfp4(wo_a), wo_b, o_scale_enc=scale)
    )
    error = rel_l2(layer(*_inputs()), _hf(*_inputs(), wo_a, wo_b))
    assert 0.05 < error < 0.2  # two quantised operands: about 0.13


def test_no_tokens() -> None:
    _, _, cos, sin = _inputs()
    empty = torch.zeros(0, HEADS, DIM), torch.zeros(0, dtype=torch.int64)
    assert _quantised()(*empty, cos, sin).shape == (0, HIDDEN)
    assert AttentionOutput(*_weights())(*empty, cos, sin).shape == (0, HIDDEN)


def test_weights_are_saved_with_the_module() -> None:
    layer, other = _quantised(), _quantised(o_scale_enc=torch.ones(()))
    assert not torch.equal(layer(*_inputs()), other(*_inputs()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(*_inputs()), other(*_inputs()))


def test_misfits_are_named() -> None:
    wo_a, wo_b = _weights()
    misfits: dict[str, Callable[[], object]] = {
        "wo_a": lambda: AttentionOutput(wo_a[0], wo_b),
        "wo_b": lambda: AttentionOutput(wo_a, wo_b[..., :-1].contiguous()),
        "o_scale_enc": lambda: _quantised(o_scale_enc=None),
        "z_scale_enc": lambda: _quantised(z_scale_enc=torch.ones(2)),
        "o": lambda: AttentionOutput(wo_a, wo_b)(torch.zeros(TOKENS, HEADS, DIM + 16), *_inputs()[1:]),
    }
    for argument, build in misfits.items():
        with pytest.raises(ArgumentError) as caught:
            build()
        assert caught.value.argument == argument


def test_attention_ending_in_nvfp4_is_the_two_ops_bit_for_bit() -> None:
    """Attention, inverse RoPE and quantisation as one op, then wo_a, on their fallbacks; with compressed keys too."""
    layer, (_, _, cos, sin) = _quantised(), _inputs()
    assert layer.o_scale_enc is not None
    batch, length = 2, 7
    q = _randn(5, batch, length, HEADS, DIM).bfloat16()
    k = _randn(6, batch, length + 4, 1, DIM).bfloat16()
    sink, positions = _randn(7, HEADS), torch.arange(length).repeat(batch)
    options: dict[str, Any] = {"softmax_scale": DIM**-0.5, "window": 5}
    turn = (positions, cos, sin, layer.o_scale_enc)
    entries = _randn(8, batch, 3, 1, DIM).bfloat16()
    some = torch.arange(batch * length * 3).view(batch, length, 3) % 5 < 2
    kinds: list[dict[str, Any]] = [{}, {"compressed": entries}, {"compressed": entries, "visible": some}]
    projected = []
    for compressed in kinds:
        given = {**options, **compressed}
        with use({"default": "fallback"}):
            two = layer(attend(q, k, sink, **given).flatten(0, 1), positions, cos, sin)
            rows = attend_quantized(q, k, *turn, sink, groups=layer.groups, **given)
            projected.append(layer.project(rows, q.dtype))
        assert torch.equal(projected[-1], two)
    assert not any(torch.equal(projected[i], projected[i - 1]) for i in range(3))
    wo_a, wo_b = _weights()
    with pytest.raises(ArgumentError, match="rows"):
        AttentionOutput(wo_a, wo_b).project(rows, q.dtype)


APART = ("multi_cta_attention", "inverse_rope_quant")
# what the configuration says, which ops have a kernel, whether one op is called
CHOICES: list[tuple[dict[str, str], tuple[str, ...], bool]] = [
    ({}, (), True),
    ({}, ("attention_quant",), True),
    ({}, ("multi_cta_attention",), False),
    ({}, ("attention_quant", "multi_cta_attention"), True),
    ({"default": "reference"}, (), True),
    ({"attention_quant": "auto"}, ("multi_cta_attention",), False),
    ({"attention_quant": "reference"}, ("multi_cta_attention",), True),
    ({"attention_quant": "off"}, ("attention_quant",), False),
    ({"attention_quant": "off", "multi_cta_attention": "reference"}, (), False),
    ({"multi_cta_attention": "auto"}, (), True),
    ({"multi_cta_attention": "reference"}, ("attention_quant",), False),
    ({"inverse_rope_quant": "reference"}, ("attention_quant",), False),
    ({"inverse_rope_quant": "off"}, ("multi_cta_attention",), True),
    ({"multi_cta_attention": "off"}, ("multi_cta_attention",), True),
    ({"attention_quant": "reference", "multi_cta_attention": "reference"}, (), True),
    ({"default": "reference", "multi_cta_attention": "fallback"}, (), False),
]


class _Called:
    """Variants by op."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def called(self, stage_id: str, decision: Decision, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.of[stage_id] = decision.variant.name
        return run(*args, **kwargs)


def _prompt() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of `attend_quantized`."""
    layer, (_, _, cos, sin) = _quantised(), _inputs()
    assert layer.o_scale_enc is not None
    q, k = _randn(5, 1, 7, HEADS, DIM).bfloat16(), _randn(6, 1, 7, 1, DIM).bfloat16()
    given = (q, k, torch.arange(7), cos, sin, layer.o_scale_enc)
    return given, {"groups": layer.groups, "softmax_scale": DIM**-0.5, "window": 5}


@pytest.mark.parametrize(("config", "kernels", "in_one"), CHOICES)
def test_the_configuration_chooses_between_one_op_and_two(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, str], kernels: tuple[str, ...], in_one: bool
) -> None:
    monkeypatch.setattr(attention, "is_kernel", lambda decision: decision.stage in kernels)
    (given, options), called = _prompt(), _Called()
    with use(config, observer=called):
        attend_quantized(*given, **options)
    assert tuple(called.of) == (("attention_quant",) if in_one else APART)
    default = config.get("default", "fallback")
    assert called.of == {name: config.get(name, default).replace("auto", default) for name in called.of}


def test_one_op_is_not_taken_where_it_has_no_variant_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that only the two ops can follow; a default that nothing can is an error of theirs."""
    (given, options), called = _prompt(), _Called()
    decide = Op.decide

    def refused(self: Op, *args: Any, **kwargs: Any) -> Decision:
        if self.stage.id == "attention_quant":
            raise NoVariantError("attention_quant", "reference", [])
        return decide(self, *args, **kwargs)

    with use({"default": "fused"}), pytest.raises(NoVariantError, match="multi_cta_attention"):
        attend_quantized(*given, **options)
    monkeypatch.setattr(Op, "decide", refused)
    with use({"default": "reference"}, observer=called):
        attend_quantized(*given, **options)
    assert tuple(called.of) == APART


def test_no_way_is_left_when_both_are_off() -> None:
    given, options = _prompt()
    with use({"attention_quant": "off", "multi_cta_attention": "off"}), pytest.raises(ConfigError, match="is off"):
        attend_quantized(*given, **options)


def test_what_does_not_fit_either_way_is_named() -> None:
    (q, k, positions, cos, *rest), options = _prompt()
    wrong = (q, k, positions, cos[0], *rest)
    with pytest.raises(ArgumentError, match="cos"):
        attend_quantized(*wrong, **options)


def test_attention_is_traced_as_one_op() -> None:
    """torch.compile sees one graph, whatever the configuration says."""
    given, options = _prompt()
    whole = torch.compile(attend_quantized, backend="eager", fullgraph=True)
    with use({"attention_quant": "reference"}):
        want = attend_quantized(*given, **options)
        got = whole(*given, **options)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales.view(torch.uint8), want.scales.view(torch.uint8))
