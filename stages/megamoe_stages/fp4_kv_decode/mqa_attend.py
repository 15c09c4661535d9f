"""The consumers of the decode kernel for keys that are the values.

Consumers take turns at the tiles of 64 tokens: the one whose turn it is makes the weights and decodes the values
(`mqa_scores`), both add them up, each half of the columns. There, queries times heads are the rows of the products and
both operands come from shared memory. As there is room for two decoded tiles, a consumer works at scores while the
other one is at its weights and sums; the sums of the tile before come late among those scores.
"""

from __future__ import annotations

import functools

import cutlass
from cutlass import Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, mbarrier, smem, wgmma
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, lanes
from megamoe_stages.fp4_kv_decode.mqa_scores import no_scores, publish, start_scores, take, weigh
from megamoe_stages.fp4_kv_decode.mqa_shape import (
    BLOCK_BYTES,
    CONSUMERS,
    DIM,
    GROUP,
    ROWS,
    TILE,
    TILE_BYTES,
    WARPS,
    Shape,
    buffer_of,
    phase_of,
)

_NEXT_TOKENS = wgmma.K_STEP * wgmma.ROW_BYTES >> 4  # in units of descriptors


def add_values(
    acc: cute.Tensor, totals: cute.Tensor, base: Int32, number: Int32, consumer: Int32, shape: Shape
) -> None:
    """Adds the values of a tile by its weights to this consumer's columns."""
    keep(acc, start_sums(acc, totals, base, number, consumer, shape), base, number, shape)


def start_sums(
    acc: cute.Tensor, totals: cute.Tensor, base: Int32, number: Int32, consumer: Int32, shape: Shape
) -> list[Float32]:
    """Starts to add the values of a tile by its weights to this consumer's columns, once both are there."""
    buffer = buffer_of(number)
    mbarrier.wait(base + shape.ready_at + buffer * 8, phase_of(number))
    follow(acc, totals, base, number, consumer, shape)
    sums = attention_mma.fence([acc[i] for i in range(cute.size(acc))])
    shared = base & 0x3FFFF
    weights = attention_mma.transposed(shared + shape.weights_at + buffer * BLOCK_BYTES, BLOCK_BYTES)
    columns = consumer * (DIM // CONSUMERS // 64 * BLOCK_BYTES)
    values = attention_mma.transposed(shared + shape.values_at + buffer * TILE_BYTES + columns, BLOCK_BYTES)
    for step in range(TILE // wgmma.K_STEP):
        ahead = step * _NEXT_TOKENS
        sums = attention_mma.mma_by_rows(sums, weights + ahead, values + ahead)
    wgmma.commit()
    return sums


def keep(acc: cute.Tensor, sums: list[Float32], base: Int32, number: Int32, shape: Shape) -> None:
    """Waits for the sums of a tile, and gives its place back."""
    for i, value in enumerate(attention_mma.wait(sums)):
        acc[i] = value
    first = asm.flag(cute.arch.lane_idx() == 0)
    mbarrier.arrive_if(base + shape.free_at + buffer_of(number) * 8, first)


@cute.jit
def follow(
    acc: cute.Tensor, totals: cute.Tensor, base: Int32, number: Int32, consumer: Int32, shape: Constexpr[Shape]
) -> None:
    """Brings the sums to what is subtracted from the scores of a tile, and to the units of its cache."""
    g, t, wide = lanes()
    if smem.load4(base + shape.flags_at + buffer_of(number) * 4) == number:
        at = base + shape.shrink_at + buffer_of(number) * (ROWS * 4)
        shares = [arith.number(Uint32(smem.load4(at + (wide * 16 + g + 8 * h) * 4))) for h in range(2)]
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] * shares[i // 2 % 2]
        if number % CONSUMERS != consumer:  # else done with the weights
            for e, word in enumerate(smem.load_words(at + (8 * g + 2 * t) * 4, 2)):
                totals[e] = totals[e] * arith.number(word)
    if cutlass.const_expr(shape.extra):
        near, ratio = smem.load_words(base + shape.facts_at + 24, 2)
        if (number > 0) & (number == Int32(near)):
            rescale(acc, Float32(1.0) / arith.number(ratio))  # the sums are in units of the cache that they come from


@cute.jit
def rescale(acc: cute.Tensor, ratio: Float32) -> None:
    """Multiplies all sums."""
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = acc[i] * ratio


@cute.jit
def attend(
    acc: cute.Tensor,  # (128,) fp32, as `wgmma.mma`
    stat: cute.Tensor,  # (4,) fp32: of a lane's two rows, what was subtracted from scores, then the sums of weights
    base: Int32,
    consumer: Int32,
    tiles: Int32,
    shape: Constexpr[Shape],
) -> None:
    """All tiles of a CTA: a consumer's half of the columns."""
    for i, zero in enumerate(wgmma.zeros(cute.size(acc))):
        acc[i] = zero
    totals = cute.make_rmem_tensor((2,), Float32)
    totals.fill(Float32(0.0))
    tile = no_scores()
    if consumer == 1:  # the other one adds up a tile of zeros at the start
        first = asm.flag(cute.arch.lane_idx() == 0)
        mbarrier.arrive_if(base + shape.free_at + buffer_of(-1) * 8, first)
    for number in cutlass.range(consumer, tiles, CONSUMERS, unroll=1):
        before = functools.partial(start_sums, acc, totals, base, number - 1, consumer, shape)
        scores, sums = start_scores(base, number, before, shape)
        scores = attention_mma.wait(scores)
        keep(acc, sums, base, number - 1, shape)
        ratio = take(tile, scores, base, number, shape)
        weigh(tile, totals, base, number, consumer, ratio, shape)
        publish(tile, base, number, shape)
        add_values(acc, totals, base, number, consumer, shape)
    if (tiles > 0) & ((tiles - 1) % CONSUMERS != consumer):
        add_values(acc, totals, base, tiles - 1, consumer, shape)
    if cutlass.const_expr(shape.extra):
        near, ratio_of = smem.load_words(base + shape.facts_at + 24, 2)
        if tiles > cutlass.max(Int32(near), 0):
            rescale(acc, arith.number(ratio_of))
    finish_totals(totals, stat, base, consumer, shape)


@cute.jit
def finish_totals(
    totals: cute.Tensor, stat: cute.Tensor, base: Int32, consumer: Int32, shape: Constexpr[Shape]
) -> None:
    """Adds up the sums of weights of all warps; all consumers, over the weights, which nobody needs any more."""
    g, t, wide = lanes()
    mbarrier.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)
    own = base + shape.own_at + (consumer * WARPS + wide) * (ROWS * 4)
    smem.store8(own + (8 * g + 2 * t) * 4, [arith.bits(totals[e]) for e in range(2)])
    mbarrier.arrive_if(base + shape.totals_at, Int32(1))  # not the barrier above: racecheck takes it for none here
    mbarrier.wait(base + shape.totals_at, Int32(0))
    for half in cutlass.range_constexpr(2):
        row = wide * 16 + g + 8 * half
        stat[half] = arith.number(Uint32(smem.load4(base + shape.table_at + row * 8 + 4)))
        total = Float32(0.0)
        for i in cutlass.range_constexpr(CONSUMERS * WARPS):
            total = total + arith.number(Uint32(smem.load4(base + shape.own_at + (i * ROWS + row) * 4)))
        stat[2 + half] = total
