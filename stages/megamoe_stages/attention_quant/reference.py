"""The definition of attention_quant: attention in fp32, then inverse RoPE and quantisation of its fp32 output."""

from __future__ import annotations

from torch import Tensor

from megamoe_stages.attention_quant import contract
from megamoe_stages.attention_quant.contract import QuantizedAttention
from megamoe_stages.inverse_rope_quant.reference import inverse_rope_quant
from megamoe_stages.multi_cta_attention.reference import multi_cta_attention


def attention_quant(
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
    """`multi_cta_attention` followed by `inverse_rope_quant`, whose references say what each does.

    Between them the output stays in fp32: it is not rounded to q's dtype.

    Args:
        q: bf16, fp16 or fp32 (Tq, heads, D).
        k: Same dtype, (Tk, kv_heads, D), heads a multiple of kv_heads.
        v: Same dtype, (Tk, kv_heads, Dv), Dv a multiple of 16.
        cu_seqlens_q: int32 (sequences + 1,), rises from 0 to Tq.
        cu_seqlens_k: int32 (sequences + 1,), the same for k and v.
        positions: int32 or int64 (Tq,), rows of the tables, at which the output is turned back.
        cos: fp32 (P, R/2), R a multiple of 16 and at most Dv.
        sin: fp32 (P, R/2).
        global_scale_enc: fp32 (), encode scale 2688 / amax of the output.
        sink: fp32 (heads,), a logit that takes part in the denominator only.
        mask: bool (Tq, columns), as for `multi_cta_attention`.
        softmax_scale: What the scores are multiplied by.
        groups: Groups G of heads, a divisor of their number.
        causal: Hide the keys after the query's position.
        window: Hide the keys `window` or more positions before the query.
        entries: Keys at the end of each sequence without a position, as for `multi_cta_attention`.
        scale_layout: Layout of the block scales, "linear" or "128x4".

    Returns:
        NVFP4 of logical shape (G, Tq, heads / G * Dv), and lse fp32 (Tq, heads) without the sink.

    Raises:
        ArgumentError: An argument does not fit.

    Source: HF modeling_deepseek_v4.py, `DeepseekV4Attention.forward`.
    """
    contract.check(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        positions,
        cos,
        sin,
        global_scale_enc,
        sink,
        mask,
        softmax_scale=softmax_scale,
        groups=groups,
        causal=causal,
        window=window,
        entries=entries,
        scale_layout=scale_layout,
    )
    o, lse = multi_cta_attention(
        q.float(),
        k.float(),
        v.float(),
        cu_seqlens_q,
        cu_seqlens_k,
        sink,
        mask,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        entries=entries,
    )
    out = inverse_rope_quant(o, positions, cos, sin, global_scale_enc, groups=groups, scale_layout=scale_layout)
    return QuantizedAttention(out, lse)
