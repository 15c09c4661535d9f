"""Attention as separate launches: two GEMMs and an online softmax for each tile of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.numerics.attention import bmm_fp32, visible_keys
from megamoe_stages.multi_cta_attention import contract
from megamoe_stages.multi_cta_attention.contract import AttentionOutput

KEY_TILE = 512
WORKSPACE = 1 << 25  # fp32 scores held at once: 128 MiB


class Segment(NamedTuple):
    """Rows whose scores are computed together; `single` when they are one sequence, so tiles can be skipped."""

    q0: int
    q1: int
    k0: int
    k1: int
    single: bool


class Rows(NamedTuple):
    """Where each row of q or k belongs: its sequence, its position among that sequence's keys, its column of the mask.

    Of keys with entries behind them the column is negative, of queries it is the position.
    """

    sequence: Tensor
    position: Tensor
    column: Tensor


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
    """See the reference. Never holds more than WORKSPACE scores; no device sync for one sequence or under capture."""
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
    queries, heads, _ = q.shape
    out = q.new_zeros(queries, heads, v.shape[2])
    lse = torch.full((queries, heads), -torch.inf, dtype=torch.float32, device=q.device)
    query_rows, key_rows = _locate(cu_seqlens_q, cu_seqlens_k, queries, k.shape[0], entries)
    query_tile = max(1, WORKSPACE // (heads * KEY_TILE))
    for segment in _segments(cu_seqlens_q, cu_seqlens_k, queries, k.shape[0]):
        for start in range(segment.q0, segment.q1, query_tile):
            rows = slice(start, min(start + query_tile, segment.q1))
            softmax = OnlineSoftmax(q[rows], k.shape[1], v.shape[2])
            for keys in _key_tiles(segment, rows, causal, window, entries):
                visible = _visible(query_rows, key_rows, rows, keys, mask, causal, window, entries > 0)
                softmax.add(k[keys], v[keys], visible, softmax_scale)
            out[rows], lse[rows] = softmax.finish(sink)
    return AttentionOutput(out, lse)


class OnlineSoftmax:
    """Attention of one tile of queries, fed one tile of keys after another.

    Args:
        q: (queries, heads, D).
        kv_heads: Number of kv heads.
        v_dim: Values a head.
    """

    def __init__(self, q: Tensor, kv_heads: int, v_dim: int) -> None:
        queries, heads, head_dim = q.shape
        grouped = q.view(queries, kv_heads, heads // kv_heads, head_dim).transpose(0, 1)
        self.q = grouped.reshape(kv_heads, -1, head_dim)  # (kv_heads, queries * group, D)
        self.queries = queries
        rows = self.q.shape[:2]
        self.top = torch.full(rows, -torch.inf, dtype=torch.float32, device=q.device)  # running maximum
        self.sum = torch.zeros(rows, dtype=torch.float32, device=q.device)
        self.acc = torch.zeros(*rows, v_dim, dtype=torch.float32, device=q.device)

    def add(self, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> None:
        """Takes in keys (keys, kv_heads, D), values (keys, kv_heads, Dv) and visible (queries, keys)."""
        scores = bmm_fp32(self.q, k.permute(1, 2, 0)).mul_(softmax_scale)
        hidden = ~visible[None, :, None, :]
        scores.view(len(scores), self.queries, -1, k.shape[0]).masked_fill_(hidden, -torch.inf)
        top = torch.maximum(self.top, scores.amax(-1))
        shift = top.masked_fill(top == -torch.inf, 0.0)  # nothing visible yet: keeps exp(-inf - shift) at 0
        p = scores.sub_(shift[..., None]).exp_()
        rescale = (self.top - shift).exp()
        self.sum = self.sum * rescale + p.sum(-1)
        self.acc = self.acc * rescale[..., None] + bmm_fp32(p.to(v.dtype), v.transpose(0, 1))
        self.top = top

    def finish(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        """Out (queries, heads, Dv) and lse (queries, heads), fp32."""
        lse = self._by_head(self.top + self.sum.log())
        top, total, acc = self._by_head(self.top), self._by_head(self.sum), self._by_head(self.acc)
        if sink is not None:
            shift = torch.maximum(top, sink)
            shift = shift.masked_fill(shift == -torch.inf, 0.0)
            rescale = (top - shift).exp()
            total, acc = total * rescale + (sink - shift).exp(), acc * rescale[..., None]
        return acc / total.masked_fill(total == 0, 1.0)[..., None], lse

    def _by_head(self, x: Tensor) -> Tensor:
        """(kv_heads, queries * group, ...) to (queries, heads, ...)."""
        kv_heads, rows = x.shape[:2]
        return x.view(kv_heads, self.queries, rows // self.queries, *x.shape[2:]).transpose(0, 1).flatten(1, 2)


def _locate(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int, entries: int) -> tuple[Rows, Rows]:
    placed = (cu_k.diff() - entries).clamp(min=0)  # keys with a position
    lead = placed - cu_q.diff()  # key position of each sequence's first query
    query, key = torch.arange(queries, device=cu_q.device), torch.arange(keys, device=cu_k.device)
    query_sequence = torch.searchsorted(cu_q[1:], query, right=True)
    key_sequence = torch.searchsorted(cu_k[1:], key, right=True)
    query_position = query - cu_q[:-1][query_sequence] + lead[query_sequence]
    key_position = key - cu_k[:-1][key_sequence]
    column = key_position - placed[key_sequence] if entries > 0 else key_position
    return Rows(query_sequence, query_position, query_position), Rows(key_sequence, key_position, column)


def _segments(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> list[Segment]:
    sequences = cu_q.shape[0] - 1
    if sequences == 1:
        return [Segment(0, queries, 0, keys, single=True)]
    if sequences == 0 or (cu_q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return [Segment(0, queries, 0, keys, single=False)]  # lengths unknown: every query meets every key, masked
    q_edges, k_edges = torch.stack((cu_q, cu_k)).tolist()
    edges = zip(q_edges[:-1], q_edges[1:], k_edges[:-1], k_edges[1:], strict=True)
    return [Segment(*edge, single=True) for edge in edges]


def _key_tiles(segment: Segment, rows: slice, causal: bool, window: int | None, entries: int) -> Iterator[slice]:
    """Tiles of keys that some query of `rows` may see."""
    first, last, apart = segment.k0, segment.k1, segment.k1
    if segment.single:
        last = apart = max(segment.k0, segment.k1 - entries)
        lead = last - segment.q1  # key row minus query row where positions are equal
        if causal:
            last = min(last, rows.stop + lead)
        if window is not None:
            first = max(first, rows.start + lead - window + 1)
    for begin, end in ((first, last), (apart, segment.k1)):
        for start in range(begin, end, KEY_TILE):
            yield slice(start, min(start + KEY_TILE, end))


def _visible(
    query_rows: Rows,
    key_rows: Rows,
    rows: slice,
    keys: slice,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    apart: bool,
) -> Tensor:
    columns = key_rows.column[keys]
    visible = visible_keys(query_rows.position[rows], key_rows.position[keys], causal=causal, window=window)
    if apart:
        visible |= columns >= 0
    visible &= query_rows.sequence[rows, None] == key_rows.sequence[keys]
    if mask is not None:
        width = mask.shape[1]
        padded = torch.nn.functional.pad(mask[rows], (0, 1))  # one hidden column for the keys beyond the mask
        picked = padded.index_select(1, columns.clamp(min=0, max=width))
        visible &= picked | (columns < 0) if apart else picked
    return visible
