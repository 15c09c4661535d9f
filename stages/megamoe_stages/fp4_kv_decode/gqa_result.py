"""What becomes of the sums of the warps of a CTA: they are joined, and written as the result or as a part of it.

A problem that several CTAs share is merged by the last of them to arrive, part by part in the order of the CTAs. A CTA
has at most two parts: of the problem that it starts within, in slot 0, and of the one that goes on behind it, in slot 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, bf16, bulk, ring
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.f16 import DECODED_UNIT
from megamoe_stages.fp4_kv_decode.gqa_attend import INFINITY, LOWEST, lanes
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, WARP, Shape

_LN2 = math.log(2)
_QUAD_BYTES = 16


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


class Segment(NamedTuple):
    """Whose sums they are.

    Attributes:
        sequence: Of the batch.
        kv_head: Of the cache.
        problem: Their number.
        first_cta: The first one that has tiles of this problem.
        parts: How many CTAs have.
    """

    sequence: Int32
    kv_head: Int32
    problem: Int32
    first_cta: Int32
    parts: Int32


def put_stats(top: cute.Tensor, total: cute.Tensor, base: Uint32, wide: Int32, shape: Shape) -> None:
    """Shows a warp's largest scores, and its sums over all lanes, to the CTA."""
    g, t = lanes()
    for column in range(2 * shape.column_blocks):
        whole = total[column]
        for step in (4, 8, 16):
            whole = whole + cute.arch.shuffle_sync_bfly(whole, offset=step)
        place = wide * shape.columns + column // 2 * COLUMNS + 2 * t + column % 2
        _store8_if(base + shape.stats_at + place * 8, top[column], whole, arith.select(g == 0, Int32(1), Int32(0)))


def _store8_if(at: Uint32, low: Float32, high: Float32, condition: Int32) -> None:
    attention_mma.store4_if(Int32(at), low, condition)
    attention_mma.store4_if(Int32(at) + 4, high, condition)


def stats_of(at: Uint32) -> tuple[list[Float32], list[Float32]]:
    """Largest scores and sums of two neighbouring columns."""
    words = bulk.load4_floats(at)
    return [words[0], words[2]], [words[1], words[3]]


@cute.jit
def finish(
    acc: cute.Tensor,
    top: cute.Tensor,
    total: cute.Tensor,
    base: Uint32,
    wide: Int32,
    segment: Constexpr[Segment],
    slot: Int32,
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Joins the sums of all warps and writes them; all threads of the CTA. `slot` is that of its part."""
    thread, _, _ = cute.arch.thread_idx()
    lane = thread % WARP
    cta, _, _ = cute.arch.block_idx()
    put_stats(top, total, base, wide, shape)
    for turn in cutlass.range_constexpr(shape.quads // shape.out_quads):
        for i in cutlass.range_constexpr(shape.out_quads):
            quad = turn * shape.out_quads + i
            at = base + shape.out_at + ((wide * shape.out_quads + i) * WARP + lane) * _QUAD_BYTES
            bulk.store4(at, [arith.bits(acc[4 * quad + k]) for k in range(4)])
        cute.arch.sync_threads()
        if wide < shape.out_quads:
            for i in cutlass.range_constexpr((shape.out_quads + shape.warps - 1) // shape.warps):
                own = wide + i * shape.warps
                sums, tops, totals = join(base, own, turn * shape.out_quads + own, shape)
                number = turn * shape.out_quads + own
                if segment.parts == 1:
                    write(sums, tops, totals, number, segment, result, shape)
                else:
                    write_part(sums, tops, totals, number, (cta * 2 + slot), result, shape)
        cute.arch.sync_threads()
    if segment.parts > 1:
        cute.arch.fence_acq_rel_gpu()
        cute.arch.sync_threads()
        if thread == 0:
            place = ring.address(result.arrived.iterator) + Int64(segment.problem) * 4
            ring.store4(Int32(base) + shape.flag_at, attention_mma.add_global(place, Int32(1)))
        cute.arch.sync_threads()
        if ring.load4(Int32(base) + shape.flag_at) == segment.parts - 1:
            cute.arch.fence_acq_rel_gpu()
            merge(wide, segment, result, shape)
        cute.arch.sync_threads()


def columns_of(quad: Int32, shape: Shape) -> Int32:
    """The first column of this lane in a group of four sums."""
    _, t = lanes()
    return quad % shape.column_blocks * COLUMNS + 2 * t


@cute.jit
def join(
    base: Uint32, own: Int32, quad: Int32, shape: Constexpr[Shape]
) -> tuple[list[Float32], list[Float32], list[Float32]]:
    """A group of four sums, largest scores and totals of its two columns, over all warps."""
    lane = cute.arch.lane_idx()
    stats = base + shape.stats_at + columns_of(quad, shape) * 8
    tops = [Float32(LOWEST), Float32(LOWEST)]
    for w in range(shape.warps):
        more, _ = stats_of(stats + w * (shape.columns * 8))
        tops = [arith.maximum(a, b, Target.SM90) for a, b in zip(tops, more, strict=True)]
    sums, totals = [Float32(0.0)] * 4, [Float32(0.0)] * 2
    for w in range(shape.warps):
        top, total = stats_of(stats + w * (shape.columns * 8))
        weight = [exp2(a - b) for a, b in zip(top, tops, strict=True)]
        at = base + shape.out_at + ((w * shape.out_quads + own) * WARP + lane) * _QUAD_BYTES
        values = bulk.load4_floats(at)
        sums = [sums[k] + values[k] * weight[k % 2] for k in range(4)]
        totals = [totals[c] + total[c] * weight[c] for c in range(2)]
    return sums, tops, totals


@cute.jit
def write(
    sums: Constexpr[list[Float32]],
    tops: Constexpr[list[Float32]],
    totals: Constexpr[list[Float32]],
    quad: Int32,
    segment: Constexpr[Segment],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes two dimensions of two columns, and with the first ones the LSE."""
    g, _ = lanes()
    for c in cutlass.range_constexpr(2):
        column = columns_of(quad, shape) + c
        if column < result.group * result.queries:
            query = column // result.group
            head = segment.kv_head * result.group + column - query * result.group
            place = (segment.sequence * result.queries + query) * result.heads + head
            sink = Float32(0.0)
            if result.has_sink != 0:
                sink = exp2(result.sink[head] * Float32(1 / _LN2) - tops[c])
            some = totals[c] > Float32(0.0)
            scale = result.v_scale[()] * Float32(DECODED_UNIT) / (totals[c] + sink)
            scale = arith.select(some, scale, Float32(0.0))
            dim = g * (shape.v_dim // COLUMNS) + quad // shape.column_blocks * 2
            pair = bf16.pack(sums[c] * scale, sums[2 + c] * scale, Target.SM90)
            at = ring.address(result.out.iterator) + (Int64(place) * shape.v_dim + dim) * 2
            attention_mma.store4_global_if(at, pair, Int32(1))
            if (quad < shape.column_blocks) & (g == 0):
                lse = (tops[c] + attention_mma.log2(totals[c])) * Float32(_LN2)
                result.lse[place] = arith.select(some, lse, Float32(-INFINITY))


@cute.jit
def write_part(
    sums: Constexpr[list[Float32]],
    tops: Constexpr[list[Float32]],
    totals: Constexpr[list[Float32]],
    quad: Int32,
    part: Int32,
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes a group of four sums of a part, and with the first ones its largest scores and totals."""
    g, _ = lanes()
    lane = cute.arch.lane_idx()
    at = ring.address(result.parts.iterator) + Int64(part) * (shape.part_floats * 4)
    bulk.store_global4(at + (quad * WARP + lane) * _QUAD_BYTES, [arith.bits(x) for x in sums])
    if (quad < shape.column_blocks) & (g == 0):
        at = ring.address(result.stats.iterator) + (Int64(part) * shape.columns + columns_of(quad, shape)) * 8
        bulk.store_global4(at, [arith.bits(x) for c in range(2) for x in (tops[c], totals[c])])


@cute.jit
def merge(
    wide: Int32,
    segment: Constexpr[Segment],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Adds the parts of a problem up, in the order of the CTAs, and writes the result."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr((shape.quads + shape.warps - 1) // shape.warps):
        quad = wide + i * shape.warps
        if quad < shape.quads:
            stats = ring.address(result.stats.iterator) + columns_of(quad, shape) * 8
            most = cute.make_rmem_tensor((2,), Float32)
            sums = cute.make_rmem_tensor((6,), Float32)
            for c in cutlass.range_constexpr(2):
                most[c] = Float32(LOWEST)
            for k in cutlass.range_constexpr(6):
                sums[k] = Float32(0.0)
            for number in cutlass.range(segment.parts, unroll=4):
                at = Int64(part_of(segment, number)) * (shape.columns * 8)
                words = attention_mma.load16_global(stats + at)
                for c in cutlass.range_constexpr(2):
                    most[c] = arith.maximum(most[c], arith.number(words[2 * c]), Target.SM90)
            for number in cutlass.range(segment.parts, unroll=4):
                part = Int64(part_of(segment, number))
                words = attention_mma.load16_global(stats + part * (shape.columns * 8))
                at = ring.address(result.parts.iterator) + part * (shape.part_floats * 4)
                values = attention_mma.load16_global(at + (quad * WARP + lane) * _QUAD_BYTES)
                for c in cutlass.range_constexpr(2):
                    weight = exp2(arith.number(words[2 * c]) - most[c])
                    sums[4 + c] = sums[4 + c] + arith.number(words[2 * c + 1]) * weight
                    for row in cutlass.range_constexpr(2):
                        sums[2 * row + c] = sums[2 * row + c] + arith.number(values[2 * row + c]) * weight
            own = [sums[k] for k in range(4)]
            write(own, [most[c] for c in range(2)], [sums[4 + c] for c in range(2)], quad, segment, result, shape)


def part_of(segment: Segment, number: Int32) -> Int32:
    """Where a part of a problem lies: the first CTA's in slot 1, the others' in slot 0."""
    slot = arith.select(number == 0, Int32(1), Int32(0))
    return Int32((segment.first_cta + number) * 2 + slot)
