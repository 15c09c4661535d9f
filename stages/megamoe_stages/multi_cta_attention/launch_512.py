"""The host side of the head_dim 512 attention on sm_90a."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.multi_cta_attention import kernel_512
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.launch import LEAST_SCALE
from megamoe_stages.multi_cta_attention.shape_512 import DIM, SHAPES, Shape


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
    sms: int,
) -> tuple[object, ...]:
    """The arguments of a kernel; nothing is empty."""
    heads = q.shape[1]
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale  # the kernel takes the largest product for the largest score
    return (
        q.view(-1, DIM),
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        out.lse.view(-1) if sink is None else sink,
        out.out.view(-1, DIM),
        out.lse.view(-1),
        (out.lse if mask is None else mask).view(torch.uint8),
        max(softmax_scale, LEAST_SCALE),
        heads,
        int(causal),
        0 if window is None else window,
        int(sink is not None),
        sms,
    )


@functools.cache
def attend_kernel(shape: Shape) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel_512.spec(shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [kernel_512.spec(shape) for shape in SHAPES]
