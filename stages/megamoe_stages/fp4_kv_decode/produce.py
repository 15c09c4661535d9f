"""The producers of the decode kernel: they find the tokens of a tile, copy them and decode them to bf16.

A thread owns some 64-column blocks of one token of each tile, a warp whole tokens. It copies 32 bytes of codes and 4 of
scales a block into a ring that only it reads, so nothing but its own groups of copies has to be waited for, and any
token may lie anywhere. Eight values come out in the order 0, 4, 1, 5, 2, 6, 3, 7, which the queries and the output
follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute

from megamoe.cute import arith, convert, copies, mbarrier, smem
from megamoe.cute.arith import Target
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode.shape import BLOCK_BYTES, Shape
from megamoe_stages.fp4_kv_decode.tokens import (
    Work,
    find_page,
    find_row,
    find_token,
    own_token,
    store_mask,
    wait_for_appended,
)

_CHUNKS = 8  # of a row of 64 values


def own_block(unit: int, shape: Shape) -> Int32:
    """This thread's block of its token by the unit's number."""
    thread, _, _ = cute.arch.thread_idx()
    return thread % WARP // shape.tokens_a_warp + shape.threads_a_token * unit


def codes_at(unit: int, shape: Shape) -> int:
    """Where in a slot of the ring the codes of a unit start, of all threads; behind the last the scales."""
    return unit * shape.producer_threads * 32


@cute.jit
def copy_unit(
    row: Int32,
    unit: Constexpr[int],
    slot: Int32,
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """Starts the copies of one of this thread's units to its place in a slot of the ring."""
    thread, _, _ = cute.arch.thread_idx()
    block = own_block(unit, shape)
    if block < shape.blocks:
        keys, values = work.keys, work.values
        of_values = block >= shape.key_blocks
        codes, scales = (arith.select(of_values, values[i], keys[i]) for i in range(2))
        code_bytes, scale_bytes = (arith.select(of_values, Int32(values[i]), Int32(keys[i])) for i in (2, 3))
        column = arith.select(of_values, block - shape.key_blocks, block)
        there = arith.select(row >= 0, row, Int32(0))
        source = codes + Int64(there) * code_bytes + column * 32
        size = arith.select(row != -1, Int32(16), Int32(0))
        at = slot + codes_at(unit, shape) + thread * 16
        copies.copy16(at, source, size)
        copies.copy16(at + shape.producer_threads * 16, source + 16, size)
        at = slot + codes_at(shape.units, shape) + (unit * shape.producer_threads + thread) * 4
        copies.copy4(at, scales + Int64(there) * scale_bytes + column * 4, size // 4)


def load_unit(unit: int, slot: Int32, shape: Shape) -> list[Uint32]:
    """Eight words of codes and one of scales of one of this thread's units, from a slot of the ring."""
    thread, _, _ = cute.arch.thread_idx()
    codes, scales = codes_at(unit, shape), codes_at(shape.units, shape) + unit * shape.producer_threads * 4
    if shape.blocks % shape.threads_a_token and unit == shape.units - 1:  # not all threads have this one
        some = own_block(unit, shape) < shape.blocks
        codes = arith.select(some, Int32(codes), Int32(codes_at(0, shape)))
        scales = arith.select(some, Int32(scales), Int32(codes_at(shape.units, shape)))
    at = slot + codes + thread * 16
    words = smem.load16(at) + smem.load16(at + shape.producer_threads * 16)
    return [*words, Uint32(smem.load4(slot + scales + thread * 4))]


@cute.jit
def decode_unit(words: Constexpr[list[Uint32]], unit: Constexpr[int], tile: Int32, shape: Constexpr[Shape]) -> None:
    """Decodes what `load_unit` loaded to a tile in shared memory."""
    block, token = own_block(unit, shape), own_token(shape)
    if block < shape.blocks:
        row = tile + block * BLOCK_BYTES + token * 128
        for i in cutlass.range_constexpr(_CHUNKS // 2):
            factor = convert.bf16_factor(words[_CHUNKS] >> (8 * i) & 0xFF, Target.SM90)
            for chunk in (2 * i, 2 * i + 1):
                there = row + ((token % _CHUNKS) ^ chunk) * 16
                smem.store16(there, decode_word(words[chunk], factor))


def decode_word(codes: Uint32, factor: Uint32) -> list[Uint32]:
    """Eight codes to four pairs of bf16, 2^-7 of E2M1 * E4M3: values (0, 4), (1, 5), (2, 6), (3, 7).

    A code s e e m becomes s 000 0 00ee m000000: a product puts it in both places, and a mask takes what belongs there.
    """
    words = []
    for i in range(4):
        pair = (codes if i < 2 else codes >> 8) & Uint32(0x000F000F << 4 * (i % 2))
        spread = pair * Uint32(0x1040 >> 4 * (i % 2)) & Uint32(0x81C081C0)
        words.append(convert.mul_bf16x2(spread, factor, Target.SM90))
    return words


def value_order(words: Sequence[Uint32]) -> list[Uint32]:
    """Eight bf16 in four words, brought into the order of decoded values."""
    return [arith.permute(words[i], words[i + 2], part, Target.SM90) for i in range(2) for part in (0x5410, 0x7632)]


@cute.jit
def produce(
    base: Int32,
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """Decodes all tiles of the CTA; the CTA's first threads, `Shape.producer_threads`."""
    thread, _, _ = cute.arch.thread_idx()
    lane, wide = thread % WARP, thread // WARP
    exist = Uint32(0)  # a bit a tile on its way: this thread's token exists; the last tile in the lowest
    stages = shape.stages
    found = [find_token(Int32(tile), work, shape) for tile in range(stages + 2)]
    pages = [find_page(found[tile], Int32(tile), work, shape) for tile in range(stages + 1)]
    for tile in cutlass.range_constexpr(stages):
        row = find_row(pages[tile][0], pages[tile][1], Int32(tile), work, shape)
        wait_for_appended(Int32(tile), work)
        for unit in cutlass.range_constexpr(shape.units):
            copy_unit(row, unit, base + shape.ring_at + tile * shape.stage_bytes, work, shape)
            copies.commit()
        exist = exist << 1 | arith.select(row != -1, Uint32(1), Uint32(0))
    home, within = pages[stages]
    token = found[stages + 1]
    stage, buffer, parity = Int32(0), Int32(0), Int32(1)
    for tile in cutlass.range(work.tiles, unroll=1):
        row = find_row(home, within, tile + shape.stages, work, shape)
        home, within = find_page(token, tile + shape.stages + 1, work, shape)  # a tile before its row is needed
        token = find_token(tile + shape.stages + 2, work, shape)  # a tile before its page is looked up
        wait_for_appended(tile + shape.stages, work)
        slot = base + shape.ring_at + stage * shape.stage_bytes
        full = base + shape.barriers_at + buffer * 16
        mbarrier.wait(full + 8, parity)
        mask = cute.arch.vote_ballot_sync((exist >> (shape.stages - 1) & 1) != 0)
        if lane == 0:
            store_mask(base + shape.masks_at + buffer * 8, wide, Uint32(mask), shape)
        copies.wait(shape.stages * shape.units - 1)
        words = load_unit(0, slot, shape)
        for unit in cutlass.range_constexpr(shape.units):
            now = words
            if cutlass.const_expr(unit + 1 < shape.units):  # they come while this one is decoded
                copies.wait(shape.stages * shape.units - 2)
                words = load_unit(unit + 1, slot, shape)
            decode_unit(now, unit, base + shape.tiles_at + buffer * shape.tile_bytes, shape)
            copy_unit(row, unit, slot, work, shape)
            copies.commit()
        exist = exist << 1 | arith.select(row != -1, Uint32(1), Uint32(0))
        smem.proxy_fence()
        mbarrier.arrive_if(full, Int32(1))
        stage = arith.select(stage == shape.stages - 1, Int32(0), stage + 1)
        parity = arith.select(buffer == shape.buffers - 1, parity ^ 1, parity)
        buffer = arith.select(buffer == shape.buffers - 1, Int32(0), buffer + 1)
    copies.wait(0)
    cute.arch.griddepcontrol_wait()  # no kernel behind this one starts before the one in front has ended
