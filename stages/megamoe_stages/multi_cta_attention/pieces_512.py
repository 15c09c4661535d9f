"""Which pieces of rows a CTA of the head_dim 512 kernel has, in turn, and how its consumers hear of them."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Uint32, cute

from megamoe.cute import arith, attention_mma, ring
from megamoe.cute.multicast import Boxes
from megamoe_stages.multi_cta_attention.rows_512 import Mask, Rows, Work, find_sequence, work_of
from megamoe_stages.multi_cta_attention.shape_512 import ROWS, Shape


class Attention(NamedTuple):
    """What all kernels of this schedule read, and the lse that they write.

    Attributes:
        q: (queries, heads, 512) bf16 or fp16.
        keys: Boxes of the keys.
        values: Boxes of the values.
        cu_seqlens_q: (sequences + 1,) int32.
        cu_seqlens_k: (sequences + 1,) int32.
        sink: (heads,) fp32; not read unless has_sink.
        lse: (queries * heads,) fp32.
        kv_heads: Of keys and values.
        group: Divides by the heads of a kv head.
        pieces: Divides by how many pieces of rows a kv head can have.
        together: Divides by how many kv heads' pieces come together.
        factor: Makes scores in base 2 of products.
        causal: Whether keys behind the query's position are hidden.
        window: Keys that a query sees up to its position; 0 for all.
        has_sink: Whether there are sinks.
    """

    q: cute.Tensor
    keys: Boxes
    values: Boxes
    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    sink: cute.Tensor
    lse: cute.Tensor
    kv_heads: Int32
    group: cute.FastDivmodDivisorV2
    pieces: cute.FastDivmodDivisorV2
    together: cute.FastDivmodDivisorV2
    factor: Float32
    causal: Int32
    window: Int32
    has_sink: Int32


class Piece(NamedTuple):
    """Rows of a cluster.

    Attributes:
        exists: Whether there are any; nothing else counts where not.
        rows: Of the CTA.
        first: Of the cluster.
        token: The sequence's first key, among all.
        kv_head: Which head of the keys.
    """

    exists: Boolean
    rows: Rows
    first: Int32
    token: Int32
    kv_head: Int32


def piece_of(given: Attention, turn: Int32, mask: Mask | None, shape: Shape) -> Piece:
    """What a CTA works on in its turn.

    Its turns go back and forth over the pieces of heads that come together, so that long and short ones meet.
    """
    cta, _, _ = cute.arch.block_idx()
    cluster, rank = cta // shape.ctas, cta % shape.ctas
    clusters, turns = clusters_and_turns(given, shape)
    several, turn_of_these = turn // turns, turn % turns
    place = (cluster + several // 2) % clusters  # so that not always the same ones get nothing
    number = turn_of_these * clusters + arith.select(turn % 2 == 0, place, clusters - 1 - place)
    number, head = divmod(number, given.together)
    kv_head = cute.arch.make_warp_uniform(several * given.together.divisor + head)
    heads, group = given.q.shape[1], given.group.divisor
    cluster_rows = shape.ctas * ROWS
    sequences = cute.size(given.cu_seqlens_q) - 1
    sequence, piece, count = find_sequence(number, given.cu_seqlens_q, group, cluster_rows)
    exists = (kv_head < given.kv_heads) & (sequence < sequences) & (number < given.pieces.divisor)
    sequence = cutlass.min(sequence, sequences - 1)
    query, key = given.cu_seqlens_q[sequence], given.cu_seqlens_k[sequence]
    queries, keys = given.cu_seqlens_q[sequence + 1] - query, given.cu_seqlens_k[sequence + 1] - key
    entries = Int32(0) if mask is None else cutlass.min(mask.entries, keys)
    first = (count - 1 - piece) * cluster_rows  # those with most keys first
    rows = Rows(
        first=first + rank * ROWS,
        count=queries * group,
        group=given.group,
        query=query,
        heads=heads,
        head=kv_head * group,
        position=keys - entries - queries,
        keys=keys - entries,
        entries=entries,
        causal=given.causal,
        window=given.window,
    )
    return Piece(exists, rows, first, key, kv_head)


def clusters_and_turns(given: Attention, shape: Shape) -> tuple[Int32, Int32]:
    """How many clusters there are, and their turns at the pieces of heads that come together."""
    across, _, _ = cute.arch.grid_dim()
    clusters = across // shape.ctas
    return clusters, (given.together.divisor * given.pieces.divisor + (clusters - 1)) // clusters


def turns_of(given: Attention, shape: Shape) -> Int32:
    """How many pieces of rows a CTA may get."""
    _, turns = clusters_and_turns(given, shape)
    together = given.together.divisor
    return Int32(cute.arch.make_warp_uniform((given.kv_heads + (together - 1)) // together * turns))


def work_on(piece: Piece, mask: Mask | None, shape: Shape) -> Work:
    """The keys of a piece of rows."""
    return work_of(piece.rows, piece.token, piece.kv_head, piece.first, mask, shape)


def tell(base: Int32, piece: Piece, shape: Shape) -> None:
    """Writes which rows the consumers have next; a warp."""
    rows = piece.rows
    words = [Uint32(word) for word in (Int32(1), piece.first, rows.count, rows.query, rows.head, rows.position)]
    words += [Uint32(rows.keys), Uint32(rows.entries)]
    for i in range(2):
        attention_mma.store16(base + shape.record_at + 16 * i, words[4 * i : 4 * i + 4])


def told(base: Int32, shape: Shape) -> list[Int32]:
    """What `tell` wrote."""
    at = base + shape.record_at
    return [cute.arch.make_warp_uniform(Int32(word)) for i in range(2) for word in ring.load16(at + 16 * i)]
