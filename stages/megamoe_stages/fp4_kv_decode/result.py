"""What becomes of the sums of the decode kernel.

A CTA that has all tokens of its rows writes the result; else it writes its part, and the last one of its rows to arrive
merges the parts in their order, so that the result does not depend on who that is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, bf16, ring
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.convert import DECODED_UNIT
from megamoe.cute.warp import from_lane
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, NONE, Rows, finite, lanes
from megamoe_stages.fp4_kv_decode.shape import GROUP, ROWS, Shape

_LN2 = math.log(2)
_LOG2E = 1 / _LN2


class Result(NamedTuple):
    """What the consumers write, and the numbers that go into it.

    Attributes:
        out: (batch * queries * heads, Dv) bf16.
        lse: (batch * queries * heads,) fp32.
        sink: (heads,) fp32; not read unless has_sink.
        has_sink: Whether there is one.
        v_scale: () fp32.
        parts: (CTAs * ROWS, Dv) fp32, columns in the order of decoded values.
        stats: (CTAs * ROWS, 2) fp32: the largest score and the sum.
        arrived: (CTAs / splits,) int32, zeros.
        splits: CTAs that share rows.
        split: The CTA's number among them.
        problem: Which rows.
    """

    out: cute.Tensor
    lse: cute.Tensor
    sink: cute.Tensor
    has_sink: Int32
    v_scale: cute.Tensor
    parts: cute.Tensor
    stats: cute.Tensor
    arrived: cute.Tensor
    splits: Int32
    split: Int32
    problem: Int32


@cute.jit
def join_consumers(acc: cute.Tensor, stat: cute.Tensor, base: Int32, consumer: Int32, shape: Constexpr[Shape]) -> None:
    """The first consumer adds what the second one has; both, over the decoded tiles, which nobody needs any more."""
    thread = cute.arch.thread_idx()[0] % GROUP
    count = shape.out_columns // 2
    at = base + shape.tiles_at + thread * 16
    attention_mma.named_barrier(CONSUMERS_BARRIER, 2 * GROUP)
    if consumer == 1:
        for i in cutlass.range_constexpr(count // 4):
            attention_mma.store16(at + i * GROUP * 16, [arith.bits(acc[4 * i + j]) for j in range(4)])
        attention_mma.store16(at + count // 4 * GROUP * 16, [arith.bits(stat[j]) for j in range(4)])
    attention_mma.named_barrier(CONSUMERS_BARRIER, 2 * GROUP)
    if consumer == 0:
        other = [arith.number(word) for word in ring.load16(at + count // 4 * GROUP * 16)]
        mine, theirs = [], []
        for row in cutlass.range_constexpr(2):
            top = arith.maximum(stat[row], other[row], Target.SM90)
            zero = finite(top)
            mine.append(exp2(stat[row] - zero))
            theirs.append(exp2(other[row] - zero))
            stat[row], stat[2 + row] = top, stat[2 + row] * mine[row] + other[2 + row] * theirs[row]
        for i in cutlass.range_constexpr(count // 4):
            words = ring.load16(at + i * GROUP * 16)
            for j in cutlass.range_constexpr(4):
                acc[4 * i + j] = acc[4 * i + j] * mine[j // 2] + arith.number(words[j]) * theirs[j // 2]


def finished(top: Float32, total: Float32, row: Int32, rows: Rows, result: Result) -> tuple[Float32, Float32]:
    """By what the sums of a row are multiplied, and its lse."""
    zero = finite(top)
    head = rows.head + row % rows.group
    head = arith.select(result.has_sink != 0, head, Int32(0))
    sink = exp2(result.sink[head] * Float32(_LOG2E) - zero)
    whole = total + arith.select(result.has_sink != 0, sink, Float32(0.0))
    scale = result.v_scale[()] * Float32(DECODED_UNIT) / whole
    lse = (top + attention_mma.log2(total)) * Float32(_LN2)
    some = total > Float32(0.0)
    return arith.select(some, scale, Float32(0.0)), arith.select(some, lse, Float32(NONE))


@cute.jit
def store(
    acc: cute.Tensor,
    stat: cute.Tensor,
    consumer: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes the result of the CTA's rows, which has all their tokens."""
    g, t, wide = lanes()
    v_dim = shape.v_dim
    column = consumer * shape.out_columns if cutlass.const_expr(shape.split_columns) else Int32(0)
    even = t % 2 == 0
    selector = arith.select(even, Uint32(0x5410), Uint32(0x3276))
    word = t // 2 + arith.select(even, Int32(0), Int32(2))
    for half in cutlass.range_constexpr(2):
        row = rows.first + wide * 16 + g + 8 * half
        inside = row < rows.count
        row = arith.select(inside, row, Int32(0))
        scale, lse = finished(stat[half], stat[2 + half], row, rows, result)
        place = rows.place(row)
        if inside & (t == 0) & (column == 0):
            result.lse[place] = lse
        at = ring.address(result.out.iterator) + (Int64(place) * v_dim + column) * 2 + word * 4
        for block in cutlass.range_constexpr(shape.out_columns // 8):
            pair = [acc[4 * block + 2 * half + j] * scale for j in range(2)]  # values t and t + 4 of 8
            mine = bf16.pack(pair[0], pair[1], Target.SM90)
            other = from_lane(mine, 1)
            both = arith.ptx(Uint32, "prmt.b32 $0, $1, $2, $3;", mine, other, selector)
            attention_mma.store4_global_if(at + block * 16, both, arith.select(inside, Int32(1), Int32(0)))


@cute.jit
def store_part(
    acc: cute.Tensor,
    stat: cute.Tensor,
    consumer: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes the CTA's part of its rows, as it is."""
    g, t, wide = lanes()
    column = consumer * shape.out_columns if cutlass.const_expr(shape.split_columns) else Int32(0)
    first = (result.problem * result.splits + result.split) * ROWS
    for half in cutlass.range_constexpr(2):
        row = wide * 16 + g + 8 * half
        if rows.first + row < rows.count:
            if (t == 0) & (column == 0):
                result.stats[first + row, 0] = stat[half]
                result.stats[first + row, 1] = stat[2 + half]
            at = ring.address(result.parts.iterator) + (Int64(first + row) * shape.v_dim + column + 2 * t) * 4
            if stat[2 + half] > Float32(0.0):  # else nobody reads it
                for block in cutlass.range_constexpr(shape.out_columns // 8):
                    pair = [arith.bits(acc[4 * block + 2 * half + j]) for j in range(2)]
                    attention_mma.store8_global(at + block * 32, pair)


@cute.jit
def merge(
    thread: Int32,
    threads: Constexpr[int],
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Merges the parts of the CTA's rows, in their order, and writes the result."""
    columns = shape.v_dim // 8
    valid = cutlass.min(rows.count - rows.first, ROWS)
    first = result.problem * result.splits * ROWS
    for item in cutlass.range(thread, valid * columns, threads, unroll=1):
        local = item // columns
        column = (item - local * columns) * 8
        row = rows.first + local
        top = Float32(NONE)
        for split in cutlass.range(result.splits, unroll=1):
            top = arith.maximum(top, result.stats[first + split * ROWS + local, 0], Target.SM90)
        zero = finite(top)
        total = Float32(0.0)
        sums = cute.make_rmem_tensor((8,), Float32)
        for i in cutlass.range_constexpr(8):
            sums[i] = Float32(0.0)
        for split in cutlass.range(result.splits, unroll=1):
            part = first + split * ROWS + local
            own = result.stats[part, 1]
            if own > Float32(0.0):
                weight = exp2(result.stats[part, 0] - zero)
                total = total + own * weight
                at = ring.address(result.parts.iterator) + (Int64(part) * shape.v_dim + column) * 4
                words = attention_mma.load16_global(at) + attention_mma.load16_global(at + 16)
                for i in cutlass.range_constexpr(8):
                    sums[i] = sums[i] + arith.number(words[i]) * weight
        scale, lse = finished(top, total, row, rows, result)
        place = rows.place(row)
        if column == 0:
            result.lse[place] = lse
        value = [sums[i] * scale for i in (0, 2, 4, 6, 1, 3, 5, 7)]  # of the places of values 0 to 7
        packed = [bf16.pack(value[i], value[i + 1], Target.SM90) for i in range(0, 8, 2)]
        at = ring.address(result.out.iterator) + (Int64(place) * shape.v_dim + column) * 2
        attention_mma.store16_global(at, packed)


@cute.jit
def finish(
    acc: cute.Tensor,
    stat: cute.Tensor,
    base: Int32,
    consumer: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes the result, or a part of it and, as the last one, the merged result; the consumers that hold sums."""
    thread = cute.arch.thread_idx()[0] - shape.producer_threads
    threads = 2 * GROUP if shape.split_columns else GROUP
    if result.splits == 1:
        store(acc, stat, consumer, rows, result, shape)
    else:
        store_part(acc, stat, consumer, rows, result, shape)
        cute.arch.fence_acq_rel_gpu()
        attention_mma.named_barrier(CONSUMERS_BARRIER, threads)
        if thread == 0:
            place = ring.address(result.arrived.iterator) + Int64(result.problem) * 4
            ring.store4(base + shape.flag_at, attention_mma.add_global(place, Int32(1)))
        attention_mma.named_barrier(CONSUMERS_BARRIER, threads)
        if ring.load4(base + shape.flag_at) == result.splits - 1:
            cute.arch.fence_acq_rel_gpu()
            merge(thread, threads, rows, result, shape)
