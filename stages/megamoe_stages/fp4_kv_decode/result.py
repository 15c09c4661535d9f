"""What becomes of the sums of the decode kernel.

Whoever has all tokens of its rows and columns writes the result; else it writes its part, and the last one to arrive
merges the parts in their order, so that the result does not depend on who that is.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, bf16, gmem, mbarrier, smem
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.softmax import HIDDEN, LN2, LOG2E, finite
from megamoe.cute.warp import from_lane
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, Rows, lanes
from megamoe_stages.fp4_kv_decode.shape import GROUP, ROWS, Shape

_AT_ONCE = 4  # items of a thread that are merged at once


class Result(NamedTuple):
    """What the consumers write, and the numbers that go into it.

    Attributes:
        out: (batch * queries * heads, Dv) bf16.
        lse: (batch * queries * heads,) fp32.
        sink: (heads,) fp32; not read unless has_sink.
        has_sink: Whether there is one.
        v_scale: What the decoded values are multiplied by.
        parts: (problems * splits * ROWS, columns) fp32, columns in the order of decoded values.
        stats: (problems * splits * ROWS, 2) fp32: the largest score and the sum.
        arrived: (problems,) int32, zeros; zeros again in the end.
        splits: Parts that share rows and columns.
        split: The part's number among them.
        problem: Which rows and columns.
        column: The first one of the output.
    """

    out: cute.Tensor
    lse: cute.Tensor
    sink: cute.Tensor
    has_sink: Int32
    v_scale: Float32
    parts: cute.Tensor
    stats: cute.Tensor
    arrived: cute.Tensor
    splits: Int32
    split: Int32
    problem: Int32
    column: Int32


@cute.jit
def join_consumers(acc: cute.Tensor, stat: cute.Tensor, base: Int32, consumer: Int32, shape: Constexpr[Shape]) -> None:
    """The first consumer adds what the second one has; both, over the decoded tiles, which nobody needs any more."""
    thread = cute.arch.thread_idx()[0] % GROUP
    count = shape.out_columns // 2
    at = base + shape.tiles_at + thread * 16
    mbarrier.named_barrier(CONSUMERS_BARRIER, 2 * GROUP)
    if consumer == 1:
        for i in cutlass.range_constexpr(count // 4):
            smem.store16(at + i * GROUP * 16, [arith.bits(acc[4 * i + j]) for j in range(4)])
        smem.store16(at + count // 4 * GROUP * 16, [arith.bits(stat[j]) for j in range(4)])
    mbarrier.named_barrier(CONSUMERS_BARRIER, 2 * GROUP)
    if consumer == 0:
        add(acc, stat, at, count)


@cute.jit
def add(acc: cute.Tensor, stat: cute.Tensor, at: Int32, count: Constexpr[int]) -> None:
    """Adds sums of other tokens that somebody has left in shared memory for this thread."""
    other = [arith.number(word) for word in smem.load16(at + count // 4 * GROUP * 16)]
    mine, theirs = [], []
    for row in cutlass.range_constexpr(2):
        top = arith.maximum(stat[row], other[row], Target.SM90)
        zero = finite(top)
        mine.append(exp2(stat[row] - zero))
        theirs.append(exp2(other[row] - zero))
        stat[row], stat[2 + row] = top, stat[2 + row] * mine[row] + other[2 + row] * theirs[row]
    for i in cutlass.range_constexpr(count // 4):
        words = smem.load16(at + i * GROUP * 16)
        for j in cutlass.range_constexpr(4):
            acc[4 * i + j] = acc[4 * i + j] * mine[j // 2] + arith.number(words[j]) * theirs[j // 2]


def finished(top: Float32, total: Float32, row: Int32, rows: Rows, result: Result) -> tuple[Float32, Float32]:
    """By what the sums of a row are multiplied, and its lse."""
    zero = finite(top)
    head = rows.head + row % rows.group
    head = arith.select(result.has_sink != 0, head, Int32(0))
    sink = exp2(result.sink[head] * Float32(LOG2E) - zero)
    whole = total + arith.select(result.has_sink != 0, sink, Float32(0.0))
    scale = result.v_scale / whole
    lse = (top + attention_mma.log2(total)) * Float32(LN2)
    some = total > Float32(0.0)
    return arith.select(some, scale, Float32(0.0)), arith.select(some, lse, Float32(HIDDEN))


@cute.jit
def store(
    acc: cute.Tensor, stat: cute.Tensor, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Writes the result of rows and columns of which these sums have all tokens."""
    g, t, wide = lanes()
    even = t % 2 == 0
    selector = arith.select(even, Uint32(0x5410), Uint32(0x3276))
    word = t // 2 + arith.select(even, Int32(0), Int32(2))
    for half in cutlass.range_constexpr(2):
        row = rows.first + wide * 16 + g + 8 * half
        inside = row < rows.count
        row = arith.select(inside, row, Int32(0))
        scale, lse = finished(stat[half], stat[2 + half], row, rows, result)
        place = rows.place(row)
        if inside & (t == 0) & (result.column == 0):
            result.lse[place] = lse
        at = asm.address(result.out) + (Int64(place) * shape.v_dim + result.column) * 2 + word * 4
        for block in cutlass.range_constexpr(shape.out_columns // 8):
            pair = [acc[4 * block + 2 * half + j] * scale for j in range(2)]  # values t and t + 4 of 8
            mine = bf16.pack(pair[0], pair[1], Target.SM90)
            other = from_lane(mine, 1)
            both = arith.ptx(Uint32, "prmt.b32 $0, $1, $2, $3;", mine, other, selector)
            gmem.store4_if(at + block * 16, both, inside)


@cute.jit
def store_part(
    acc: cute.Tensor, stat: cute.Tensor, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Writes a part of the sums as it is."""
    g, t, wide = lanes()
    first = (result.problem * result.splits + result.split) * ROWS
    for half in cutlass.range_constexpr(2):
        row = wide * 16 + g + 8 * half
        if rows.first + row < rows.count:
            if t == 0:
                result.stats[first + row, 0] = stat[half]
                result.stats[first + row, 1] = stat[2 + half]
            at = asm.address(result.parts) + (Int64(first + row) * shape.out_columns + 2 * t) * 4
            for block in cutlass.range_constexpr(shape.out_columns // 8):
                pair = [arith.bits(acc[4 * block + 2 * half + j]) for j in range(2)]
                gmem.store8(at + block * 32, pair)


@cute.jit
def share_out(local: Int32, first: Int32, shares: Int32, rows: Constexpr[Rows], result: Constexpr[Result]) -> None:
    """Finds what the parts of a row are multiplied by, and writes its lse; a thread."""
    top = Float32(HIDDEN)
    for split in cutlass.range(result.splits, unroll=4):
        top = arith.maximum(top, result.stats[first + split * ROWS + local, 0], Target.SM90)
    zero = finite(top)
    total = Float32(0.0)
    for split in cutlass.range(result.splits, unroll=4):
        part = first + split * ROWS + local
        total = total + result.stats[part, 1] * exp2(result.stats[part, 0] - zero)
    row = rows.first + local
    scale, lse = finished(top, total, row, rows, result)
    for split in cutlass.range(result.splits, unroll=4):
        share = exp2(result.stats[first + split * ROWS + local, 0] - zero) * scale
        smem.store4(shares + (split * ROWS + local) * 4, arith.bits(share))
    if result.column == 0:
        result.lse[rows.place(row)] = lse


@cute.jit
def merge(
    thread: Int32, base: Int32, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Merges the parts of rows and columns, in their order, and writes the result; a warpgroup.

    What each part is multiplied by goes to where the tiles were: (parts, ROWS) fp32.
    """
    valid = cutlass.min(rows.count - rows.first, ROWS)
    first = result.problem * result.splits * ROWS
    shares = base + shape.tiles_at
    if thread < valid:
        share_out(thread, first, shares, rows, result)
    mbarrier.named_barrier(CONSUMERS_BARRIER, GROUP)
    columns = shape.out_columns // 8
    items = valid * columns
    for item in cutlass.range(thread, items, GROUP * _AT_ONCE, unroll=1):
        merge_some(item, items, first, shares, rows, result, shape)


@cute.jit
def merge_some(
    item: Int32,
    items: Int32,
    first: Int32,
    shares: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Merges some items, of eight columns of a row, whose loads of a part are all in flight at once."""
    columns = shape.out_columns // 8
    sums = cute.make_rmem_tensor((8 * _AT_ONCE,), Float32)
    for i in cutlass.range_constexpr(8 * _AT_ONCE):
        sums[i] = Float32(0.0)
    own = [cutlass.min(item + i * GROUP, items - 1) for i in range(_AT_ONCE)]
    places = [(one // columns, one % columns * 8) for one in own]
    for split in cutlass.range(result.splits, unroll=2):
        words = [load_part(first + split * ROWS + local, column, result, shape) for local, column in places]
        for i in cutlass.range_constexpr(_AT_ONCE):
            share = arith.number(Uint32(smem.load4(shares + (split * ROWS + places[i][0]) * 4)))
            for j in cutlass.range_constexpr(8):
                sums[8 * i + j] = sums[8 * i + j] + arith.number(words[i][j]) * share
    for i in cutlass.range_constexpr(_AT_ONCE):
        value = [sums[8 * i + j] for j in (0, 2, 4, 6, 1, 3, 5, 7)]  # of the places of values 0 to 7
        packed = [bf16.pack(value[j], value[j + 1], Target.SM90) for j in range(0, 8, 2)]
        local, column = places[i]
        at = Int64(rows.place(rows.first + local)) * shape.v_dim + result.column + column
        inside = asm.flag(item + i * GROUP < items)
        gmem.store16_if(asm.address(result.out) + at * 2, packed, inside)


def load_part(row: Int32, column: Int32, result: Result, shape: Shape) -> list[Uint32]:
    """Eight columns of a row of a part."""
    at = asm.address(result.parts) + (Int64(row) * shape.out_columns + column) * 4
    return gmem.load16(at) + gmem.load16(at + 16)


@cute.jit
def finish(
    acc: cute.Tensor,
    stat: cute.Tensor,
    base: Int32,
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes the result, or a part of it and, as the last one, the merged result; the consumer that has the sums."""
    if result.splits == 1:
        store(acc, stat, rows, result, shape)
    else:
        store_part(acc, stat, rows, result, shape)
        merge_last(base, rows, result, shape)


@cute.jit
def merge_last(base: Int32, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]) -> None:
    """Says that a part is there and merges all parts if it is the last one; the consumer that has written it."""
    cute.arch.fence_acq_rel_gpu()
    mbarrier.named_barrier(CONSUMERS_BARRIER, GROUP)
    thread = cute.arch.thread_idx()[0] % GROUP
    if thread == 0:
        place = asm.address(result.arrived) + Int64(result.problem) * 4
        smem.store4(base + shape.flag_at, gmem.count_round(place, Int32(result.splits - 1)))
    mbarrier.named_barrier(CONSUMERS_BARRIER, GROUP)
    if smem.load4(base + shape.flag_at) == result.splits - 1:
        cute.arch.fence_acq_rel_gpu()
        merge(thread, base, rows, result, shape)
