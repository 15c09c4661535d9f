"""The host side of the head_dim 512 attention on sm_90a."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler, mask_bits
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.multi_cta_attention import kernel_512
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.launch import LEAST_SCALE, nothing, window_argument
from megamoe_stages.multi_cta_attention.shape_512 import DTYPES, SHAPES, Shape


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
    entries: int,
    sms: int,
) -> tuple[object, ...]:
    """The arguments of a kernel, `MASKED` with a mask or entries; nothing but a mask of entries is empty."""
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale  # the kernel takes the largest product for the largest score
    return (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        nothing(q.device)[0] if sink is None else sink,
        *mask_arguments(q, k, mask, entries),
        out.out,
        out.lse,
        max(softmax_scale, LEAST_SCALE),
        int(causal),
        window_argument(q, k, window),
        int(sink is not None),
        sms,
    )


def mask_arguments(q: Tensor, k: Tensor, mask: Tensor | None, entries: int) -> tuple[object, ...]:
    """Of `MASKED`: the mask as bytes, room for what it is packed into, and `entries`; of other kernels none."""
    if mask is None:
        if entries == 0:
            return ()
        entries = min(entries, k.shape[0])  # all keys are entries then
        mask = q.new_ones((q.shape[0], entries), dtype=torch.bool)
    queries, columns = mask.shape
    if columns == 0:
        mask, columns = mask.new_zeros((queries, 1)), 1
    words = mask.new_empty((queries, mask_bits.width_of(columns)), dtype=torch.int32)
    return mask.view(torch.uint8), words, entries


@functools.cache
def attend_kernel(shape: Shape) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel_512.spec(shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [kernel_512.spec(shape._replace(dtype=dtype)) for dtype in DTYPES for shape in SHAPES]
