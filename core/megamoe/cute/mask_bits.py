"""A mask of one's own as bits: packed by a launch of its own, read a tile of 64 keys at a time (sm_90a).

A bool mask is a byte a pair of query and key, eight times what there is to say, and at the place of a score no two
bytes lie together. As bits a lane's 16 scores of a row and a tile of 64 keys are in two words.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor

from megamoe.cute import arith, asm
from megamoe.cute.softmax import HIDDEN
from megamoe.cute.warp import WARP

TILE = 64  # keys whose bits are read together
WORDS = TILE // WARP  # of a row of a tile
PACK_THREADS = 128
_LANES_OF_ROW = 4  # that share a row of scores


class MaskBits(NamedTuple):
    """A packed mask.

    Attributes:
        words: (queries, WORDS * (tiles + 1)) int32: bit b of word w is key 32 w + b, 1 where the query sees it.
        ends: (queries,) int32: one past the last key that the query sees, 0 for none; the first word behind the tiles'.
    """

    words: cute.Tensor
    ends: cute.Tensor

    def last_end(self, first: Int32, last: Int32) -> Int32:
        """The largest of `ends` from query `first` to `last`; a whole warp."""
        return _last_end(self.ends, first, last)

    def load_if(self, query: Int32, start: Int32, condition: Boolean) -> list[Uint32]:
        """The words of a tile of keys from `start` on, a multiple of TILE; all ones unless the condition holds."""
        width = cute.size(self.words, mode=[1])
        at = asm.address(self.words) + (Int64(query) * width + start // WARP) * 4
        text = (
            "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, -1; mov.b32 $1, -1;"
            " @p ld.global.nc.v2.b32 {$0, $1}, [$2];}"
        )
        # with effects, to stay where it was put, long before the bits are needed
        return asm.values([Uint32] * WORDS, text, at, asm.flag(condition), early=True)


@cute.jit
def _last_end(ends: cute.Tensor, first: Int32, last: Int32) -> Int32:
    most = Int32(0)
    for query in cutlass.range(first + cute.arch.lane_idx(), last + 1, WARP, unroll=1):
        most = cutlass.max(most, ends[query])
    for step in cutlass.range_constexpr(5):
        most = cutlass.max(most, cute.arch.shuffle_sync_bfly(most, offset=1 << step))
    return most


def hide(scores: cute.Tensor, words: list[Uint32]) -> None:
    """Makes the scores of keys whose bit is 0 HIDDEN.

    Args:
        scores: (TILE / 2,) fp32 of a lane, placed as in `softmax`.
        words: Of the lane's first row, then of its second.
    """
    shift = Uint32(2 * (cute.arch.lane_idx() % _LANES_OF_ROW))
    for half in range(2):
        own = [word >> shift for word in words[WORDS * half : WORDS * (half + 1)]]
        for i in range(TILE // 8):
            word, block = divmod(8 * i, WARP)
            for j in range(2):
                place = 4 * i + 2 * half + j
                seen = (own[word] & Uint32(1 << (block + j))) != 0
                scores[place] = arith.select(seen, scores[place], Float32(HIDDEN))


def width_of(columns: int) -> int:
    """Words of a row of `MaskBits.words` for so many columns of a mask."""
    return WORDS * (-(-columns // TILE) + 1)


def bits_of(words: cute.Tensor) -> MaskBits:
    """A packed mask, or the room for one; on the host, in a launcher."""
    queries, width = words.shape
    ends = cute.make_tensor(words.iterator + (width - WORDS), cute.make_layout((queries,), stride=(width,)))
    return MaskBits(words, ends)


@cute.kernel
def pack(mask: cute.Tensor, words: cute.Tensor, ends: cute.Tensor) -> None:
    """A warp a query: see `start_packing`."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    query = block * (PACK_THREADS // WARP) + thread // WARP
    queries, columns = mask.shape
    if query < queries:
        pack_row(query, columns, mask, words, ends)


@cute.jit
def pack_row(query: Int32, columns: Int32, mask: cute.Tensor, words: cute.Tensor, ends: cute.Tensor) -> None:
    """Packs a row of the mask, 32 words at a time, of which each lane keeps one; a whole warp."""
    lane = cute.arch.lane_idx()
    width = cute.size(words, mode=[1])
    bytes_of_row = cute.make_tensor(mask.iterator + Int64(query) * columns, cute.make_layout(columns))
    words_of_row = cute.make_tensor(words.iterator + Int64(query) * width, cute.make_layout(width))
    end = Int32(0)
    used = width - WORDS
    for first in cutlass.range(0, used, WARP, unroll=1):
        seen = []
        for i in cutlass.range_constexpr(WARP):
            column = (first + i) * WARP + lane
            inside = column < columns
            byte = bytes_of_row[arith.select(inside, column, Int32(0))]
            seen.append(arith.select(inside, Uint32(byte), Uint32(0)))
        own = Uint32(0)
        for i in cutlass.range_constexpr(WARP):
            word = Uint32(cute.arch.vote_ballot_sync(seen[i] != 0))
            own = arith.select(lane == i, word, own)
        if first + lane < used:
            words_of_row[first + lane] = Int32(own)
        upto = (first + lane + 1) * WARP - Int32(cute.arch.clz(Int32(own)))
        end = cutlass.max(end, arith.select(own != 0, upto, Int32(0)))
    for step in cutlass.range_constexpr(5):
        end = cutlass.max(end, cute.arch.shuffle_sync_bfly(end, offset=1 << step))
    if lane == 0:
        ends[query] = end


def tensors() -> list[object]:
    """Fake mask and words, to compile for any sizes."""

    def compact(dtype: type, sizes: tuple[object, ...], align: int) -> object:
        order = tuple(reversed(range(len(sizes))))
        return make_fake_compact_tensor(dtype, sizes, stride_order=order, assumed_align=align)

    size = cute.sym_int32
    queries = size()
    return [
        compact(Uint8, (queries, size()), 1),
        compact(Int32, (queries, size(divisibility=WORDS)), 8),
    ]


def start_packing(mask: cute.Tensor, bits: MaskBits, stream: object) -> None:
    """Launches the packing of a mask (queries, columns) uint8, 0 for a hidden key; on the host, in a launcher.

    Args:
        mask: At least one query and one column.
        bits: What it becomes; its rows hold all columns.
        stream: As `launch` takes it.
    """
    queries = mask.shape[0]
    rows = PACK_THREADS // WARP
    pack(mask, bits.words, bits.ends).launch(
        grid=[(queries + (rows - 1)) // rows, 1, 1], block=[PACK_THREADS, 1, 1], stream=stream
    )
