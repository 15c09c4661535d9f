"""A tile's scores and weights in the decode kernel for keys that are the values, and its decoded values.

Tokens are the rows of the products and queries times heads their columns: FP4 goes from shared memory to registers, is
decoded there to fp16 (`cute.f16`) and multiplied from there, K Q^T; a lane's word of eight values becomes part of the
left operands of two products. The same registers go to shared memory, where rows are tokens, as right operand of the
sums. A lane is (g, t) = (lane // 4, lane % 4). Scores are in base 2.

What is subtracted from the scores of a row, an integer, stays until a score is far above it; fp16 holds weights that
are not too large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, f16, mbarrier, smem, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.softmax import HIDDEN
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, lanes
from megamoe_stages.fp4_kv_decode.mqa_shape import (
    BLOCK_BYTES,
    CONSUMERS,
    GROUP,
    MASKS,
    PIECE_BYTES,
    PIECE_CODES,
    PIECE_SCALES,
    PIECES,
    QUARTERS,
    ROWS,
    TILE,
    TILE_BYTES,
    WARPS,
    Shape,
    buffer_of,
    phase_of,
)

LOWEST = -3.0e38  # finite, so that no difference of two is NaN
_SLACK = 15.0  # weights below 2^15 fit fp16
_MARGIN = 5.0  # the largest weight when a number to subtract is chosen is about 2^5
_BEFORE = 3  # the quarter of the scores that the sums of the tile before come before
_WORDS = 4  # of a lane's codes of a quarter


def key_operands(codes: list[Uint32], factors: list[Uint32]) -> list[list[Uint32]]:
    """The left operands of two products from a word of each of two tokens, and their scales."""
    rows = [[f16.widen(half) for half in f16.spread(codes[h])] for h in range(2)]
    return [[f16.multiply(rows[h][odd][i], factors[h]) for i in range(2) for h in range(2)] for odd in range(2)]


def fenced(operands: list[list[Uint32]]) -> list[list[Uint32]]:
    """Left operands behind a fence, for the next products."""
    words = attention_mma.fence([word for a in operands for word in a])
    return [words[4 * i : 4 * i + 4] for i in range(len(operands))]


def load_quarter(base: Int32, number: Int32, quarter: int, shape: Shape) -> tuple[list[list[Uint32]], list[Uint32]]:
    """16 bytes of codes of each of a lane's two tokens, and the pairs of their scales; gives their place back."""
    g, t, wide = lanes()
    piece = number * QUARTERS + quarter
    place = piece % PIECES
    slot, token = base + shape.ring_at + place * PIECE_BYTES, wide * 16 + g
    scales_at = slot + TILE * PIECE_CODES + token * PIECE_SCALES + t * 2
    full = base + shape.full_at + (number % CONSUMERS * QUARTERS + quarter) * 8
    mbarrier.wait(full, number // CONSUMERS % 2)
    codes = [smem.load16(slot + (token + 8 * h) * PIECE_CODES + t * 16) for h in range(2)]
    pairs = [f16.scale_pair(smem.load_bytes(scales_at + 8 * h * PIECE_SCALES, 2)) for h in range(2)]
    mbarrier.arrive_if(base + shape.empty_at + place * 8, Int32(1))  # all lanes: racecheck lets none speak for others
    return codes, pairs


def start_scores(
    base: Int32, number: Int32, start_sums: Callable[[], list[Float32]], shape: Shape
) -> tuple[list[Float32], list[Float32]]:
    """The products of the keys of a tile and the queries, and the sums of the tile before, both still on their way.

    Args:
        base: Of shared memory.
        number: Of the tile.
        start_sums: Starts the sums; called with no product on its way, and the scores that come behind it make no wait.
        shape: The kernel.
    """
    _, _, wide = lanes()
    lane, buffer = cute.arch.lane_idx(), buffer_of(number)
    queries = wgmma.descriptor(base & 0x3FFFF)
    raw = load_quarter(base, number, 0, shape)
    to = base + shape.values_at + buffer * TILE_BYTES + (wide * 16 + lane % 16) * 128 + ((lane // 16) ^ (lane % 8)) * 16
    mbarrier.wait(base + shape.free_at + buffer * 8, phase_of(number) ^ 1)
    scores = attention_mma.fence(wgmma.zeros(ROWS // 2))
    for quarter in range(QUARTERS):
        if quarter == _BEFORE:
            scores = attention_mma.wait(scores)
            sums = start_sums()
            scores = attention_mma.fence(scores)
        now, pairs = raw
        for word in range(_WORDS):
            factors = [f16.both_halves(pair, upper=word > 1) for pair in pairs]
            operands = key_operands([now[h][word] for h in range(2)], factors)
            block = (2 * quarter + word // 2) * BLOCK_BYTES
            for odd, a in enumerate(operands):
                smem.store_matrices((to ^ ((word % 2 * 2 + odd) * 32)) + block, a)
            for odd, a in enumerate(fenced(operands)):
                scores = wgmma.mma(scores, a, queries + ((block + (word % 2 * 2 + odd) * 32) >> 4), "f16")
            wgmma.commit()
            if quarter < _BEFORE:
                wgmma.wait(1)
            if word == 1 and quarter < QUARTERS - 1:
                raw = load_quarter(base, number, quarter + 1, shape)
    return scores, sums


@cute.jit
def hide(
    x: cute.Tensor,
    base: Int32,
    start: Int32,
    exist: Constexpr[list[Uint32]],
    every: Boolean,
    shape: Constexpr[Shape],
) -> None:
    """Scores of what a row does not see become -inf."""
    g, t, wide = lanes()
    local = wide * 16 + g  # and 8 more
    word = arith.select(wide < 2, exist[0], exist[1])
    position, window = (Int32(one) for one in smem.load_words(base + shape.facts_at + 16, 2))
    for n in cutlass.range_constexpr(ROWS // 8):
        for e in cutlass.range_constexpr(2):
            query = smem.load4(base + shape.queries_at + (8 * n + 2 * t + e) * 4)
            last = position + query
            for h in cutlass.range_constexpr(2):
                token = start + local + 8 * h
                seen = every | ((token <= last) & ((window == 0) | (token > last - window)))
                seen = seen & ((word >> Uint32(local % 32 + 8 * h) & 1) != 0)
                at = 4 * n + 2 * h + e
                x[at] = arith.select(seen, x[at], Float32(HIDDEN))


class Scores(NamedTuple):
    """What a consumer has of a tile between its scores and its weights.

    Attributes:
        x: (32,) fp32: the scores, placed as `wgmma.mma`.
        weights: (16,) uint32: pairs of fp16, those of the first tokens of rows n, then of the others.
        sums: (8,) fp32: sums of weights, as `add_sums` leaves them.
        highest: (1,) int32: bits of the largest distance above what is subtracted: as integers positive numbers keep
            their order, and three of them go into one instruction.
    """

    x: cute.Tensor
    weights: cute.Tensor
    sums: cute.Tensor
    highest: cute.Tensor


def no_scores() -> Scores:
    """Room for those of a tile."""
    return Scores(
        cute.make_rmem_tensor((ROWS // 2,), Float32),
        cute.make_rmem_tensor((ROWS // 4,), Uint32),
        cute.make_rmem_tensor((ROWS // 8,), Float32),
        cute.make_rmem_tensor((1,), Int32),
    )


@cute.jit
def take(
    tile: Constexpr[Scores], scores: Constexpr[list[Float32]], base: Int32, number: Int32, shape: Constexpr[Shape]
) -> Float32:
    """Takes the scores of a tile, hides what is not seen; by what their factors are multiplied."""
    for i in cutlass.range_constexpr(ROWS // 2):
        tile.x[i] = scores[i]
    tile.highest[0] = Int32(0)
    exist = [Uint32(word) for word in smem.load_words(base + shape.masks_at + number % MASKS * 8, 2)]
    start, early, late, all_from = (Int32(word) for word in smem.load16(base + shape.facts_at))
    every, start = number >= all_from, start + number * TILE
    ratio = Float32(1.0)
    if cutlass.const_expr(shape.extra):
        near, bits_of = smem.load_words(base + shape.facts_at + 24, 2)
        ratio = arith.select(number < Int32(near), Float32(1.0), arith.number(bits_of))
    inner = (start + (TILE - 1) <= early) & (start > late)
    all_seen = arith.select(inner | every, exist[0] & exist[1], Uint32(0))
    if all_seen != Uint32(0xFFFFFFFF):
        hide(tile.x, base, start, exist, every, shape)
    return ratio


@cute.jit
def weigh(
    tile: Constexpr[Scores],
    totals: cute.Tensor,
    base: Int32,
    number: Int32,
    consumer: Int32,
    ratio: Float32,
    shape: Constexpr[Shape],
) -> None:
    """Makes weights of scores; all warps of a consumer subtract the same.

    Args:
        tile: The scores.
        totals: Sums of weights over this warp's tokens, of rows 8 g + 2 t and the next one.
        base: Of shared memory.
        number: Of the tile.
        consumer: 0 or 1.
        ratio: As from `take`.
        shape: The kernel.
    """
    _, t, _ = lanes()
    for n in cutlass.range_constexpr(ROWS // 8):
        row = [arith.number(word) for word in smem.load16(base + shape.table_at + n * 64 + t * 16)]
        factors = [row[2 * e] * ratio if shape.extra else row[2 * e] for e in range(2)]
        add_sums(tile, n, [put_weights(tile, n, e, factors[e], row[2 * e + 1]) for e in range(2)])
    flag = base + shape.flags_at + buffer_of(number) * 4
    if arith.any_lane(tile.highest[0] > Float32(_SLACK).bitcast(Int32), Target.SM90):
        smem.store4(flag, number)
    own_barrier(consumer)
    if smem.load4(flag) == number:
        raise_rows(tile, totals, base, number, consumer, ratio, shape)
    for e, total in enumerate(fold(fold([tile.sums[i] for i in range(ROWS // 8)], 2), 1)):
        totals[e] = totals[e] + total


@cute.jit
def own_barrier(consumer: Int32) -> None:
    """A barrier of a consumer's warps."""
    if consumer == 0:
        mbarrier.named_barrier(CONSUMERS_BARRIER + 1, GROUP)
    else:
        mbarrier.named_barrier(CONSUMERS_BARRIER + 2, GROUP)


def put_weights(tile: Scores, n: int, e: int, factor: Float32, less: Float32) -> Float32:
    """Leaves the weights of a row's two tokens, in pairs with the next row's; their sum."""
    above = [minus(tile.x[4 * n + 2 * h + e], factor, less) for h in range(2)]
    for one in above:
        tile.highest[0] = cutlass.max(tile.highest[0], one.bitcast(Int32))
    weights = [exp2(one) for one in above]
    for h in range(2):
        one = arith.bits(weights[h]) if e == 0 else f16.pack(arith.number(tile.weights[2 * n + h]), weights[h])
        tile.weights[2 * n + h] = one
    return weights[0] + weights[1]


def add_sums(tile: Scores, n: int, sums: list[Float32]) -> None:
    """Keeps the sums of two rows of n; those of n and n + 4 are added over a bit of g, and a lane keeps one n's."""
    for e in range(2):
        one = sums[e] if n < 4 else fold([tile.sums[2 * (n - 4) + e], sums[e]], 4)[0]
        tile.sums[2 * (n % 4) + e] = one


def fold(x: list[Float32], bit: int) -> list[Float32]:
    """Sums over a bit of g: a lane without it gets the first half of the values, one with it the others."""
    g, _, _ = lanes()
    upper, half = (g & bit) != 0, len(x) // 2
    sent = [arith.select(upper, x[i], x[i + half]) for i in range(half)]
    kept = [arith.select(upper, x[i + half], x[i]) for i in range(half)]
    return [kept[i] + cute.arch.shuffle_sync_bfly(sent[i], offset=4 * bit) for i in range(half)]


def minus(x: Float32, factor: Float32, less: Float32) -> Float32:
    """x * factor - less, rounded once."""
    negative = arith.ptx(Float32, "neg.f32 $0, $1;", less)
    out: Float32 = arith.ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", x, factor, negative)
    return out


@cute.jit
def raise_rows(
    tile: Constexpr[Scores],
    totals: cute.Tensor,
    base: Int32,
    number: Int32,
    consumer: Int32,
    ratio: Float32,
    shape: Constexpr[Shape],
) -> None:
    """Subtracts more from the scores of rows where one is far above, weighs anew and says by what sums shrink."""
    g, t, wide = lanes()
    first = asm.flag(g == 0)
    for n in cutlass.range_constexpr(ROWS // 8):
        for e in cutlass.range_constexpr(2):
            most = arith.maximum(tile.x[4 * n + e], tile.x[4 * n + 2 + e], Target.SM90)
            for step in (4, 8, 16):
                most = arith.maximum(most, cute.arch.shuffle_sync_bfly(most, offset=step), Target.SM90)
            smem.store4_if(base + shape.tops_at + (wide * ROWS + 8 * n + 2 * t + e) * 4, most, first)
    own_barrier(consumer)
    for n in cutlass.range_constexpr(ROWS // 8):
        row = [arith.number(word) for word in smem.load16(base + shape.table_at + n * 64 + t * 16)]
        tops = [smem.load_words(base + shape.tops_at + (i * ROWS + 8 * n + 2 * t) * 4, 2) for i in range(WARPS)]
        sums = []
        for e in cutlass.range_constexpr(2):
            factor = row[2 * e] * ratio if shape.extra else row[2 * e]
            most = arith.number(tops[0][e])
            for i in cutlass.range_constexpr(1, WARPS):
                most = arith.maximum(most, arith.number(tops[i][e]), Target.SM90)
            most = most * factor
            larger = arith.ptx(Float32, "cvt.rpi.f32.f32 $0, $1;", most) - Float32(_MARGIN)
            now = arith.select(most > row[2 * e + 1] + Float32(_SLACK - 1), larger, row[2 * e + 1])
            smem.store4_if(base + shape.next_at + (8 * n + 2 * t + e) * 4, now, first * (wide == 0))
            totals[e] = totals[e] * arith.select(g == n, exp2(row[2 * e + 1] - now), Float32(1.0))
            sums.append(put_weights(tile, n, e, factor, now))
        add_sums(tile, n, sums)
    own_barrier(consumer)
    thread = cute.arch.thread_idx()[0] % GROUP
    if thread < ROWS:
        at = base + shape.table_at + thread * 8 + 4
        before, now = (arith.number(Uint32(smem.load4(one))) for one in (at, base + shape.next_at + thread * 4))
        smem.store4(at, now)
        smem.store4(base + shape.shrink_at + (buffer_of(number) * ROWS + thread) * 4, exp2(before - now))


def publish(tile: Scores, base: Int32, number: Int32, shape: Shape) -> None:
    """Leaves the weights of a tile in shared memory, and says that they and the decoded values are there."""
    _, _, wide = lanes()
    lane, buffer = cute.arch.lane_idx(), buffer_of(number)
    at = base + shape.weights_at + buffer * BLOCK_BYTES + (wide * 16 + lane % 16) * 128
    for i in range(ROWS // 16):
        words = [tile.weights[4 * i + k] for k in range(4)]
        smem.store_matrices(at + (((2 * i + lane // 16) ^ lane) % 8) * 16, words)
    smem.proxy_fence()
    mbarrier.arrive_if(base + shape.ready_at + buffer * 8, Int32(1))
