"""Puts megamoe's layers together from a model's modules and installs their forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4Experts,
    DeepseekV4HyperConnection,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)

from megamoe.integrations.transformers.kv import PagedCaches
from megamoe.integrations.transformers.layers import (
    AttentionForward,
    DecoderForward,
    ModelForward,
    MoeForward,
    RouterForward,
)
from megamoe.integrations.transformers.patching import Patches
from megamoe.integrations.transformers.scales import LayerScales, encode_scale, norm_bound
from megamoe.integrations.weights import ExpertWeights, OutputWeights, Weights
from megamoe.nn.attention_output import AttentionOutput
from megamoe.nn.experts import Experts
from megamoe.nn.hyper_connections import HyperSite

# Hook point -> the ops without which it cannot run.
HOOK_POINTS: Mapping[str, tuple[str, ...]] = {
    "router": ("moe_route",),
    "experts": ("moe_permute", "swiglu_quant", "grouped_gemm", "moe_combine"),
    "attention_output": ("inverse_rope_quant", "grouped_gemm", "quantize"),
    "hyper_connections": ("mhc_quant",),
    "prefill": ("multi_cta_attention",),
    "decode": ("fp4_kv_decode",),
}


def install(
    model: DeepseekV4ForCausalLM,
    patches: Patches,
    points: Mapping[str, bool],
    weights: Weights,
    scales: tuple[LayerScales, ...],
    session: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Installs the forwards of every hook point that is on.

    Args:
        model: The model.
        patches: Where the changes are noted.
        points: Hook points by name.
        weights: Prepared weights of experts and output projections.
        scales: Largest activations by layer, all fields filled; empty for the exact mode.
        session: Makes the context in which a forward pass runs.
    """
    if not any(points.values()):
        return
    body = model.model
    patches.set(body, "forward", ModelForward(body, body.forward, session))
    layers = list(body.layers)
    for i, layer in enumerate(layers):
        encs = _Encoders(scales[i] if scales else None, layer.self_attn.sinks.device)
        if points["router"]:
            patches.set(layer.mlp.gate, "forward", RouterForward(layer.mlp.gate))
        if points["experts"]:
            with session():  # what it chooses decides how the weights are laid out
                experts = _experts(layer.mlp.experts, weights.experts[i], encs)
            patches.set(layer.mlp, "forward", MoeForward(layer.mlp, experts))
        if points["attention_output"] or points["prefill"] or points["decode"]:
            with session():
                output = _output(weights.output[i], encs) if points["attention_output"] else None
            caches = PagedCaches(layer.self_attn) if points["decode"] and scales else None
            attention = AttentionForward(
                layer.self_attn, body.rotary_emb, prefill=points["prefill"], caches=caches, output=output
            )
            patches.set(layer.self_attn, "forward", attention)
        if points["hyper_connections"]:
            following = layers[i + 1] if i + 1 < len(layers) else None
            patches.set(layer, "forward", _decoder(layer, following, encs, points["experts"], body.rotary_emb))


class _Encoders:
    """Encode scales of one layer's activations, fp32 (); None each in the exact mode."""

    def __init__(self, scales: LayerScales | None, device: torch.device) -> None:
        def encoder(name: str) -> Tensor | None:
            return None if scales is None else encode_scale(getattr(scales, name), device)

        self.normed, self.product = encoder("normed"), encoder("product")
        self.o, self.z = encoder("o"), encoder("z")


def _experts(own: DeepseekV4Experts, weights: ExpertWeights, encs: _Encoders) -> Experts:
    experts = Experts(weights.gate_up, weights.down, limit=own.limit, activation_scale_enc=encs.product)
    return experts.prepare()


def _output(weights: OutputWeights, encs: _Encoders) -> AttentionOutput:
    return AttentionOutput(weights.wo_a, weights.wo_b, o_scale_enc=encs.o, z_scale_enc=encs.z).prepare()


def _site(connection: DeepseekV4HyperConnection, norm: DeepseekV4RMSNorm) -> HyperSite:
    """A site of the hyper-connections with the norm behind it."""
    return HyperSite(
        fn=connection.fn.detach().float(),
        base=connection.base.detach().float(),
        scale=connection.scale.detach().float(),
        norm_weight=norm.weight.detach(),
        hc_eps=connection.hc_eps,
        norm_eps=norm.variance_epsilon,
        sinkhorn_iters=connection.hc_sinkhorn_iters,
    )


def _decoder(
    layer: DeepseekV4DecoderLayer,
    following: DeepseekV4DecoderLayer | None,
    encs: _Encoders,
    feeds_experts: bool,
    rotary: DeepseekV4RotaryEmbedding,
) -> DecoderForward:
    here = layer.attn_hc.fn.device
    if following is not None and following.attn_hc.fn.device != here:
        following = None  # the next layer enters its own site, on its own device
    return DecoderForward(
        layer,
        attention=_site(layer.attn_hc, layer.input_layernorm),
        ffn=_site(layer.ffn_hc, layer.post_attention_layernorm),
        following=None if following is None else _site(following.attn_hc, following.input_layernorm),
        normed_enc=encs.normed,
        following_enc=None if following is None or encs.normed is None else _bound_enc(following.input_layernorm),
        feeds_experts=feeds_experts,
        rotary=rotary,
    )


def _bound_enc(norm: DeepseekV4RMSNorm) -> Tensor:
    return encode_scale(norm_bound(norm), norm.weight.device)
