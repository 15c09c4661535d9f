"""The producers of the decode kernel for keys that are the values: they find tokens and copy them as they are.

A warp has 16 tokens of a tile. A tile comes in quarters, 128 values of every token, as there is room for no more.
"""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, copies, mbarrier
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode.mqa_shape import (
    CODE_BYTES,
    CONSUMERS,
    MASKS,
    PIECE_BYTES,
    PIECE_CODES,
    PIECE_SCALES,
    PIECES,
    QUARTERS,
    SCALE_BYTES,
    TILE,
    Shape,
)
from megamoe_stages.fp4_kv_decode.tokens import Work, find_page, find_row, find_token, store_mask, wait_for_appended


@cute.jit
def copy_part(
    row: Int32, column: Int32, to: Int32, scales: Constexpr[bool], work: Constexpr[Work], shape: Constexpr[Shape]
) -> None:
    """Starts the copy of 16 bytes of codes or 4 scales of a row; zeros for a row that does not exist."""
    size = SCALE_BYTES if scales else CODE_BYTES
    source = work.keys.scales if scales else work.keys.codes
    there = arith.select(row >= 0, row, Int32(0))
    if cutlass.const_expr(shape.extra):
        far = row < -1
        source = arith.select(far, work.extra.scales if scales else work.extra.codes, source)
        there = arith.select(far, -2 - row, there)
    at = source + Int64(there) * size + column
    if cutlass.const_expr(scales):
        copies.copy4(to, at, arith.select(row != -1, Int32(4), Int32(0)))
    else:
        copies.copy16(to, at, arith.select(row != -1, Int32(16), Int32(0)))


@cute.jit
def produce(base: Int32, work: Constexpr[Work], shape: Constexpr[Shape]) -> None:
    """Copies all tiles of the CTA; its first warpgroup."""
    thread, _, _ = cute.arch.thread_idx()
    lane, wide = thread % WARP, thread // WARP
    first = asm.flag(lane == 0)
    codes_to = (wide * 16 + lane // 4) * PIECE_CODES + lane % 4 * 16
    scales_to = TILE * PIECE_CODES + thread * 4
    home, within = find_page(find_token(Int32(0), work, shape), Int32(0), work, shape)
    token = find_token(Int32(1), work, shape)
    place, parity = Int32(0), Int32(1)
    for tile in cutlass.range(work.tiles, unroll=1):
        row = find_row(home, within, tile, work, shape)
        home, within = find_page(token, tile + 1, work, shape)  # a tile before its row is needed
        token = find_token(tile + 2, work, shape)  # a tile before its page is looked up
        wait_for_appended(tile, work)
        mask = cute.arch.vote_ballot_sync(row != -1)
        if lane == 0:
            store_mask(base + shape.masks_at + tile % MASKS * 8, wide, Uint32(mask), shape)
        for quarter in cutlass.range_constexpr(QUARTERS):
            mbarrier.wait(base + shape.empty_at + place * 8, parity)
            at = base + shape.ring_at + place * PIECE_BYTES
            for i in cutlass.range_constexpr(2):
                other = cute.arch.shuffle_sync(row, lane // 4 + 8 * i)
                column = quarter * PIECE_CODES + lane % 4 * 16
                copy_part(other, column, at + codes_to + 8 * i * PIECE_CODES, False, work, shape)
            other = cute.arch.shuffle_sync(row, lane // 2)
            copy_part(other, quarter * PIECE_SCALES + lane % 2 * 4, at + scales_to, True, work, shape)
            full = base + shape.full_at + (tile % CONSUMERS * QUARTERS + quarter) * 8
            mbarrier.arrive_when_copied(full)
            mbarrier.arrive_if(full, first)  # for the mask: copies show copies only
            last = place == PIECES - 1
            parity = arith.select(last, parity ^ 1, parity)
            place = arith.select(last, Int32(0), place + 1)
    copies.wait(0)
    cute.arch.griddepcontrol_wait()  # no kernel behind this one starts before the one in front has ended
