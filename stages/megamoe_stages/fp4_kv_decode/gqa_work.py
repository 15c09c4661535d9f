"""Who decodes what: the tiles of all sequences and kv heads in a line, cut into equal runs from lengths on the device.

A problem is a sequence and a kv head; it has at least one tile, so that somebody writes its result. The problems lie in
a line, sequence by sequence, each behind a place that stands for the time to get started with it, as long as that of a
tile. Every warp of every CTA takes an equal run of the line and does its tiles one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, copies, mbarrier, smem, warp
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode.gqa_shape import STEP, TILE, Shape


class Cache(NamedTuple):
    """The paged cache and its table.

    Attributes:
        sides: Addresses of key codes, key scales, value codes and value scales.
        block_table: (batch, max_pages) int32.
        lengths: (batch,) int32.
        page: Divides by the tokens of a page.
        page_size: Tokens of a page, a multiple of 16.
        pages: Of the cache; other numbers in the table are no pages.
        kv_heads: Of the cache.
        queries: Of each sequence.
        window: Tokens that a query sees; 0 for all before it.
        fresh: Tokens of each sequence that the kernel before this one appends.
    """

    sides: tuple[Int64, Int64, Int64, Int64]
    block_table: cute.Tensor
    lengths: cute.Tensor
    page: cute.FastDivmodDivisorV2
    page_size: Int32
    pages: Int32
    kv_heads: Int32
    queries: Int32
    window: Int32
    fresh: Int32


class Share(NamedTuple):
    """How the line is cut: among `warps`, of which the first `longer` have one place more than `places`."""

    warps: Int32
    places: Int32
    longer: Int32

    def start(self, warp: Int32) -> Int32:
        """First place of a warp, counted through all CTAs; the end of the line for one that gets none."""
        warp = cutlass.min(warp, self.warps)
        return warp * self.places + cutlass.min(warp, self.longer)

    def owner(self, place: Int32) -> Int32:
        """The warp that has a place."""
        edge = self.longer * (self.places + 1)
        early = place < edge
        inside = arith.select(early, place, place - edge)
        size = arith.select(early, self.places + 1, cutlass.max(self.places, 1))
        return inside // size + arith.select(early, Int32(0), self.longer)


class Copier(NamedTuple):
    """What a lane copies of every tile: a run of tokens' codes or scales, of keys and of values.

    Attributes:
        sides: Where in shared memory the addresses of its side of the cache are.
        second: Whether it copies scales.
        token: Of the tile, where the run starts.
        tokens: Of the run; 0 where the lane copies nothing.
    """

    sides: Uint32
    second: Int32
    token: Int32
    tokens: Int32


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


def places_of(length: Int32, cache: Cache) -> Int32:
    """What each problem of a sequence has of the line."""
    return tiles_of(length, cache) + 1


@cute.jit
def cut(cache: Constexpr[Cache], shape: Constexpr[Shape]) -> tuple[Int32, Int32, Int32, Int32]:
    """What a `Share` is made of, and the length of the sequence of this lane's number; a warp adds up all lengths."""
    lane = cute.arch.lane_idx()
    batch = cute.size(cache.lengths)
    total, own = Int32(0), Int32(0)
    if lane < batch:
        own = cache.lengths[lane]
        total = places_of(own, cache)
    for chunk in cutlass.range(1, (batch + (WARP - 1)) // WARP, unroll=1):
        mine = chunk * WARP + lane
        if mine < batch:
            total = total + places_of(cache.lengths[mine], cache)
    for step in (1, 2, 4, 8, 16):
        total = total + cute.arch.shuffle_sync_bfly(total, offset=step)
    total = total * cache.kv_heads
    warps = cutlass.min(cute.arch.grid_dim()[0] * shape.warps, total)
    places = total // warps
    return warps, places, total - places * warps, own


@cute.jit
def find(place: Int32, own: Int32, cache: Constexpr[Cache]) -> tuple[Int32, Int32, Int32]:
    """The sequence that a place belongs to, the first place of that, and its length; `own` is from `cut`."""
    lane = cute.arch.lane_idx()
    batch = cute.size(cache.lengths)
    before, sequence, start, length = Int32(0), Int32(0), Int32(0), Int32(0)
    for chunk in cutlass.range((batch + (WARP - 1)) // WARP, unroll=1):
        mine = chunk * WARP + lane
        count = Int32(0)
        if mine < batch:
            if chunk > 0:
                own = cache.lengths[mine]
            count = places_of(own, cache) * cache.kv_heads
        through = count
        for step in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(through, step)
            through = through + arith.select(lane >= step, below, Int32(0))
        first = before + through - count
        here = Uint32(cute.arch.vote_ballot_sync((place >= first) & (place < first + count)))
        if here != 0:
            number = lowest(here)
            sequence = chunk * WARP + number
            start = cute.arch.shuffle_sync(first, number)
            length = cute.arch.shuffle_sync(own, number)
        before = before + cute.arch.shuffle_sync(through, WARP - 1)
    return sequence, start, length


def lowest(mask: Uint32) -> Int32:
    """The number of the lowest bit that is set, -1 for none."""
    return Int32(arith.ptx(Uint32, "{.reg .b32 x; neg.s32 x, $1; and.b32 x, x, $1; bfind.u32 $0, x;}", mask))


def highest(mask: Uint32) -> Int32:
    """The number of the highest bit that is set, -1 for none."""
    return Int32(arith.ptx(Uint32, "bfind.u32 $0, $1;", mask))


def run_shift(cache: Cache) -> Int32:
    """Tokens that lie together in every page and tile: 16 times 2 to this."""
    page = cache.page_size
    return Int32(arith.select(page % 64 == 0, Int32(2), asm.flag(page % 32 == 0)))


@cute.jit
def put_sides(base: Uint32, cache: Constexpr[Cache], shape: Constexpr[Shape]) -> None:
    """Leaves the addresses of the cache in shared memory, one thread: in the loop they would cost registers."""
    for i, side in enumerate((cache.sides[0], cache.sides[2], cache.sides[1], cache.sides[3])):
        smem.store_address(Int32(base) + shape.sides_at + 8 * i, side)


def copier(base: Uint32, cache: Cache, shape: Shape) -> Copier:
    """What this lane copies: an even one codes, the odd one behind it their scales. To be asked anew where needed."""
    lane = warp.thread() % WARP
    run = Int32(STEP) << run_shift(cache)
    return Copier(
        sides=base + shape.sides_at + lane % 2 * 16,
        second=lane % 2,
        token=lane // 2 * run,
        tokens=arith.select(lane // 2 * run < TILE, run, Int32(0)),
    )


@cute.jit
def home_of(tile: Int32, inside: cutlass.Boolean, sequence: Int32, cache: Constexpr[Cache], token: Int32) -> Int32:
    """The page of this lane's part of a tile; -1 for none."""
    number, _ = divmod(tile * TILE + token, cache.page)
    home = Int32(-1)
    if inside & (number < cute.size(cache.block_table, mode=[1])):
        home = cache.block_table[sequence, number]
        home = arith.select(home < cache.pages, home, Int32(-1))
    return home


def row_of(tile: Int32, home: Int32, kv_head: Int32, cache: Cache, mine: Copier) -> Int32:
    """The row of the cache where this lane's run of a tile starts; a page that is not there gives one that is."""
    _, within = divmod(tile * TILE + mine.token, cache.page)
    return (cutlass.max(home, 0) * cache.kv_heads + kv_head) * cache.page_size + within


@cute.jit
def copy_if(
    wanted: cutlass.Boolean,
    row: Int32,
    which: Constexpr[int],
    place: Uint32,
    barrier: Uint32,
    mine: Constexpr[Copier],
    shape: Constexpr[Shape],
) -> None:
    """Starts this lane's copy of a tile's keys (`which` = 0) or values (1) if there is such a tile."""
    if wanted & (mine.tokens != 0):
        codes, scales = (shape.key_bytes, shape.value_bytes)[which]
        token_bytes = arith.select(mine.second != 0, Int32(scales), Int32(codes))
        source = smem.load_address(Int32(mine.sides) + 8 * which) + Int64(row) * Int64(token_bytes)
        size = mine.tokens * token_bytes
        mbarrier.expect(barrier, size)
        place = place + mine.second * (TILE * codes) + mine.token * token_bytes
        copies.load_bulk(place, source, size, barrier, copies.evict_first())
