"""Softmax attention with sinks and its log-sum-exp, in fp32: what is visible, the sum, and the merge of partial sums.

With s the scaled scores of the visible keys, p_j = exp(s_j) / (sum_j exp(s_j) + exp(sink)), out = sum_j p_j v_j and
lse = log sum_j exp(s_j), natural, without the sink. A sink takes part in the denominator only, and once: partial sums
are kept without it and it is applied where they are merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megamoe.errors import ArgumentError


def visible_keys(
    query_positions: Tensor, key_positions: Tensor, *, causal: bool = True, window: int | None = None
) -> Tensor:
    """Which keys each query may see, by position alone.

    Args:
        query_positions: Integer (..., queries).
        key_positions: Integer (..., keys), on the same scale.
        causal: Hide the keys after the query.
        window: Hide the keys `window` or more positions before the query; it counts the query's own position.

    Returns:
        bool (..., queries, keys).
    """
    age = query_positions[..., :, None] - key_positions[..., None, :]
    visible = age >= 0 if causal else torch.ones_like(age, dtype=torch.bool)
    return visible if window is None else visible & (age < window)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, softmax_scale: float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence by the formula of this module; holds all scores at once.

    Args:
        q: (queries, heads, D), any float dtype, taken as fp32.
        k: (keys, kv_heads, D); head h reads kv head h // (heads / kv_heads).
        v: (keys, kv_heads, Dv).
        visible: bool (queries, keys).
        softmax_scale: What the scores are multiplied by.
        sink: fp32 (heads,).

    Returns:
        out fp32 (queries, heads, Dv) and lse fp32 (queries, heads); 0 and -inf where no key is visible.
    """
    queries, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.float().reshape(queries, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("qhgd,khd->qhgk", grouped, k.float()) * softmax_scale
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    p, lse = softmax(scores.flatten(1, 2), sink)
    out = torch.einsum("qhgk,khd->qhgd", p.view(scores.shape), v.float())
    return out.flatten(1, 2), lse


def softmax(scores: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the last dim with a sink in the denominator.

    Args:
        scores: fp32 (..., heads, keys), -inf where hidden.
        sink: fp32 (heads,).

    Returns:
        Probabilities, of the scores' shape, and lse (..., heads) without the sink; 0 and -inf where all is hidden.
    """
    lse = scores.logsumexp(-1)
    shift = lse if sink is None else torch.maximum(lse, sink.float())  # no score and no sink is above it
    shift = shift.masked_fill(shift == -torch.inf, 0.0)[..., None]
    weights = (scores - shift).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink.float()[:, None] - shift).exp()
    return weights / total.masked_fill(total == 0, 1.0), lse


def merge_lse(outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of keys into attention over their union.

    Args:
        outs: One (..., heads, Dv) for each set, each divided by its own denominator, without the sink.
        lses: One (..., heads) for each set, natural log, without the sink; -inf where the set has no visible key.
        sink: fp32 (heads,), applied here.

    Returns:
        out fp32 (..., heads, Dv) and lse fp32 (..., heads), still without the sink; 0 and -inf where no set has a
        visible key.

    Raises:
        ArgumentError: No sets, or not as many `lses` as `outs`.
    """
    if not outs or len(outs) != len(lses):
        raise ArgumentError("lses", f"{len(lses)} for {len(outs)} outs", "one for each of at least one")
    shares, lse = softmax(torch.stack(list(lses), dim=-1).float(), sink)  # a set counts as one key with score lse
    merged = torch.zeros_like(outs[0], dtype=torch.float32)
    for out, share in zip(outs, shares.unbind(-1), strict=True):
        merged += out.float() * share[..., None]
    return merged, lse


def bmm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b with the products exact and the sum in fp32.

    Args:
        a: (batch, m, k).
        b: (batch, k, n), dtype of `a`.

    Returns:
        fp32 (batch, m, n). On CUDA one tensor-core GEMM with an fp32 result; elsewhere the operands are widened.
    """
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
