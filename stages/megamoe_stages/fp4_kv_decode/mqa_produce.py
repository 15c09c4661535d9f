"""The producers of the decode kernel for keys that are the values: they find tokens and copy them as they are.

A warp has 16 tokens of a tile, and copies a token's 256 bytes of codes by 16 lanes.
"""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, ring
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode.mqa_shape import (
    CODE_BYTES,
    CONSUMERS,
    PITCH,
    SCALE_BYTES,
    STAGE_BYTES,
    TILE,
    TURNS,
    Shape,
)
from megamoe_stages.fp4_kv_decode.tokens import Work, find_page, find_row, find_token, store_mask, wait_for_appended


@cute.jit
def copy_part(
    row: Int32, column: Int32, to: Int32, scales: Constexpr[bool], work: Constexpr[Work], shape: Constexpr[Shape]
) -> None:
    """Starts the copy of 16 bytes of a row; zeros for a row that does not exist."""
    size = SCALE_BYTES if scales else CODE_BYTES
    source = work.keys.scales if scales else work.keys.codes
    there = arith.select(row >= 0, row, Int32(0))
    if cutlass.const_expr(shape.extra):
        far = row < -1
        source = arith.select(far, work.extra.scales if scales else work.extra.codes, source)
        there = arith.select(far, -2 - row, there)
    at = source + Int64(there) * size + column
    attention_mma.copy16(to, at, arith.select(row != -1, Int32(16), Int32(0)))


def show_turn(full: Int32) -> None:
    """Says that the tiles of a turn, the last two groups of copies, are there, each as soon as it is."""
    for tile in range(CONSUMERS):
        attention_mma.wait_copies(CONSUMERS - 1 - tile)
        ring.arrive_if(full + tile * 8, Int32(1))


@cute.jit
def produce(base: Int32, tiles: Int32, work: Constexpr[Work], shape: Constexpr[Shape]) -> None:
    """Copies so many tiles of the CTA, an even number; its first warpgroup."""
    thread, _, _ = cute.arch.thread_idx()
    lane, wide = thread % WARP, thread // WARP
    half, chunk = lane // 16, lane % 16
    place = (chunk % 4 * 4 + chunk // 4) * 16
    codes_to = (wide * 16 + half) * PITCH + place
    scales_to = TILE * PITCH + thread * 16
    home, within = find_page(find_token(Int32(0), work, shape), Int32(0), work, shape)
    token = find_token(Int32(1), work, shape)
    turn, number, parity = Int32(0), Int32(0), Int32(1)
    for tile in cutlass.range(tiles, unroll=1):
        row = find_row(home, within, tile, work, shape)
        home, within = find_page(token, tile + 1, work, shape)  # a tile before its row is needed
        token = find_token(tile + 2, work, shape)  # a tile before its page is looked up
        ring.wait(base + shape.barriers_at + (CONSUMERS * TURNS + turn) * 8, parity)
        stage = turn * CONSUMERS + number
        at = base + shape.ring_at + stage * STAGE_BYTES
        wait_for_appended(tile, work)
        for i in cutlass.range_constexpr(8):
            other = cute.arch.shuffle_sync(row, half + 2 * i)
            copy_part(other, chunk * 16, at + codes_to + 2 * i * PITCH, False, work, shape)
        other = cute.arch.shuffle_sync(row, lane // 2)
        copy_part(other, lane % 2 * 16, at + scales_to, True, work, shape)
        mask = cute.arch.vote_ballot_sync(row != -1)
        if lane == 0:
            store_mask(base + shape.masks_at + stage * 8, wide, Uint32(mask), shape)
        attention_mma.commit_copies()
        if number == 1:
            show_turn(base + shape.barriers_at + turn * (CONSUMERS * 8))
        next_turn = turn + number
        parity = arith.select(next_turn == TURNS, parity ^ 1, parity)
        turn = arith.select(next_turn == TURNS, Int32(0), next_turn)
        number = number ^ 1
    cute.arch.griddepcontrol_wait()  # no kernel behind this one starts before the one in front has ended
