"""attention_quant as the two ops one after the other, with the output in q's dtype between them."""

from __future__ import annotations

from torch import Tensor

from megamoe_stages.attention_quant import contract
from megamoe_stages.attention_quant.contract import QuantizedAttention
from megamoe_stages.inverse_rope_quant.fallback import inverse_rope_quant
from megamoe_stages.multi_cta_attention.fallback import multi_cta_attention


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
    """See the reference; the output is rounded to q's dtype before it is quantised."""
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
    out = inverse_rope_quant(o, positions, cos, sin, global_scale_enc, groups=groups, scale_layout=scale_layout)
    return QuantizedAttention(out, lse)
