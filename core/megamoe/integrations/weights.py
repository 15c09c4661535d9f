"""NVFP4 weights of a DeepSeek-V4 model's routed experts and output projections."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4Experts

from megamoe.numerics.nvfp4 import NVFP4Tensor, amax, global_scale_enc, quantize

PATIENCE_S = 1.0  # work that takes longer shows a progress bar


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of one layer's routed experts.

    Attributes:
        gate_up: (E, 2I, H), gate rows first; NVFP4 with a global scale (E, 2), one each for gate and up.
        down: (E, H, I); NVFP4 with a global scale (E,).
    """

    gate_up: NVFP4Tensor | Tensor
    down: NVFP4Tensor | Tensor


@dataclass(frozen=True)
class OutputWeights:
    """Weights of one layer's output projections.

    Attributes:
        wo_a: (G, r, K), one matrix per group of heads; NVFP4 with a global scale (G,).
        wo_b: (1, H, G * r); NVFP4 with a global scale (1,).
    """

    wo_a: NVFP4Tensor | Tensor
    wo_b: NVFP4Tensor | Tensor


@dataclass(frozen=True)
class Weights:
    """Prepared weights by layer index; a layer that is missing keeps its own code."""

    experts: Mapping[int, ExpertWeights] = field(default_factory=dict)
    output: Mapping[int, OutputWeights] = field(default_factory=dict)


def exact_weights(model: DeepseekV4ForCausalLM, *, experts: bool = True, output: bool = True) -> Weights:
    """The model's own weights, not quantised and not copied."""
    layers = list(enumerate(model.model.layers))
    return Weights(
        {i: ExpertWeights(*_experts(layer.mlp.experts)) for i, layer in layers} if experts else {},
        {i: OutputWeights(*_projections(layer.self_attn)) for i, layer in layers} if output else {},
    )


@torch.no_grad()
def quantize_weights(
    model: DeepseekV4ForCausalLM,
    *,
    experts: bool = True,
    output: bool = True,
    ready: Mapping[int, ExpertWeights] | None = None,
    console: Console | None = None,
) -> Weights:
    """Quantises the weights of the routed experts, wo_a and wo_b to NVFP4; the model keeps its own.

    Args:
        model: Its weights are read one matrix at a time, so that the fp32 copies stay small.
        experts: Prepare the routed experts.
        output: Prepare wo_a and wo_b.
        ready: Experts by layer that a checkpoint already holds in NVFP4; they are taken as they are.
        console: Where a progress bar goes when this takes longer than a second; default stderr.

    Returns:
        Weights on the device of the model's.
    """
    ready = ready or {}
    layers = list(enumerate(model.model.layers))
    matrices = sum(2 * layer.mlp.experts.num_experts for i, layer in layers if experts and i not in ready)
    matrices += sum(layer.self_attn.o_a_proj.n_groups + 1 for _, layer in layers if output)
    done_experts = dict(ready) if experts else {}
    done_output = {}
    with progress("quantising weights to NVFP4", matrices, console) as advance:
        for i, layer in layers:
            if experts and i not in ready:
                gate_up, down = _experts(layer.mlp.experts)
                done_experts[i] = ExpertWeights(
                    quantize_matrices(gate_up, parts=2, advance=advance), quantize_matrices(down, advance=advance)
                )
            if output:
                wo_a, wo_b = _projections(layer.self_attn)
                done_output[i] = OutputWeights(
                    quantize_matrices(wo_a, advance=advance), quantize_matrices(wo_b, advance=advance)
                )
    return Weights(done_experts, done_output)


def quantize_matrices(weights: Tensor, *, parts: int = 1, advance: Callable[[], None] = lambda: None) -> NVFP4Tensor:
    """Quantises a stack of matrices, each with global scales from its own largest magnitudes.

    Args:
        weights: (E, N, K), any float dtype.
        parts: Equal parts of the N rows that get a global scale each.
        advance: Called after every matrix.

    Returns:
        NVFP4Tensor (E, N, K), linear scales, `global_scale_dec` (E,) or (E, parts).
    """
    done = []
    for matrix in weights.detach():
        enc = global_scale_enc(torch.stack([amax(part) for part in matrix.chunk(parts)]))
        done.append(quantize(matrix.float(), enc[0] if parts == 1 else enc))
        advance()
    return NVFP4Tensor(
        torch.stack([t.codes for t in done]),
        torch.stack([t.scales for t in done]),
        torch.stack([t.global_scale_dec for t in done]),
    )


@contextlib.contextmanager
def progress(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each of `total` steps; shows a bar once they take longer than a second."""
    bar = Progress(console=console or Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total)
    start = time.monotonic()

    def advance() -> None:
        bar.advance(task)
        if not bar.live.is_started and time.monotonic() - start > PATIENCE_S:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()


def _experts(experts: DeepseekV4Experts) -> tuple[Tensor, Tensor]:
    """gate_up (E, 2I, H) and down (E, H, I) of an experts module, not copied."""
    return experts.gate_up_proj.detach(), experts.down_proj.detach()


def _projections(attention: DeepseekV4Attention) -> tuple[Tensor, Tensor]:
    """wo_a (G, r, K) and wo_b (1, H, G * r) of an attention module, not copied."""
    wo_a, wo_b = attention.o_a_proj.weight.detach(), attention.o_b_proj.weight.detach()
    return wo_a.view(attention.o_a_proj.n_groups, -1, wo_a.shape[1]), wo_b[None]
