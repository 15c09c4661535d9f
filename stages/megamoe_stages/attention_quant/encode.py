"""The epilogue of attention_quant: turns the output back, encodes it and writes codes and block scales group by group.

A consumer of `multi_cta_attention.attend_512` holds half of the columns of 64 rows as the tensor cores left them: four
neighbouring lanes share a block of 16. A warp moves two blocks of each row at a time through 2 KB of its own shared
memory, after which a lane has a whole block and encodes it by the recipe of `quantize`. Cosines and sines come early,
by a warp of the producers.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, copies, gmem, mbarrier, recipe, smem
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import CHUNK
from megamoe.cute.layout import TILE, TILE_COLS, offset_128x4
from megamoe.cute.recipe import BLOCK, GlobalScale
from megamoe.cute.warp import WARP
from megamoe_stages.attention_quant.limits import ROPE_DIM
from megamoe_stages.inverse_rope_quant.kernel import turn_back
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.rows_512 import Rows, lanes
from megamoe_stages.multi_cta_attention.shape_512 import ANGLES_PITCH, BLOCK_BYTES, BLOCKS, CONSUMERS, HALF, ROWS, Shape

_WARP_ROWS = 16
_SCALE_BYTES = HALF // BLOCK
_STEPS = _SCALE_BYTES // 2  # a lane has the blocks of half of a consumer's columns of a row, one a step
_STEP_BYTES = 2 * BLOCK * 4  # of a row in shared memory
_ANGLE_BYTES = ROPE_DIM // 2 * 4  # cosines or sines of a row
_CHUNKS = _ANGLE_BYTES // CHUNK
_SINES_AT = ROWS * ANGLES_PITCH


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
def fetch(base: Int32, rows: Constexpr[Rows], out: Constexpr[Quantized], shape: Constexpr[Shape]) -> None:
    """Brings the cosines and sines of the CTA's rows, and the scale; a warp of the producers."""
    lane = cute.arch.lane_idx()
    step = arith.select(cute.size(out.positions) != out.queries, Int32(2), Int32(1))  # 2: int64 seen as int32
    last = cute.size(out.cos, mode=[0]) - 1
    at = []
    for i in cutlass.range_constexpr(ROWS // WARP):
        query, _ = rows.split(cutlass.min(rows.first + i * WARP + lane, rows.count - 1))
        position = out.positions[query * step]
        at.append(Int32(arith.select((position < 0) | (position > last), last, position)))
    row, chunk = lane // _CHUNKS, lane % _CHUNKS
    for i in cutlass.range_constexpr(ROWS // WARP):
        for j in cutlass.range(_CHUNKS, unroll=2):  # four rows each
            here = j * (WARP // _CHUNKS) + row
            line = Int64(cute.arch.shuffle_sync(at[i], here)) * _ANGLE_BYTES + chunk * CHUNK
            target = base + shape.angles_at + angles_of(i * WARP + here, chunk)
            copies.copy16(target, asm.address(out.cos) + line, Int32(CHUNK))
            copies.copy16(target + _SINES_AT, asm.address(out.sin) + line, Int32(CHUNK))
    copies.commit()
    if lane == 0:
        smem.store4(base + shape.word_at, out.enc[()])
    copies.wait(0)
    mbarrier.arrive_if(base + shape.fetched_at, Int32(1))


@cute.jit
def encode_rows(
    me: Constexpr[Consumer], rows: Constexpr[Rows], out: Constexpr[Quantized], shape: Constexpr[Shape]
) -> None:
    """Encodes a consumer's half of its rows and writes it."""
    mbarrier.wait(me.base + shape.fetched_at, me.before[0] // 4)
    enc = arith.number(Uint32(smem.load4(me.base + shape.word_at)))
    if me.number == CONSUMERS - 1:
        turn(me, shape)
    hold(me)
    mbarrier.arrive_if(me.base + shape.turned_at, Int32(1))
    place = place_of(me, rows, out)
    scale = recipe.regular_global_scale(enc, Target.SM90)
    regular, codes, scales = scale.regular, [], []
    for step in cutlass.range_constexpr(_STEPS):
        block = recipe.encode_block(exchange(me, step), Float32, scale, Target.SM90)
        regular = regular & block.regular
        codes += [block.low, block.high]
        scales.append(block.scale)
        if cutlass.const_expr(len(codes) == 4):
            gmem.store16_if(place.codes + (step - 1) * (BLOCK // 2), codes, place.inside)
            codes = []
        if cutlass.const_expr(len(scales) == TILE_COLS):
            store_scales(place, step // TILE_COLS, word_of(scales))
            scales = []
    if arith.any_lane(~regular, Target.SM90):  # rare: NaN, infinity, saturation
        encode_exactly(me, place, recipe.global_scale(enc, Target.SM90))


def exchange(me: Consumer, step: int) -> list[Uint32]:
    """Makes of what a lane has of its two rows a whole block of one row, fp32; a warp.

    Lane i has row i % 16 and gets block `step` of the lower, from lane 16 on of the upper half of the columns.
    """
    g, t, wide = lanes()
    lane = cute.arch.lane_idx()
    area = me.base + BLOCKS * BLOCK_BYTES + me.number * BLOCK_BYTES + wide * (_WARP_ROWS * _STEP_BYTES)
    for upper in range(2):
        for side in range(2):
            for half in range(2):
                first = HALF // 4 * upper + 8 * step + 4 * side + 2 * half
                at = chunk_at(area, g + 8 * half, 4 * upper + 2 * side | t >> 1) + (t & 1) * 8
                smem.store8(at, [arith.bits(me.acc[first + j]) for j in range(2)])
    cute.arch.sync_warp()
    row, upper = lane % _WARP_ROWS, lane // _WARP_ROWS
    words = [word for i in range(4) for word in smem.load16(chunk_at(area, row, 4 * upper | i))]
    cute.arch.sync_warp()
    return words


def chunk_at(area: Int32, row: Int32, chunk: Int32) -> Int32:
    """Where 16 bytes of a row are: swizzled, so that neither pairs of four rows nor chunks of eight share banks."""
    return area + row * _STEP_BYTES + (chunk ^ ((row & 3) << 1 | row >> 2 & 1)) * 16


def word_of(scales: list[Uint32]) -> Uint32:
    """Four bytes."""
    return scales[0] | scales[1] << 8 | scales[2] << 16 | scales[3] << 24


@cute.jit
def encode_exactly(me: Constexpr[Consumer], place: Constexpr[Place], scale: Constexpr[GlobalScale]) -> None:
    """Encodes and writes anything; the registers move down from step to step, so that there is one code for all."""
    words = cute.make_rmem_tensor((2,), Uint32)
    words[0], words[1] = Uint32(0), Uint32(0)
    for step in cutlass.range(_STEPS, unroll=1):
        block = recipe.encode_any_block(exchange(me, 0), Float32, scale, Target.SM90)
        if place.inside != 0:
            gmem.store8(place.codes + step * (BLOCK // 2), [block.low, block.high])
        words[0], words[1] = words[0] >> 8 | words[1] << 24, words[1] >> 8 | block.scale << 24
        move_down(me)
    for i in cutlass.range_constexpr(2):
        store_scales(place, i, words[i])


def move_down(me: Consumer) -> None:
    """Puts the next step's values where the first one's were."""
    for i in range(HALF // 2 - 8):
        me.acc[i] = me.acc[i + 8]


@cute.jit
def turn(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """Takes the rotation out of the last 64 columns, which are this consumer's."""
    g, t, wide = lanes()
    for half in cutlass.range_constexpr(2):
        row = wide * _WARP_ROWS + g + 8 * half
        for block in cutlass.range_constexpr(ROPE_DIM // 8):
            place = (HALF - ROPE_DIM) // 2 + 4 * block + 2 * half
            x = [me.acc[place], me.acc[place + 1]]
            at = me.base + shape.angles_at + angles_of(row, block) + t * 4
            c, s = (arith.number(Uint32(smem.load4(at + there))) for there in (0, _SINES_AT))
            me.acc[place], me.acc[place + 1] = turn_back(x, [c], [s], Target.SM90)


def angles_of(row: Int32, chunk: int | Int32) -> Int32:
    """Where 16 bytes of a row's cosines are: swizzled, so that eight rows are in different banks."""
    return row * ANGLES_PITCH + ((chunk ^ row) & (_CHUNKS - 1)) * CHUNK


def hold(me: Consumer) -> None:
    """Has the rotated columns computed, so what was read for them has come, before what follows."""
    first = (HALF - ROPE_DIM) // 2
    for i, value in enumerate(attention_mma.fence([me.acc[first + i] for i in range(ROPE_DIM // 2)])):
        me.acc[first + i] = value


class Place(NamedTuple):
    """Where a lane writes: half of a consumer's columns of a row.

    Attributes:
        codes: Address of the first.
        scales: Address of the first four.
        next_scales: Bytes from there to the next four.
        inside: 0 where there is no such row.
    """

    codes: Int64
    scales: Int64
    next_scales: int
    inside: Int32


def place_of(me: Consumer, rows: Rows, out: Quantized) -> Place:
    """See `exchange` for which row and columns are a lane's."""
    lane = cute.arch.lane_idx()
    _, _, wide = lanes()
    row = rows.first + wide * _WARP_ROWS + lane % _WARP_ROWS
    inside = row < rows.count
    query, head = rows.split(arith.select(inside, row, Int32(0)))
    group, within = divmod(head, out.heads_a_group)
    line = Int64(group) * out.queries + query  # of the codes
    column = (within * CONSUMERS + me.number) * _SCALE_BYTES + lane // _WARP_ROWS * _STEPS
    codes = asm.address(out.codes) + line * (out.cols * (BLOCK // 2)) + column * (BLOCK // 2)
    there = asm.flag(inside)
    scales = asm.address(out.scales)
    if out.tiled:
        padded = cute.size(out.scales, mode=[1])
        offset = group * (padded * out.cols) + offset_128x4(query, column, out.cols)
        return Place(codes, scales + offset, TILE, there)
    return Place(codes, scales + line * out.cols + column, TILE_COLS, there)


def store_scales(place: Place, number: int, word: Uint32) -> None:
    """Writes four scales, if there is such a row."""
    gmem.store4_if(place.scales + number * place.next_scales, word, place.inside)


@cute.jit
def write_rest(out: Constexpr[Quantized]) -> None:
    """Zeros the rows of tiles behind the last query; all threads of the launch, each some words of four scales."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    threads, _, _ = cute.arch.block_dim()
    groups, padded = cute.size(out.scales, mode=[0]), cute.size(out.scales, mode=[1])
    rest, words = padded - out.queries, out.cols // TILE_COLS
    total = groups * rest * words
    for item in cutlass.range(cta * threads + thread, total, ctas * threads, unroll=1):
        row, word = item // words, item % words
        group = row // rest
        offset = group * (padded * out.cols)
        offset = offset + offset_128x4(out.queries + row - group * rest, word * TILE_COLS, out.cols)
        gmem.store4_if(asm.address(out.scales) + offset, Uint32(0), Int32(1))
