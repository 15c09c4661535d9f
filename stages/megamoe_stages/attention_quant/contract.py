"""What attention_quant accepts, what choosing may look at, and how far a variant may be from the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import INDICES, bucket, check_multiple, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, check_scale_layout
from megamoe.testing.cases import Bound
from megamoe_stages.multi_cta_attention import contract as attention
from megamoe_stages.quantize import contract as quantize

BOUNDS: Mapping[str, Bound] = {
    "out": Bound(6e-2, "attention's error moves values and block scales over rounding borders, a whole step each"),
    "lse": attention.BOUNDS["lse"],
}


class QuantizedAttention(NamedTuple):
    """What attention_quant returns.

    Attributes:
        out: NVFP4 of logical shape (G, Tq, heads / G * Dv); 0 where no key is visible.
        lse: fp32 (Tq, heads), natural log of the sum of exp(scaled score), without the sink; -inf where no key is
            visible.
    """

    out: NVFP4Tensor
    lse: Tensor


class Problem(NamedTuple):
    """Facts that choosing a variant may look at.

    Attributes:
        device: Where the tensors live.
        dtype: Of q, k and v.
        head_dim: D.
        v_dim: Dv.
        heads: Of q.
        kv_heads: Of k and v.
        queries: Tq, as a bucket.
        keys: Tk, as a bucket.
        masked: Whether there is a mask.
        causal: As asked.
        rope_dim: Rotated dims at the end of each head.
        groups: Of heads.
        scale_layout: As asked.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    masked: bool
    causal: bool
    rope_dim: int
    groups: int
    scale_layout: str


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    groups: int,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
    scale_layout: str = "linear",
) -> None:
    """Raises ArgumentError for what the op does not accept; looks at metadata only."""
    attention.check(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        sink,
        mask,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        entries=entries,
    )
    queries, heads, _ = q.shape
    v_dim = v.shape[2]
    check_multiple("v", v_dim, BLOCK, "values a head")
    check_tensor("positions", positions, (queries,), INDICES, like=q)
    check_tensor("cos", cos, ("P", "R/2"), (torch.float32,), like=q)
    rope_dim = 2 * cos.shape[1]
    check_multiple("cos", rope_dim, BLOCK, "rotated dims per head")
    if rope_dim > v_dim:
        raise ArgumentError("cos", f"{rope_dim} rotated dims per head", f"at most {v_dim}, the dims of a head of v")
    check_tensor("sin", sin, tuple(cos.shape), (torch.float32,), like=q)
    check_tensor("global_scale_enc", global_scale_enc, (), (torch.float32,), like=q)
    if not isinstance(groups, int) or groups < 1 or heads < 1 or heads % groups:
        raise ArgumentError("groups", groups, f"a positive divisor of the {heads} heads of q")
    check_scale_layout(scale_layout)


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    groups: int,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
    scale_layout: str = "linear",
) -> Problem:
    """The facts of one call."""
    queries, heads, head_dim = q.shape
    keys, kv_heads, v_dim = v.shape
    sizes = (head_dim, v_dim, heads, kv_heads, bucket(queries), bucket(keys))
    return fast_problem(
        Problem,
        (q.device, q.dtype, *sizes, mask is not None, causal, 2 * cos.shape[1], groups, scale_layout),
    )


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    softmax_scale: float,
    groups: int,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
    scale_layout: str = "linear",
) -> QuantizedAttention:
    """Outputs of the right shapes and dtypes, not filled."""
    queries, heads, _ = q.shape
    rotated = v.new_empty((groups, queries, heads // groups * v.shape[2]))
    out = quantize.fake(rotated, global_scale_enc, scale_layout=scale_layout)
    return QuantizedAttention(out, q.new_empty((queries, heads), dtype=torch.float32))
