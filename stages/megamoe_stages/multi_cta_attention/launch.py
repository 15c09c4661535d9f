"""The host side of the fused attention on sm_90a."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.multi_cta_attention import kernel
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.shape import DTYPES, HEADS, Shape, shape_of

LEAST_SCALE = 1e-30  # a scale of 0 would make a hidden score, -inf, NaN; with this one all weights are 1 as well


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sink: Tensor | None,
    mask: Tensor | None,
    out: AttentionOutput,
    *,
    softmax_scale: float,
    causal: bool,
    window: int | None,
    rows: int,
    sms: int,
) -> tuple[object, ...]:
    """The arguments of a kernel whose CTAs take `rows` rows; nothing is empty."""
    queries, heads, _ = q.shape
    kv_heads = k.shape[1]
    tiles = kv_heads * (queries * (heads // kv_heads) // rows + cu_seqlens_q.shape[0] - 1)  # as many as there can be
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale  # the kernel takes the largest product for the largest score
    no_sink, no_mask = nothing(q.device)
    return (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        no_sink if sink is None else sink,
        no_mask if mask is None else mask.view(torch.uint8),
        out.out,
        out.lse,
        max(softmax_scale, LEAST_SCALE),
        int(causal),
        window_argument(q, k, window),
        int(sink is not None),
        min(tiles, sms),
    )


def window_argument(q: Tensor, k: Tensor, window: int | None) -> int:
    """0 for none; one that hides nothing is cut, so that positions less it fit 32 bits."""
    return 0 if window is None else min(window, q.shape[0] + k.shape[0])


@functools.cache
def nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """What goes in the place of a sink and of a mask that are not there; never read."""
    return torch.empty(1, dtype=torch.float32, device=device), torch.empty(1, 1, dtype=torch.uint8, device=device)


@functools.cache
def processors(device: torch.device) -> int:
    """SMs of a GPU; asking takes longer than a launch."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def attend_kernel(shape: Shape) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel.spec(shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    shapes = [shape_of(*head, dtype, masked) for masked in (False, True) for dtype in DTYPES for head in HEADS]
    return [kernel.spec(shape) for shape in shapes if shape is not None]
