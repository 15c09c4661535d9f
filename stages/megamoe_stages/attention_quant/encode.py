"""The epilogue of attention_quant: turns the output back, encodes it and writes codes and block scales group by group.

A consumer of `multi_cta_attention.attend_512` holds half of the columns of 64 rows as the tensor cores left them: four
neighbouring lanes share a block of 16. A warp moves 64 columns at a time through its own shared memory, after which a
lane has whole blocks and encodes them by the recipe of `quantize`.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, multicast, recipe, ring
from megamoe.cute.arith import Target
from megamoe.cute.layout import TILE_COLS, offset_128x4
from megamoe.cute.recipe import BLOCK, GlobalScale
from megamoe_stages.attention_quant.limits import ROPE_DIM
from megamoe_stages.inverse_rope_quant.kernel import turn_back
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.rows_512 import Rows, lanes
from megamoe_stages.multi_cta_attention.shape_512 import COLUMNS, CONSUMERS, HALF, Shape

_WARP_ROWS = 16
_PITCH = COLUMNS * 4 + 32  # bytes of a row of fp32: four rows of pairs fill all banks once
_CODE_BYTES = HALF // 2  # of a row
_CODES_PITCH = _CODE_BYTES + 16
_SCALE_BYTES = HALF // BLOCK
_CODES_AT = _WARP_ROWS * _PITCH
_SCALES_AT = _CODES_AT + _WARP_ROWS * _CODES_PITCH
_WARP_BYTES = _SCALES_AT + _WARP_ROWS * _SCALE_BYTES


class Quantized(NamedTuple):
    """What the epilogue reads and writes.

    Attributes:
        positions: int32 (queries * step): the first of every `step` counts.
        cos: (P, 32) fp32.
        sin: (P, 32) fp32.
        enc: () fp32.
        codes: (G, queries, heads / G * 256) uint8.
        scales: (G, queries, heads / G * 32) uint8; padded to 128 rows when tiled.
        heads_a_group: Divides by the heads of a group.
        tiled: The scales lie in 128x4 tiles.
    """

    positions: cute.Tensor
    cos: cute.Tensor
    sin: cute.Tensor
    enc: cute.Tensor
    codes: cute.Tensor
    scales: cute.Tensor
    heads_a_group: cute.FastDivmodDivisorV2
    tiled: bool

    @property
    def queries(self) -> Int32:
        """Of all sequences."""
        return cute.size(self.codes, mode=[1])

    @property
    def cols(self) -> Int32:
        """Blocks of a row of the result."""
        return cute.size(self.codes, mode=[2]) // (BLOCK // 2)


@cute.jit
def encode_rows(
    me: Constexpr[Consumer], rows: Constexpr[Rows], out: Constexpr[Quantized], shape: Constexpr[Shape]
) -> None:
    """Encodes a consumer's half of its rows and writes it, over its ring."""
    lane = cute.arch.lane_idx()
    _, _, wide = lanes()
    area = me.base + shape.ring_at + me.number * shape.ring_bytes + wide * _WARP_BYTES
    if me.number == CONSUMERS - 1:
        turn(me, rows, out)
    scale = recipe.regular_global_scale(out.enc[()], Target.SM90)
    row, pair = lane % _WARP_ROWS, lane // _WARP_ROWS
    for part in cutlass.range_constexpr(HALF // COLUMNS):
        spread(me, area, part)
        cute.arch.sync_warp()
        blocks = [[word for i in range(4) for word in load(area, row, 2 * pair + j, i)] for j in range(2)]
        cute.arch.sync_warp()
        at = area + _CODES_AT + row * _CODES_PITCH + part * (COLUMNS // 2) + pair * BLOCK
        scales_at = area + _SCALES_AT + row * _SCALE_BYTES + part * TILE_COLS + pair * 2
        encode(blocks, at, scales_at, scale, out)
    attention_mma.proxy_fence()
    cute.arch.sync_warp()
    write(me, area, rows, out, wide)


@cute.jit
def turn(me: Constexpr[Consumer], rows: Constexpr[Rows], out: Constexpr[Quantized]) -> None:
    """Takes the rotation out of the last 64 columns, which are this consumer's."""
    g, t, wide = lanes()
    step = cute.size(out.positions) // out.queries  # 2 where int64 is seen as int32
    for half in cutlass.range_constexpr(2):
        row = cutlass.min(rows.first + wide * _WARP_ROWS + g + 8 * half, rows.count - 1)
        query, _ = rows.split(row)
        last = cute.size(out.cos, mode=[0]) - 1
        at = out.positions[query * step]
        at = arith.select((at < 0) | (at > last), last, at)
        for block in cutlass.range_constexpr(ROPE_DIM // 8):
            place = (HALF - ROPE_DIM) // 2 + 4 * block + 2 * half
            x = [me.acc[place], me.acc[place + 1]]
            c, s = out.cos[at, 4 * block + t], out.sin[at, 4 * block + t]
            me.acc[place], me.acc[place + 1] = turn_back(x, [c], [s], Target.SM90)


def spread(me: Consumer, area: Int32, part: int) -> None:
    """Writes 64 columns of a warp's rows to its shared memory."""
    g, t, _ = lanes()
    for half in range(2):
        at = area + (g + 8 * half) * _PITCH + 8 * t
        for block in range(COLUMNS // 8):
            place = COLUMNS // 2 * part + 4 * block + 2 * half
            attention_mma.store8(at + 32 * block, [arith.bits(me.acc[place + j]) for j in range(2)])


def load(area: Int32, row: Int32, block: Int32, quarter: int) -> list[Uint32]:
    """Four values of a block."""
    return ring.load16(area + row * _PITCH + block * (BLOCK * 4) + quarter * 16)


@cute.jit
def encode(
    blocks: Constexpr[list[list[Uint32]]],
    at: Int32,
    scales_at: Int32,
    scale: Constexpr[GlobalScale],
    out: Constexpr[Quantized],
) -> None:
    """Encodes two neighbouring blocks into shared memory."""
    target = Target.SM90
    encoded = [recipe.encode_block(words, Float32, scale, target) for words in blocks]
    keep(encoded, at, scales_at)
    if not (scale.regular & encoded[0].regular & encoded[1].regular):  # rare: NaN, infinity or saturation
        exact = recipe.global_scale(out.enc[()], target)
        keep([recipe.encode_any_block(words, Float32, exact, target) for words in blocks], at, scales_at)


def keep(encoded: list[recipe.Block], at: Int32, scales_at: Int32) -> None:
    """Puts the codes and scales of two blocks into shared memory."""
    attention_mma.store16(at, [word for block in encoded for word in (block.low, block.high)])
    attention_mma.store2(scales_at, encoded[0].scale | encoded[1].scale << 8)


@cute.jit
def write(me: Constexpr[Consumer], area: Int32, rows: Constexpr[Rows], out: Constexpr[Quantized], wide: Int32) -> None:
    """Writes a warp's scales and starts the bulk stores of its codes, a row each, and waits until they were read."""
    lane = cute.arch.lane_idx()
    local = lane % _WARP_ROWS
    row = rows.first + wide * _WARP_ROWS + local
    inside = row < rows.count
    query, head = rows.split(arith.select(inside, row, Int32(0)))
    group, within = divmod(head, out.heads_a_group)
    line = Int64(group) * out.queries + query  # of the codes
    half = within * CONSUMERS + me.number
    leads = arith.select(inside & (lane < _WARP_ROWS), Int32(1), Int32(0))
    to = ring.address(out.codes.iterator) + line * (out.cols * (BLOCK // 2)) + half * _CODE_BYTES
    multicast.store_row(to, area + _CODES_AT + local * _CODES_PITCH, _CODE_BYTES, leads)
    scales_at = area + _SCALES_AT + local * _SCALE_BYTES
    to = ring.address(out.scales.iterator)
    if cutlass.const_expr(out.tiled):
        padded = cute.size(out.scales, mode=[1])
        for i in cutlass.range_constexpr(_SCALE_BYTES // TILE_COLS // 2):
            part = lane // _WARP_ROWS * 2 + i
            offset = group * (padded * out.cols) + offset_128x4(query, half * _SCALE_BYTES + part * TILE_COLS, out.cols)
            word = Uint32(ring.load4(scales_at + part * TILE_COLS))
            attention_mma.store4_global_if(to + offset, word, arith.select(inside, Int32(1), Int32(0)))
    else:
        ring.store_global16_if(to + line * out.cols + half * _SCALE_BYTES, ring.load16(scales_at), leads)
    cute.arch.cp_async_bulk_commit_group()
    cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def write_rest(out: Constexpr[Quantized]) -> None:
    """Zeros the rows of tiles behind the last query; all threads of the launch, each some words of four scales."""
    thread, _, _ = cute.arch.thread_idx()
    x, y, _ = cute.arch.block_idx()
    across, down, _ = cute.arch.grid_dim()
    threads, _, _ = cute.arch.block_dim()
    groups, padded = cute.size(out.scales, mode=[0]), cute.size(out.scales, mode=[1])
    rest, words = padded - out.queries, out.cols // TILE_COLS
    total = groups * rest * words
    for item in cutlass.range((y * across + x) * threads + thread, total, across * down * threads, unroll=1):
        row, word = item // words, item % words
        group = row // rest
        offset = group * (padded * out.cols)
        offset = offset + offset_128x4(out.queries + row - group * rest, word * TILE_COLS, out.cols)
        attention_mma.store4_global_if(ring.address(out.scales.iterator) + offset, Uint32(0), Int32(1))
