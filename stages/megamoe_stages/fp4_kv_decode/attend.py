"""The consumers of the decode kernel: scores, softmax and sums over decoded tiles.

A consumer, a warpgroup, holds 64 rows, each a query and a head. The consumers take turns at the tiles, and join their
sums at the end. Scores are in base 2.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, bf16, mbarrier, smem, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.softmax import HIDDEN, finite
from megamoe.cute.warp import WARP, sum_of_four
from megamoe_stages.fp4_kv_decode.shape import BLOCK_BYTES, COLUMNS, GROUP, TILE, Shape

_STEP_BYTES = wgmma.K_STEP * 2  # along a row
_STEP_ROWS = wgmma.K_STEP * wgmma.ROW_BYTES >> 4  # in units of descriptors
_PRODUCT_COLUMNS = 128
_PRODUCT_STEP = _PRODUCT_COLUMNS // COLUMNS * BLOCK_BYTES >> 4
CONSUMERS_BARRIER = 1  # of the consumers; 0 is that of the CTA


class Rows(NamedTuple):
    """The rows of a CTA and what they see.

    Attributes:
        first: The CTA's first row.
        count: Rows of the whole problem of this kv head.
        group: Heads that share a kv head.
        position: Token that query 0 is at.
        window: Tokens that a query sees; 0 for all before it.
        indexed: Every query sees all tokens of the first cache's tiles.
        near: Tiles of the CTA that are of the first cache.
        query: Row of q, in queries, of query 0.
        heads: Of q.
        head: First of the CTA's.
    """

    first: Int32
    count: Int32
    group: Int32
    position: Int32
    window: Int32
    indexed: Int32
    near: Int32
    query: Int32
    heads: Int32
    head: Int32

    def place(self, row: Int32) -> Int32:
        """Where in q, in heads, a row lies; row counts from the start of the problem."""
        query = row // self.group
        return (self.query + query) * self.heads + self.head + row - query * self.group


def lanes() -> tuple[Int32, Int32, Int32]:
    """Row (0..15 of a warp: this and 8 more), pair of columns, and the warp's number in its warpgroup."""
    lane = cute.arch.lane_idx()
    return lane // 4, lane % 4, cute.arch.warp_idx() % (GROUP // WARP)


def below(count: Int32) -> Uint32:
    """A mask of the lowest bits: none for count <= 0, all from 32 on."""
    bounded = cutlass.max(cutlass.min(count, 32), 0)
    return arith.ptx(Uint32, "{.reg .b32 x; shl.b32 x, 1, $1; add.s32 $0, x, -1;}", bounded)  # 1 << 32 is 0 here


def row_masks(row: Int32, start: Int32, every: Boolean, exist: list[Uint32], rows: Rows) -> list[Uint32]:
    """Which tokens of a tile a row of the CTA sees, 32 a word, from this lane's first column on."""
    _, t, _ = lanes()
    last = rows.position + (rows.first + row) // rows.group - start  # in the tile
    end = arith.select(every, Int32(TILE), last + 1)
    begin = arith.select(every | (rows.window == 0), Int32(0), last - rows.window + 1)
    return [(exist[i] & below(end - 32 * i) & ~below(begin - 32 * i)) >> Uint32(2 * t) for i in range(2)]


@cute.jit
def attend(
    acc: cute.Tensor,  # (out columns / 2,) fp32, as `wgmma.mma`
    stat: cute.Tensor,  # (4,) fp32: largest scores of two rows, their sums
    base: Int32,
    consumer: Int32,
    tiles: Int32,
    first: Int32,
    factor: Float32,
    rows: Constexpr[Rows],
    shape: Constexpr[Shape],
) -> None:
    """All tiles that a consumer attends to.

    `first` is the first token, `factor` makes scores, in base 2, of products; above 0.
    """
    for i, zero in enumerate(wgmma.zeros(shape.out_columns // 2)):
        acc[i] = zero
    for i in cutlass.range_constexpr(2):
        stat[i], stat[2 + i] = Float32(HIDDEN), Float32(0.0)
    for turn in cutlass.range((tiles - consumer + 1) // 2, unroll=1):
        attend_to(acc, stat, base, consumer + 2 * turn, first, factor, rows, shape)
    for i in cutlass.range_constexpr(2):
        stat[2 + i] = sum_of_four(stat[2 + i], Target.SM90)


@cute.jit
def attend_to(
    acc: cute.Tensor,
    stat: cute.Tensor,
    base: Int32,
    tile: Int32,
    first: Int32,
    factor: Float32,
    rows: Constexpr[Rows],
    shape: Constexpr[Shape],
) -> None:
    """One tile, scores and sums."""
    count = shape.out_columns // 2
    scores = start_scores(base, tile, shape)
    masks = masks_of(base, tile, first, rows, shape)
    weights, scale = softmax(attention_mma.wait(scores), masks, stat, factor, rows)
    shrink(acc, scale)
    ready = attention_mma.fence([acc[i] for i in range(count)] + weights)
    sums = start_sums(ready[:count], ready[count:], base, tile, shape)
    for i, value in enumerate(attention_mma.wait(sums)):
        acc[i] = value
    release(base, tile, shape)


@cute.jit
def shrink(acc: cute.Tensor, scale: Constexpr[list[Float32]]) -> None:
    """Multiplies the sums by what their rows shrink by; nothing where no row of the warp has a new largest score."""
    if cute.arch.vote_any_sync((scale[0] != Float32(1.0)) | (scale[1] != Float32(1.0))):
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] * scale[i // 2 % 2]


def start_scores(base: Int32, tile: Int32, shape: Shape) -> list[Float32]:
    """Starts the products of the queries and the keys of a tile, once it is there; a group of its own."""
    buffer = tile % shape.buffers
    mbarrier.wait(base + shape.barriers_at + buffer * 16, tile // shape.buffers % 2)
    scores = attention_mma.fence(wgmma.zeros(TILE // 2))
    queries, keys = wgmma.descriptor(base), wgmma.descriptor(base + shape.tiles_at + buffer * shape.tile_bytes)
    for k in range(shape.head_dim // wgmma.K_STEP):
        ahead = (k // 4 * BLOCK_BYTES + k % 4 * _STEP_BYTES) >> 4
        scores = attention_mma.mma_shared(scores, queries + ahead, keys + ahead)
    wgmma.commit()
    return scores


def start_sums(sums: list[Float32], weights: list[Uint32], base: Int32, tile: Int32, shape: Shape) -> list[Float32]:
    """Starts adding the values of a tile by weights in registers; a group of its own."""
    values, parts = _values(base, tile, shape), _products(sums, shape)
    for k in range(TILE // wgmma.K_STEP):
        for i, part in enumerate(parts):
            at = values + (k * _STEP_ROWS + i * _PRODUCT_STEP)
            parts[i] = attention_mma.mma_transposed(part, weights[4 * k : 4 * k + 4], at)
    wgmma.commit()
    return [value for part in parts for value in part]


def _products(sums: list[Float32], shape: Shape) -> list[list[Float32]]:
    """The sums of each product; with four warpgroups ptxas holds one to 128 registers, too few for 256 columns."""
    each = _PRODUCT_COLUMNS // 2 if shape.producers == 2 else len(sums)
    return [sums[i : i + each] for i in range(0, len(sums), each)]


def _values(base: Int32, tile: Int32, shape: Shape) -> Int64:
    at = base + shape.tiles_at + tile % shape.buffers * shape.tile_bytes + shape.key_blocks * BLOCK_BYTES
    return attention_mma.transposed(at, BLOCK_BYTES)


def release(base: Int32, tile: Int32, shape: Shape) -> None:
    """Gives the place of a tile back, an arrival a warp."""
    empty = base + shape.barriers_at + tile % shape.buffers * 16 + 8
    mbarrier.arrive_if(empty, cute.arch.lane_idx() == 0)


def masks_of(base: Int32, tile: Int32, first: Int32, rows: Rows, shape: Shape) -> list[list[Uint32]]:
    """What this lane's two rows see of a tile."""
    g, _, wide = lanes()
    at = base + shape.masks_at + tile % shape.buffers * 8
    exist = [Uint32(smem.load4(at + 4 * i)) for i in range(2)]
    every = rows.indexed != 0
    return [row_masks(wide * 16 + g + 8 * i, first + tile * TILE, every, exist, rows) for i in range(2)]


def softmax(
    scores: list[Float32],
    masks: list[list[Uint32]],
    stat: cute.Tensor,
    factor: Float32,
    rows: Rows,
) -> tuple[list[Uint32], list[Float32]]:
    """Weights of a tile as left operands of four products, and by what the sums so far shrink; updates `stat`."""
    weights = cute.make_rmem_tensor((TILE // 4,), Uint32)
    scale = cute.make_rmem_tensor((2,), Float32)
    _, _, wide = lanes()
    softmax_of_rows(weights, scale, stat, scores, masks, factor, rows.count - rows.first > wide * 16)
    return [weights[i] for i in range(TILE // 4)], [scale[i] for i in range(2)]


@cute.jit
def softmax_of_rows(
    weights: cute.Tensor,
    scale: cute.Tensor,
    stat: cute.Tensor,
    scores: Constexpr[list[Float32]],
    masks: Constexpr[list[list[Uint32]]],
    factor: Float32,
    some: Boolean,
) -> None:
    """The same of a lane's two rows side by side; nothing where no row of the warp is `some`."""
    target = Target.SM90
    for i in cutlass.range_constexpr(TILE // 4):
        weights[i] = Uint32(0)
    scale[0], scale[1] = Float32(1.0), Float32(1.0)
    if some:
        x, tops, zeros = [], [], []
        for half in cutlass.range_constexpr(2):
            top = Float32(HIDDEN)
            for i in cutlass.range_constexpr(TILE // 4):
                visible = (masks[half][i // 8] & Uint32(1 << (i % 8 // 2 * 8 + i % 2))) != 0
                value = arith.select(visible, scores[i // 2 * 4 + 2 * half + i % 2], Float32(HIDDEN))
                top = arith.maximum(top, value, target)
                x.append(value)
            tops.append(top)
        for half in cutlass.range_constexpr(2):
            top = attention_mma.max_of_four(tops[half]) * factor
            tops[half] = arith.maximum(stat[half], top, target)
            zeros.append(finite(tops[half]))
        for half in cutlass.range_constexpr(2):
            scale[half] = exp2(stat[half] - zeros[half])
            total = stat[2 + half] * scale[half]
            for i in cutlass.range_constexpr(TILE // 4):
                at = half * (TILE // 4) + i
                x[at] = exp2(arith.ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", x[at], factor, -zeros[half]))
                total = total + x[at]
            for i in cutlass.range_constexpr(TILE // 8):
                at = half * (TILE // 4) + 2 * i
                weights[2 * i + half] = bf16.pack(x[at], x[at + 1], target)
            stat[half], stat[2 + half] = tops[half], total
