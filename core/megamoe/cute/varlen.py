"""Work of attention over sequences that lie back to back, found on the device from their offsets.

Queries and the heads that share a kv head are rows: row r of a sequence and kv head is query r // group and head
r % group of the group. A tile is so many rows of one sequence and one kv head; a persistent CTA has one tile after
another. One warp finds them (`publish_tiles`) and hands them to the others through a ring of records in shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, copies, mbarrier, smem
from megamoe.cute.warp import WARP

SLOTS = 2  # tiles ahead
RECORD_BYTES = 32
_NO_LEVEL, _MOST_LEVEL = -(1 << 31), (1 << 31) - 1
TILE_RING_BYTES = SLOTS * (RECORD_BYTES + 16)


class Sequences(NamedTuple):
    """What is attended to.

    Attributes:
        cu_q: (sequences + 1,) int32, offsets of the queries.
        cu_k: (sequences + 1,) int32, offsets of the keys.
        heads: Of q.
        kv_heads: Of k and v.
        causal: Not 0: keys after the query's position are hidden.
        window: Keys that a query sees, its own position included; 0 for all before it.
        columns: Keys of a sequence from this one on are hidden; None for none.
    """

    cu_q: cute.Tensor
    cu_k: cute.Tensor
    heads: Int32
    kv_heads: Int32
    causal: Int32
    window: Int32
    columns: Int32 | None = None

    @property
    def group(self) -> Int32:
        """Heads that share a kv head."""
        return self.heads // self.kv_heads


class Tile(NamedTuple):
    """Rows of one sequence and kv head, and the keys that some of them see.

    Attributes:
        query: The sequence's first query, of all queries.
        first: The first row, of the sequence's.
        rows: Rows of the sequence; 0 where there is no more work.
        lead: Key position of query 0.
        key: The sequence's first key, of all keys.
        begin: First key of the sequence that some row sees.
        end: One past the last one; not above `begin` where none is seen.
        kv_head: Which kv head.
    """

    query: Int32
    first: Int32
    rows: Int32
    lead: Int32
    key: Int32
    begin: Int32
    end: Int32
    kv_head: Int32

    def steps(self, keys: int) -> Int32:
        """Tiles of so many keys from `begin` to `end`."""
        return (cutlass.max(self.end - self.begin, 0) + (keys - 1)) // keys

    def place(self, row: Int32, sequences: Sequences) -> Int32:
        """Where in q, counted in heads, a row lies; row counts from `first`."""
        group = sequences.group
        query = (self.first + row) // group
        inner = self.first + row - query * group
        return (self.query + query) * sequences.heads + self.kv_head * group + inner

    def seen(self, row: Int32, length: Int32, sequences: Sequences) -> tuple[Int32, Int32]:
        """The keys that a row sees, from one to before another; row counts from `first`.

        Args:
            row: Any row, also one that does not exist.
            length: Keys of the sequence that may be seen, such as `end`.
            sequences: Masks.
        """
        position = self.lead + (self.first + row) // sequences.group
        last = arith.select(sequences.causal != 0, cutlass.min(length, position + 1), length)
        start = arith.select(sequences.window != 0, position - sequences.window + 1, Int32(0))
        return start, last


class TileRing(NamedTuple):
    """Where tiles are handed over.

    Attributes:
        at: Shared memory, TILE_RING_BYTES from a multiple of 16 on: records, then two mbarriers a slot.
        readers: Warps that read each tile.
    """

    at: Int32
    readers: int

    def barriers(self, slot: Int32) -> Int32:
        """The mbarrier of a full slot; that of an empty one follows."""
        return self.at + SLOTS * RECORD_BYTES + slot * 16

    def init(self) -> None:
        """Makes the mbarriers; one thread, before `mbarrier.init_fence` and a barrier of the CTA."""
        for slot in range(SLOTS):
            mbarrier.init(self.barriers(Int32(slot)), 1)
            mbarrier.init(self.barriers(Int32(slot)) + 8, self.readers)


def take(tiles: TileRing, number: Int32) -> Tile:
    """The CTA's tile number `number`; each reading warp, in order."""
    slot = number % SLOTS
    full = tiles.barriers(slot)
    mbarrier.wait(full, number // SLOTS % 2)
    at = tiles.at + slot * RECORD_BYTES
    words = smem.load16(at) + smem.load16(at + 16)
    cute.arch.sync_warp()
    mbarrier.arrive_if(full + 8, cute.arch.lane_idx() == 0)
    return Tile(*(Int32(word) for word in words))


@cute.jit
def publish_tiles(tiles: Constexpr[TileRing], sequences: Constexpr[Sequences], rows: Constexpr[int]) -> None:
    """Finds this CTA's tiles of `rows` rows and publishes them, then one without rows; one warp.

    Of 32 sequences at a time those tiles come first that see the most keys when causal: they go by levels, on which a
    tile's end stands among all key positions. CTAs take turns back and forth, so that each has as much to do.
    """
    lane = cute.arch.lane_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    count = cute.size(sequences.cu_q) - 1
    chunk, level, before = Int32(-WARP), Int32(_NO_LEVEL), Int32(0)  # `before`: tiles on levels before this one
    own, low = Int32(0), Int32(0)  # tiles of this lane's sequence for each kv head, and the level of its first one
    turn, going = Int32(0), Int32(1)
    while going != 0:
        number = turn * ctas + arith.select(turn % 2 == 0, cta, ctas - 1 - cta)
        here, looking = Uint32(0), Int32(1)
        while looking != 0:
            here = Uint32(cute.arch.vote_ballot_sync((level >= low) & (level < low + own)))
            width = Int32(cute.arch.popc(here)) * sequences.kv_heads
            if number < before + width:
                looking = Int32(0)
            else:
                before = before + width
                level = _highest(own, low, level - 1)
                if level == _NO_LEVEL:
                    chunk = chunk + WARP
                    if chunk >= count:
                        looking, going = Int32(0), Int32(0)
                    else:
                        own, low = _levels(chunk + lane, sequences, rows)
                        level = _highest(own, low, Int32(_MOST_LEVEL))
        local = number - before
        place = local // sequences.kv_heads
        below = cute.arch.popc(here & ((Uint32(1) << Uint32(lane)) - 1))
        mine = (below == place) & ((here >> Uint32(lane) & 1) != 0)
        which = WARP - 1 - cute.arch.clz(Int32(cute.arch.vote_ballot_sync(mine)))
        which = cutlass.max(which, 0)
        index = level - cute.arch.shuffle_sync(low, which)
        tile = _tile(chunk + which, index, local - place * sequences.kv_heads, sequences, rows)
        slot = turn % SLOTS
        full = tiles.barriers(slot)
        mbarrier.wait(full + 8, turn // SLOTS % 2 ^ 1)
        if lane == 0:
            at = tiles.at + slot * RECORD_BYTES
            exists = arith.select(going != 0, tile.rows, Int32(0))
            words = [Uint32(word) for word in tile._replace(rows=exists)]
            smem.store16(at, words[:4])
            smem.store16(at + 16, words[4:])
            mbarrier.arrive_if(full, Int32(1))
        turn = turn + 1


def _levels(sequence: Int32, sequences: Sequences, rows: int) -> tuple[Int32, Int32]:
    """Tiles of a sequence for each kv head, and the level of the first one; no tile where there is no sequence."""
    count = cute.size(sequences.cu_q) - 1
    here, there = cutlass.min(sequence, count), cutlass.min(sequence + 1, count)
    lq = sequences.cu_q[there] - sequences.cu_q[here]
    lead = sequences.cu_k[there] - sequences.cu_k[here] - lq
    low = arith.select(sequences.causal != 0, lead * sequences.group // rows, Int32(0))
    return (lq * sequences.group + (rows - 1)) // rows, low


def _highest(own: Int32, low: Int32, most: Int32) -> Int32:
    """The highest level up to `most` on which a lane has a tile, or _NO_LEVEL; all lanes."""
    level = cutlass.min(most, low + own - 1)
    level = arith.select(level >= low, level, Int32(_NO_LEVEL))
    for step in range(5):
        level = cutlass.max(level, cute.arch.shuffle_sync_bfly(level, offset=1 << step))
    return level


def _tile(sequence: Int32, index: Int32, kv_head: Int32, sequences: Sequences, rows: int) -> Tile:
    """A tile of a sequence; anything where there is none."""
    last = cute.size(sequences.cu_q) - 1
    here = cutlass.max(cutlass.min(sequence, last), 0)
    there = cutlass.min(here + 1, last)
    q0, k0 = sequences.cu_q[here], sequences.cu_k[here]
    lq, lk = sequences.cu_q[there] - q0, sequences.cu_k[there] - k0
    tile = Tile(
        query=q0,
        first=index * rows,
        rows=lq * sequences.group,
        lead=lk - lq,
        key=k0,
        begin=Int32(0),
        end=lk,
        kv_head=kv_head,
    )
    length = lk if sequences.columns is None else cutlass.min(lk, sequences.columns)
    last_row = cutlass.min(Int32(rows), tile.rows - tile.first) - 1
    begin, _ = tile.seen(Int32(0), length, sequences)
    _, end = tile.seen(last_row, length, sequences)
    return tile._replace(begin=cutlass.max(begin, 0), end=end)


@cute.jit
def load_rows(
    q: cute.Tensor,  # (queries * heads, D), 16 bits each
    at: Int32,
    tile: Constexpr[Tile],
    first: Constexpr[int],
    rows: Constexpr[int],
    sequences: Constexpr[Sequences],
    thread: Int32,
    threads: Constexpr[int],
) -> None:
    """Starts copies of rows of a tile into shared memory (`copies.copy16`); zeros where there are no rows.

    They lie in blocks of 64 columns, of `rows` rows of 128 bytes, swizzled as in `wgmma`. Threads, a multiple of 8,
    take turns at the rows, eight at each.
    """
    columns = q.shape[1]
    chunk = thread % 8
    for turn in cutlass.range(rows * 8 // threads, unroll=1):
        row = turn * (threads // 8) + thread // 8
        inside = tile.first + first + row < tile.rows
        place = tile.place(arith.select(inside, row + first, Int32(0)), sequences)
        source = asm.address(q) + (Int64(place) * columns + chunk * 8) * 2
        target = at + row * 128 + ((chunk ^ row) % 8) * 16
        size = arith.select(inside, Int32(16), Int32(0))
        for block in cutlass.range_constexpr(columns // 64):
            copies.copy16(target + block * rows * 128, source + block * 128, size)
