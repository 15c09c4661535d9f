"""The producers of the head_dim 512 kernel: warps that keep the rings of keys and values full."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Int32, cute

from megamoe.cute import arith, mbarrier, multicast
from megamoe.cute.multicast import Boxes
from megamoe_stages.multi_cta_attention.rows_512 import Work
from megamoe_stages.multi_cta_attention.shape_512 import (
    BLOCK_BYTES,
    BLOCKS,
    CONSUMERS,
    ROW_BYTES,
    TILE,
    Shape,
)


class Source(NamedTuple):
    """Where tiles come from.

    Attributes:
        keys: Boxes of keys.
        values: Boxes of values.
        rank: Of the CTA in its cluster.
    """

    keys: Boxes
    values: Boxes
    rank: Int32


def key_box(shape: Shape) -> tuple[int, int]:
    """Rows and blocks of a box of keys: what a CTA loads of a chunk, or of one of its blocks."""
    blocks, split = divmod(shape.chunk, shape.ctas)
    return (TILE // shape.ctas, 1) if split else (TILE, blocks)


def value_box(shape: Shape) -> tuple[int, int]:
    """Rows and blocks of a box of values: what a CTA loads of a chunk."""
    return shape.value_rows, BLOCKS // CONSUMERS // shape.ctas


@cute.jit
def claim(base: Int32, which: Int32, cursor: cute.Tensor, shape: Constexpr[Shape]) -> tuple[Int32, Int32]:
    """Waits for the next slot of a ring and promises it a chunk; its address and its mbarrier."""
    slot = cursor[0]
    full = base + shape.barriers_at + (which * shape.slots + slot) * 16
    mbarrier.wait(full + 8, cursor[1] ^ 1)
    mbarrier.expect_if(full, shape.chunk_bytes, cute.arch.lane_idx() == 0)
    advance(cursor, shape)
    return base + shape.ring_at + which * shape.ring_bytes + slot * shape.chunk_bytes, full


def advance(cursor: cute.Tensor, shape: Shape) -> None:
    """The next slot of a ring: (slot, parity)."""
    last = cursor[0] == shape.slots - 1
    cursor[1] = arith.select(last, cursor[1] ^ 1, cursor[1])
    cursor[0] = arith.select(last, Int32(0), cursor[0] + 1)


@cute.jit
def load_keys(
    tile: Int32,
    chunk: Int32,
    slot: Int32,
    full: Int32,
    source: Constexpr[Source],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """This CTA's part of a chunk of a tile of keys."""
    token = work.token + work.start(tile)
    rows, blocks = key_box(shape)
    block = chunk * shape.chunk
    if cutlass.const_expr(rows == TILE):
        there = source.rank * blocks
        at = slot + there * BLOCK_BYTES
        multicast.load_box(source.keys, token, work.kv_head, block + there, at, full)
    else:
        for i in cutlass.range_constexpr(shape.chunk):
            at = slot + i * BLOCK_BYTES + source.rank * (rows * ROW_BYTES)
            multicast.load_box(source.keys, token + source.rank * rows, work.kv_head, block + i, at, full)


@cute.jit
def load_key_tile(
    base: Int32,
    which: Int32,
    tile: Int32,
    cursor: cute.Tensor,
    source: Constexpr[Source],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """A tile of keys, for the consumer that makes its scores."""
    for chunk in cutlass.range(shape.key_chunks, unroll=1):
        slot, full = claim(base, which, cursor, shape)
        load_keys(tile, chunk, slot, full, source, work, shape)


@cute.jit
def load_value_tile(
    base: Int32,
    which: Int32,
    tile: Int32,
    cursor: cute.Tensor,
    source: Constexpr[Source],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """A consumer's half of a tile of values."""
    rows, blocks = value_box(shape)
    for chunk in cutlass.range(shape.value_chunks, unroll=1):
        slot, full = claim(base, which, cursor, shape)
        token = work.token + work.start(tile) + chunk * rows
        there = source.rank * blocks
        at = slot + there * (rows * ROW_BYTES)
        block = which * (BLOCKS // CONSUMERS) + there
        multicast.load_box(source.values, token, work.kv_head, block, at, full)


@cute.jit
def produce(
    base: Int32,
    which: Int32,
    cursor: cute.Tensor,
    source: Constexpr[Source],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """Loads all that a consumer reads, in the order in which it does (`attend_512`); one warp for each consumer."""
    if which < work.tiles:
        load_key_tile(base, which, which, cursor, source, work, shape)
    if (which == 1) & (work.tiles > 0):
        load_value_tile(base, which, Int32(0), cursor, source, work, shape)
    for tile in cutlass.range(which, work.tiles, 2, unroll=1):
        load_value_tile(base, which, tile, cursor, source, work, shape)
        if tile + 2 < work.tiles:
            load_key_tile(base, which, tile + 2, cursor, source, work, shape)
        if tile + 1 < work.tiles:
            load_value_tile(base, which, tile + 1, cursor, source, work, shape)
