"""What `megamoe bench grouped_gemm --sweep` measures: the second GEMM of DeepSeek-V4's experts."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import grouped_mm

from megamoe.model import Role
from megamoe.nn.weights import rearranged
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe.testing import roofline
from megamoe.testing.cases import Case
from megamoe.testing.roofline import Call, Subject
from megamoe_stages.grouped_gemm import STAGE, contract
from megamoe_stages.grouped_gemm.cases import random_alphas, random_nvfp4
from megamoe_stages.grouped_gemm.reference import grouped_gemm

TOKENS = (1, 8, 32, 64, 128, 512, 2048, 8192)


class Model(NamedTuple):
    """Sizes of a model's expert layers."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int = 6


MODELS = {"flash": Model(4096, 2048, 256), "pro": Model(7168, 3072, 384), "tiny": Model(128, 64, 8)}


class Routing(NamedTuple):
    """Which rows each expert has, and the token of each row."""

    offsets: Tensor  # (E + 1,) int32
    row_index: Tensor  # (M,) int32


def routing(generator: Generator, model: Model, tokens: int) -> Routing:
    """Each token's experts drawn without replacement, all alike."""
    picks = torch.rand(tokens, model.experts, generator=generator).topk(model.top_k).indices.flatten()
    ends = torch.bincount(picks, minlength=model.experts).cumsum(0)
    order = picks.sort(stable=True).indices
    return Routing(torch.nn.functional.pad(ends, (1, 0)).int(), (order // model.top_k).int())


def activations(generator: Generator, rows: int, k: int, kind: str) -> Tensor | NVFP4Tensor:
    """Normal "bf16" ones, or random "nvfp4" ones, (rows, K)."""
    if kind == "bf16":
        return torch.randn(rows, k, generator=generator).bfloat16()
    return replace(random_nvfp4(generator, (rows, k)), global_scale_dec=torch.tensor(0.0123))


def make(generator: Generator, *, model: str, tokens: int, kind: str) -> dict[str, Any]:
    """Arguments of `grouped_gemm`: a new routing, the same weights each time, not yet prepared."""
    sizes = MODELS[model]
    offsets, _ = routing(generator, sizes, tokens)
    a = activations(generator, tokens * sizes.top_k, sizes.intermediate, kind)
    plain, _, _ = _weights(model, generator.device.type)
    return {"a": a, "weights": plain, "offsets": offsets}


@functools.lru_cache(maxsize=1)
def _weights(model: str, device: str) -> tuple[NVFP4Tensor, NVFP4Tensor, Tensor]:
    """(E, H, I): plain, prepared, and in bf16."""
    sizes, generator = MODELS[model], Generator(device).manual_seed(0)
    with torch.device(device):
        plain = random_nvfp4(generator, (sizes.experts, sizes.hidden, sizes.intermediate))
        plain = replace(plain, global_scale_dec=random_alphas(generator, sizes.experts, 1))
        return plain, rearranged(plain), to_bf16(plain)


def to_bf16(weights: NVFP4Tensor) -> Tensor:
    """Dequantised expert by expert, for the memory."""
    out = torch.empty(weights.shape, dtype=torch.bfloat16, device=weights.device)
    for e in range(out.shape[0]):
        one = NVFP4Tensor(weights.codes[e], weights.scales[e], weights.global_scale_dec[e])
        out[e] = dequantize(one, torch.bfloat16)
    return out


def calls(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor) -> dict[str, Call]:
    """The fused variant on prepared weights, the fallback on plain ones, torch's grouped GEMM of bf16."""
    model = next(name for name, sizes in MODELS.items() if sizes.experts == weights.shape[0])
    _, prepared, plain16 = _weights(model, weights.device.type)
    a16 = dequantize(a, torch.bfloat16) if isinstance(a, NVFP4Tensor) else a
    return {
        **roofline.variants(STAGE, (Role.FUSED,), a=a, weights=prepared, offsets=offsets),
        "torch grouped_mm, bf16": lambda: grouped_mm(a16, plain16.mT, offs=offsets[1:]),
        **roofline.variants(STAGE, (Role.FALLBACK,), a=a, weights=weights, offsets=offsets),
    }


def bytes_moved(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None) -> int:
    """Weights of the experts that have rows, activations and result, once each."""
    live = int((offsets.diff() > 0).sum())
    _, n, k = weights.shape
    rows = contract.rows_of(a, row_index)
    given = a.shape[0] * k * 9 // 16 if isinstance(a, NVFP4Tensor) else a.numel() * a.element_size()
    return live * n * k * 9 // 16 + given + rows * n * 2


def flops(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None) -> int:
    """2 M N K."""
    _, n, k = weights.shape
    return 2 * contract.rows_of(a, row_index) * n * k


SUBJECT = Subject(
    cases={
        f"{model} L2, {kind} activations, T {tokens}": Case(
            make, {"model": model, "tokens": tokens, "kind": kind}, gpu_only=True
        )
        for model, kind in (("flash", "bf16"), ("flash", "nvfp4"), ("pro", "nvfp4"))
        for tokens in TOKENS
    },
    bytes_moved=bytes_moved,
    flops=flops,
    expected=grouped_gemm,
    calls=calls,
    bounds=contract.BOUNDS,
)
