"""Who decodes what: the tiles of all sequences and kv heads in a line, in equal shares, cut from the lengths on the device.

A problem is a sequence and a kv head; it has at least one tile, so that somebody writes its result. The problems lie in
a line, sequence by sequence, and every CTA takes an equal run of their tiles. What a CTA has of one problem is a segment.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, bulk
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode.gqa_shape import HALF, TILE, WARPS, Shape


class Cache(NamedTuple):
    """The paged cache and its table.

    Attributes:
        sides: Addresses of key codes, key scales, value codes and value scales.
        block_table: (batch, max_pages) int32.
        lengths: (batch,) int32.
        page: Divides by the tokens of a page.
        page_size: Tokens of a page, a multiple of 16.
        kv_heads: Of the cache.
        queries: Of each sequence.
        window: Tokens that a query sees; 0 for all before it.
    """

    sides: tuple[Int64, Int64, Int64, Int64]
    block_table: cute.Tensor
    lengths: cute.Tensor
    page: cute.FastDivmodDivisorV2
    page_size: Int32
    kv_heads: Int32
    queries: Int32
    window: Int32


class Share(NamedTuple):
    """How the line is cut: among `ctas`, of which the first `longer` have one tile more than `tiles`."""

    ctas: Int32
    tiles: Int32
    longer: Int32

    def start(self, cta: Int32) -> Int32:
        """First tile of a CTA; the end of the line for one that gets none."""
        cta = cutlass.min(cta, self.ctas)
        return cta * self.tiles + cutlass.min(cta, self.longer)

    def owner(self, tile: Int32) -> Int32:
        """The CTA that has a tile."""
        edge = self.longer * (self.tiles + 1)
        behind = self.longer + (tile - edge) // cutlass.max(self.tiles, 1)
        return Int32(arith.select(tile < edge, tile // (self.tiles + 1), behind))


class Copier(NamedTuple):
    """What a lane copies of every tile: a run of one side's bytes.

    Attributes:
        side: Its address.
        token_bytes: Of it.
        token: Of the tile, where the run starts.
        size: Bytes of the run.
        place: Where in a stage it goes.
        keys: Whether it copies keys.
        values: Whether it copies values.
    """

    side: Int64
    token_bytes: Int32
    token: Int32
    size: Int32
    place: Int32
    keys: Int32
    values: Int32


def first_token(length: Int32, cache: Cache) -> Int32:
    """The first token that some query sees."""
    start = length - cache.queries - cache.window + 1
    return Int32(arith.select(cache.window != 0, cutlass.max(start, 0), Int32(0)))


def held(length: Int32, cache: Cache) -> Int32:
    """Tokens that the table has room for, of those that there are."""
    return cutlass.min(length, cute.size(cache.block_table, mode=[1]) * cache.page_size)


def tiles_of(length: Int32, cache: Cache) -> Int32:
    """Tiles of each problem of a sequence."""
    first = first_token(length, cache) // TILE
    return cutlass.max((held(length, cache) + (TILE - 1)) // TILE - first, 1)


@cute.jit
def cut(cache: Constexpr[Cache]) -> tuple[Int32, Int32, Int32]:
    """What a `Share` is made of; every warp adds up all lengths. There are as many CTAs as keep all warps busy."""
    lane = cute.arch.lane_idx()
    batch = cute.size(cache.lengths)
    total = Int32(0)
    for chunk in cutlass.range((batch + (WARP - 1)) // WARP, unroll=1):
        mine = chunk * WARP + lane
        if mine < batch:
            total = total + tiles_of(cache.lengths[mine], cache)
    for step in (1, 2, 4, 8, 16):
        total = total + cute.arch.shuffle_sync_bfly(total, offset=step)
    total = total * cache.kv_heads
    ctas = cutlass.min(cute.arch.grid_dim()[0], (total + (WARPS - 1)) // WARPS)
    tiles = total // ctas
    return ctas, tiles, total - tiles * ctas


@cute.jit
def find(tile: Int32, cache: Constexpr[Cache]) -> tuple[Int32, Int32]:
    """The sequence that a tile belongs to, and the first tile of that."""
    lane = cute.arch.lane_idx()
    batch = cute.size(cache.lengths)
    before, sequence, start = Int32(0), Int32(0), Int32(0)
    for chunk in cutlass.range((batch + (WARP - 1)) // WARP, unroll=1):
        mine = chunk * WARP + lane
        count = Int32(0)
        if mine < batch:
            count = tiles_of(cache.lengths[mine], cache) * cache.kv_heads
        through = count
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(through, step)
            through = through + arith.select(lane >= step, below, Int32(0))
        own = before + through - count
        here = Uint32(cute.arch.vote_ballot_sync((tile >= own) & (tile < own + count)))
        if here != 0:
            place = Int32(arith.ptx(Uint32, "{.reg .b32 r; brev.b32 r, $1; clz.b32 $0, r;}", here))
            sequence = chunk * WARP + place
            start = cute.arch.shuffle_sync(own, place)
        before = before + cute.arch.shuffle_sync(through, WARP - 1)
    return sequence, start


def copier(cache: Cache, shape: Shape) -> Copier:
    """What this lane copies: pages of whole tiles need five runs a tile, others eight."""
    lane = cute.arch.lane_idx()
    whole = cache.page_size % TILE == 0
    run = arith.select(lane < 3, lane, lane - 1)  # of whole tiles, lane 3 has the second half of the codes of values
    kind = arith.select(whole, run, lane % 4)
    half = arith.select(whole, arith.select(lane == 3, Int32(1), Int32(0)), lane // 4)
    tokens = arith.select(whole & (kind != 2), Int32(TILE), Int32(HALF))
    active = lane < arith.select(whole, Int32(5), Int32(8))
    sizes = (shape.key_codes, shape.key_scales, shape.value_codes, shape.value_scales)
    side, size, place = cache.sides[0], Int32(sizes[0]), Int32(shape.regions[0])
    for i in range(1, 4):
        side = Int64(arith.select(kind == i, cache.sides[i], side))
        size = arith.select(kind == i, Int32(sizes[i]), size)
        place = arith.select(kind == i, Int32(shape.regions[i]), place)
    padding = arith.select((kind == 2) & (half == 1), Int32(shape.padding), Int32(0))
    return Copier(
        side=side,
        token_bytes=size,
        token=half * HALF,
        size=tokens * size,
        place=place + half * HALF * size + padding,
        keys=arith.select(active & (kind < 2), Int32(1), Int32(0)),
        values=arith.select(active & (kind >= 2), Int32(1), Int32(0)),
    )


def arrivals(cache: Cache) -> tuple[Int32, Int32]:
    """Lanes that copy keys, and values."""
    whole = cache.page_size % TILE == 0
    return Int32(arith.select(whole, Int32(2), Int32(4))), Int32(arith.select(whole, Int32(3), Int32(4)))


@cute.jit
def home_of(tile: Int32, inside: cutlass.Boolean, sequence: Int32, cache: Constexpr[Cache], token: Int32) -> Int32:
    """The page of this lane's part of a tile; -1 for none."""
    number, _ = divmod(tile * TILE + token, cache.page)
    home = Int32(-1)
    if inside & (number < cute.size(cache.block_table, mode=[1])):
        home = cache.block_table[sequence, number]
    return home


def source_of(tile: Int32, home: Int32, kv_head: Int32, cache: Cache, mine: Copier) -> Int64:
    """Where this lane's run of a tile lies; a page that is not there is replaced by one that is, and not seen."""
    _, within = divmod(tile * TILE + mine.token, cache.page)
    row = (Int64(cutlass.max(home, 0)) * cache.kv_heads + kv_head) * cache.page_size + within
    return mine.side + row * mine.token_bytes


@cute.jit
def copy_if(there: Int32, wanted: Int32, source: Int64, stage: Uint32, barrier: Uint32, mine: Constexpr[Copier]) -> None:
    """Starts this lane's copy if it is wanted and there is a tile."""
    if (there != 0) & (wanted != 0):
        bulk.barrier_expect(barrier, mine.size)
        bulk.copy(stage + mine.place, source, mine.size, barrier, bulk.evict_first())
