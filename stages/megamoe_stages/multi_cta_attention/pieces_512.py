"""Which pieces of rows a CTA of the head_dim 512 kernel has, in turn, and how its consumers hear of them."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, asm, smem
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention.rows_512 import Mask, Rows, Work, work_of
from megamoe_stages.multi_cta_attention.shape_512 import ROWS, Shape

_STRIDE = 25  # clusters
_LEAST, _MOST = -(1 << 31), (1 << 31) - 1


class Order(NamedTuple):
    """In which order clusters have the pieces of rows: of some kv heads together, then of the next ones.

    Attributes:
        pieces: Divides by how many pieces of rows a kv head can have.
        together: Divides by how many kv heads' pieces come together.
        clusters: Divides by how many clusters there are.
        turns: Divides by a cluster's turns at the pieces of heads that come together.
        all_turns: Of a cluster.
    """

    pieces: cute.FastDivmodDivisorV2
    together: cute.FastDivmodDivisorV2
    clusters: cute.FastDivmodDivisorV2
    turns: cute.FastDivmodDivisorV2
    all_turns: Int32


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
        order: Of the pieces of rows.
        group: Divides by the heads of a kv head.
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
    order: Order
    group: cute.FastDivmodDivisorV2
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
    """What a CTA works on in its turn."""
    cta, _, _ = cute.arch.block_idx()
    cluster, rank = cta // shape.ctas, cta % shape.ctas
    several, number = turn_at(turn, cluster, given.order)
    number, head = divmod(number, given.order.together)
    kv_head = cute.arch.make_warp_uniform(several * given.order.together.divisor + head)
    heads, group = given.q.shape[1], given.group.divisor
    sequences = cute.size(given.cu_seqlens_q) - 1
    sequence, piece = find_piece(number, given, shape.ctas * ROWS)
    exists = (sequence < sequences) & (number < given.order.pieces.divisor)
    sequence = cutlass.min(sequence, sequences - 1)
    query, key = given.cu_seqlens_q[sequence], given.cu_seqlens_k[sequence]
    queries, keys = given.cu_seqlens_q[sequence + 1] - query, given.cu_seqlens_k[sequence + 1] - key
    entries = Int32(0) if mask is None else cutlass.min(mask.entries, keys)
    first = piece * (shape.ctas * ROWS)
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


def turn_at(turn: Int32, cluster: Int32, order: Order) -> tuple[Int32, Int32]:
    """Which group of heads a cluster has in its turn, and which of their pieces; of plain ints too.

    Its turns go back and forth over the pieces, and every second group of heads begins the other way, so that long and
    short ones meet; two groups later it begins at another place, so that not always the same clusters get what is left.
    """
    several, turn_of_these = divmod(turn, order.turns)
    clusters = order.clusters.divisor
    _, place = divmod(cluster + several // 2 * _STRIDE, order.clusters)
    back = (several + turn_of_these) % 2
    return several, turn_of_these * clusters + place + back * (clusters - 1 - 2 * place)


@cute.jit
def find_piece(number: Int32, given: Constexpr[Attention], rows: Constexpr[int]) -> tuple[Int32, Int32]:
    """Whose piece of so many rows comes as `number`, and which of that sequence's; the whole warp looks together.

    Of 32 sequences at a time those come first that see the most keys when causal: they go by levels, on which a piece
    stands among all key positions. A number behind the last piece gives a sequence behind the last one.
    """
    sequences = cute.size(given.cu_seqlens_q) - 1
    lane, group = cute.arch.lane_idx(), given.group.divisor
    first, before, total = Int32(-WARP), Int32(0), Int32(0)
    own, low = Int32(0), Int32(0)  # pieces of this lane's sequence, and the level of its first one
    looking = Int32(1)
    while looking != 0:
        first, before = first + WARP, before + total
        at = cutlass.min(first + lane, sequences - 1)
        queries = given.cu_seqlens_q[at + 1] - given.cu_seqlens_q[at]
        lead = given.cu_seqlens_k[at + 1] - given.cu_seqlens_k[at] - queries
        own = arith.select(first + lane < sequences, (queries * group + (rows - 1)) // rows, Int32(0))
        low = arith.select(given.causal != 0, lead * group // rows, Int32(0))
        total = Int32(cute.arch.warp_redux_sync(own, "add"))
        looking = asm.flag((number >= before + total) & (first + WARP < sequences))
    found = number < before + total
    rest = cutlass.min(number - before, total - 1)
    alone = Int32(cute.arch.warp_redux_sync(own, "max")) == total  # the only sequence that has pieces
    top = Int32(cute.arch.warp_redux_sync(arith.select(own > 0, low + own, Int32(_LEAST)), "max"))
    level = Int32(cute.arch.warp_redux_sync(arith.select(own > 0, low, Int32(_MOST)), "min"))
    level = arith.select(alone, top - 1 - rest, level)
    top = arith.select(alone, level + 1, top)
    while top - level > 1:  # more than `rest` pieces are on `level` or above, no more from `top` on
        middle = level + (top - level) // 2
        more = pieces_from(middle, own, low) > rest
        level, top = arith.select(more, middle, level), arith.select(more, top, middle)
    here = Uint32(cute.arch.vote_ballot_sync((level >= low) & (level < low + own)))
    below = cute.arch.popc(here & ((Uint32(1) << Uint32(lane)) - 1))
    mine = (below == rest - pieces_from(level + 1, own, low)) & ((here >> Uint32(lane) & 1) != 0)
    which = cutlass.max(WARP - 1 - cute.arch.clz(Int32(cute.arch.vote_ballot_sync(mine))), 0)
    return arith.select(found, first + which, sequences), level - cute.arch.shuffle_sync(low, which)


def pieces_from(level: Int32, own: Int32, low: Int32) -> Int32:
    """How many pieces are on a level or above."""
    return Int32(cute.arch.warp_redux_sync(cutlass.min(own, cutlass.max(low + own - level, 0)), "add"))


def work_on(piece: Piece, mask: Mask | None, shape: Shape) -> Work:
    """The keys of a piece of rows."""
    return work_of(piece.rows, piece.token, piece.kv_head, piece.first, mask, shape)


@cute.jit
def tell(base: Int32, piece: Constexpr[Piece], shape: Constexpr[Shape]) -> None:
    """Writes which rows the consumers have next; a warp."""
    rows = piece.rows
    words = [Uint32(word) for word in (Int32(1), piece.first, rows.count, rows.query, rows.head, rows.position)]
    words += [Uint32(rows.keys), Uint32(rows.entries)]
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(2):
            smem.store16(base + shape.record_at + 16 * i, words[4 * i : 4 * i + 4])


@cute.jit
def tell_end(base: Int32, shape: Constexpr[Shape]) -> None:
    """Writes that there are no more; a warp."""
    if cute.arch.lane_idx() == 0:
        smem.store16(base + shape.record_at, [Uint32(0)] * 4)


def told(base: Int32, shape: Shape) -> list[Int32]:
    """What `tell` wrote."""
    at = base + shape.record_at
    return [cute.arch.make_warp_uniform(Int32(word)) for i in range(2) for word in smem.load16(at + 16 * i)]
