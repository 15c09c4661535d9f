"""How large activations get where they are quantised: measured by `calibrate`, or bounded by the weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4DecoderLayer,
    DeepseekV4RMSNorm,
)

from megamoe.errors import ArgumentError
from megamoe.integrations.transformers.patching import Patches
from megamoe.numerics.nvfp4 import E2M1_MAX, E4M3_MAX, amax


@dataclass(frozen=True)
class LayerScales:
    """Largest magnitude of one layer's activations at each point of quantisation; None takes the default.

    Attributes:
        normed: The experts' input, after the norm.
        product: silu(gate) * up, the input of the experts' second GEMM.
        o: Attention's output after inverse RoPE, the input of wo_a.
        z: Output of wo_a, the input of wo_b.
    """

    normed: float | None = None
    product: float | None = None
    o: float | None = None
    z: float | None = None

    def over(self, defaults: LayerScales) -> LayerScales:
        """These values, with those of `defaults` where there is none."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(defaults, **given)


def encode_scale(largest: float | None, device: torch.device) -> Tensor:
    """The global encode scale 6 * 448 / amax of an activation, fp32 (); 1 where nothing but zeros is expected."""
    return torch.tensor(E2M1_MAX * E4M3_MAX / largest if largest else 1.0, dtype=torch.float32, device=device)


def default_scales(model: DeepseekV4ForCausalLM) -> tuple[LayerScales, ...]:
    """Bounds that hold for every input, from the weights alone, so that nothing ever saturates.

    - normed: an RMS-normalised vector has entries up to sqrt(H), times the largest norm weight.
    - product: |silu(g)| <= limit and |u| <= limit, so limit squared.
    - o: a convex combination of normalised keys of norm up to sqrt(D) * max|w|; rotating keeps the norm.
    - z: the norm of a row of wo_a times the norm of a group's o (Cauchy-Schwarz).

    Typical activations lie one or two decades below; their block scales stay in E4M3's normal range.
    """
    return tuple(_bounds(layer) for layer in model.model.layers)


def key_bound(attention: DeepseekV4Attention, norm: DeepseekV4RMSNorm) -> float:
    """Largest magnitude that a key can have: it leaves `norm` with norm up to sqrt(D) * max|w|, and is then rotated."""
    return math.sqrt(attention.head_dim) * float(norm.weight.detach().abs().max())


def norm_bound(norm: DeepseekV4RMSNorm) -> float:
    """Largest magnitude that can leave an RMS norm: sqrt(H) * max|w|."""
    return math.sqrt(norm.weight.shape[0]) * float(norm.weight.detach().abs().max())


def _bounds(layer: DeepseekV4DecoderLayer) -> LayerScales:
    attention = layer.self_attn
    norms = [attention.kv_norm, *([attention.compressor.kv_norm] if attention.compressor is not None else [])]
    o = max(key_bound(attention, norm) for norm in norms)
    heads_per_group = attention.num_heads // attention.o_a_proj.n_groups
    row_norm = float(attention.o_a_proj.weight.detach().float().norm(dim=1).max())
    return LayerScales(
        normed=norm_bound(layer.post_attention_layernorm),
        product=layer.mlp.experts.limit**2,
        o=o,
        z=row_norm * math.sqrt(heads_per_group) * o,
    )


@torch.no_grad()
def calibrate(model: DeepseekV4ForCausalLM, input_ids: Tensor | Sequence[Tensor]) -> tuple[LayerScales, ...]:
    """Runs the plain model once and records the largest magnitude at each point of quantisation, layer by layer.

    Args:
        model: Not enabled.
        input_ids: int64 (batch, tokens) without padding, or several such batches.

    Returns:
        One LayerScales a layer, for `enable(..., scales=...)`. Text unlike the calibration text may exceed them; what
        does saturates.

    Raises:
        ArgumentError: The model is enabled, so its activations are quantised already, or there is no input.
    """
    from megamoe.integrations.transformers import is_enabled  # the package imports this module

    if is_enabled(model):
        raise ArgumentError("model", "an enabled model", "the plain model; call disable(model) first")
    batches = [input_ids] if isinstance(input_ids, Tensor) else list(input_ids)
    if not batches or any(batch.numel() == 0 for batch in batches):
        raise ArgumentError("input_ids", "no tokens", "at least one token")
    seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    patches = Patches()
    try:
        for layer, record in zip(model.model.layers, seen, strict=True):
            experts, wo_a = layer.mlp.experts, layer.self_attn.o_a_proj
            patches.pre_hook(layer.mlp, functools.partial(_first_input, record, "normed"))
            patches.pre_hook(wo_a, functools.partial(_first_input, record, "o"))
            patches.hook(wo_a, functools.partial(_output, record, "z"))
            patches.set(experts, "_apply_gate", _watched(experts._apply_gate, record, "product"))
        for batch in batches:
            model.model(input_ids=batch, use_cache=False)
    finally:
        patches.undo()
    return tuple(LayerScales(**{name: float(value) for name, value in record.items()}) for record in seen)


def _see(record: dict[str, Tensor], name: str, value: Tensor) -> None:
    largest = amax(value)
    record[name] = torch.maximum(record[name], largest) if name in record else largest


def _first_input(record: dict[str, Tensor], name: str, _module: Any, args: tuple[Any, ...]) -> None:
    _see(record, name, args[0])


def _output(record: dict[str, Tensor], name: str, _module: Any, _args: tuple[Any, ...], out: Tensor) -> None:
    _see(record, name, out)


def _watched(run: Callable[[Tensor], Tensor], record: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def call(gate_up: Tensor) -> Tensor:
        product = run(gate_up)
        _see(record, name, product)
        return product

    return call
