"""Attention over sequences that lie back to back, in plain fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.numerics.attention import masked_attention, visible_keys
from megamoe_stages.multi_cta_attention import contract
from megamoe_stages.multi_cta_attention.contract import AttentionOutput


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
    entries: int = 0,
) -> AttentionOutput:
    """Attention of each sequence's queries over its own keys: see megamoe.numerics.attention for the formula.

    Query i of a sequence with Lq queries and Lk keys sits at key position i + (Lk - Lq). A key is visible when all of
    `causal`, `window` and `mask` let it through. Keys and values must be finite, hidden ones too, if not those of other
    sequences.

    The last `entries` keys of each sequence may be such as have no position, as DeepSeek-V4's compressed entries: they
    are not counted in Lk, neither `causal` nor `window` hides them, and `mask` is of them alone.

    Args:
        q: bf16, fp16 or fp32 (Tq, heads, D).
        k: Same dtype, (Tk, kv_heads, D), heads a multiple of kv_heads; head h reads kv head h // (heads / kv_heads).
        v: Same dtype, (Tk, kv_heads, Dv).
        cu_seqlens_q: int32 (sequences + 1,), rises from 0 to Tq; sequence b owns rows cu[b]:cu[b + 1].
        cu_seqlens_k: int32 (sequences + 1,), the same for k and v.
        sink: fp32 (heads,), a logit that takes part in the denominator only; -inf for none.
        mask: bool (Tq, columns); column j is key j of the query's own sequence, or its entry j where there are some;
            those beyond the last column are hidden.
        softmax_scale: What the scores are multiplied by.
        causal: Hide the keys after the query's position.
        window: Hide the keys `window` or more positions before the query; it counts the query's own position.
        entries: Keys at the end of each sequence that have no position; all of a sequence that has fewer keys.

    Returns:
        out (Tq, heads, Dv) in q's dtype and lse fp32 (Tq, heads) without the sink; 0 and -inf where nothing is visible.

    Raises:
        ArgumentError: An argument of another dtype, shape or device, or not contiguous, or queries of no sequence.
    """
    contract.check(
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
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    q_edges, k_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_edges) - 1):
        queries, keys = slice(q_edges[b], q_edges[b + 1]), slice(k_edges[b], k_edges[b + 1])
        lq, apart = queries.stop - queries.start, min(entries, keys.stop - keys.start)
        lk = keys.stop - keys.start - apart
        key_positions = torch.arange(lk, device=q.device)
        query_positions = torch.arange(lq, device=q.device) + (lk - lq)
        visible = visible_keys(query_positions, key_positions, causal=causal, window=window)
        if entries > 0:
            visible = torch.cat([visible, visible.new_ones(lq, apart)], dim=1)
        if mask is not None:
            masked = visible[:, -apart:] if apart else visible[:, :0] if entries > 0 else visible
            columns = mask[queries, : masked.shape[1]]
            masked &= torch.nn.functional.pad(columns, (0, masked.shape[1] - columns.shape[1]))
        out_b, lse[queries] = masked_attention(
            q[queries], k[keys], v[keys], visible, softmax_scale=softmax_scale, sink=sink
        )
        out[queries] = out_b.to(q.dtype)
    return AttentionOutput(out, lse)
