"""What becomes of the sums of the decode kernel for keys that are the values; as `result`, of sums that lie otherwise.

A lane (g, t) has, of its warp's 64 columns, 8 g to 8 g + 7, of the rows 2 t and 2 t + 1 of each 8.
"""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Int32, Int64, cute

from megamoe.cute import arith, attention_mma, bf16, ring
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, Rows, lanes
from megamoe_stages.fp4_kv_decode.mqa_shape import CONSUMERS, GROUP, ROWS, Shape
from megamoe_stages.fp4_kv_decode.result import Result, finished, merge


@cute.jit
def join_pair(acc: cute.Tensor, base: Int32, consumer: Int32, rank: Int32, shape: Constexpr[Shape]) -> None:
    """Adds what the other CTA of the cluster has of the half of the columns that this one keeps, its rank's."""
    thread = cute.arch.thread_idx()[0] % GROUP
    at = base + shape.tiles_at + thread * 16
    count = cute.size(acc) // 4
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()  # nobody needs the queries any more
    if consumer != rank:
        there = attention_mma.peer_address(at, 1 - rank)
        for i in cutlass.range_constexpr(count):
            attention_mma.store16_peer(there + i * GROUP * 16, [arith.bits(acc[4 * i + j]) for j in range(4)])
        if thread < ROWS // 2:
            mine = ring.load16(base + shape.ends_at + thread * 16)
            attention_mma.store16_peer(attention_mma.peer_address(base + shape.peer_at + thread * 16, 1 - rank), mine)
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    if consumer == rank:
        add(acc, base, at, consumer, shape)


def pass_pair() -> None:
    """The barriers of `join_pair`, for the producers."""
    for _ in range(2):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


@cute.jit
def add(acc: cute.Tensor, base: Int32, at: Int32, consumer: Int32, shape: Constexpr[Shape]) -> None:
    """Adds the sums of other tokens that the other CTA has left for this thread."""
    thread = cute.arch.thread_idx()[0] % GROUP
    _, t, _ = lanes()
    table = base + shape.final_at
    if thread < ROWS:
        here, there = base + shape.ends_at + thread * 8, base + shape.peer_at + thread * 8
        one, other = (arith.number(word_of(a)) for a in (here, there))
        largest = arith.maximum(one, other, Target.SM90)
        mine, theirs = exp2(one - largest), exp2(other - largest)
        total = arith.number(word_of(here + 4)) * mine + arith.number(word_of(there + 4)) * theirs
        attention_mma.store8(here, [arith.bits(largest), arith.bits(total)])
        attention_mma.store8(table + thread * 8, [arith.bits(mine), arith.bits(theirs)])
    attention_mma.named_barrier(CONSUMERS_BARRIER, GROUP)
    for n in cutlass.range_constexpr(ROWS // 8):
        shares = [arith.number(word) for word in ring.load16(table + n * 64 + t * 16)]
        for j in cutlass.range_constexpr(4):
            words = ring.load16(at + (8 * j + n) * GROUP * 16)
            for k in cutlass.range_constexpr(4):
                i, e = 32 * j + 4 * n + k, k % 2
                acc[i] = acc[i] * shares[2 * e] + arith.number(words[k]) * shares[2 * e + 1]


def word_of(at: Int32) -> cutlass.Uint32:
    """A word of shared memory."""
    return cutlass.Uint32(ring.load4(at))


@cute.jit
def store(
    acc: cute.Tensor,
    base: Int32,
    consumer: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes the result of rows and columns of which these sums have all tokens; a consumer of a pair, else both."""
    _, t, wide = lanes()
    g = cute.arch.lane_idx() // 4
    thread = cute.arch.thread_idx()[0] % GROUP
    table = base + shape.last_at + consumer * ROWS * 8
    if thread < ROWS:
        row = rows.first + thread
        inside = row < rows.count
        row = arith.select(inside, row, Int32(0))
        ends = base + shape.ends_at + thread * 8
        scale, lse = finished(arith.number(word_of(ends)), arith.number(word_of(ends + 4)), row, rows, result)
        place = rows.place(row)
        attention_mma.store8(table + thread * 8, [arith.bits(scale), cutlass.Uint32(place)])
        if inside & (result.column == 0):
            result.lse[place] = lse
    attention_mma.named_barrier(CONSUMERS_BARRIER, GROUP if shape.paired else CONSUMERS * GROUP)
    to = ring.address(result.out.iterator) + (result.column + wide * 64 + g * 8) * 2
    for n in cutlass.range_constexpr(ROWS // 8):
        line = ring.load16(table + n * 64 + t * 16)
        for e in cutlass.range_constexpr(2):
            scale, place = arith.number(line[2 * e]), Int32(line[2 * e + 1])
            words = []
            for j in cutlass.range_constexpr(4):
                low, high = (acc[32 * j + 4 * n + 2 * h + e] * scale for h in range(2))
                words.append(bf16.pack(low, high, Target.SM90))
            inside = rows.first + 8 * n + 2 * t + e < rows.count
            there = to + Int64(place) * (shape.v_dim * 2)
            ring.store_global16_if(there, words, arith.select(inside, Int32(1), Int32(0)))


@cute.jit
def store_part(
    acc: cute.Tensor, base: Int32, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Writes a part of the sums, in the order of `result.merge`."""
    g, t, wide = lanes()
    thread = cute.arch.thread_idx()[0] % GROUP
    first = (result.problem * result.splits + result.split) * ROWS
    if (thread < ROWS) & (rows.first + thread < rows.count):
        for i in cutlass.range_constexpr(2):
            number = arith.number(word_of(base + shape.ends_at + thread * 8 + 4 * i))
            result.stats[first + thread, i] = number
    to = ring.address(result.parts.iterator) + (wide * 64 + g * 8) * 4
    for n in cutlass.range_constexpr(ROWS // 8):
        for e in cutlass.range_constexpr(2):
            row = 8 * n + 2 * t + e
            inside = arith.select(rows.first + row < rows.count, Int32(1), Int32(0))
            value = [arith.bits(acc[32 * (k // 2) + 4 * n + 2 * (k % 2) + e]) for k in range(8)]
            there = to + Int64(first + row) * (shape.out_columns * 4)
            ring.store_global16_if(there, [value[k] for k in (0, 4, 1, 5)], inside)
            ring.store_global16_if(there + 16, [value[k] for k in (2, 6, 3, 7)], inside)


@cute.jit
def finish(
    acc: cute.Tensor,
    base: Int32,
    consumer: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes the result, or a part of it and, as the last one, the merged result; the consumer that has the sums."""
    if result.splits == 1:
        store(acc, base, consumer, rows, result, shape)
    else:
        store_part(acc, base, rows, result, shape)
        cute.arch.fence_acq_rel_gpu()
        attention_mma.named_barrier(CONSUMERS_BARRIER, GROUP)
        thread = cute.arch.thread_idx()[0] % GROUP
        if thread == 0:
            place = ring.address(result.arrived.iterator) + Int64(result.problem) * 4
            ring.store4(base + shape.flag_at, attention_mma.add_global(place, Int32(1)))
        attention_mma.named_barrier(CONSUMERS_BARRIER, GROUP)
        if ring.load4(base + shape.flag_at) == result.splits - 1:
            cute.arch.fence_acq_rel_gpu()
            merge(thread, base, rows, result, shape)
