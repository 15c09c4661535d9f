"""The same as separate launches: quantise, scatter; gather, decode, two GEMMs and a softmax for each split; merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import E4M3Tensor
from megamoe.numerics.attention import bmm_fp32, merge_lse, visible_keys
from megamoe.numerics.nvfp4 import BLOCK
from megamoe_stages.fp4_kv_decode import contract
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput, Extra
from megamoe_stages.quantize.fallback import quantize

WORKSPACE = 1 << 26  # decoded values held at once, for `splits=0`: 128 MiB of bf16


class Cache(NamedTuple):
    """One side of the cache; `codes` and `scales` are (pages, kv_heads, page, ...)."""

    codes: Tensor
    scales: Tensor
    scale: Tensor


class Keys(NamedTuple):
    """The tokens that rows of queries may look at: one row a sequence, or one a query when indices pick them.

    Attributes:
        slot: int64 (rows, tokens), page * page size + slot; 0 where the token does not exist.
        seen: bool (rows, tokens), some query sees it.
        visible: bool (rows, queries of a row, tokens).
    """

    slot: Tensor
    seen: Tensor
    visible: Tensor

    def part(self, start: int, stop: int) -> Keys:
        """Tokens `start` to `stop`."""
        return Keys(self.slot[:, start:stop], self.seen[:, start:stop], self.visible[..., start:stop])


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
    """See the reference. No device sync: the work is sized by the table (or window, or indices), not by the lengths."""
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
    k_cache = v_cache = Cache(k_codes, k_scales, k_scale)
    if v_codes is not None and v_scales is not None and v_scale is not None:
        v_cache = Cache(v_codes, v_scales, v_scale)
    if k_new is not None:
        _append(k_cache, k_new, block_table, lengths)
    if v_new is not None:
        _append(v_cache, v_new, block_table, lengths)

    batch, queries, heads, _ = q.shape
    v_dim = v_cache.codes.shape[3] * 2
    extra = Extra.of(extra_codes, extra_scales, extra_table, extra_lengths, extra_scale, extra_indices)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    if q.numel():
        keys = _keys(k_cache, block_table, lengths, indices, queries, window)
        outs, lses = _parts(q, k_cache, v_cache, keys, splits, softmax_scale)
        if extra is not None:
            more = Cache(extra.codes, extra.scales, extra.scale)
            entries = _entries(more, extra, queries)
            far, far_lses = _parts(q, more, more, entries, splits, softmax_scale)
            outs, lses = outs + [out * (more.scale / v_cache.scale) for out in far], lses + far_lses
    if not outs:
        lse = torch.full((batch, queries, heads), -torch.inf, device=q.device)
        return DecodeOutput(q.new_zeros(batch, queries, heads, v_dim), lse)
    out, lse = merge_lse(outs, lses, sink)
    out = out * v_cache.scale
    return DecodeOutput(out.to(q.dtype).view(batch, queries, heads, v_dim), lse.view(batch, queries, heads))


def _parts(
    q: Tensor, k_cache: Cache, v_cache: Cache, keys: Keys, splits: int, softmax_scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention over some tokens at a time, `splits` times or as the workspace has it: outs and lses for `merge_lse`.

    Returns:
        out (batch, queries, heads, Dv) without the scale of the values and lse (batch, queries, heads), fp32, of each.
    """
    kv_heads, heads, rows = k_cache.codes.shape[1], q.shape[2], keys.slot.shape[0]
    tokens = keys.slot.shape[1] if k_cache.codes.shape[0] else 0
    dims = k_cache.codes.shape[3] * 2, v_cache.codes.shape[3] * 2
    grouped = q.view(rows, -1, kv_heads, heads // kv_heads, q.shape[3]).transpose(1, 2).contiguous()
    pairs = _pairs(q)
    outs, lses = [], []
    step = -(-tokens // splits) if splits else max(BLOCK, WORKSPACE // (rows * kv_heads * max(dims)))
    for start in range(0, tokens, step):
        part = keys.part(start, min(start + step, tokens))
        out, lse = _partial(grouped, k_cache, v_cache, part, pairs, softmax_scale)
        outs.append(out.view(*q.shape[:3], -1))
        lses.append(lse.view(q.shape[:3]))
    return outs, lses


def _append(cache: Cache, new: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Quantises `new` (batch, new, kv_heads, D) and scatters it into the last token slots of each sequence."""
    count = new.shape[1]
    if new.numel() == 0 or cache.codes.numel() == 0 or block_table.shape[1] == 0:
        return
    quantized = quantize(new, 1.0 / cache.scale)
    positions = lengths[:, None] - count + torch.arange(count, device=lengths.device)
    slot, exists = (x.flatten() for x in _slots(cache, block_table, lengths, positions))  # (batch * count,)
    # A token that is dropped repeats the write of one that is not, since a masked scatter would wait for its count.
    donor = exists.int().argmax()
    source = torch.where(exists, torch.arange(len(exists), device=exists.device), donor)
    rows = _cache_rows(slot[None, source], cache.codes)  # (1, kv_heads, batch * count)
    for side, fresh in ((cache.codes, quantized.codes), (cache.scales, quantized.scales)):
        flat = side.view(torch.uint8).view(-1, side.shape[3])
        data = fresh.view(torch.uint8).flatten(0, 1)[source].transpose(0, 1)  # (kv_heads, batch * count, bytes)
        data = torch.where(exists.any(), data, flat[rows[0]])  # all dropped: write back what is there
        flat.index_copy_(0, rows.flatten(), data.flatten(0, 1))


def _slots(cache: Cache, block_table: Tensor, lengths: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where tokens (rows, tokens) lie, int64 page * page size + slot, and whether they exist."""
    pages, page = cache.codes.shape[0], cache.codes.shape[2]
    exists = (positions >= 0) & (positions < lengths[:, None].clamp(max=block_table.shape[1] * page))
    inside = torch.where(exists, positions, 0).long()
    home = block_table.gather(1, inside // page)
    exists &= (home >= 0) & (home < pages)
    return torch.where(exists, home.long() * page + inside % page, 0), exists


def _keys(
    cache: Cache, block_table: Tensor, lengths: Tensor, indices: Tensor | None, queries: int, window: int | None
) -> Keys:
    """The tokens to look at: the picked ones, those of the window, or all that the table has room for."""
    if indices is not None:
        return _picked(cache, block_table, lengths, indices)
    capacity = block_table.shape[1] * cache.codes.shape[2]
    span = capacity if window is None else min(capacity, window + queries - 1)
    first = 0 if window is None else lengths[:, None].clamp(max=capacity) - span
    positions = first + torch.arange(span, device=lengths.device).expand(len(lengths), span)
    if positions.numel() == 0:
        return _no_keys(positions)
    slot, exists = _slots(cache, block_table, lengths, positions)
    query_positions = lengths[:, None] - queries + torch.arange(queries, device=lengths.device)
    visible = visible_keys(query_positions, positions, window=window) & exists[:, None]
    return Keys(slot, visible.any(1), visible)


def _entries(cache: Cache, extra: Extra, queries: int) -> Keys:
    """The entries of the second cache to look at: the picked ones, or all that the table has room for."""
    if extra.indices is not None:
        return _picked(cache, extra.table, extra.lengths, extra.indices)
    positions = torch.arange(extra.room, device=extra.table.device).expand(len(extra.lengths), -1)
    if positions.numel() == 0:
        return _no_keys(positions)
    slot, exists = _slots(cache, extra.table, extra.lengths, positions)
    return Keys(slot, exists, exists[:, None].expand(-1, queries, -1))


def _picked(cache: Cache, block_table: Tensor, lengths: Tensor, indices: Tensor) -> Keys:
    """The tokens `indices` (batch, queries, n), a row a query."""
    queries, positions = indices.shape[1], indices.flatten(0, 1)
    if positions.numel() == 0 or block_table.shape[1] == 0:
        return _no_keys(positions)
    table, held = block_table.repeat_interleave(queries, 0), lengths.repeat_interleave(queries)
    slot, exists = _slots(cache, table, held, positions)
    return Keys(slot, exists, exists[:, None])


def _no_keys(positions: Tensor) -> Keys:
    empty = positions.new_zeros(positions.shape[0], 0)
    return Keys(empty.long(), empty.bool(), empty.bool()[:, None])


def _cache_rows(slot: Tensor, codes: Tensor) -> Tensor:
    """Slots (rows, tokens) to rows of a (pages * kv_heads * page, bytes) cache: (rows, kv_heads, tokens)."""
    _, kv_heads, page, _ = codes.shape
    head = torch.arange(kv_heads, device=codes.device)[:, None]
    home, within = slot[:, None] // page, slot[:, None] % page
    return (home * kv_heads + head) * page + within


def _gather(cache: Cache, keys: Keys, pairs: Tensor) -> Tensor:
    """Decodes tokens without the global scale, exact in any dtype of `pairs`: (rows * kv_heads, tokens, D)."""
    rows = _cache_rows(keys.slot, cache.codes)
    codes = cache.codes.view(-1, cache.codes.shape[3]).index_select(0, rows.flatten())
    scales = cache.scales.view(torch.uint8).view(-1, cache.scales.shape[3])[rows]
    scales = scales.masked_fill(~keys.seen[:, None, :, None], 0)  # slots that nobody sees may hold NaN
    values = pairs.index_select(0, codes.flatten().int()).view(-1, BLOCK)
    values *= scales.view(torch.float8_e4m3fn).to(pairs.dtype).view(-1, 1)
    return values.view(rows.shape[0] * rows.shape[1], rows.shape[2], -1)


def _pairs(like: Tensor) -> Tensor:
    """The two values of every byte of codes, (256, 2) in the dtype of `like`, made on the device."""
    byte = torch.arange(256, dtype=torch.uint8, device=like.device)
    codes = torch.stack((byte & 0xF, byte >> 4), dim=-1)
    e4m3 = (codes & 8) << 4 | (codes & 7) << 2  # in the fields of an E4M3 the value comes out 64 times too small
    return e4m3.view(torch.float8_e4m3fn).to(like.dtype) * 64


def _partial(
    q: Tensor, k_cache: Cache, v_cache: Cache, keys: Keys, pairs: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q (rows, kv_heads, queries, group, D) over some keys, values without their global scale.

    Returns:
        out fp32 (rows, queries, heads, Dv) and lse fp32 (rows, queries, heads).
    """
    rows, kv_heads, queries, group, head_dim = q.shape
    k = _gather(k_cache, keys, pairs)
    v = k if v_cache is k_cache else _gather(v_cache, keys, pairs)
    scores = bmm_fp32(q.view(rows * kv_heads, queries * group, head_dim), k.transpose(1, 2))
    scores = scores.view(rows, kv_heads, queries, group, -1) * (k_cache.scale * softmax_scale)
    scores.masked_fill_(~keys.visible[:, None, :, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = bmm_fp32(p.to(q.dtype).view(rows * kv_heads, queries * group, -1), v).view(*q.shape[:4], -1)
    out = out / total.masked_fill(total == 0, 1.0)
    lse = (top + total.log()).squeeze(-1)
    return out.transpose(1, 2).flatten(2, 3), lse.transpose(1, 2).flatten(2, 3)
