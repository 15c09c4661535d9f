"""The epilogue of attention_quant: turns the output back, encodes it and writes codes and block scales group by group.

A consumer of `multi_cta_attention.attend_512` holds half of the columns of 64 rows as the tensor cores left them: four
neighbouring lanes share a block of 16. Of four blocks of a row each lane finds one block's scale and gets that block's
codes, all by shuffles: nothing goes through shared memory, which would take as long as the arithmetic. Cosines and
sines are brought by a warp of the producers while the last values are added, over the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, convert, multicast, recipe, ring
from megamoe.cute.arith import Target, ptx
from megamoe.cute.layout import TILE_COLS, offset_128x4
from megamoe.cute.quads import LANES, Quad, store8_if
from megamoe.cute.recipe import BLOCK, GlobalScale
from megamoe.cute.warp import WARP
from megamoe_stages.attention_quant.limits import ROPE_DIM
from megamoe_stages.inverse_rope_quant.kernel import turn_back
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.rows_512 import Rows, lanes
from megamoe_stages.multi_cta_attention.shape_512 import CONSUMERS, HALF, ROWS, Shape

_WARP_ROWS = 16
_CODE_BYTES = HALF // 2  # of a row
_SCALE_BYTES = HALF // BLOCK
_PARTS = _SCALE_BYTES // LANES  # of a row: four blocks each
_ANGLE_BYTES = ROPE_DIM // 2 * 4  # cosines or sines of a row
_PITCH = _ANGLE_BYTES + 16  # of rows in shared memory: eight rows in different banks
_SINES_AT = ROWS * _PITCH
_ENC_AT = 2 * _SINES_AT


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
    """Brings what the epilogue reads to where the queries were; a warp of the producers."""
    lane = cute.arch.lane_idx()
    step = arith.select(cute.size(out.positions) != out.queries, Int32(2), Int32(1))  # 2: int64 seen as int32
    last = cute.size(out.cos, mode=[0]) - 1
    at = []
    for i in cutlass.range_constexpr(ROWS // WARP):
        query, _ = rows.split(cutlass.min(rows.first + i * WARP + lane, rows.count - 1))
        position = out.positions[query * step]
        at.append(arith.select((position < 0) | (position > last), last, position))
    enc = out.enc[()]
    ring.wait(base + shape.queries_read_at, Int32(0))
    if lane == 0:
        ring.store4(base + _ENC_AT, enc)
    full = base + shape.fetched_at
    multicast.expect_if(full, 2 * ROWS * _ANGLE_BYTES, arith.select(lane == 0, Int32(1), Int32(0)))
    cute.arch.sync_warp()
    for i in cutlass.range_constexpr(ROWS // WARP):
        there, line = base + (i * WARP + lane) * _PITCH, Int64(at[i]) * _ANGLE_BYTES
        ring.copy(ring.address(out.cos.iterator) + line, there, Int32(_ANGLE_BYTES), full)
        ring.copy(ring.address(out.sin.iterator) + line, there + _SINES_AT, Int32(_ANGLE_BYTES), full)


@cute.jit
def encode_rows(
    me: Constexpr[Consumer], rows: Constexpr[Rows], out: Constexpr[Quantized], shape: Constexpr[Shape]
) -> None:
    """Encodes a consumer's half of its rows and writes it."""
    ring.wait(me.base + shape.fetched_at, Int32(0))
    if me.number == CONSUMERS - 1:
        turn(me)
    enc = arith.number(Uint32(ring.load4(me.base + _ENC_AT)))
    quad, places = Quad(), [place_of(me, rows, out, half) for half in range(2)]
    regular = write(me, places, recipe.regular_global_scale(enc, Target.SM90), quad, exact=False)
    if arith.any_lane(~regular, Target.SM90):  # rare: NaN, infinity, saturation
        write(me, places, recipe.global_scale(enc, Target.SM90), quad, exact=True)


@cute.jit
def turn(me: Constexpr[Consumer]) -> None:
    """Takes the rotation out of the last 64 columns, which are this consumer's."""
    g, t, wide = lanes()
    for half in cutlass.range_constexpr(2):
        angles = me.base + (wide * _WARP_ROWS + g + 8 * half) * _PITCH + t * 4
        for block in cutlass.range_constexpr(ROPE_DIM // 8):
            place = (HALF - ROPE_DIM) // 2 + 4 * block + 2 * half
            x = [me.acc[place], me.acc[place + 1]]
            c, s = (arith.number(Uint32(ring.load4(angles + 16 * block + there))) for there in (0, _SINES_AT))
            me.acc[place], me.acc[place + 1] = turn_back(x, [c], [s], Target.SM90)


class Place(NamedTuple):
    """Where a lane writes what it gets of a row.

    Attributes:
        codes: Address of its block of the first four.
        scales: Address of the word of four scales that it gets.
        inside: 0 where there is no such row.
    """

    codes: Int64
    scales: Int64
    inside: Int32


def place_of(me: Consumer, rows: Rows, out: Quantized, half: int) -> Place:
    """Of one of a lane's two rows."""
    g, t, wide = lanes()
    row = rows.first + wide * _WARP_ROWS + g + 8 * half
    inside = row < rows.count
    query, head = rows.split(arith.select(inside, row, Int32(0)))
    group, within = divmod(head, out.heads_a_group)
    line = Int64(group) * out.queries + query  # of the codes
    column = (within * CONSUMERS + me.number) * _SCALE_BYTES
    codes = ring.address(out.codes.iterator) + line * (out.cols * (BLOCK // 2)) + column * (BLOCK // 2)
    scales = ring.address(out.scales.iterator)
    if out.tiled:
        padded = cute.size(out.scales, mode=[1])
        scales = scales + (group * (padded * out.cols) + offset_128x4(query, column + t * TILE_COLS, out.cols))
    else:
        scales = scales + line * out.cols + (column + t * TILE_COLS)
    return Place(codes + t * (BLOCK // 2), scales, arith.select(inside, Int32(1), Int32(0)))


def write(me: Consumer, places: list[Place], scale: GlobalScale, quad: Quad, *, exact: bool) -> Boolean:
    """Encodes and writes all that a lane has a part in; whether that can be trusted."""
    regular = scale.regular
    for half, place in enumerate(places):
        word = Uint32(0)
        for part in range(_PARTS):
            first = LANES * BLOCK // 2 * part + 2 * half
            x = [
                [me.acc[first + 8 * block + 4 * side + j] for side in range(2) for j in range(2)]
                for block in range(LANES)
            ]
            codes, byte, fine = encode(x, scale, quad, exact=exact)
            store8_if(place.codes + part * (LANES * BLOCK // 2), codes, place.inside)
            word, regular = word | byte << (8 * part), regular & fine
        attention_mma.store4_global_if(place.scales, quad.gather_bytes(word), place.inside)
    return regular


def encode(
    x: list[list[Float32]], scale: GlobalScale, quad: Quad, *, exact: bool
) -> tuple[tuple[Uint32, Uint32], Uint32, Boolean]:
    """Encodes four blocks of a row, of each of which a lane has four values, as `recipe` does.

    Returns:
        Codes and scale of the block that is the lane's by its number in the quad, and whether they can be trusted.
    """
    target = Target.SM90
    if exact:
        v = quad.reduce([_most(block, _larger) for block in x], _larger)
        byte, o = recipe.block_scale(v, scale, target)
        fine = Boolean(True)
    else:
        v = quad.reduce([_most(block, _larger_or_nan) for block in x], _larger_or_nan)
        byte = convert.encode_e4m3(arith.mul(v, scale.enc_sixth, target), target)
        o = arith.reciprocal_in_range(arith.mul(convert.decode_e4m3(byte, target), scale.dec, target), target)
        o = arith.select(byte == 0, Float32(0.0), o)
        fine = arith.mul(v, o, target) < Float32(convert.BOUND)
    words = []
    factors = quad.all_of(o)
    for blocks in ((0, 1), (2, 3)):
        values = [value for block in blocks for value in x[block]]
        by = [factors[block] for block in blocks for _ in x[block]]
        if exact:
            codes = [convert.encode_e2m1(arith.mul(a, o, target), target) for a, o in zip(values, by, strict=True)]
            words.append(recipe.pack_codes(codes))
        else:
            y = [arith.mul(arith.magnitude(a, target), o, target) for a, o in zip(values, by, strict=True)]
            codes = [convert.code_of_bounded(a, target) - convert.MAGIC_BITS for a in y]
            bits = [arith.bits(a) for a in values]
            words.append(recipe.pack_codes(codes) | recipe.signs(bits, Float32, target))
    return quad.gather_halves(words), byte, fine


def _most(values: list[Float32], larger: Callable[[Float32, Float32], Float32]) -> Float32:
    return larger(larger(values[0], values[1]), larger(values[2], values[3]))


def _larger_or_nan(a: Float32, b: Float32) -> Float32:
    """The larger magnitude, or NaN where there is one."""
    return Float32(ptx(Float32, "{.reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b;}", a, b))


def _larger(a: Float32, b: Float32) -> Float32:
    """The larger magnitude, NaN left out."""
    return Float32(ptx(Float32, "{.reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b;}", a, b))


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
