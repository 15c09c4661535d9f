"""What becomes of the sums of warps: results of problems that are a warp's own, parts that are joined in the end.

A warp shares at most two problems with others: the one that its run starts within, and the one that goes on behind it.
Their sums wait in shared memory until all warps of the CTA are done. What a CTA then has of a problem that other CTAs
have too is a part in global memory; the last of these CTAs to arrive merges the parts, in their order. A CTA has at
most two: of the problem that it starts within, number 0, and of the one that goes on behind it, number 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, bf16, bulk, ring, warp
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.f16 import DECODED_UNIT
from megamoe_stages.fp4_kv_decode import gqa_work as work
from megamoe_stages.fp4_kv_decode.gqa_attend import INFINITY, LOWEST, lanes
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, WARP, Shape
from megamoe_stages.fp4_kv_decode.gqa_work import Cache, Share

_LN2 = math.log(2)
_QUAD_BYTES = 16
_ROUND_BYTES = WARP * _QUAD_BYTES  # of a group of four sums, of all lanes


class Result(NamedTuple):
    """What is written, and the numbers that go into it.

    Attributes:
        out: (batch * queries * heads, Dv) bf16.
        lse: (batch * queries * heads,) fp32.
        sink: (heads,) fp32; not read unless has_sink.
        has_sink: Whether there is one.
        v_scale: () fp32.
        parts: (2 CTAs, sums) fp32, as the lanes hold them.
        stats: (2 CTAs, columns, 2) fp32: the largest score and the sum.
        arrived: (problems,) int32, zeros.
        queries: Of each sequence.
        heads: Of q.
        group: Heads that share a kv head.
    """

    out: cute.Tensor
    lse: cute.Tensor
    sink: cute.Tensor
    has_sink: Int32
    v_scale: cute.Tensor
    parts: cute.Tensor
    stats: cute.Tensor
    arrived: cute.Tensor
    queries: Int32
    heads: Int32
    group: Int32


class Place(NamedTuple):
    """Whose sums they are."""

    sequence: Int32
    kv_head: Int32


@cute.jit
def finish(
    acc: cute.Tensor,
    top: cute.Tensor,
    total: cute.Tensor,
    base: Uint32,
    starts: cutlass.Boolean,
    ends: cutlass.Boolean,
    place: Constexpr[Place],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes a warp's sums of a problem: the result where it has all of it, else for `join_all`.

    Args:
        acc: Sums.
        top: Largest scores.
        total: This lane's sums of weights.
        base: Of shared memory.
        starts: The problem starts in the warp's run.
        ends: It ends there.
        place: Whose they are.
        result: Where they go.
        shape: The kernel's.
    """
    for column in cutlass.range_constexpr(2 * shape.column_blocks):
        for step in (4, 8, 16):
            total[column] = total[column] + cute.arch.shuffle_sync_bfly(total[column], offset=step)
    if starts & ends:
        for quad in cutlass.range_constexpr(shape.quads):
            n = quad % shape.column_blocks
            own = [[values[2 * n + c] for c in range(2)] for values in (top, total)]
            write([acc[4 * quad + k] for k in range(4)], own[0], own[1], Int32(quad), place, result, shape)
    else:
        thread = warp.thread()
        g, t = lanes()
        wide = thread // WARP
        at = base + sums_of(wide, ends, shape) + thread % WARP * _QUAD_BYTES
        for quad in cutlass.range_constexpr(shape.quads):
            bulk.store4(at + quad * _ROUND_BYTES, [arith.bits(acc[4 * quad + k]) for k in range(4)])
        if g == 0:
            at = base + stats_of(wide, ends, shape) + t * 16
            for n in cutlass.range_constexpr(shape.column_blocks):
                words = [arith.bits(values[2 * n + c]) for c in range(2) for values in (top, total)]
                bulk.store4(at + n * (COLUMNS * 8), words)


def sums_of(wide: Int32, ends: cutlass.Boolean, shape: Shape) -> Int32:
    """Where a warp's sums of a problem are that ends in its run, or else of its last one: its ring is free by then."""
    return Int32(arith.select(ends, shape.sums_at + wide * shape.sums_bytes, wide * shape.ring_bytes))


def stats_of(wide: Int32, ends: cutlass.Boolean, shape: Shape) -> Int32:
    """Where its largest scores and sums of weights are."""
    number = arith.select(ends, wide, wide + shape.warps)
    return Int32(shape.stats_at + number * (shape.columns * 8))


@cute.jit
def join_all(
    base: Uint32,
    cache: Constexpr[Cache],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Goes through the problems of the CTA's run and joins what several warps have; then merges what several CTAs have."""
    thread = warp.thread()
    cta, _, _ = cute.arch.block_idx()
    *numbers, sequence = (Int32(word) for word in bulk.load4(base + shape.share_at))
    share, origin = Share(*numbers), ring.load4(Int32(base) + shape.share_at + 16)
    begin, stop = share.start(cta * shape.warps), share.start(cta * shape.warps + shape.warps)
    tile = begin
    shared = [cute.make_rmem_tensor((4,), Int32) for _ in range(2)]  # sequence, kv head, first and last CTA of parts
    for i in cutlass.range_constexpr(2):
        shared[i].fill(Int32(-1))
    while tile < stop:
        count = work.tiles_of(cache.lengths[sequence], cache)
        kv_head = (tile - origin) // count
        start = origin + kv_head * count
        end = start + count
        place = Place(sequence, kv_head)
        first, last = share.owner(tile), share.owner(cutlass.min(end, stop) - 1)
        if (first < last) | (start < begin) | (end > stop):
            warps = (first - cta * shape.warps, last - cta * shape.warps)
            ends = share.start(last + 1) >= end
            join(base, warps[0], warps[1], ends, start >= begin, end <= stop, place, result, shape)
            if (start < begin) | (end > stop):
                words = (sequence, kv_head, share.owner(start) // shape.warps, share.owner(end - 1) // shape.warps)
                number = arith.select(start < begin, Int32(0), Int32(1))
                for k, word in enumerate(words):
                    for i in cutlass.range_constexpr(2):
                        shared[i][k] = arith.select(number == i, word, shared[i][k])
        tile = cutlass.min(end, stop)
        if (tile == end) & (kv_head == cache.kv_heads - 1):
            sequence = sequence + 1
            origin = tile
    if (shared[0][0] >= 0) | (shared[1][0] >= 0):
        cute.arch.fence_acq_rel_gpu()
        cute.arch.sync_threads()
        for number in cutlass.range_constexpr(2):
            if thread == number * WARP:
                whole = Int32(0)
                if shared[number][0] >= 0:
                    problem = shared[number][0] * cache.kv_heads + shared[number][1]
                    at = ring.address(result.arrived.iterator) + Int64(problem) * 4
                    arrived = attention_mma.add_global(at, Int32(1))
                    whole = arith.select(arrived == shared[number][3] - shared[number][2], Int32(1), Int32(0))
                ring.store4(Int32(base) + shape.flags_at + 4 * number, whole)
        cute.arch.sync_threads()
        merge(base, shared, result, shape)


@cute.jit
def join(
    base: Uint32,
    first: Int32,
    last: Int32,
    ends: cutlass.Boolean,
    starts_here: cutlass.Boolean,
    ends_here: cutlass.Boolean,
    place: Constexpr[Place],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Adds up what warps `first` to `last` have of a problem, which ends in the run of the last or does not."""
    thread = warp.thread()
    cta, _, _ = cute.arch.block_idx()
    lane = thread % WARP
    for i in cutlass.range_constexpr((shape.quads + shape.warps - 1) // shape.warps):
        quad = thread // WARP + i * shape.warps
        if quad < shape.quads:
            whole = Sums.empty()
            stats = base + columns_of(quad, shape) * 8
            for w in cutlass.range(first, last + 1, unroll=4):
                words = bulk.load4(stats + stats_of(w, (w == last) & ends, shape))
                at = base + sums_of(w, (w == last) & ends, shape) + lane * _QUAD_BYTES
                whole.add(words, bulk.load4(at + quad * _ROUND_BYTES))
            if starts_here & ends_here:
                whole.write(quad, place, result, shape)
            else:
                number = arith.select(starts_here, Int32(1), Int32(0))
                write_part(whole, quad, cta * 2 + number, result, shape)


class Sums(NamedTuple):
    """A group of four sums that is added up: two rows of two columns.

    Attributes:
        most: Largest scores of the columns.
        totals: Sums of weights.
        sums: Row by row.
    """

    most: cute.Tensor
    totals: cute.Tensor
    sums: cute.Tensor

    @staticmethod
    def empty() -> Sums:
        """Nothing yet."""
        made = Sums(*(cute.make_rmem_tensor((n,), Float32) for n in (2, 2, 4)))
        for i in range(2):
            made.most[i], made.totals[i] = Float32(LOWEST), Float32(0.0)
        for i in range(4):
            made.sums[i] = Float32(0.0)
        return made

    def add(self, stats: Sequence[Uint32], values: Sequence[Uint32]) -> None:
        """Adds more: largest scores and sums of weights, column by column, and sums."""
        for c in range(2):
            top = arith.number(stats[2 * c])
            most = arith.maximum(self.most[c], top, Target.SM90)
            old, new = exp2(self.most[c] - most), exp2(top - most)
            self.most[c] = most
            self.totals[c] = self.totals[c] * old + arith.number(stats[2 * c + 1]) * new
            for i in (c, 2 + c):
                self.sums[i] = self.sums[i] * old + arith.number(values[i]) * new

    def write(self, quad: Int32, place: Place, result: Result, shape: Shape) -> None:
        """Writes the result."""
        own = [[tensor[i] for i in range(n)] for tensor, n in zip(self, (2, 2, 4), strict=True)]
        write(own[2], own[0], own[1], quad, place, result, shape)


def columns_of(quad: Int32, shape: Shape) -> Int32:
    """The first column of this lane in a group of four sums."""
    _, t = lanes()
    return quad % shape.column_blocks * COLUMNS + 2 * t


@cute.jit
def write(
    sums: Constexpr[list[Float32]],
    tops: Constexpr[list[Float32]],
    totals: Constexpr[list[Float32]],
    quad: Int32,
    place: Constexpr[Place],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes two dimensions of two columns, and with the first ones the LSE."""
    g, _ = lanes()
    for c in cutlass.range_constexpr(2):
        column = columns_of(quad, shape) + c
        if column < result.group * result.queries:
            query = column // result.group
            head = place.kv_head * result.group + column - query * result.group
            row = (place.sequence * result.queries + query) * result.heads + head
            sink = Float32(0.0)
            if result.has_sink != 0:
                sink = exp2(result.sink[head] * Float32(1 / _LN2) - tops[c])
            some = totals[c] > Float32(0.0)
            scale = result.v_scale[()] * Float32(DECODED_UNIT) / (totals[c] + sink)
            scale = arith.select(some, scale, Float32(0.0))
            dim = g * (shape.v_dim // COLUMNS) + quad // shape.column_blocks * 2
            pair = bf16.pack(sums[c] * scale, sums[2 + c] * scale, Target.SM90)
            at = ring.address(result.out.iterator) + (Int64(row) * shape.v_dim + dim) * 2
            attention_mma.store4_global_if(at, pair, Int32(1))
            if (quad < shape.column_blocks) & (g == 0):
                lse = (tops[c] + attention_mma.log2(totals[c])) * Float32(_LN2)
                result.lse[row] = arith.select(some, lse, Float32(-INFINITY))


@cute.jit
def write_part(
    whole: Constexpr[Sums], quad: Int32, part: Int32, result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Writes a group of four sums of a part, and with the first ones its largest scores and sums of weights."""
    g, _ = lanes()
    lane = cute.arch.lane_idx()
    at = ring.address(result.parts.iterator) + Int64(part) * (shape.part_floats * 4)
    bulk.store_global4(at + (quad * WARP + lane) * _QUAD_BYTES, [arith.bits(whole.sums[k]) for k in range(4)])
    if (quad < shape.column_blocks) & (g == 0):
        at = ring.address(result.stats.iterator) + (Int64(part) * shape.columns + columns_of(quad, shape)) * 8
        bulk.store_global4(at, [arith.bits(x[c]) for c in range(2) for x in (whole.most, whole.totals)])


@cute.jit
def merge(
    base: Uint32,
    shared: Constexpr[list[cute.Tensor]],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Adds up the parts of the problems of which this CTA was the last to have its own ready, and writes the results."""
    thread = warp.thread()
    lane = thread % WARP
    cute.arch.fence_acq_rel_gpu()
    for i in cutlass.range_constexpr((2 * shape.quads + shape.warps - 1) // shape.warps):
        item = thread // WARP + i * shape.warps
        second = item >= shape.quads
        quad = item - arith.select(second, Int32(shape.quads), Int32(0))
        words = [arith.select(second, shared[1][k], shared[0][k]) for k in range(4)]
        flag = ring.load4(Int32(base) + shape.flags_at + arith.select(second, Int32(4), Int32(0)))
        if (quad < shape.quads) & (flag != 0):
            whole = Sums.empty()
            stats = ring.address(result.stats.iterator) + columns_of(quad, shape) * 8
            sums = ring.address(result.parts.iterator) + (quad * WARP + lane) * _QUAD_BYTES
            for cta in cutlass.range(words[2], words[3] + 1, unroll=8):
                part = Int64(cta * 2 + arith.select(cta == words[2], Int32(1), Int32(0)))
                values = attention_mma.load16_global(sums + part * (shape.part_floats * 4))
                whole.add(attention_mma.load16_global(stats + part * (shape.columns * 8)), values)
            whole.write(quad, Place(words[0], words[1]), result, shape)
