"""The consumers of the decode kernel for keys that are the values: scores, weights and sums.

Tokens are the rows of the products and queries times heads their columns, so that both left operands are the cache's:
FP4 goes from shared memory to registers, is decoded there to fp16 (`cute.f16`) and multiplied from there. Scores are
K Q^T: a lane has 128 values of a token, every word, eight of them, becomes part of the left operands of two products.
Sums are V^T P^T: the words of two tokens are interleaved, so that a register has two tokens of one dimension.

A turn is two tiles of 64 tokens. A consumer makes the scores and weights of one of them, and the sums of its half of
the columns for both; weights pass through shared memory. The scores of a turn are made before the sums of the turn
before, and its weights during them, so that nobody waits for the other one's weights. A lane is (g, t) = (lane // 4,
lane % 4). Scores are in base 2.

What is subtracted from the scores of a row, an integer, stays until a score is far above it. The warp that finds that
weighs its 16 tokens by a larger number and says so; before the sums of that turn, everybody follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, attention_mma, f16, ring, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, lanes
from megamoe_stages.fp4_kv_decode.mqa_shape import (
    BLOCK_BYTES,
    CONSUMERS,
    GROUP,
    PITCH,
    ROWS,
    SCALE_BYTES,
    STAGE_BYTES,
    TILE,
    TURNS,
    WARPS,
    Shape,
)

LOWEST = -3.0e38  # finite, so that no difference of two is NaN
_SLACK = 15.0  # weights below 2^15 fit fp16
_MARGIN = 5.0  # the largest weight when a number to subtract is chosen is about 2^5
_PRODUCTS = 4  # side by side: a consumer's columns


def token_of(row: Int32 | int) -> Int32 | int:
    """The token, of a warp's 16, of a row of its products: banks differ for keys and for values."""
    return (row // 2 % 4) + row % 2 * 4 + row // 8 * 8


def key_operands(codes: list[Uint32], factors: list[Uint32]) -> list[list[Uint32]]:
    """The left operands of two products from a word of each of two tokens, and their scales."""
    rows = [[f16.widen(half) for half in f16.spread(codes[h])] for h in range(2)]
    return [[f16.multiply(rows[h][odd][i], factors[h]) for i in range(2) for h in range(2)] for odd in range(2)]


def value_operands(words: list[Uint32], half: int, factors: list[Uint32]) -> list[list[Uint32]]:
    """The left operands of two products of 16 tokens from a word of each of four, and their scales in pairs."""
    part = (0x5140, 0x7362)[half]  # bytes of two tokens in turn
    mixed = [arith.permute(words[2 * h], words[2 * h + 1], part, Target.SM90) for h in range(2)]
    pairs = [[f16.widen(upper) for upper in f16.spread(mixed[h])] for h in range(2)]  # even, odd dimensions
    return [[f16.multiply(pairs[h][odd][i], factors[h]) for h in range(2) for odd in range(2)] for i in range(2)]


def fenced(operands: list[list[Uint32]]) -> list[list[Uint32]]:
    """Left operands behind a fence, for the next products."""
    words = attention_mma.fence([word for a in operands for word in a])
    return [words[4 * i : 4 * i + 4] for i in range(len(operands))]


def load_keys(at: Int32, scales_at: Int32, i: int) -> tuple[list[list[Uint32]], list[Uint32]]:
    """16 bytes of codes of each of a lane's two tokens, and the pairs of their scales."""
    codes = [ring.load16(at + 8 * h * PITCH + i * 64) for h in range(2)]
    return codes, [f16.scale_pair(f16.load_bytes(scales_at + 8 * h * SCALE_BYTES + 2 * i, 2)) for h in range(2)]


def start_scores(base: Int32, turn: Int32, parity: Int32, consumer: Int32, shape: Shape) -> list[Float32]:
    """The products of the keys of a tile and the queries, the last of them still on their way."""
    g, t, wide = lanes()
    stage = turn * CONSUMERS + consumer
    slot = base + shape.ring_at + stage * STAGE_BYTES
    at = slot + (wide * 16 + token_of(g)) * PITCH + t * 16
    scales_at = slot + TILE * PITCH + (wide * 16 + token_of(g)) * SCALE_BYTES + t * 8
    ring.wait(base + shape.barriers_at + stage * 8, parity)
    queries = wgmma.descriptor(base & 0x3FFFF)
    raw = load_keys(at, scales_at, 0)
    scores = attention_mma.fence(wgmma.zeros(ROWS // 2))
    for i in range(4):
        now, pairs = raw
        for word in range(4):
            factors = [f16.both_halves(pair, upper=word > 1) for pair in pairs]
            for odd, a in enumerate(fenced(key_operands([now[h][word] for h in range(2)], factors))):
                ahead = ((2 * i + word // 2) * BLOCK_BYTES + (word % 2 * 2 + odd) * 32) >> 4
                scores = f16.mma_group(scores, a, queries + ahead)
            wgmma.commit()
            wgmma.wait(1)
            if word == 0 and i < 3:
                raw = load_keys(at, scales_at, i + 1)
    return scores


def load_values(
    base: Int32, stage: Int32, step: int, consumer: Int32, shape: Shape
) -> tuple[list[Uint32], list[Uint32]]:
    """The words of a lane's eight dimensions of four of 16 tokens, and their scales in pairs."""
    g, t, wide = lanes()
    warp = consumer * (GROUP // 32) + wide
    slot = base + shape.ring_at + stage * STAGE_BYTES + step * 16 * PITCH
    at = slot + t * PITCH + (warp % 2 * 8 + g // 4 * 4 + warp // 2) * 16 + g % 4 * 4
    scales_at = base + shape.ring_at + stage * STAGE_BYTES + TILE * PITCH + (step * 16 + t) * SCALE_BYTES + warp * 4
    words = [f16.load_words(at + 4 * j * PITCH, 1)[0] for j in range(4)]
    scales = [f16.load_words(scales_at + 4 * j * SCALE_BYTES, 1)[0] for j in range(4)]
    selector = Uint32((g // 2) * 0x11 + 0x40)
    factors = [
        f16.scale_pair(arith.ptx(Uint32, "prmt.b32 $0, $1, $2, $3;", scales[2 * h], scales[2 * h + 1], selector))
        for h in range(2)
    ]
    return words, factors


def add_values(
    acc: cute.Tensor,
    base: Int32,
    turn: Int32,
    buffer: Int32,
    consumer: Int32,
    meanwhile: Callable[[int], None],
    shape: Shape,
) -> None:
    """Adds the values of a turn by its weights; `meanwhile` is called after each of 8 starts of products."""
    before = attention_mma.fence([acc[i] for i in range(32 * _PRODUCTS)])
    sums = [before[32 * j : 32 * j + 32] for j in range(_PRODUCTS)]
    weights = (base & 0x3FFFF) + shape.weights_at + buffer * (CONSUMERS * BLOCK_BYTES)
    weights = attention_mma.transposed(weights, BLOCK_BYTES)
    steps = [(tile, step) for tile in range(CONSUMERS) for step in range(TILE // 16)]
    ahead = load_values(base, turn * CONSUMERS, 0, consumer, shape)
    for number, (tile, step) in enumerate(steps):
        words, factors = ahead
        if number + 1 < len(steps):
            ahead = load_values(base, turn * CONSUMERS + steps[number + 1][0], steps[number + 1][1], consumer, shape)
        there = weights + (tile * (BLOCK_BYTES >> 4) + step * 128)
        for half in range(2):
            for i, a in enumerate(fenced(value_operands(words, half, factors))):
                sums[2 * half + i] = attention_mma.mma_transposed(sums[2 * half + i], a, there, "f16")
            wgmma.commit()
            if half == 0:
                meanwhile(number)
            wgmma.wait(1)
    done = attention_mma.wait([value for part in sums for value in part])
    for i, value in enumerate(done):
        acc[i] = value


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
    local = wide * 16 + token_of(g)  # and 8 more
    word = arith.select(wide < 2, exist[0], exist[1])
    position, window = (Int32(one) for one in f16.load_words(base + shape.facts_at + 16, 2))
    for n in cutlass.range_constexpr(ROWS // 8):
        for e in cutlass.range_constexpr(2):
            query = ring.load4(base + shape.queries_at + (8 * n + 2 * t + e) * 4)
            last = position + query
            for h in cutlass.range_constexpr(2):
                token = start + local + 8 * h
                seen = every | ((token <= last) & ((window == 0) | (token > last - window)))
                seen = seen & ((word >> Uint32(local % 32 + 8 * h) & 1) != 0)
                at = 4 * n + 2 * h + e
                x[at] = arith.select(seen, x[at], Float32(float("-inf")))


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
    tile: Constexpr[Scores],
    scores: Constexpr[list[Float32]],
    base: Int32,
    turn: Int32,
    number: Int32,
    consumer: Int32,
    shape: Constexpr[Shape],
) -> Float32:
    """Takes the scores of a tile, hides what is not seen; by what their factors are multiplied."""
    for i in cutlass.range_constexpr(ROWS // 2):
        tile.x[i] = scores[i]
    tile.highest[0] = Int32(0)
    place = number * CONSUMERS + consumer
    masks_at = base + shape.masks_at + (turn * CONSUMERS + consumer) * 8
    exist = [Uint32(word) for word in f16.load_words(masks_at, 2)]
    start, early, late, all_from = (Int32(word) for word in ring.load16(base + shape.facts_at))
    every, start = place >= all_from, start + place * TILE
    ratio = Float32(1.0)
    if cutlass.const_expr(shape.extra):
        near, bits_of = f16.load_words(base + shape.facts_at + 24, 2)
        ratio = arith.select(place < Int32(near), Float32(1.0), arith.number(bits_of))
    inner = (start + (TILE - 1) <= early) & (start > late)
    all_seen = arith.select(inner | every, exist[0] & exist[1], Uint32(0))
    if all_seen != Uint32(0xFFFFFFFF):
        hide(tile.x, base, start, exist, every, shape)
    return ratio


def weigh_some(tile: Scores, n: int, base: Int32, ratio: Float32, shape: Shape) -> None:
    """Weighs the scores of 8 rows."""
    _, t, _ = lanes()
    row = [arith.number(word) for word in ring.load16(base + shape.table_at + n * 64 + t * 16)]
    sums = []
    for e in range(2):
        factor = row[2 * e] * ratio if shape.extra else row[2 * e]
        sums.append(put_weights(tile, n, e, factor, row[2 * e + 1]))
    add_sums(tile, n, sums)


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


@cute.jit
def publish(
    tile: Constexpr[Scores],
    totals: cute.Tensor,
    base: Int32,
    number: Int32,
    consumer: Int32,
    ratio: Float32,
    shape: Constexpr[Shape],
) -> None:
    """Leaves the weights of a tile in shared memory, and says that they are there.

    Args:
        tile: Its scores, weighed.
        totals: Sums of weights over this warp's tokens, of rows 8 g + 2 t and the next one.
        base: Of shared memory.
        number: Of the turn.
        consumer: 0 or 1, also which tile of the turn.
        ratio: As from `take`.
        shape: The kernel.
    """
    _, _, wide = lanes()
    if arith.any_lane(tile.highest[0] > Float32(_SLACK).bitcast(Int32), Target.SM90):
        raise_rows(tile, totals, base, consumer, ratio, shape)
        flag = base + shape.flags_at + (number % 2 * WARPS + consumer * (GROUP // 32) + wide) * 4
        ring.store4(flag, number + 1)
    lane, buffer = cute.arch.lane_idx(), number % 2
    at = base + shape.weights_at + (buffer * CONSUMERS + consumer) * BLOCK_BYTES + (wide * 16 + lane % 16) * 128
    for i in cutlass.range_constexpr(ROWS // 16):
        words = [tile.weights[4 * i + k] for k in range(4)]
        attention_mma.store_matrices(at + (((2 * i + lane // 16) ^ lane) % 8) * 16, words)
    attention_mma.proxy_fence()
    ring.arrive_if(base + shape.barriers_at + (CONSUMERS * TURNS + TURNS + buffer) * 8, Int32(1))
    for e, total in enumerate(fold(fold([tile.sums[i] for i in range(ROWS // 8)], 2), 1)):
        totals[e] = totals[e] + total


@cute.jit
def raise_rows(
    tile: Constexpr[Scores],
    totals: cute.Tensor,
    base: Int32,
    consumer: Int32,
    ratio: Float32,
    shape: Constexpr[Shape],
) -> None:
    """Chooses what a warp subtracts from its tokens' scores of rows where one is far above, and weighs them anew."""
    g, t, wide = lanes()
    own = base + shape.own_at + (consumer * (GROUP // 32) + wide) * (ROWS * 4)
    for n in cutlass.range_constexpr(ROWS // 8):
        row = [arith.number(word) for word in ring.load16(base + shape.table_at + n * 64 + t * 16)]
        sums = []
        for e in cutlass.range_constexpr(2):
            factor = row[2 * e] * ratio if shape.extra else row[2 * e]
            most = arith.maximum(tile.x[4 * n + e], tile.x[4 * n + 2 + e], Target.SM90)
            for step in (4, 8, 16):
                most = arith.maximum(most, cute.arch.shuffle_sync_bfly(most, offset=step), Target.SM90)
            most = most * factor
            larger = arith.ptx(Float32, "cvt.rpi.f32.f32 $0, $1;", most) - Float32(_MARGIN)
            now = arith.select(most > row[2 * e + 1] + Float32(_SLACK - 1), larger, row[2 * e + 1])
            attention_mma.store4_if(own + (8 * n + 2 * t + e) * 4, now, arith.select(g == 0, Int32(1), Int32(0)))
            totals[e] = totals[e] * arith.select(g == n, exp2(row[2 * e + 1] - now), Float32(1.0))
            sums.append(put_weights(tile, n, e, factor, now))
        add_sums(tile, n, sums)


def minus(x: Float32, factor: Float32, less: Float32) -> Float32:
    """x * factor - less, rounded once."""
    negative = arith.ptx(Float32, "neg.f32 $0, $1;", less)
    out: Float32 = arith.ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", x, factor, negative)
    return out


@cute.jit
def follow(
    acc: cute.Tensor, totals: cute.Tensor, base: Int32, number: Int32, consumer: Int32, shape: Constexpr[Shape]
) -> None:
    """Waits for the weights of a turn, and follows a warp that subtracted something else than the others."""
    buffer = number % 2
    ring.wait(base + shape.barriers_at + (CONSUMERS * TURNS + TURNS + buffer) * 8, number // 2 % 2)
    flags_at = base + shape.flags_at + buffer * WARPS * 4
    flags = [Int32(word) for i in range(2) for word in ring.load16(flags_at + 16 * i)]
    some = flags[0] == number + 1
    for i in cutlass.range_constexpr(1, WARPS):
        some = some | (flags[i] == number + 1)
    if some:
        follow_all(acc, totals, flags, base, number, consumer, shape)


@cute.jit
def follow_all(
    acc: cute.Tensor,
    totals: cute.Tensor,
    flags: Constexpr[list[Int32]],
    base: Int32,
    number: Int32,
    consumer: Int32,
    shape: Constexpr[Shape],
) -> None:
    """Brings the sums, and the weights of a turn, to the largest number that a warp has subtracted; all consumers."""
    _, t, wide = lanes()
    lane = cute.arch.lane_idx()
    buffer = number % 2
    warp = consumer * (GROUP // 32) + wide
    flags_at = base + shape.flags_at + buffer * WARPS * 4
    thread = consumer * GROUP + cute.arch.thread_idx()[0] % GROUP
    if thread < ROWS:
        at = base + shape.table_at + thread * 8 + 4
        before = arith.number(Uint32(ring.load4(at)))
        most = before
        for i in cutlass.range_constexpr(WARPS):
            one = arith.number(Uint32(ring.load4(base + shape.own_at + (i * ROWS + thread) * 4)))
            most = arith.select(flags[i] == number + 1, arith.maximum(most, one, Target.SM90), most)
        ring.store4(at, arith.bits(most))
        attention_mma.store8(base + shape.final_at + thread * 8, [arith.bits(most), arith.bits(exp2(before - most))])
    attention_mma.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)
    mine = ring.load4(flags_at + warp * 4) == number + 1
    own = base + shape.own_at + warp * (ROWS * 4)
    for n in cutlass.range_constexpr(ROWS // 8):
        row = [arith.number(word) for word in ring.load16(base + shape.final_at + n * 64 + t * 16)]
        for e in cutlass.range_constexpr(2):
            for j in cutlass.range_constexpr(_PRODUCTS):
                for h in cutlass.range_constexpr(2):
                    at = 32 * j + 4 * n + 2 * h + e
                    acc[at] = acc[at] * row[2 * e + 1]
    ends = [arith.number(word) for word in ring.load16(base + shape.final_at + lane // 4 * 64 + t * 16)]
    for e in cutlass.range_constexpr(2):
        one = arith.number(Uint32(ring.load4(own + (lane // 4 * 8 + 2 * t + e) * 4)))
        totals[e] = totals[e] * arith.select(mine, exp2(one - ends[2 * e]), ends[2 * e + 1])
    chunk = lane % 8
    factors = cute.make_rmem_tensor((8,), Float32)
    for k in cutlass.range_constexpr(8):
        row_at = base + shape.final_at + (chunk * 8 + k) * 8
        final, shrunk = (arith.number(Uint32(ring.load4(row_at + 4 * i))) for i in range(2))
        one = arith.number(Uint32(ring.load4(own + (chunk * 8 + k) * 4)))
        factors[k] = arith.select(mine, exp2(one - final), shrunk)
    pairs = [f16.pack(factors[2 * k], factors[2 * k + 1]) for k in range(4)]
    tile = base + shape.weights_at + (buffer * CONSUMERS + consumer) * BLOCK_BYTES
    for i in cutlass.range_constexpr(4):
        local = wide * 16 + i * 4 + lane // 8
        at = tile + local * 128 + ((chunk ^ local) % 8) * 16
        words = ring.load16(at)
        attention_mma.store16(at, [f16.multiply(words[k], pairs[k]) for k in range(4)])
    attention_mma.proxy_fence()
    attention_mma.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)


@cute.jit
def rescale(acc: cute.Tensor, ratio: Float32) -> None:
    """Multiplies all sums."""
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = acc[i] * ratio


@cute.jit
def follow_turn(
    acc: cute.Tensor, totals: cute.Tensor, base: Int32, number: Int32, consumer: Int32, shape: Constexpr[Shape]
) -> None:
    """What comes before the sums of a turn."""
    follow(acc, totals, base, number, consumer, shape)
    if cutlass.const_expr(shape.extra):
        near, ratio = f16.load_words(base + shape.facts_at + 24, 2)
        if (number > 0) & (number * CONSUMERS == Int32(near)):
            rescale(acc, Float32(1.0) / arith.number(ratio))  # the sums are in units of the cache that they come from


def release(base: Int32, turn: Int32, shape: Shape) -> None:
    """Gives the place of a turn in the ring back."""
    cute.arch.sync_warp()
    empty = base + shape.barriers_at + (CONSUMERS * TURNS + turn) * 8
    ring.arrive_if(empty, arith.select(cute.arch.lane_idx() == 0, Int32(1), Int32(0)))


@cute.jit
def attend(
    acc: cute.Tensor,  # (128,) fp32: four products of 32, as `wgmma.mma`
    base: Int32,
    consumer: Int32,
    turns: Int32,
    shape: Constexpr[Shape],
) -> None:
    """All turns of a CTA; leaves what was subtracted and the sums of weights in shared memory."""
    for i, zero in enumerate(wgmma.zeros(cute.size(acc))):
        acc[i] = zero
    totals = cute.make_rmem_tensor((2,), Float32)
    totals.fill(Float32(0.0))
    tile = no_scores()
    turn, parity = Int32(0), Int32(0)
    if turns > 0:
        scores = attention_mma.wait(start_scores(base, turn, parity, consumer, shape))
        ratio = take(tile, scores, base, turn, Int32(0), consumer, shape)
        for n in cutlass.range_constexpr(ROWS // 8):
            weigh_some(tile, n, base, ratio, shape)
        publish(tile, totals, base, Int32(0), consumer, ratio, shape)
    for number in cutlass.range(turns, unroll=1):
        last = turn == TURNS - 1
        ahead, ahead_parity = arith.select(last, Int32(0), turn + 1), arith.select(last, parity ^ 1, parity)
        ratio = Float32(1.0)
        if number + 1 < turns:
            scores = attention_mma.wait(start_scores(base, ahead, ahead_parity, consumer, shape))
            ratio = take(tile, scores, base, ahead, number + 1, consumer, shape)
        follow_turn(acc, totals, base, number, consumer, shape)
        weigh = functools.partial(weigh_some, tile, base=base, ratio=ratio, shape=shape)
        add_values(acc, base, turn, number % 2, consumer, weigh, shape)
        release(base, turn, shape)
        if number + 1 < turns:
            publish(tile, totals, base, number + 1, consumer, ratio, shape)
        turn, parity = ahead, ahead_parity
    if cutlass.const_expr(shape.extra):
        near, ratio_of = f16.load_words(base + shape.facts_at + 24, 2)
        if turns * CONSUMERS > cutlass.max(Int32(near), 0):
            rescale(acc, arith.number(ratio_of))
    finish_totals(totals, base, consumer, shape)


@cute.jit
def finish_totals(totals: cute.Tensor, base: Int32, consumer: Int32, shape: Constexpr[Shape]) -> None:
    """Leaves what was subtracted and the sums of weights where the result is made; all consumers."""
    g, t, wide = lanes()
    own = base + shape.own_at + (consumer * (GROUP // 32) + wide) * (ROWS * 4)
    attention_mma.store8(own + (8 * g + 2 * t) * 4, [arith.bits(totals[e]) for e in range(2)])
    attention_mma.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)
    thread = consumer * GROUP + cute.arch.thread_idx()[0] % GROUP
    if thread < ROWS:
        top = Uint32(ring.load4(base + shape.table_at + thread * 8 + 4))
        parts = [arith.number(Uint32(ring.load4(base + shape.own_at + (i * ROWS + thread) * 4))) for i in range(WARPS)]
        for i in cutlass.range_constexpr(1, WARPS):
            parts[0] = parts[0] + parts[i]
        attention_mma.store8(base + shape.ends_at + thread * 8, [top, arith.bits(parts[0])])
    attention_mma.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)
