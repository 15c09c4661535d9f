"""`multi_cta_attention` on Hopper (sm_90a)."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import check_readable, dtype_name
from megamoe.errors import ArgumentError
from megamoe_stages.multi_cta_attention import contract, launch, launch_512, limits, shape_512
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.shape import shape_of


def multi_cta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
) -> AttentionOutput:
    """See the reference and `limits.supports`; one launch, on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and data not aligned to 16 bytes.
    """
    contract.check(
        q, k, v, cu_seqlens_q, cu_seqlens_k, sink, mask, softmax_scale=softmax_scale, causal=causal, window=window
    )
    masked = mask is not None
    wide = shape_512.shape_for(window) if q.shape[2] == shape_512.DIM else None
    shape = shape_of(q.shape[2], v.shape[2], dtype_name(q), masked=masked) if wide is None else wide
    head = {"head_dim": q.shape[2], "v_dim": v.shape[2]}
    if (reasons := limits.supports({"dtype": dtype_name(q), "masked": masked, **head})) or shape is None:
        raise ArgumentError("multi_cta_attention", "; ".join(reasons), "what this kernel supports")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel():
            check_readable(name, tensor)
    out = contract.fake(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale)
    if q.numel() == 0 or k.numel() == 0 or (mask is not None and mask.numel() == 0):
        out.out.zero_()
        out.lse.fill_(-torch.inf)
        return out
    if isinstance(shape, shape_512.Shape):
        given = (q, k, v, cu_seqlens_q, cu_seqlens_k, sink, out)
        arguments = launch_512.attend(*given, softmax_scale=softmax_scale, causal=causal, window=window)
        launch_512.attend_kernel(shape)(*arguments)
        return out
    arguments = launch.attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        sink,
        mask,
        out,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        rows=shape.rows,
        sms=launch.processors(q.device),
    )
    launch.attend_kernel(shape)(*arguments)
    return out


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return launch.kernels() + launch_512.kernels()
