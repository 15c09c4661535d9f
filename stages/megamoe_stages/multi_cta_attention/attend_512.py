"""The consumers of the head_dim 512 kernel: scores, softmax and sums.

Each consumer, a warpgroup, holds 64 rows and half of the columns of their output. The consumers take turns at the
scores of tiles; the weights of a tile go through shared memory to the other one. In a turn a consumer queues its
own values, the keys of its next tile and the other's values, so that products run while it makes the softmax, and the
other consumer's run while it waits. Scores are in base 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, cluster, mask_bits, mbarrier, smem, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.mask_bits import MaskBits
from megamoe.cute.softmax import HIDDEN, finite, fma, left_operands
from megamoe.cute.warp import sum_of_four
from megamoe_stages.multi_cta_attention.produce_512 import advance
from megamoe_stages.multi_cta_attention.rows_512 import Mask, Rows, Work, lanes
from megamoe_stages.multi_cta_attention.shape_512 import (
    BLOCK_BYTES,
    CONSUMERS,
    GROUP,
    HALF,
    ROW_BYTES,
    ROWS,
    TILE,
    TOTALS_BYTES,
    Shape,
)

_STEP_BYTES = wgmma.K_STEP * 2 >> 4  # along a row, in units of descriptors
_STEP_ROWS = wgmma.K_STEP * ROW_BYTES >> 4
_STEPS = 4  # of 64 columns or rows
_COUNT = HALF // 2  # sums of a thread
CONSUMERS_BARRIER = 1  # of both consumers; 0 is that of the CTA
_CLEAR_BARRIER = 2  # of the first one
_LOCAL = (1 << 18) - 1


class Consumer:
    """One of the two warpgroups, and where it is.

    Attributes:
        base: Of the shared memory.
        number: 0 or 1.
        factor: Makes scores in base 2 of products; positive.
        mask: A mask of one's own, or None.
        cursor: (2,) Int32: slot and parity of its ring.
        acc: (HALF / 2,) fp32, as `wgmma.mma`.
        stat: (4,) fp32: largest products of a thread's two rows, their sums.
        weights: (TILE / 4,) words: of the tile whose values come next.
        scale: (2,) fp32: by what the sums shrink before that.
        before: (1,) Int32, of pieces of rows before: bits 0 and 1, whether the tiles that each consumer has published
            were odd in number; bit 2, whether the pieces were.
    """

    def __init__(self, base: Int32, number: Int32, factor: Float32, mask: Mask | None) -> None:
        self.base, self.number, self.factor, self.mask = base, number, factor, mask
        self.cursor = cute.make_rmem_tensor((2,), Int32)
        self.acc = cute.make_rmem_tensor((_COUNT,), Float32)
        self.stat = cute.make_rmem_tensor((4,), Float32)
        self.weights = cute.make_rmem_tensor((TILE // 4,), Uint32)
        self.scale = cute.make_rmem_tensor((2,), Float32)
        self.before = cute.make_rmem_tensor((1,), Int32)
        self.before[0] = Int32(0)
        for i in range(2):
            self.cursor[i] = Int32(0)

    def parity(self, tile: Int32, owner: int | Int32) -> Int32:
        """Of the phase in which the owner publishes a tile's weights."""
        return (tile // 2 ^ self.before[0] >> owner) % 2


def begin(me: Consumer) -> None:
    """Starts with rows that have seen nothing."""
    for i, zero in enumerate(wgmma.zeros(_COUNT)):
        me.acc[i] = zero
    for i in range(2):
        me.stat[i], me.stat[2 + i] = Float32(HIDDEN), Float32(0.0)


def end(me: Consumer, tiles: Int32) -> None:
    """Remembers how many tiles the rows have seen."""
    me.before[0] = me.before[0] ^ ((tiles + 1) // 2 % 2 | tiles // 2 % 2 << 1 | 4)


@cute.jit
def attend(
    me: Constexpr[Consumer],
    rows: Constexpr[Rows],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """All tiles, but for the values of the last ones."""
    if (me.number == 0) & (work.tiles > 0):
        take_turn(me, Int32(0), rows, work, False, False, shape)
    if (me.number == 1) & (work.tiles > 1):
        take_turn(me, Int32(1), rows, work, False, True, shape)
    own = (work.tiles - me.number + 1) // 2
    for turn in cutlass.range(own - 1, unroll=1):
        take_turn(me, me.number + 2 + 2 * turn, rows, work, True, True, shape)
    mbarrier.arrive_if(me.base + shape.queries_read_at, Int32(1))


@cute.jit
def add_last(
    me: Constexpr[Consumer],
    rows: Constexpr[Rows],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """The values of the last tiles; then the sums of both consumers are one."""
    own = (work.tiles - me.number + 1) // 2
    if own > 0:
        last_own = me.number + 2 * (own - 1)
        finish_own(me, rows.keys + rows.entries - work.start(last_own), shape)
    last = me.number + 2 * own - 1  # of the other consumer, behind this one's last
    if (last >= 0) & (last < work.tiles):
        finish_other(me, last, rows.keys + rows.entries - work.start(last), shape)
    for i in cutlass.range_constexpr(2):
        me.stat[2 + i] = sum_of_four(me.stat[2 + i], Target.SM90)
    join_totals(me, shape)


@cute.jit
def take_turn(
    me: Constexpr[Consumer],
    tile: Int32,
    rows: Constexpr[Rows],
    work: Constexpr[Work],
    owns: Constexpr[bool],
    follows: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """The weights of an own tile, and meanwhile the values of the two before.

    Args:
        me: This consumer.
        tile: Its next tile.
        rows: Of the CTA.
        work: Of the cluster.
        owns: Add the values of its tile before.
        follows: Add the values of the other's tile before.
        shape: Of the kernel.
    """
    sums = [me.acc[i] for i in range(_COUNT)]
    held: list[Int32] = []
    if cutlass.const_expr(owns):
        sums, held = start_own(me, sums, None, shape)
    scores = attention_mma.fence(wgmma.zeros(TILE // 2))
    for chunk in cutlass.range_constexpr(shape.key_chunks):
        at, empty = next_chunk(me, shape)
        wgmma.fence()
        scores = add_scores(scores, me.base, at, chunk, shape)
        wgmma.commit()
        if cutlass.const_expr(chunk == 0 and owns):
            sums = attention_mma.wait(sums, 1)
        elif cutlass.const_expr(chunk > 0):
            wgmma.wait(1)
        release(held if chunk > 0 or owns else [], shape)
        held = empty
    words = seen_words(me.mask.bits, tile, rows, work) if me.mask is not None else []
    running = 0
    others: list[Int32] = []
    if cutlass.const_expr(follows):
        shrink = follow(me, tile - 1, shape)
        sums = attention_mma.fence([sums[i] * shrink[i // 2 % 2] for i in range(_COUNT)])
        # a few entries may follow a tile that reaches behind them: the last tile is not the only one to clear
        count = None if me.mask is None else rows.keys + rows.entries - work.start(tile - 1)
        sums, others, running = start_other(me, sums, count, shape)
    scores = attention_mma.wait(scores, running)
    release(held, shape)
    softmax(me, scores, words, tile, rows, work, shape)
    publish(me, tile, shape)
    if cutlass.const_expr(follows):
        sums = attention_mma.wait(sums)
        release(others, shape)
        acknowledge(me, shape)
    for i in cutlass.range_constexpr(_COUNT):
        me.acc[i] = sums[i]


@cute.jit
def finish_own(me: Constexpr[Consumer], count: Int32, shape: Constexpr[Shape]) -> None:
    """Adds the values of the last own tile, of which the first `count` are the sequence's."""
    sums, held = start_own(me, [me.acc[i] for i in range(_COUNT)], count, shape)
    for i, value in enumerate(attention_mma.wait(sums)):
        me.acc[i] = value
    release(held, shape)


@cute.jit
def finish_other(me: Constexpr[Consumer], tile: Int32, count: Int32, shape: Constexpr[Shape]) -> None:
    """Adds the values of the other consumer's last tile, of which the first `count` are the sequence's."""
    shrink = follow(me, tile, shape)
    sums = attention_mma.fence([me.acc[i] * shrink[i // 2 % 2] for i in range(_COUNT)])
    sums, others, _ = start_other(me, sums, count, shape)
    for i, value in enumerate(attention_mma.wait(sums)):
        me.acc[i] = value
    release(others, shape)
    acknowledge(me, shape)


def local(address: Int32) -> Int32:
    """An address without the number of the CTA in its cluster, which is not for descriptors."""
    return address & _LOCAL


def seen_words(mask: MaskBits, tile: Int32, rows: Rows, work: Work) -> list[Uint32]:
    """The bits of a tile's keys for a thread's two rows."""
    g, _, wide = lanes()
    words: list[Uint32] = []
    for half in range(2):
        row = cutlass.min(rows.first + wide * 16 + g + 8 * half, rows.count - 1)
        words += mask.load_if(rows.split(row)[0], work.start(tile) - work.columns, tile >= work.near)
    return words


def next_chunk(me: Consumer, shape: Shape) -> tuple[Int32, list[Int32]]:
    """Waits for the next chunk of keys or values; its address, and what to give back when it was read."""
    slot = me.cursor[0]
    full = me.base + shape.barriers_at + (me.number * shape.slots + slot) * 16
    mbarrier.wait(full, me.cursor[1])
    advance(me.cursor, shape)
    return me.base + shape.ring_at + me.number * shape.ring_bytes + slot * shape.chunk_bytes, [full + 8]


def add_scores(scores: list[Float32], base: Int32, at: Int32, chunk: int, shape: Shape) -> list[Float32]:
    """Starts the products of the queries and a chunk of keys."""
    queries, keys = wgmma.descriptor(local(base)), wgmma.descriptor(local(at))
    for i in range(shape.chunk):
        for k in range(_STEPS):
            ahead = (chunk * shape.chunk + i) * (BLOCK_BYTES >> 4) + k * _STEP_BYTES
            there = i * (BLOCK_BYTES >> 4) + k * _STEP_BYTES
            scores = attention_mma.mma_shared(scores, queries + ahead, keys + there, shape.kind)
    return scores


def start_own(
    me: Consumer, sums: list[Float32], count: Int32 | None, shape: Shape
) -> tuple[list[Float32], list[Int32]]:
    """Starts adding the values of an own tile, whose weights are in registers; what to give back afterwards."""
    weights = [me.weights[i] for i in range(TILE // 4)]
    ready = attention_mma.fence([sums[i] * me.scale[i // 2 % 2] for i in range(_COUNT)] + weights)
    sums, weights = ready[:_COUNT], ready[_COUNT:]
    held: list[Int32] = []
    for values, first, steps, empty in value_steps(me, count, shape):
        wgmma.fence()
        for k in range(steps):
            part = weights[4 * (first + k) : 4 * (first + k) + 4]
            sums = attention_mma.mma_transposed(sums, part, values + k * _STEP_ROWS, shape.kind)
        wgmma.commit()
        held += empty
    return sums, held


def start_other(
    me: Consumer, sums: list[Float32], count: Int32 | None, shape: Shape
) -> tuple[list[Float32], list[Int32], int]:
    """Starts adding the values of a tile of the other consumer; also says how many groups are on their way."""
    weights = wgmma.descriptor(local(me.base) + shape.weights_at + (1 - me.number) * BLOCK_BYTES)
    held: list[Int32] = []
    groups = 0
    for values, first, steps, empty in value_steps(me, count, shape):
        wgmma.fence()
        for k in range(steps):
            left = weights + (first + k) * _STEP_BYTES
            sums = attention_mma.mma_shared_transposed(sums, left, values + k * _STEP_ROWS, shape.kind)
        wgmma.commit()
        held += empty
        groups += 1
    return sums, held, groups


def value_steps(me: Consumer, count: Int32 | None, shape: Shape) -> Iterator[tuple[Int64, int, int, list[Int32]]]:
    """Chunks of this consumer's half of a tile of values, each waited for when it comes.

    Args:
        me: This consumer.
        count: Values that are the sequence's; the others become zeros. None where all are.
        shape: Of the kernel.

    Yields:
        The descriptor, the first of the products (16 rows each) and their number, and what to give back afterwards.
    """
    for chunk in range(shape.value_chunks):
        at, empty = next_chunk(me, shape)
        if count is not None:
            clear_behind(me, at, count - chunk * shape.value_rows, shape)
        yield attention_mma.transposed(local(at), shape.value_rows * ROW_BYTES), chunk * shape.chunk, shape.chunk, empty


@cute.jit
def clear_behind(me: Constexpr[Consumer], at: Int32, count: Int32, shape: Constexpr[Shape]) -> None:
    """Zeros the rows from `count` on of a chunk of values: another sequence's, and 0 times NaN is NaN; a warpgroup."""
    if count < shape.value_rows:
        thread = cute.arch.thread_idx()[0] % GROUP
        for i in cutlass.range_constexpr(shape.chunk_bytes // (GROUP * 16)):
            piece = thread + i * GROUP
            if piece // (ROW_BYTES // 16) % shape.value_rows >= count:
                smem.store16(at + piece * 16, [Uint32(0)] * 4)
        smem.proxy_fence()
        mbarrier.named_barrier(me.number + _CLEAR_BARRIER, GROUP)


@cute.jit
def release(empty: Constexpr[list[Int32]], shape: Constexpr[Shape]) -> None:
    """Gives slots back, an arrival a warp at each CTA of the cluster."""
    for barrier in empty:
        cluster.arrive_everywhere(barrier, shape.ctas)


@cute.jit
def softmax(
    me: Constexpr[Consumer],
    scores: Constexpr[list[Float32]],
    words: Constexpr[list[Uint32]],
    tile: Int32,
    rows: Constexpr[Rows],
    work: Constexpr[Work],
    shape: Constexpr[Shape],
) -> None:
    """The weights of a tile, and by what the sums so far shrink; `words` are those of `mask_bits.hide`, or none."""
    target = Target.SM90
    x = cute.make_rmem_tensor((TILE // 2,), Float32)
    for i, score in enumerate(scores):
        x[i] = score
    start = work.start(tile)
    begin, _ = work.seen(cutlass.min(rows.first + (ROWS - 1), rows.count - 1), tile, rows)
    _, end = work.seen(cutlass.min(rows.first, rows.count - 1), tile, rows)
    if (begin > start) | (end < start + TILE):
        hide(x, tile, rows, work)
    if cutlass.const_expr(len(words) > 0):
        mask_bits.hide(x, words)
    for half in cutlass.range_constexpr(2):
        own = [i + j for i in range(2 * half, TILE // 2, 4) for j in range(2)]
        top = me.stat[half]
        for i in own:
            top = arith.maximum(top, x[i], target)
        top = attention_mma.max_of_four(top)
        minus = arith.mul(finite(top), -me.factor, target)
        me.scale[half] = shrinks(me, half, minus)
        total = me.stat[2 + half] * me.scale[half]
        p = [exp2(fma(x[i], me.factor, minus)) for i in own]
        for value in p:
            total = total + value
        for i, word in enumerate(left_operands(p, shape.kind)):
            me.weights[2 * i + half] = word
        me.stat[half], me.stat[2 + half] = top, total


@cute.jit
def hide(x: cute.Tensor, tile: Int32, rows: Constexpr[Rows], work: Constexpr[Work]) -> None:
    """Takes the keys of a tile that a row does not see out of its scores."""
    g, t, wide = lanes()
    start = work.start(tile)
    for half in cutlass.range_constexpr(2):
        begin, end = work.seen(cutlass.min(rows.first + wide * 16 + g + 8 * half, rows.count - 1), tile, rows)
        first, last = begin - start - 2 * t, end - start - 2 * t
        for i in cutlass.range_constexpr(TILE // 8):
            for j in cutlass.range_constexpr(2):
                column = 8 * i + j
                place = 4 * i + 2 * half + j
                visible = (column >= first) & (column < last)
                x[place] = arith.select(visible, x[place], Float32(HIDDEN))


@cute.jit
def publish(me: Constexpr[Consumer], tile: Int32, shape: Constexpr[Shape]) -> None:
    """Shows the weights of an own tile and the largest scores so far to the other consumer."""
    g, t, wide = lanes()
    ready = me.base + shape.ready_at + me.number * 16
    mbarrier.wait(ready + 8, me.parity(tile, me.number) ^ 1)
    for half in cutlass.range_constexpr(2):
        row = wide * 16 + g + 8 * half
        at = me.base + shape.weights_at + me.number * BLOCK_BYTES + row * ROW_BYTES + t * 4
        for i in cutlass.range_constexpr(TILE // 8):
            smem.store4(at + ((g ^ i) * 16), me.weights[2 * i + half])
        one = asm.flag(t == 0)
        smem.store4_if(me.base + shape.tops_at + (me.number * ROWS + row) * 4, me.stat[half], one)
    smem.proxy_fence()
    mbarrier.arrive_if(ready, Int32(1))


@cute.jit
def acknowledge(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """Says that the other consumer's weights were read."""
    at = me.base + shape.ready_at + (1 - me.number) * 16 + 8
    mbarrier.arrive_if(at, cute.arch.lane_idx() == 0)


def follow(me: Consumer, tile: Int32, shape: Shape) -> list[Float32]:
    """Waits for the weights of the other consumer's tile and follows its largest scores; by what the sums shrink."""
    g, _, wide = lanes()
    other = 1 - me.number
    mbarrier.wait(me.base + shape.ready_at + other * 16, me.parity(tile, other))
    shrink = []
    for half in range(2):
        at = me.base + shape.tops_at + (other * ROWS + wide * 16 + g + 8 * half) * 4
        top = arith.number(Uint32(smem.load4(at)))
        minus = arith.mul(finite(top), -me.factor, Target.SM90)
        shrink.append(shrinks(me, half, minus))
        me.stat[half], me.stat[2 + half] = top, me.stat[2 + half] * shrink[half]
    return shrink


@cute.jit
def join_totals(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """Adds the sums of both consumers, whose largest scores are the same by now."""
    g, t, wide = lanes()
    at = me.base + shape.totals_at + me.before[0] // 4 * TOTALS_BYTES + (wide * 16 + g) * 4
    one = asm.flag(t == 0)
    for half in cutlass.range_constexpr(2):
        smem.store4_if(at + (me.number * ROWS + 8 * half) * 4, me.stat[2 + half], one)
    mbarrier.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)
    for half in cutlass.range_constexpr(2):
        other = arith.number(Uint32(smem.load4(at + ((1 - me.number) * ROWS + 8 * half) * 4)))
        me.stat[2 + half] = me.stat[2 + half] + other


def shrinks(me: Consumer, half: int, minus: Float32) -> Float32:
    """By what a row's sums shrink when weights become relative to a score of -`minus`: exactly 1 for the same one."""
    before = arith.mul(me.stat[half], me.factor, Target.SM90)  # rounded as `minus` was then
    return exp2(arith.add(before, minus, Target.SM90))
