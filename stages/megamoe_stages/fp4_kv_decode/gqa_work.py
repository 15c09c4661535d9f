"""Who decodes what: the tiles of all sequences and kv heads in a line, cut into equal runs from lengths on the device.

A problem is a sequence and a kv head; it has at least one tile, so that somebody writes its result. The problems lie in
a line, sequence by sequence, and every warp of every CTA takes an equal run of their tiles, one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm

from megamoe.cute import arith, bulk
from megamoe_stages.fp4_kv_decode.gqa_shape import STEP, TILE, WARP, Shape


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
    """How the line is cut: among `warps`, of which the first `longer` have one tile more than `tiles`."""

    warps: Int32
    tiles: Int32
    longer: Int32

    def start(self, warp: Int32) -> Int32:
        """First tile of a warp, counted through all CTAs; the end of the line for one that gets none."""
        warp = cutlass.min(warp, self.warps)
        return warp * self.tiles + cutlass.min(warp, self.longer)

    def owner(self, tile: Int32) -> Int32:
        """The warp that has a tile."""
        edge = self.longer * (self.tiles + 1)
        behind = self.longer + (tile - edge) // self.tiles
        return Int32(arith.select(tile < edge, tile // (self.tiles + 1), behind))


class Copier(NamedTuple):
    """What a lane copies of every tile: a run of tokens' codes or scales, of keys and of values.

    Attributes:
        keys: Address of that side of the cache.
        values: Likewise.
        key_bytes: Of a token.
        value_bytes: Of a token.
        token: Of the tile, where the run starts.
        tokens: Of the run; 0 where the lane copies nothing.
        second: Whether it copies scales.
    """

    keys: Int64
    values: Int64
    key_bytes: Int32
    value_bytes: Int32
    token: Int32
    tokens: Int32
    second: Int32


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
def cut(cache: Constexpr[Cache], shape: Constexpr[Shape]) -> tuple[Int32, Int32, Int32]:
    """What a `Share` is made of; every warp adds up all lengths."""
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
    warps = cutlass.min(cute.arch.grid_dim()[0] * shape.warps, total)
    tiles = total // warps
    return warps, tiles, total - tiles * warps


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


def run_shift(cache: Cache) -> Int32:
    """Tokens that lie together in every page and tile: 16 times 2 to this."""
    page = cache.page_size
    return Int32(arith.select(page % 64 == 0, Int32(2), arith.select(page % 32 == 0, Int32(1), Int32(0))))


def _as_it_is(address: Int64) -> Int64:
    """An address that the compiler reads as a whole: else it may choose between the places of kernel parameters."""
    out = llvm.inline_asm(
        Int64.mlir_type,
        [address.ir_value()],
        "mov.b64 $0, $1;",
        "=l,l",
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return Int64(out)


def copier(cache: Cache, shape: Shape) -> Copier:
    """What this lane copies: an even one codes, the odd one behind it their scales."""
    lane = cute.arch.lane_idx()
    run = Int32(STEP) << run_shift(cache)
    sides = [_as_it_is(side) for side in cache.sides]
    second = lane % 2 == 1
    return Copier(
        keys=arith.select(second, sides[1], sides[0]),
        values=arith.select(second, sides[3], sides[2]),
        key_bytes=arith.select(second, Int32(shape.key_bytes[1]), Int32(shape.key_bytes[0])),
        value_bytes=arith.select(second, Int32(shape.value_bytes[1]), Int32(shape.value_bytes[0])),
        token=lane // 2 * run,
        tokens=arith.select(lane // 2 * run < TILE, run, Int32(0)),
        second=arith.select(second, Int32(1), Int32(0)),
    )


@cute.jit
def home_of(tile: Int32, inside: cutlass.Boolean, sequence: Int32, cache: Constexpr[Cache], token: Int32) -> Int32:
    """The page of this lane's part of a tile; -1 for none."""
    number, _ = divmod(tile * TILE + token, cache.page)
    home = Int32(-1)
    if inside & (number < cute.size(cache.block_table, mode=[1])):
        home = cache.block_table[sequence, number]
    return home


def row_of(tile: Int32, home: Int32, kv_head: Int32, cache: Cache, mine: Copier) -> Int32:
    """The row of the cache where this lane's run of a tile starts; a page that is not there gives one that is."""
    _, within = divmod(tile * TILE + mine.token, cache.page)
    return (cutlass.max(home, 0) * cache.kv_heads + kv_head) * cache.page_size + within


@cute.jit
def copy_keys(
    row: Int32, wanted: cutlass.Boolean, slot: Uint32, barrier: Uint32, mine: Constexpr[Copier], shape: Constexpr[Shape]
) -> None:
    """Starts this lane's copy of keys if there is such a tile."""
    if wanted & (mine.tokens != 0):
        _copy(mine.keys, row, mine.key_bytes, slot + mine.second * (TILE * shape.key_bytes[0]), barrier, mine)


@cute.jit
def copy_values(
    row: Int32, wanted: cutlass.Boolean, slot: Uint32, barrier: Uint32, mine: Constexpr[Copier], shape: Constexpr[Shape]
) -> None:
    """Starts this lane's copy of values if there is such a tile."""
    if wanted & (mine.tokens != 0):
        _copy(mine.values, row, mine.value_bytes, slot + mine.second * (TILE * shape.value_bytes[0]), barrier, mine)


def _copy(side: Int64, row: Int32, token_bytes: Int32, place: Uint32, barrier: Uint32, mine: Copier) -> None:
    size = mine.tokens * token_bytes
    bulk.barrier_expect(barrier, size)
    source = side + Int64(row) * Int64(token_bytes)
    bulk.copy(place + mine.token * token_bytes, source, size, barrier, bulk.evict_first())
