"""Which rows a CTA of the head_dim 512 kernel has, which keys they see, and where a block of shared memory has them."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute

from megamoe.cute import arith, mask_bits
from megamoe.cute.attention_mma import CHUNK
from megamoe.cute.mask_bits import MaskBits
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention.shape_512 import GROUP, ROW_BYTES, ROWS, TILE, Shape

CHUNKS = ROW_BYTES // CHUNK  # of a row of a block
ROWS_AT_ONCE = WARP // CHUNKS  # of a block, a chunk a lane


class Mask(NamedTuple):
    """A mask of one's own.

    Attributes:
        bits: Of the last `entries` keys of each sequence, or of all.
        entries: Keys without a position: neither causality nor the window hides them; 0 for none.
    """

    bits: MaskBits
    entries: Int32


class Rows(NamedTuple):
    """The rows of a CTA: queries times the heads of a kv head, heads fastest, of one sequence.

    Attributes:
        first: The CTA's first row.
        count: Of the whole sequence.
        group: Heads that share a kv head.
        query: The sequence's first query, among all.
        heads: Of q.
        head: The first of this kv head.
        position: Key that the sequence's query 0 is at.
        keys: Of the sequence, those without a position left out.
        entries: Keys behind them without a position.
        causal: Whether keys behind the query's position are hidden.
        window: Keys that a query sees up to its position; 0 for all.
    """

    first: Int32
    count: Int32
    group: cute.FastDivmodDivisorV2
    query: Int32
    heads: Int32
    head: Int32
    position: Int32
    keys: Int32
    entries: Int32
    causal: Int32
    window: Int32

    def split(self, row: Int32) -> tuple[Int32, Int32]:
        """The query of a row of the sequence, among all, and its head."""
        query, head = divmod(row, self.group)
        return self.query + query, self.head + head

    def place(self, row: Int32) -> Int64:
        """Where in q, in heads, a row of the sequence lies."""
        query, head = self.split(row)
        return Int64(query) * self.heads + head

    def seen(self, row: Int32) -> tuple[Int32, Int32]:
        """Keys that a row of the sequence sees, from one to before another."""
        at = self.position + divmod(row, self.group)[0]
        end = arith.select(self.causal != 0, cutlass.min(at + 1, self.keys), self.keys)
        begin = arith.select(self.window != 0, cutlass.max(at - self.window + 1, 0), Int32(0))
        return begin, end


class Work(NamedTuple):
    """The keys that the CTAs of a cluster go through: tiles from `first` on, with a mask also some from `far` on.

    Attributes:
        first: The first key, of the sequence.
        tiles: Of keys.
        token: The sequence's first key, among all.
        kv_head: Which head of the keys.
        near: Tiles before `far`, whose keys the mask says nothing of; None without a mask.
        far: The first key of the others, and so is `columns`, the key of the mask's first column.
        columns: See `far`.
    """

    first: Int32
    tiles: Int32
    token: Int32
    kv_head: Int32
    near: Int32 | None = None
    far: Int32 | None = None
    columns: Int32 | None = None

    def start(self, tile: Int32) -> Int32:
        """The first key of a tile, of the sequence."""
        start = self.first + tile * TILE
        if self.near is None or self.far is None:
            return start
        return Int32(arith.select(tile < self.near, start, self.far + (tile - self.near) * TILE))

    def seen(self, row: Int32, tile: Int32, rows: Rows) -> tuple[Int32, Int32]:
        """Keys that a row of the sequence may see in a tile, from one to before another."""
        begin, end = rows.seen(row)
        if self.near is None:
            return begin, end
        apart = (rows.entries != 0) & (tile >= self.near)
        return arith.select(apart, rows.keys, begin), arith.select(apart, rows.keys + rows.entries, end)


def lanes() -> tuple[Int32, Int32, Int32]:
    """Row (0..15 of a warp: this and 8 more), pair of columns, and the warp's number in its warpgroup."""
    lane = cute.arch.lane_idx()
    return lane // 4, lane % 4, cute.arch.warp_idx() % (GROUP // WARP)


def chunk_at(area: Int32, row: Int32, chunk: Int32) -> Int32:
    """Where 16 bytes of a row of 128 are: swizzled, so that eight rows are in different banks."""
    return area + row * ROW_BYTES + ((chunk ^ row) & (CHUNKS - 1)) * CHUNK


def work_of(rows: Rows, token: Int32, kv_head: Int32, cluster_first: Int32, mask: Mask | None, shape: Shape) -> Work:
    """The keys that some row of the cluster sees; `cluster_first` is its first row."""
    last = cutlass.min(cluster_first + shape.ctas * ROWS, rows.count) - 1
    start, _ = rows.seen(cluster_first)
    _, end = rows.seen(last)
    if mask is not None:
        shown = mask.bits.last_end(rows.split(cluster_first)[0], rows.split(last)[0])
        return masked_work(rows, token, kv_head, start, end, shown)
    return Work(start, _tiles(end - start), token, kv_head)


def masked_work(rows: Rows, token: Int32, kv_head: Int32, start: Int32, end: Int32, shown: Int32) -> Work:
    """`work_of` where a row sees positions from `start` to before `end`, and the mask `shown` columns."""
    apart = rows.entries != 0
    near = arith.select(apart, _tiles(end - start), Int32(0))
    columns = arith.select(apart, rows.keys, Int32(0))
    far = arith.select(apart, rows.keys, start // mask_bits.TILE * mask_bits.TILE)  # where words start
    stop = columns + cutlass.min(shown, arith.select(apart, rows.entries, end))
    numbers = (start, near + _tiles(stop - far), token, kv_head, near, far, columns)
    return Work(*(cute.arch.make_warp_uniform(number) for number in numbers))  # which takes no registers


def _tiles(keys: Int32) -> Int32:
    return (cutlass.max(keys, 0) + (TILE - 1)) // TILE
