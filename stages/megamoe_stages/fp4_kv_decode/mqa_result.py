"""What becomes of the sums of the decode kernel for keys that are the values; as `result`, of columns in another order.

A lane (g, t) has of its two rows eight neighbouring columns in every 32: of 128 columns those from 32 t + 8 w on, for w
from 0 to 3. Of these, product columns 8 (2 o + h) + 2 t + e are column o + 4 h + 2 e.
"""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, asm, bf16, cluster, gmem
from megamoe.cute.arith import Target
from megamoe_stages.fp4_kv_decode.attend import Rows, lanes
from megamoe_stages.fp4_kv_decode.mqa_shape import GROUP, ROWS, Shape
from megamoe_stages.fp4_kv_decode.result import Result, add, finished, merge_last

_EIGHTS = 8  # of a lane's columns of a row


@cute.jit
def join_pair(
    acc: cute.Tensor, stat: cute.Tensor, base: Int32, consumer: Int32, rank: Int32, shape: Constexpr[Shape]
) -> None:
    """Adds what the other CTA of the cluster has of the half of the columns that this one keeps, its rank's."""
    thread = cute.arch.thread_idx()[0] % GROUP
    at = base + shape.tiles_at + thread * 16
    count = cute.size(acc)
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()  # nobody needs queries and decoded tiles any more
    if consumer != rank:
        there = cluster.peer_address(at, 1 - rank)
        for i in cutlass.range_constexpr(count // 4):
            cluster.store16(there + i * GROUP * 16, [arith.bits(acc[4 * i + j]) for j in range(4)])
        cluster.store16(there + count // 4 * GROUP * 16, [arith.bits(stat[j]) for j in range(4)])
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    if consumer == rank:
        add(acc, stat, at, count)


def pass_pair() -> None:
    """The barriers of `join_pair`, for the producers."""
    for _ in range(2):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def eight(acc: cute.Tensor, number: int, half: int) -> list[Float32]:
    """Eight neighbouring columns of a lane's row."""
    places = [4 * (4 * number + 2 * (v % 2) + v // 4) + 2 * half + v // 2 % 2 for v in range(8)]
    return [acc[place] for place in places]


def column_of(number: int, t: Int32) -> Int32:
    """The first of those columns."""
    return number // 4 * 128 + t * 32 + number % 4 * 8


@cute.jit
def store(
    acc: cute.Tensor, stat: cute.Tensor, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Writes the result of rows and columns of which these sums have all tokens; a consumer."""
    g, t, wide = lanes()
    for half in cutlass.range_constexpr(2):
        row = rows.first + wide * 16 + g + 8 * half
        inside = row < rows.count
        row = arith.select(inside, row, Int32(0))
        scale, lse = finished(stat[half], stat[2 + half], row, rows, result)
        place = rows.place(row)
        if inside & (t == 0) & (result.column == 0):
            result.lse[place] = lse
        to = asm.address(result.out) + (Int64(place) * shape.v_dim + result.column) * 2
        for number in cutlass.range_constexpr(_EIGHTS):
            value = [one * scale for one in eight(acc, number, half)]
            words = [bf16.pack(value[2 * k], value[2 * k + 1], Target.SM90) for k in range(4)]
            there = to + Int64(column_of(number, t) * 2)
            gmem.store16_if(there, words, inside)


@cute.jit
def store_part(
    acc: cute.Tensor, stat: cute.Tensor, rows: Constexpr[Rows], result: Constexpr[Result], shape: Constexpr[Shape]
) -> None:
    """Writes a part of the sums, in the order of `result.merge`."""
    g, t, wide = lanes()
    first = (result.problem * result.splits + result.split) * ROWS
    for half in cutlass.range_constexpr(2):
        row = wide * 16 + g + 8 * half
        if rows.first + row < rows.count:
            if t == 0:
                result.stats[first + row, 0] = stat[half]
                result.stats[first + row, 1] = stat[2 + half]
            to = asm.address(result.parts) + Int64(first + row) * (shape.out_columns * 4)
            for number in cutlass.range_constexpr(_EIGHTS):
                value = [arith.bits(one) for one in eight(acc, number, half)]
                there = to + Int64(column_of(number, t) * 4)
                gmem.store16(there, [value[k] for k in (0, 4, 1, 5)])
                gmem.store16(there + 16, [value[k] for k in (2, 6, 3, 7)])


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
