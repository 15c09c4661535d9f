"""The decode kernel's roles where the keys are the values, of 512: every value is decoded once.

A warpgroup copies tiles of 64 tokens, two attend (`mqa_attend`). Two CTAs of a cluster may share a row's tokens.
"""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, bf16, f16, gmem, mbarrier, smem
from megamoe.cute.arith import Target
from megamoe_stages.fp4_kv_decode import mqa_attend, mqa_produce, mqa_shape
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, Rows
from megamoe_stages.fp4_kv_decode.mqa_result import finish, join_pair, pass_pair, store
from megamoe_stages.fp4_kv_decode.mqa_scores import LOWEST
from megamoe_stages.fp4_kv_decode.mqa_shape import (
    BLOCK_BYTES,
    CONSUMERS,
    DIM,
    GROUP,
    PIECES,
    QUARTERS,
    ROWS,
    TILE_BYTES,
    WARPS,
    Shape,
)
from megamoe_stages.fp4_kv_decode.result import Result
from megamoe_stages.fp4_kv_decode.tokens import Work

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # all of 64 K
_LARGEST = 14  # queries are brought below 2^15 by a power of two: what fp16 rounds is below 2^-39 of their largest
_BIAS = 127
_LEAST_FACTOR = 1e-37  # stands for 0, so that a hidden score is -inf whatever the scale
_NEVER = 1 << 30  # a tile or token beyond all
_LEAST_RATIO = 2.0**-60  # of the decode scales of two caches


def init_barriers(base: Int32, shape: Shape) -> None:
    """Makes the mbarriers; a thread."""
    for i in range(CONSUMERS * QUARTERS):
        mbarrier.init(base + shape.full_at + i * 8, GROUP + WARPS)  # copies of all threads, masks of all warps
    for i in range(PIECES):
        mbarrier.init(base + shape.empty_at + i * 8, GROUP)
    for i in range(2):
        mbarrier.init(base + shape.ready_at + i * 8, GROUP)
        mbarrier.init(base + shape.free_at + i * 8, CONSUMERS * WARPS)
    mbarrier.init(base + shape.totals_at, CONSUMERS * GROUP)


@cute.jit
def run(
    base: Int32,
    q: cute.Tensor,
    scores: Float32,
    scales: Constexpr[tuple[cute.Tensor, cute.Tensor]],
    own: Int32,
    first: Int32,
    work: Constexpr[Work],
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """What the threads of a CTA do, whose `own` tiles start at token `first`.

    Products times `scores` times the cache's decode scale, of `scales`, are scores.
    """
    thread, _, _ = cute.arch.thread_idx()
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        mqa_produce.produce(base, work, shape)
        if cutlass.const_expr(shape.paired):
            pass_pair()
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        consumer = thread // GROUP - 1
        acc = cute.make_rmem_tensor((shape.out_columns // 2,), Float32)
        scale, extra = (one[()] for one in scales)
        ratio = arith.maximum(extra / scale, Float32(_LEAST_RATIO), Target.SM90)
        if thread == GROUP:
            note(base, first, ratio, rows, shape)
        load_queries(thread - GROUP, q, scores * scale, base, rows, shape)
        stat = cute.make_rmem_tensor((4,), Float32)
        mqa_attend.attend(acc, stat, base, consumer, own, shape)
        if cutlass.const_expr(shape.paired):
            rank = result.split % 2
            join_pair(acc, stat, base, consumer, rank, shape)
            column, problem = rank * shape.out_columns, result.problem * 2 + rank
            half = result._replace(splits=result.splits // 2, split=result.split // 2, problem=problem, column=column)
            if consumer == rank:
                finish(acc, stat, base, rows, half, shape)
        else:  # all tokens
            store(acc, stat, rows, result._replace(column=consumer * shape.out_columns), shape)


def note(base: Int32, first: Int32, ratio: Float32, rows: Rows, shape: Shape) -> None:
    """Leaves in shared memory what masks and scales of a tile follow from: eight words.

    Token that tile 0 starts at; last token that all queries see; the last that some query sees no more; tile from which
    all queries see all that exists; position; window; tile from which scores are the second cache's; their ratio.
    """
    early = rows.position + rows.first // rows.group
    late = rows.position + (cutlass.min(rows.first + ROWS, rows.count) - 1) // rows.group
    late = arith.select(rows.window != 0, late - rows.window, Int32(-_NEVER))
    every = rows.near if shape.extra else Int32(_NEVER)
    every = arith.select(rows.indexed != 0, Int32(0), every)
    smem.store16(base + shape.facts_at, [Uint32(word) for word in (first, early, late, every)])
    words = [Uint32(word) for word in (rows.position, rows.window, rows.near)]
    smem.store16(base + shape.facts_at + 16, [*words, arith.bits(ratio)])


@cute.jit
def load_queries(
    thread: Int32,
    q: cute.Tensor,
    unit: Float32,
    base: Int32,
    rows: Constexpr[Rows],
    shape: Constexpr[Shape],
) -> None:
    """Brings the queries into shared memory as right operands, and fills tables; 16 threads a row, all consumers.

    fp16 of a row's largest value's size; the order of its values is that of the products' k, see `mqa_attend`. Zeros
    where there is no row. Signs are flipped where `unit` is below 0: the factors of scores, with it in them, have none.
    """
    negative = arith.select(unit < Float32(0.0), Uint32(0x80008000), Uint32(0))
    unit = arith.magnitude(unit, Target.SM90)
    lane = thread % 16
    if thread < 2:
        smem.store4(base + shape.flags_at + thread * 4, Int32(-2))
    zeros = [Uint32(0)] * 4
    for i in cutlass.range_constexpr(TILE_BYTES // 2 // 16 // (CONSUMERS * GROUP)):  # tile -1, of the first consumer
        smem.store16(base + shape.values_at + (i * CONSUMERS * GROUP + thread) * 16, zeros)
    for i in cutlass.range_constexpr(BLOCK_BYTES // 16 // (CONSUMERS * GROUP)):
        smem.store16(base + shape.weights_at + (i * CONSUMERS * GROUP + thread) * 16, zeros)
    for step in cutlass.range_constexpr(ROWS * 16 // (CONSUMERS * GROUP)):
        local = step * (CONSUMERS * GROUP // 16) + thread // 16
        inside = rows.first + local < rows.count
        row = arith.select(inside, rows.first + local, Int32(0))
        at = asm.address(q) + Int64(rows.place(row)) * (DIM * 2) + lane // 4 * 256 + lane % 4 * 16
        words = [gmem.load16(at + t * 64) for t in range(4)]  # quarter lane / 4, lane t's word lane % 4
        largest = Uint32(0)
        for t in cutlass.range_constexpr(4):
            words[t] = [arith.select(inside, word ^ negative, word ^ word) for word in words[t]]
            for word in words[t]:
                largest = arith.umax_halves(largest, word & 0x7FFF7FFF, Target.SM90)
        largest = cutlass.max(largest & 0xFFFF, largest >> 16)
        for other in (1, 2, 4, 8):
            largest = cutlass.max(largest, cute.arch.shuffle_sync_bfly(largest, offset=other))
        exponent = cutlass.max(largest >> 7, Uint32(_LARGEST + 1))
        larger = arith.number((Uint32(2 * _BIAS + _LARGEST) - exponent) << 23)
        back = arith.number((exponent - _LARGEST) << 23)
        values = [[v * larger for word in words[t] for v in bf16.unpack(word)] for t in range(4)]
        for odd in cutlass.range_constexpr(2):
            for h in cutlass.range_constexpr(2):
                chunk = lane % 2 * 4 + odd * 2 + h  # of a row of 64 values: of words of 8 two, each of two products
                place = base + lane // 2 * BLOCK_BYTES + local * 128 + ((chunk ^ local) % 8) * 16
                packed = [f16.pack(values[t][odd + 4 * h], values[t][odd + 4 * h + 2]) for t in range(4)]
                smem.store16(place, packed)
        if lane == 0:
            least = arith.maximum(unit * back, Float32(_LEAST_FACTOR), Target.SM90)
            smem.store8(base + shape.table_at + local * 8, [arith.bits(least), arith.bits(Float32(LOWEST))])
            smem.store4(base + shape.queries_at + local * 4, (rows.first + local) // rows.group)
    smem.proxy_fence()
    if thread < GROUP:
        mbarrier.arrive_if(base + shape.ready_at + mqa_shape.buffer_of(-1) * 8, Int32(1))
    mbarrier.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)
