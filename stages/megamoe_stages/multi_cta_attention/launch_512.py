"""The host side of the head_dim 512 attention on sm_90a."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.multi_cta_attention import kernel_512
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.launch import LEAST_SCALE
from megamoe_stages.multi_cta_attention.shape_512 import SHAPES, Shape


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sink: Tensor | None,
    out: AttentionOutput,
    *,
    softmax_scale: float,
    causal: bool,
    window: int | None,
) -> tuple[object, ...]:
    """The arguments of a kernel; nothing is empty."""
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale  # the kernel takes the largest product for the largest score
    return (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        out.lse.view(-1) if sink is None else sink,
        out.out,
        out.lse.view(-1),
        max(softmax_scale, LEAST_SCALE),
        int(causal),
        0 if window is None else window,
        int(sink is not None),
    )


@functools.cache
def attend_kernel(shape: Shape) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel_512.spec(shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [kernel_512.spec(shape) for shape in SHAPES]
