"""What becomes of the sums of warps: results of problems that are a warp's own, parts that are joined in the end.

A warp shares at most two problems with others: the one that its run starts within, and the one that goes on behind it.
Their sums wait in shared memory until all warps of the CTA are done. What a CTA then has of a problem that other CTAs
have too is a part in global memory; the last of these CTAs to arrive merges the parts, in their order. A CTA has at
most two: of the problem that it starts within, number 0, and of the one that goes on behind it, number 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, bf16, gmem, smem, warp
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.f16 import DECODED_UNIT
from megamoe.cute.softmax import LN2, LOG2E
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode import gqa_work as work
from megamoe_stages.fp4_kv_decode.gqa_attend import INFINITY, LOWEST, lanes
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, Shape
from megamoe_stages.fp4_kv_decode.gqa_work import Share

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
        arrived: (problems,) int32, zeros; zeros again in the end.
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
            smem.store16(at + quad * _ROUND_BYTES, [arith.bits(acc[4 * quad + k]) for k in range(4)])
        if g == 0:
            at = base + stats_of(wide, ends, shape) + t * 16
            for n in cutlass.range_constexpr(shape.column_blocks):
                words = [arith.bits(values[2 * n + c]) for c in range(2) for values in (top, total)]
                smem.store16(at + n * (COLUMNS * 8), words)


def sums_of(wide: Int32, ends: cutlass.Boolean, shape: Shape) -> Int32:
    """Where a warp's sums of a problem are that ends in its run, or else of its last one: its ring is free by then."""
    return Int32(arith.select(ends, shape.sums_at + wide * shape.sums_bytes, wide * shape.ring_bytes))


def stats_of(wide: Int32, ends: cutlass.Boolean, shape: Shape) -> Int32:
    """Where its largest scores and sums of weights are."""
    number = arith.select(ends, wide, wide + shape.warps)
    return Int32(shape.stats_at + number * (shape.columns * 8))


def record_of(wide: Int32, ends: cutlass.Boolean, shape: Shape) -> Int32:
    """Where it is said whose sums they are: sequence, kv head * 2 + starts, first and last CTA that have some."""
    return Int32(shape.records_at + arith.select(ends, wide, wide + shape.warps) * 16)


def no_record(base: Uint32, shape: Shape) -> None:
    """Nothing of this warp waits to be joined yet."""
    none = [Uint32(0xFFFFFFFF)] * 4
    for ends in (True, False):
        smem.store16(base + record_of(warp.thread() // WARP, cutlass.Boolean(ends), shape), none)


@cute.jit
def put_record(
    base: Uint32,
    place: Constexpr[Place],
    first_tile: Int32,
    tiles: Int32,
    starts: Int32,
    ends: Int32,
    shape: Constexpr[Shape],
) -> None:
    """Sums of a problem, from `first_tile` on in the line, will wait to be joined."""
    share = Share(*(Int32(word) for word in smem.load16(base + shape.share_at)[:3]))
    ctas = [share.owner(tile) // shape.warps for tile in (first_tile, first_tile + tiles - 1)]
    words = (place.sequence, place.kv_head * 2 + starts, *ctas)
    at = record_of(warp.thread() // WARP, ends != 0, shape)
    smem.store16(base + at, [Uint32(word) for word in words])


@cute.jit
def join_all(base: Uint32, kv_heads: Int32, result: Constexpr[Result], shape: Constexpr[Shape]) -> None:
    """Joins what several warps of the CTA have of a problem, then merges what several CTAs have.

    The warps' runs follow each other in the line, so a problem's sums are those of the warp where it starts, or of the
    first one, and of the warps behind it up to the first where a problem ends that did not start there, or the last.
    """
    thread = warp.thread()
    cta, _, _ = cute.arch.block_idx()
    lane = thread % WARP
    first, last = [Uint32(0xFFFFFFFF)] * 2, [Uint32(0xFFFFFFFF)] * 2
    if lane < shape.warps:
        first = smem.load16(base + record_of(lane, cutlass.Boolean(True), shape))[:2]
        last = smem.load16(base + record_of(lane, cutlass.Boolean(False), shape))[:2]
    none = Uint32(0xFFFFFFFF)
    ending = Uint32(cute.arch.vote_ballot_sync(first[0] != none))
    going = Uint32(cute.arch.vote_ballot_sync(last[0] != none))
    starting = Uint32(cute.arch.vote_ballot_sync((last[0] != none) & ((last[1] & 1) != 0)))
    head = ((ending | (going & ~starting)) & 1) != 0  # the first problem started in a CTA before
    leaders = starting
    before = head
    turn, tail = Int32(0), Int32(-1)
    while before | (leaders != 0):
        leader = arith.select(before, Int32(0), work.lowest(leaders))
        behind = arith.select(before, ending, ending & (Uint32(0xFFFFFFFE) << leader.to(Uint32)))
        ends = behind != 0
        end = arith.select(ends, work.lowest(behind), work.highest(going))
        alone = ~before & ends
        for i in cutlass.range_constexpr((shape.quads + shape.warps - 1) // shape.warps):
            quad = thread // WARP - turn
            quad = arith.select(quad < 0, quad + shape.warps, quad) + i * shape.warps
            if quad < shape.quads:
                place, whole = join(base, leader, end, ends, quad, shape)
                if alone:
                    whole.write(quad, place, result, shape)
                else:
                    whole.write_part(quad, cta * 2 + arith.select(before, Int32(0), Int32(1)), result, shape)
        tail = arith.select(~before & ~ends, leader, tail)
        leaders = arith.select(before, leaders, leaders & (leaders - 1))
        before = cutlass.Boolean(False)
        turn = turn + shape.quads % shape.warps
        turn = arith.select(turn >= shape.warps, turn - shape.warps, turn)
    if head | (tail >= 0):
        records = [
            arith.select(head, record_of(Int32(0), (ending & 1) != 0, shape), Int32(0)),
            arith.select(tail >= 0, record_of(cutlass.max(tail, 0), cutlass.Boolean(False), shape), Int32(0)),
        ]
        cute.arch.fence_acq_rel_gpu()
        cute.arch.sync_threads()
        for number in cutlass.range_constexpr(2):
            if thread == number * WARP:
                whole = Int32(0)
                if records[number] != 0:
                    words = [Int32(word) for word in smem.load16(base + records[number])]
                    problem = words[0] * kv_heads + words[1] // 2
                    at = asm.address(result.arrived) + Int64(problem) * 4
                    others = words[3] - words[2]
                    whole = asm.flag(gmem.count_round(at, others) == others)
                smem.store4(Int32(base) + shape.flags_at + 4 * number, whole)
        cute.arch.sync_threads()
        merge(base, records, result, shape)


def join(
    base: Uint32, leader: Int32, end: Int32, ends: cutlass.Boolean, quad: Int32, shape: Shape
) -> tuple[Place, Sums]:
    """Adds up a group of sums of warps `leader` to `end`; the problem ends in that warp's run or goes on behind it."""
    lane = warp.thread() % WARP
    record = smem.load16(base + record_of(leader, ends & (leader == end), shape))
    whole = Sums.empty()
    stats = base + columns_of(quad, shape) * 8
    _join(whole, stats, base + lane * _QUAD_BYTES + quad * _ROUND_BYTES, leader, end, ends, shape)
    return Place(Int32(record[0]), Int32(record[1] >> 1)), whole


@cute.jit
def _join(
    whole: Constexpr[Sums],
    stats: Uint32,
    sums: Uint32,
    leader: Int32,
    end: Int32,
    ends: cutlass.Boolean,
    shape: Constexpr[Shape],
) -> None:
    for w in cutlass.range(leader, end + 1, unroll=4):
        here = ends & (w == end)
        whole.add(smem.load16(stats + stats_of(w, here, shape)), smem.load16(sums + sums_of(w, here, shape)))


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

    def write_part(self, quad: Int32, part: Int32, result: Result, shape: Shape) -> None:
        """Writes a part."""
        words = [arith.bits(self.sums[k]) for k in range(4)]
        stats = [arith.bits(x[c]) for c in range(2) for x in (self.most, self.totals)]
        write_part(words, stats, quad, part, result, shape)


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
                sink = exp2(result.sink[head] * Float32(LOG2E) - tops[c])
            some = totals[c] > Float32(0.0)
            scale = result.v_scale[()] * Float32(DECODED_UNIT) / (totals[c] + sink)
            scale = arith.select(some, scale, Float32(0.0))
            dim = g * (shape.v_dim // COLUMNS) + quad // shape.column_blocks * 2
            pair = bf16.pack(sums[c] * scale, sums[2 + c] * scale, Target.SM90)
            at = asm.address(result.out) + (Int64(row) * shape.v_dim + dim) * 2
            gmem.store4_if(at, pair, Int32(1))
            if (quad < shape.column_blocks) & (g == 0):
                lse = (tops[c] + attention_mma.log2(totals[c])) * Float32(LN2)
                result.lse[row] = arith.select(some, lse, Float32(-INFINITY))


@cute.jit
def write_part(
    sums: Constexpr[list[Uint32]],
    stats: Constexpr[list[Uint32]],
    quad: Int32,
    part: Int32,
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes a group of four sums of a part, and with the first ones its largest scores and sums of weights."""
    g, _ = lanes()
    lane = warp.thread() % WARP
    at = asm.address(result.parts) + Int64(part) * (shape.part_floats * 4)
    gmem.store16(at + (quad * WARP + lane) * _QUAD_BYTES, sums)
    if (quad < shape.column_blocks) & (g == 0):
        at = asm.address(result.stats) + (Int64(part) * shape.columns + columns_of(quad, shape)) * 8
        gmem.store16(at, stats)


@cute.jit
def merge(base: Uint32, records: Constexpr[list[Int32]], result: Constexpr[Result], shape: Constexpr[Shape]) -> None:
    """Adds up the parts of problems of which this CTA was the last to have its own ready, and writes the results."""
    thread = warp.thread()
    lane = thread % WARP
    cute.arch.fence_acq_rel_gpu()
    for i in cutlass.range_constexpr((2 * shape.quads + shape.warps - 1) // shape.warps):
        item = thread // WARP + i * shape.warps
        second = item >= shape.quads
        quad = item - arith.select(second, Int32(shape.quads), Int32(0))
        flag = smem.load4(Int32(base) + shape.flags_at + arith.select(second, Int32(4), Int32(0)))
        if (quad < shape.quads) & (flag != 0):
            words = [Int32(word) for word in smem.load16(base + arith.select(second, records[1], records[0]))]
            whole = Sums.empty()
            stats = asm.address(result.stats) + columns_of(quad, shape) * 8
            sums = asm.address(result.parts) + (quad * WARP + lane) * _QUAD_BYTES
            for cta in cutlass.range(words[2], words[3] + 1, unroll=8):
                part = Int64(cta * 2 + asm.flag(cta == words[2]))
                values = gmem.load16(sums + part * (shape.part_floats * 4))
                whole.add(gmem.load16(stats + part * (shape.columns * 8)), values)
            whole.write(quad, Place(words[0], words[1] // 2), result, shape)
