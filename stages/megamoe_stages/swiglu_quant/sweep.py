"""What `megamoe bench swiglu_quant --sweep` measures: activation and quantisation, the part that is bound by memory.

`--part experts` is the whole op, the first GEMM of DeepSeek-V4's experts: fused, as the same GEMM and a launch for
activation and quantisation, and its fallbacks.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from megamoe.model import Role
from megamoe.nn.weights import rearranged
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.testing import roofline
from megamoe.testing.cases import Bound, Case
from megamoe.testing.roofline import Call, Subject
from megamoe_stages import grouped_gemm
from megamoe_stages.grouped_gemm import sweep as gemm
from megamoe_stages.grouped_gemm.cases import random_alphas, random_nvfp4
from megamoe_stages.quantize.fallback import quantize
from megamoe_stages.quantize.reference import quantize as quantize_reference
from megamoe_stages.swiglu_quant import STAGE, contract, fallback, fused_act
from megamoe_stages.swiglu_quant.reference import swiglu_quant

_LIMIT = 10.0


def make(generator: Generator, *, rows: int, intermediate: int, scale_layout: str) -> dict[str, Any]:
    """Arguments of `fused_act.activate`: gate and up of a few units, a scale that saturates no block."""
    gate_up = 2 * torch.randn(rows, 2 * intermediate, generator=generator)
    return {
        "gate_up": gate_up.bfloat16(),
        "global_scale_enc": torch.tensor(23.7),
        "scale_layout": scale_layout,
    }


def fused(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> NVFP4Tensor:
    """One launch."""
    return fused_act.activate(gate_up, global_scale_enc, limit=_LIMIT, scale_layout=scale_layout)


def separate(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> NVFP4Tensor:
    """What the fallback does after its GEMM."""
    return quantize(fallback.activate(gate_up, None, _LIMIT, "gate_up"), global_scale_enc, scale_layout=scale_layout)


def reference(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> NVFP4Tensor:
    """The definition, from gate and up as they were stored."""
    y = fallback.activate(gate_up, None, _LIMIT, "gate_up")
    return quantize_reference(y, global_scale_enc, scale_layout=scale_layout)


def bytes_moved(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> int:
    """Gate and up read, half a byte a code and a byte a block scale written (padding left out)."""
    results = gate_up.numel() // 2
    return gate_up.numel() * gate_up.element_size() + results // 2 + results // 16


SUBJECT = Subject(
    cases={
        f"{name} {rows}x{half} {layout}": Case(
            make, {"rows": rows, "intermediate": half, "scale_layout": layout}, gpu_only=True
        )
        for name, half in (("flash", 2048), ("pro", 3072))
        for layout in ("linear", "128x4")
        for rows in (1, 64, 4096, 8192, 49152)
    },
    bytes_moved=bytes_moved,
    expected=reference,
    calls=lambda **inputs: {"fused_act": partial(fused, **inputs), "fallback": partial(separate, **inputs)},
    compiled=separate,
    bounds={"out": Bound(3e-3, "`exp` differs by an ulp or two, which moves one code in 10^4 by a step")},
)


def make_experts(generator: Generator, *, model: str, tokens: int, kind: str) -> dict[str, Any]:
    """Arguments of `swiglu_quant`: a new routing that gathers the tokens, the same weights each time, not prepared."""
    sizes = gemm.MODELS[model]
    offsets, row_index = gemm.routing(generator, sizes, tokens)
    plain, _, _ = _weights(model, generator.device.type)
    return {
        "a": gemm.activations(generator, tokens, sizes.hidden, kind),
        "weights": plain,
        "offsets": offsets,
        "global_scale_enc": torch.tensor(26.88),
        "row_index": row_index,
    }


@functools.lru_cache(maxsize=1)
def _weights(model: str, device: str) -> tuple[NVFP4Tensor, NVFP4Tensor, NVFP4Tensor]:
    """(E, 2I, H): plain, prepared for the fused kernel, and prepared with its rows in order."""
    sizes, generator = gemm.MODELS[model], Generator(device).manual_seed(0)
    with torch.device(device):
        plain = random_nvfp4(generator, (sizes.experts, 2 * sizes.intermediate, sizes.hidden))
        plain = replace(plain, global_scale_dec=random_alphas(generator, sizes.experts, 2))
        return plain, rearranged(plain, "gate_up"), rearranged(plain)


def calls(weights: NVFP4Tensor, global_scale_enc: Tensor, **rest: Any) -> dict[str, Call]:
    """The fused variant, the same GEMM and the activation's launch, the fallbacks."""
    model = next(name for name, sizes in gemm.MODELS.items() if sizes.experts == weights.shape[0])
    _, interleaved, in_order = _weights(model, weights.device.type)
    prepared = {**rest, "weights": interleaved, "global_scale_enc": global_scale_enc, "order": "interleaved"}
    found = roofline.variants(STAGE, (Role.FUSED,), **prepared)
    for first in roofline.variants(grouped_gemm.STAGE, (Role.FUSED,), **rest, weights=in_order).values():
        found["separate"] = partial(_activated, first, global_scale_enc)
    given = {**rest, "weights": weights, "global_scale_enc": global_scale_enc}
    return found | roofline.variants(STAGE, (Role.FALLBACK,), **given)


def _activated(first: Call, global_scale_enc: Tensor) -> NVFP4Tensor:
    return fused_act.activate(first(), global_scale_enc, limit=_LIMIT)


def bytes_moved_experts(weights: NVFP4Tensor, row_index: Tensor, **rest: Any) -> int:
    """Weights of the experts that have rows, activations once, codes and block scales of the result."""
    given = {"a": rest["a"], "weights": weights, "offsets": rest["offsets"], "row_index": row_index}
    rows, width = row_index.shape[0], weights.shape[1]
    return gemm.bytes_moved(**given) - 2 * rows * width + rows * width // 2 * 9 // 16


PARTS = {
    "experts": Subject(
        cases={
            f"{model} L1, {kind} activations, T {tokens}": Case(
                make_experts, {"model": model, "tokens": tokens, "kind": kind}, gpu_only=True
            )
            for model, kind in (("flash", "bf16"), ("flash", "nvfp4"), ("pro", "nvfp4"))
            for tokens in gemm.TOKENS
        },
        bytes_moved=bytes_moved_experts,
        flops=lambda global_scale_enc, **rest: gemm.flops(**rest),
        expected=swiglu_quant,
        calls=calls,
        bounds=contract.BOUNDS,
    )
}
