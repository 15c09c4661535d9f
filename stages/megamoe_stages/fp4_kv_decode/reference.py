"""Appending to an NVFP4 KV cache and attending over it, in plain fp32, one sequence after another."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.contracts import E4M3Tensor
from megamoe.numerics.attention import masked_attention, visible_keys
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize, quantize
from megamoe_stages.fp4_kv_decode import contract
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput, Extra


def fp4_kv_decode(
    q: Tensor,
    k_codes: Tensor,
    k_scales: E4M3Tensor,
    block_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor,
    v_codes: Tensor | None = None,
    v_scales: E4M3Tensor | None = None,
    v_scale: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    sink: Tensor | None = None,
    indices: Tensor | None = None,
    extra_codes: Tensor | None = None,
    extra_scales: E4M3Tensor | None = None,
    extra_table: Tensor | None = None,
    extra_lengths: Tensor | None = None,
    extra_scale: Tensor | None = None,
    extra_indices: Tensor | None = None,
    *,
    softmax_scale: float,
    window: int | None = None,
    splits: int = 0,
) -> DecodeOutput:
    """Writes the new tokens into the cache, then attends over it: see megamoe.numerics.attention for the formula.

    Token t of sequence b lies in slot t % page of page block_table[b, t // page]; its value is E2M1 * E4M3 * scale. A
    token exists when 0 <= t < lengths[b], it lies within the table and its page is one of the cache's; a new token that
    would not exist is dropped. Query i of sequence b sits at position lengths[b] - queries + i. What lies in a slot
    that no query of its sequence sees never matters, be it NaN: slots past the end or before the window may be as they
    are.

    A second cache (`extra_`; DeepSeek-V4's compressed entries beside the window) joins the same softmax: entry t of it
    exists by the same rule, and every query sees each one, or those that `extra_indices` picks for it. It shares no
    memory with the first one where tokens are appended: a variant may read it while they are written.

    The cache is written in place; a page must belong to one sequence. `contract.check_values` checks, for debugging,
    what is only known from values.

    Args:
        q: bf16, fp16 or fp32 (batch, queries, heads, D); 0 queries only append.
        k_codes: uint8 (pages, kv_heads, page, D/2), written in place; head h reads kv head h // (heads / kv_heads).
        k_scales: float8_e4m3fn (pages, kv_heads, page, D/16), linear, written in place.
        block_table: int32 (batch, max_pages), -1 where there is no page.
        lengths: int32 (batch,), cached tokens of each sequence, the new ones included.
        k_scale: fp32 (), decode scale of the keys. The usual convention, amax / 448, is the caller's to keep.
        v_codes: uint8 (pages, kv_heads, page, Dv/2), written in place; None when the keys are the values.
        v_scales: float8_e4m3fn (pages, kv_heads, page, Dv/16), written in place.
        v_scale: fp32 (), decode scale of the values.
        k_new: bf16, fp16 or fp32 (batch, new, kv_heads, D): tokens lengths - new to lengths - 1, quantised by the
            recipe of megamoe.numerics.nvfp4 with the encode scale 1 / k_scale.
        v_new: (batch, new, kv_heads, Dv), with v_codes only.
        sink: fp32 (heads,), a logit that takes part in the denominator only; -inf for none.
        indices: int32 (batch, queries, n): the tokens that each query sees, -1 for none, no token twice. Positions
            (causality) and `window` then play no part.
        extra_codes: uint8 (extra pages, kv_heads, extra page, D/2), keys that are the values; None for no second cache,
            and with v_codes. Nothing is appended to it; see above.
        extra_scales: float8_e4m3fn (extra pages, kv_heads, extra page, D/16).
        extra_table: int32 (batch, extra max_pages).
        extra_lengths: int32 (batch,), its entries.
        extra_scale: fp32 (), its decode scale.
        extra_indices: int32 (batch, queries, m): the entries that each query sees, as `indices`; None for all.
        softmax_scale: What the scores are multiplied by.
        window: Hide the tokens `window` or more positions before the query; it counts the query's own position.
        splits: Into how many parts the keys are split; 0 leaves it to the variant, and the reference never splits.

    Returns:
        out (batch, queries, heads, Dv) in q's dtype and lse fp32 (batch, queries, heads) without the sink; 0 and -inf
        where nothing is visible.

    Raises:
        ArgumentError: An argument of another dtype, shape or device, or not contiguous; a second cache in the memory
            that new tokens are written to.
    """
    contract.check(
        q,
        k_codes,
        k_scales,
        block_table,
        lengths,
        k_scale,
        v_codes,
        v_scales,
        v_scale,
        k_new,
        v_new,
        sink,
        indices,
        extra_codes,
        extra_scales,
        extra_table,
        extra_lengths,
        extra_scale,
        extra_indices,
        softmax_scale=softmax_scale,
        window=window,
        splits=splits,
    )
    if k_new is not None:
        _append(k_codes, k_scales, k_scale, k_new, block_table, lengths)
    if v_codes is not None and v_scales is not None and v_scale is not None and v_new is not None:
        _append(v_codes, v_scales, v_scale, v_new, block_table, lengths)

    extra = Extra.of(extra_codes, extra_scales, extra_table, extra_lengths, extra_scale, extra_indices)
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, q.shape[3] if v_codes is None else v_codes.shape[3] * 2)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        tokens = min(length, block_table.shape[1] * k_codes.shape[2])
        k, exists = _read(k_codes, k_scales, k_scale, block_table[b], tokens)
        v = k
        if v_codes is not None and v_scales is not None and v_scale is not None:
            v, _ = _read(v_codes, v_scales, v_scale, block_table[b], tokens)
        if indices is None:
            query_positions = torch.arange(queries, device=q.device) + (length - queries)
            visible = visible_keys(query_positions, torch.arange(tokens, device=q.device), window=window)
        else:
            visible = _picked(indices[b], tokens)
        visible &= exists
        if extra is not None:
            entries = min(int(extra.lengths[b]), extra.room)
            more, exists = _read(extra.codes, extra.scales, extra.scale, extra.table[b], entries)
            seen = exists.expand(queries, -1)
            if extra.indices is not None:
                seen = seen & _picked(extra.indices[b], entries)
            k = v = torch.cat([k, more])
            visible = torch.cat([visible, seen], dim=-1)
        v = v.masked_fill(~visible.any(0)[:, None, None], 0.0)  # may hold NaN where nobody looks
        out_b, lse[b] = masked_attention(q[b], k, v, visible, softmax_scale=softmax_scale, sink=sink)
        out[b] = out_b.to(q.dtype)
    return DecodeOutput(out, lse)


def _append(codes: Tensor, scales: Tensor, scale: Tensor, new: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Quantises `new` (batch, new, kv_heads, D) into the last token slots of each sequence."""
    page, table = codes.shape[2], block_table.tolist()
    quantized = quantize(new, 1.0 / scale)
    for b, length in enumerate(lengths.tolist()):
        for i in range(new.shape[1]):
            t = length - new.shape[1] + i
            home = table[b][t // page] if 0 <= t < len(table[b]) * page else -1
            if 0 <= home < codes.shape[0]:
                codes[home, :, t % page] = quantized.codes[b, i]
                scales[home, :, t % page] = quantized.scales[b, i]


def _read(codes: Tensor, scales: Tensor, scale: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The first `tokens` tokens of one sequence: fp32 (tokens, kv_heads, D), 0 where none exists; bool (tokens,)."""
    page = codes.shape[2]
    homes = [h if h < codes.shape[0] else -1 for h in table[: -(-tokens // page)].tolist()]
    own_codes = codes.new_zeros(len(homes), *codes.shape[1:])
    own_scales = scales.new_zeros(len(homes), *scales.shape[1:])
    for i, home in enumerate(homes):
        if home >= 0:
            own_codes[i], own_scales[i] = codes[home], scales[home]
    values = dequantize(NVFP4Tensor(own_codes, own_scales, scale))  # (pages of this sequence, kv_heads, page, D)
    exists = torch.tensor([h >= 0 for h in homes], dtype=torch.bool, device=codes.device).repeat_interleave(page)
    return values.transpose(1, 2).flatten(0, 1)[:tokens], exists[:tokens]


def _picked(indices: Tensor, tokens: int) -> Tensor:
    """Token positions (queries, n), -1 for none, to visible (queries, tokens)."""
    within = torch.where((indices >= 0) & (indices < tokens), indices, tokens).long()  # one column for the rest
    visible = torch.zeros(len(indices), tokens + 1, dtype=torch.bool, device=indices.device)
    return visible.scatter_(1, within, value=True)[:, :tokens]
