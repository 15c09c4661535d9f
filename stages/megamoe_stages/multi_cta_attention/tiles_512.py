"""Which rows a CTA of the head_dim 512 kernel has."""

from __future__ import annotations

import cutlass
from cutlass import Boolean, Constexpr, Int32, cute

from megamoe.cute import arith
from megamoe.cute.varlen import Sequences, Tile
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention.shape_512 import GROUP, ROWS, Shape


def lanes() -> tuple[Int32, Int32, Int32]:
    """Row (0..15 of a warp: this and 8 more), pair of columns, and the warp's number in its warpgroup."""
    lane = cute.arch.lane_idx()
    return lane // 4, lane % 4, cute.arch.warp_idx() % (GROUP // WARP)


def pieces_of(queries: Int32, group: Int32, shape: Shape) -> Int32:
    """Clusters that the rows of a sequence and kv head take."""
    return (queries * group + (shape.ctas * ROWS - 1)) // (shape.ctas * ROWS)


def tile_of(sequence: Int32, piece: Int32, rank: Int32, kv_head: Int32, sequences: Sequences, shape: Shape) -> Tile:
    """The rows of a CTA, `rank` in its cluster, and the keys that some row of the cluster sees."""
    first_query, first_key = sequences.cu_q[sequence], sequences.cu_k[sequence]
    queries, keys = sequences.cu_q[sequence + 1] - first_query, sequences.cu_k[sequence + 1] - first_key
    rows = shape.ctas * ROWS
    shown = keys if sequences.columns is None else cutlass.min(keys, sequences.columns)
    cluster = Tile(
        query=first_query,
        first=piece * rows,
        rows=queries * sequences.group,
        lead=keys - queries,
        key=first_key,
        begin=Int32(0),
        end=shown,
        kv_head=kv_head,
    )
    begin, _ = cluster.seen(Int32(0), shown, sequences)
    _, end = cluster.seen(cutlass.min(Int32(rows), cluster.rows - cluster.first) - 1, shown, sequences)
    return cluster._replace(first=piece * rows + rank * ROWS, begin=cutlass.max(begin, 0), end=end)


@cute.jit
def find_piece(number: Int32, sequences: Constexpr[Sequences], shape: Constexpr[Shape]) -> tuple[Int32, Int32]:
    """The sequence and piece of rows that come as `number` of a kv head; those that see most keys first.

    A number behind the last piece gives a sequence behind the last one. The whole warp looks together.
    """
    count = cute.size(sequences.cu_q) - 1
    lane = cute.arch.lane_idx()
    first, before, found = Int32(0), Int32(0), Boolean(False)
    sequence, piece = count, Int32(0)
    while (first < count) & ~found:
        at = cutlass.min(first + lane, count - 1)
        queries = arith.select(first + lane < count, sequences.cu_q[at + 1] - sequences.cu_q[at], Int32(0))
        own = pieces_of(queries, sequences.group, shape)
        upto = own
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(upto, offset=1 << i, mask_and_clamp=0)
            upto = arith.select(lane >= (1 << i), upto + below, upto)
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(before + upto <= number))
        found = passed < WARP
        here = cutlass.min(passed, WARP - 1)
        piece = before + cute.arch.shuffle_sync(upto, here) - 1 - number
        sequence = arith.select(found, first + passed, count)
        before = before + cute.arch.shuffle_sync(upto, WARP - 1)
        first = first + WARP
    return sequence, piece
