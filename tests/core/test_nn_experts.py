"""The experts: exact mode against transformers, NVFP4 against a dequantised model, and what both must keep to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.nn.experts import Experts
from megamoe.numerics import nvfp4
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, LIMIT = 33, 16, 6, 64, 48, 10.0


def plain_weights(seed: int = 1) -> tuple[Tensor, Tensor]:
    """(E, 2I, H) and (E, H, I), large enough that the clamp bites."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator)
    return gate_up, torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator)


def routed(tokens: int = TOKENS, used: int = EXPERTS - 2) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, H), indices and weights (T, k); the last experts get no token."""
    generator = torch.Generator().manual_seed(2)
    indices = torch.rand(tokens, used, generator=generator).argsort(dim=1)[:, :TOP_K].contiguous()
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x, indices, torch.rand(tokens, TOP_K, generator=generator) + 0.1


def quantized(t: Tensor, layout: str = "linear") -> NVFP4Tensor:
    """Quantised with a global scale of each expert's own."""
    enc = nvfp4.global_scale_enc(t.abs().amax((-2, -1)))
    return nvfp4.quantize(t, enc, scale_layout=layout)


def loop(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float = LIMIT) -> Tensor:
    """The layer in fp64, token by token."""
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for e, w in zip(indices[t].tolist(), weights[t].tolist(), strict=True):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            hidden = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
            out[t] += w * (down[e].double() @ hidden)
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_exact_mode_equals_transformers() -> None:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    config = DeepseekV4Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        compress_ratios=[0, 4],
        n_routed_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        swiglu_limit=LIMIT,
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV4Experts(config)
    gate_up, down = plain_weights()
    assert theirs.gate_up_proj.shape == gate_up.shape
    with torch.no_grad():
        theirs.gate_up_proj.copy_(gate_up)
        theirs.down_proj.copy_(down)
        x, indices, weights = routed()
        want = theirs(x, indices, weights)
        got = Experts(gate_up, down, limit=LIMIT)(x, indices, weights)
    assert relative(got, want) <= 1e-6
    assert relative(got, loop(x, indices, weights, gate_up, down)) <= 1e-6


@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("kind", ["plain", "nvfp4", "nvfp4-128x4"])
def test_nvfp4_is_the_dequantised_model_but_for_the_activations(kind: str, layout: str) -> None:
    gate_up, down = (quantized(w, layout) for w in plain_weights())
    x, indices, weights = routed()
    given: Tensor | NVFP4Tensor = x.bfloat16()
    values = x.bfloat16().float()
    if kind != "plain":
        given = nvfp4.quantize(x, torch.tensor(500.0), scale_layout="128x4" if "128" in kind else "linear")
        values = dequantize(given)
    layer = Experts(gate_up, down, limit=LIMIT, activation_scale_enc=torch.tensor(2688 / 100.0))
    out = layer(given, indices, weights)
    assert out.shape == (TOKENS, HIDDEN)
    assert out.dtype == torch.bfloat16
    want = loop(values, indices, weights, dequantize(gate_up), dequantize(down))
    assert relative(out, want) <= 0.12, "NVFP4 of the hidden activations alone: about 0.095"
    assert relative(out, want) >= 0.02, "the hidden activations must have been quantised"


def test_nvfp4_is_exact_where_every_number_is_one() -> None:
    """Gates of 32 pass silu unchanged, up holds E2M1 values over 32, down picks one hidden value an output."""
    gate_up = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.uint8)
    gate_up[:, :INTERMEDIATE, 0] = 4  # the code of 2, times a block scale of 16
    gate_up[:, INTERMEDIATE:, 1] = torch.arange(16, dtype=torch.uint8).repeat(INTERMEDIATE // 16)
    scales = torch.full((EXPERTS, 2 * INTERMEDIATE, HIDDEN // 16), 16.0)
    scales[:, INTERMEDIATE:] = 1 / 32
    down = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    down.scatter_(2, torch.randint(INTERMEDIATE, (EXPERTS, HIDDEN, 1), generator=generator), 2)  # the code of 1
    ones = torch.ones(EXPERTS, HIDDEN, INTERMEDIATE // 16)
    packed = [
        NVFP4Tensor(nvfp4.pack_nibbles(codes), nvfp4.encode_e4m3(s), torch.tensor(1.0))
        for codes, s in ((gate_up, scales), (down, ones))
    ]
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    x[:, :2] = 1
    _, indices, weights = routed()
    layer = Experts(packed[0], packed[1], limit=None, activation_scale_enc=torch.tensor(16.0))
    out = layer(x, indices, weights, dtype=torch.float32)
    want = loop(x, indices, weights, dequantize(packed[0]), dequantize(packed[1]), limit=float("inf"))
    assert relative(out, want) <= 1e-6


def nvfp4_layer(layout: str = "linear") -> Experts:
    gate_up, down = (quantized(w, layout) for w in plain_weights())
    return Experts(gate_up, down, limit=LIMIT, activation_scale_enc=torch.tensor(26.88))


def test_result_repeats_to_the_bit_and_does_not_depend_on_the_other_tokens() -> None:
    layer = nvfp4_layer()
    x, indices, weights = routed()
    once, again = (layer(x.bfloat16(), indices, weights) for _ in range(2))
    assert torch.equal(once, again)
    some = torch.tensor([3, 4, 20])
    alone = layer(x.bfloat16()[some], indices[some], weights[some])
    assert torch.equal(alone, once[some])


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_dtype_of_the_result(dtype: torch.dtype | None) -> None:
    x, indices, weights = routed()
    layer = nvfp4_layer()
    assert layer(x.bfloat16(), indices, weights, dtype=dtype).dtype == (dtype or torch.bfloat16)
    assert layer(x, indices, weights, dtype=dtype).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(quantised: bool, tokens: int) -> None:
    gate_up, down = plain_weights()
    layer = nvfp4_layer() if quantised else Experts(gate_up, down, limit=LIMIT)
    x, indices, weights = routed(tokens)
    out = layer(x, indices, weights)
    assert out.shape == (tokens, HIDDEN)
    if tokens:
        want = loop(x, indices, weights, gate_up, down)
        assert relative(out, want) <= (0.3 if quantised else 1e-6)


def test_one_expert_may_be_hit_by_all_slots() -> None:
    """What tid2eid = 0 does: every slot of every token is expert 0."""
    gate_up, down = plain_weights()
    x, _, weights = routed()
    indices = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)
    out = Experts(gate_up, down, limit=LIMIT)(x, indices, weights)
    assert relative(out, loop(x, indices, weights, gate_up, down)) <= 1e-6


def test_state_moves_with_the_module() -> None:
    layer = nvfp4_layer("128x4")
    other = Experts(
        *(quantized(w, "128x4") for w in plain_weights(9)), limit=LIMIT, activation_scale_enc=torch.tensor(1.0)
    )
    other.load_state_dict(layer.state_dict())
    x, indices, weights = routed()
    assert torch.equal(other(x, indices, weights), layer(x, indices, weights))
    assert {b.device.type for b in layer.to("meta").buffers()} == {"meta"}


def same(got: NVFP4Tensor | Tensor, want: NVFP4Tensor | Tensor) -> bool:
    """Bit for bit, layout and all."""
    assert isinstance(got, NVFP4Tensor)
    assert isinstance(want, NVFP4Tensor)
    pairs = [(got.codes, want.codes), (got.scales.view(torch.uint8), want.scales.view(torch.uint8))]
    pairs.append((got.global_scale_dec, want.global_scale_dec))
    return got.scale_layout == want.scale_layout and all(torch.equal(a, b) for a, b in pairs)


def in_order(order: str, layout: str) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Weights whose gate and up halves have global scales of their own, gate or up rows first."""
    gate_up, down = plain_weights()
    parts = gate_up.view(EXPERTS, 2, INTERMEDIATE, HIDDEN)  # (E, half, I, H)
    if order == "up_gate":
        parts = parts.flip(1)
    enc = nvfp4.global_scale_enc(parts.abs().amax((-2, -1)))  # (E, 2)
    return nvfp4.quantize(parts.flatten(1, 2), enc, scale_layout=layout), quantized(down, layout)


@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
def test_prepared_weights_give_the_same_result_and_come_back(order: str, layout: str) -> None:
    weights = in_order(order, layout)
    layer, prepared = (
        Experts(*weights, limit=LIMIT, activation_scale_enc=torch.tensor(26.88), order=order) for _ in range(2)
    )
    x, indices, routing = routed()
    want = layer(x.bfloat16(), indices, routing)
    assert prepared.prepare(always=True) is prepared
    assert prepared.gate_up.prepared
    assert "prepared" in repr(prepared)
    kept = prepared.gate_up.codes
    assert kept.shape != weights[0].codes.shape, "padded to whole slabs"
    assert torch.equal(prepared(x.bfloat16(), indices, routing), want)
    for name, given in zip(("gate_up", "down"), weights, strict=True):
        assert same(prepared.weight(name), given)
    prepared.prepare(always=True)
    assert prepared.gate_up.codes is kept, "once"


def test_gate_and_up_in_either_order_give_the_same() -> None:
    x, indices, routing = routed()
    outs = [
        Experts(*in_order(order, "linear"), limit=LIMIT, activation_scale_enc=torch.tensor(26.88), order=order)(
            x.bfloat16(), indices, routing
        )
        for order in ("gate_up", "up_gate")
    ]
    assert torch.equal(*outs)
    gate_up, down = plain_weights()
    turned = gate_up.view(EXPERTS, 2, INTERMEDIATE, HIDDEN).flip(1).flatten(1, 2)
    exact = [
        Experts(w, down, limit=LIMIT, order=order)(x, indices, routing)
        for w, order in ((gate_up, "gate_up"), (turned, "up_gate"))
    ]
    torch.testing.assert_close(*exact)
    with pytest.raises(ArgumentError, match="order"):
        Experts(gate_up, down, limit=LIMIT, order="interleaved")


def test_weights_are_prepared_only_for_kernels_that_would_run() -> None:
    layer = nvfp4_layer().prepare()
    assert not layer.gate_up.prepared, "there are none on a CPU"
    gate_up, down = plain_weights()
    exact = Experts(gate_up, down, limit=LIMIT).prepare(always=True)
    assert exact.weight("gate_up") is gate_up


@pytest.mark.parametrize("source_prepared", [False, True])
@pytest.mark.parametrize("target_prepared", [False, True])
def test_state_crosses_layouts(source_prepared: bool, target_prepared: bool) -> None:
    source = nvfp4_layer("128x4")
    target = Experts(*(quantized(w) for w in plain_weights(9)), limit=LIMIT, activation_scale_enc=torch.tensor(1.0))
    for layer, wanted in ((source, source_prepared), (target, target_prepared)):
        if wanted:
            layer.prepare(always=True)
    target.load_state_dict(source.state_dict())
    assert target.down.prepared == target.gate_up.prepared == source_prepared
    for name in ("gate_up", "down"):
        assert same(target.weight(name), source.weight(name))
    x, indices, weights = routed()
    assert torch.equal(target(x, indices, weights), source(x, indices, weights))


def test_state_of_another_size_is_refused() -> None:
    gate_up, down = plain_weights()
    smaller = Experts(quantized(gate_up[:8]), quantized(down[:8]), limit=LIMIT, activation_scale_enc=torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="size mismatch"):
        nvfp4_layer().load_state_dict(smaller.state_dict())


BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "mixed kinds": (lambda g, d: (quantized(g), d), "down"),
    "mixed kinds the other way": (lambda g, d: (g, quantized(d)), "down"),
    "mixed dtypes": (lambda g, d: (g, d.bfloat16()), "down"),
    "shape": (lambda g, d: (g, d[..., :-16].contiguous()), "down"),
    "experts": (lambda g, d: (g, d[1:].contiguous()), "down"),
    "odd rows": (lambda g, d: (g[:, 1:].contiguous(), d[..., 1:].contiguous()), "gate_up"),
    "no scale": (lambda g, d: (quantized(g), quantized(d)), "activation_scale_enc"),
}


@pytest.mark.parametrize("wrong", BAD_WEIGHTS)
def test_wrong_weights_are_named(wrong: str) -> None:
    change, argument = BAD_WEIGHTS[wrong]
    with pytest.raises(ArgumentError) as caught:
        Experts(*change(*plain_weights()), limit=LIMIT)
    assert caught.value.argument == argument


def test_wrong_inputs_are_named() -> None:
    x, indices, weights = routed()
    layer, exact = nvfp4_layer(), Experts(*plain_weights(), limit=LIMIT)
    for args, argument in [
        ((x[:, :48].contiguous(), indices, weights), "x"),
        ((x.double(), indices, weights), "x"),
        ((x, indices.float(), weights), "indices"),
        ((x, indices[1:], weights), "indices"),
        ((x, indices, weights[:, 1:].contiguous()), "weights"),
        ((x, indices, weights.to("meta")), "weights"),
    ]:
        for module in (layer, exact):
            with pytest.raises(ArgumentError) as caught:
                module(*args)
            assert caught.value.argument == argument
    with pytest.raises(ArgumentError, match="x: got NVFP4Tensor"):
        exact(quantized(x[None]), indices, weights)
    with pytest.raises(ArgumentError, match="x: got bfloat16"):
        exact(x.bfloat16(), indices, weights)
