"""The consumers of the head_dim 512 kernel: scores, softmax and sums.

Each consumer, a warpgroup, holds 64 rows and half of the columns of their output. The consumers take turns at the
scores of tiles of keys; the weights of a tile go through shared memory to the other one. In a turn a consumer queues
its own values, the keys of its next tile and the other's values, so that products run while it makes the softmax, and
the other consumer's run while it waits.
"""

from __future__ import annotations

from collections.abc import Iterator

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, attention_mma, multicast, ring, softmax, wgmma
from megamoe.cute.varlen import Sequences, Tile
from megamoe_stages.multi_cta_attention.produce_512 import advance
from megamoe_stages.multi_cta_attention.shape_512 import (
    BLOCK_BYTES,
    COLUMNS,
    CONSUMERS,
    GROUP,
    HALF,
    ROW_BYTES,
    ROWS,
    Shape,
)
from megamoe_stages.multi_cta_attention.tiles_512 import lanes

_STEP_BYTES = wgmma.K_STEP * 2 >> 4  # along a row, in units of descriptors
_STEP_ROWS = wgmma.K_STEP * ROW_BYTES >> 4
_STEPS = 4  # of 64 columns or rows
_COUNT = HALF // 2  # sums of a thread
_BARRIER = 1  # of both consumers; 0 is that of the CTA
_LOCAL = (1 << 18) - 1


class Consumer:
    """One of the two warpgroups, and where it is.

    Attributes:
        base: Of the shared memory.
        number: 0 or 1.
        tile: The CTA's rows, and the keys that it goes through; from `start` on.
        sequences: Masks.
        factor: Makes scores in base 2 of products; positive.
        mask: (queries, columns) uint8, 0 for a hidden key; not read unless `Shape.masked`.
        view: First key from which on all rows of the CTA see keys, and the one up to which; from `start` on.
        turns: (2,) Int32: weights that the consumers have shown each other in earlier pieces of rows.
        cursor: (2,) Int32: slot and parity of its ring.
        acc: (HALF / 2,) fp32, as `wgmma.mma`.
        stat: (4,) fp32: largest products of a thread's two rows, its part of their sums.
        weights: (keys / 4,) words: of the tile whose values come next.
        shrink: (2,) fp32: by what the sums shrink before that.
    """

    tile: Tile
    view: tuple[Int32, Int32]

    def __init__(
        self, base: Int32, number: Int32, sequences: Sequences, factor: Float32, mask: cute.Tensor, shape: Shape
    ) -> None:
        self.base, self.number, self.sequences, self.factor, self.mask = base, number, sequences, factor, mask
        self.turns = cute.make_rmem_tensor((CONSUMERS,), Int32)
        self.cursor = cute.make_rmem_tensor((2,), Int32)
        self.acc = cute.make_rmem_tensor((_COUNT,), Float32)
        self.stat = cute.make_rmem_tensor((4,), Float32)
        self.weights = cute.make_rmem_tensor((shape.keys // 4,), Uint32)
        self.shrink = cute.make_rmem_tensor((2,), Float32)
        for i in range(2):
            self.cursor[i], self.turns[i] = Int32(0), Int32(0)

    def start(self, tile: Tile) -> None:
        """Begins with the rows of a tile."""
        begin, _ = tile.seen(Int32(ROWS - 1), tile.end, self.sequences)
        _, end = tile.seen(Int32(0), tile.end, self.sequences)
        self.tile, self.view = tile, (begin, end)
        for i, zero in enumerate(wgmma.zeros(_COUNT)):
            self.acc[i] = zero
        for i in range(2):
            self.stat[i], self.stat[2 + i] = Float32(softmax.HIDDEN), Float32(0.0)

    def shown(self, step: Int32, number: Int32) -> Int32:
        """How many weights the consumer `number` has shown before those of a tile of its."""
        return arith.select(number == 0, self.turns[0], self.turns[1]) + step // 2

    def row(self, half: int) -> Int32:
        """One of the lane's two rows in the CTA."""
        g, _, wide = lanes()
        return wide * 16 + g + 8 * half


@cute.jit
def attend(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """All tiles of keys."""
    steps = me.tile.steps(shape.keys)
    if (me.number == 0) & (steps > 0):
        take_turn(me, Int32(0), False, False, shape)
    if (me.number == 1) & (steps > 1):
        take_turn(me, Int32(1), False, True, shape)
    own = (steps - me.number + 1) // 2
    for turn in cutlass.range(own - 1, unroll=1):
        take_turn(me, me.number + 2 + 2 * turn, True, True, shape)
    if own > 0:
        finish_own(me, shape)
    last = me.number + 2 * own - 1  # of the other consumer, behind this one's last
    if (last >= 0) & (last < steps):
        finish_other(me, last, shape)
    join_totals(me, shape)
    me.turns[0] = me.turns[0] + (steps + 1) // 2
    me.turns[1] = me.turns[1] + steps // 2


@cute.jit
def take_turn(
    me: Constexpr[Consumer], step: Int32, owns: Constexpr[bool], follows: Constexpr[bool], shape: Constexpr[Shape]
) -> None:
    """The weights of an own tile, and meanwhile the values of the two before.

    Args:
        me: This consumer.
        step: Its next tile of keys.
        owns: Add the values of its tile before.
        follows: Add the values of the other's tile before.
        shape: Of the kernel.
    """
    sums = [me.acc[i] for i in range(_COUNT)]
    held: list[Int32] = []
    running = owns  # products of own values are on their way
    if cutlass.const_expr(owns):
        sums, held = start_own(me, shape)
    scores: list[Float32] = []
    for chunk in cutlass.range_constexpr(shape.key_chunks):
        at, empty = next_chunk(me, shape)
        wgmma.fence()
        scores = add_scores(scores, me.base, at, chunk, shape)
        wgmma.commit()
        if cutlass.const_expr(running):
            sums = attention_mma.wait(sums, 1)
            running = False
        elif cutlass.const_expr(chunk > 0):
            wgmma.wait(1)
        if cutlass.const_expr(chunk > 0 or owns):
            release(held, shape)
        held = empty
    groups = 0
    others: list[Int32] = []
    if cutlass.const_expr(follows):
        follow(me, step - 1, shape)
        sums, others, groups = start_other(me, sums, shape)
    scores = attention_mma.wait(scores, groups)
    release(held, shape)
    weigh(me, scores, step, shape)
    publish(me, step, shape)
    if cutlass.const_expr(follows):
        sums = attention_mma.wait(sums)
        release(others, shape)
        acknowledge(me, shape)
    for i in cutlass.range_constexpr(_COUNT):
        me.acc[i] = sums[i]


@cute.jit
def finish_own(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """Adds the values of the last own tile."""
    sums, held = start_own(me, shape)
    for i, value in enumerate(attention_mma.wait(sums)):
        me.acc[i] = value
    release(held, shape)


@cute.jit
def finish_other(me: Constexpr[Consumer], step: Int32, shape: Constexpr[Shape]) -> None:
    """Adds the values of the other consumer's last tile."""
    follow(me, step, shape)
    sums, others, _ = start_other(me, [me.acc[i] for i in range(_COUNT)], shape)
    for i, value in enumerate(attention_mma.wait(sums)):
        me.acc[i] = value
    release(others, shape)
    acknowledge(me, shape)


def local(address: Int32) -> Int32:
    """An address without the number of the CTA in its cluster, which is not for descriptors."""
    return address & _LOCAL


def next_chunk(me: Consumer, shape: Shape) -> tuple[Int32, list[Int32]]:
    """Waits for the next chunk of this consumer's ring; its address, and what to give back when it was read."""
    slot = me.cursor[0]
    full = me.base + shape.barriers_at + (me.number * shape.slots + slot) * 16
    ring.wait(full, me.cursor[1])
    advance(me.cursor, shape)
    return me.base + shape.ring_at + me.number * shape.ring_bytes + slot * shape.chunk_bytes, [full + 8]


def add_scores(scores: list[Float32], base: Int32, at: Int32, chunk: int, shape: Shape) -> list[Float32]:
    """Starts the products of the queries and a chunk of keys."""
    queries, keys = wgmma.descriptor(local(base)), wgmma.descriptor(local(at))
    for i in range(shape.key_blocks):
        for k in range(_STEPS):
            a = queries + ((chunk * shape.key_blocks + i) * (BLOCK_BYTES >> 4) + k * _STEP_BYTES)
            b = keys + (i * (shape.key_block_bytes >> 4) + k * _STEP_BYTES)
            if scores:
                scores = attention_mma.mma_shared(scores, a, b)
            else:
                scores = attention_mma.first_shared(shape.keys // 2, a, b)
    return scores


@cute.jit
def shrink_sums(me: Constexpr[Consumer], sums: cute.Tensor, shape: Constexpr[Shape]) -> None:
    """Makes sums relative to the largest products that weights are relative to now."""
    if cutlass.const_expr(shape.lazy):
        if cute.arch.vote_any_sync((me.shrink[0] != Float32(1.0)) | (me.shrink[1] != Float32(1.0))):
            for i in cutlass.range_constexpr(_COUNT):
                sums[i] = sums[i] * me.shrink[i // 2 % 2]
    else:
        for i in cutlass.range_constexpr(_COUNT):
            sums[i] = sums[i] * me.shrink[i // 2 % 2]


def start_own(me: Consumer, shape: Shape) -> tuple[list[Float32], list[Int32]]:
    """Starts adding the values of an own tile, whose weights are in registers; what to give back afterwards."""
    shrink_sums(me, me.acc, shape)
    weights = [me.weights[i] for i in range(shape.keys // 4)]
    ready = attention_mma.fence([me.acc[i] for i in range(_COUNT)] + weights)
    sums, weights = ready[:_COUNT], ready[_COUNT:]
    held: list[Int32] = []
    for values, first, steps, empty in value_steps(me, shape):
        wgmma.fence()
        for k in range(steps):
            part = weights[4 * (first + k) : 4 * (first + k) + 4]
            sums = attention_mma.mma_transposed(sums, part, values + k * _STEP_ROWS)
        wgmma.commit()
        held += empty
    return sums, held


def start_other(me: Consumer, sums: list[Float32], shape: Shape) -> tuple[list[Float32], list[Int32], int]:
    """Starts adding the values of a tile of the other consumer; also says how many groups are on their way."""
    for i, value in enumerate(sums):
        me.acc[i] = value
    shrink_sums(me, me.acc, shape)
    sums = attention_mma.fence([me.acc[i] for i in range(_COUNT)])
    weights = wgmma.descriptor(local(me.base) + shape.weights_at + (1 - me.number) * shape.weights_bytes)
    held: list[Int32] = []
    groups = 0
    for values, first, steps, empty in value_steps(me, shape):
        wgmma.fence()
        for k in range(steps):
            block, within = divmod(first + k, _STEPS)
            left = weights + (block * (BLOCK_BYTES >> 4) + within * _STEP_BYTES)
            sums = attention_mma.mma_shared_transposed(sums, left, values + k * _STEP_ROWS)
        wgmma.commit()
        held += empty
        groups += 1
    return sums, held, groups


def value_steps(me: Consumer, shape: Shape) -> Iterator[tuple[Int64, int, int, list[Int32]]]:
    """Chunks of this consumer's half of a tile of values, each waited for when it comes.

    Yields:
        The descriptor, the first of the products (16 rows each) and their number, and what to give back afterwards.
    """
    for chunk in range(shape.value_chunks):
        at, empty = next_chunk(me, shape)
        yield attention_mma.transposed(local(at), shape.value_rows * ROW_BYTES), chunk * shape.chunk, shape.chunk, empty


@cute.jit
def release(empty: Constexpr[list[Int32]], shape: Constexpr[Shape]) -> None:
    """Gives slots back, an arrival a warp at each CTA of the cluster."""
    for barrier in empty:
        multicast.arrive_everywhere(barrier, shape.ctas)


def weigh(me: Consumer, products: list[Float32], step: Int32, shape: Shape) -> None:
    """The weights of a tile, and by what the sums so far shrink."""
    held = cute.make_rmem_tensor((len(products),), Float32)
    for i, product in enumerate(products):
        held[i] = product
    hide_edges(held, me, me.tile.begin + step * shape.keys)
    if shape.masked:
        hide_masked(held, me, me.tile.begin + step * shape.keys)
    seen, top = [held[i] for i in range(len(products))], [me.stat[0], me.stat[1]]
    largest = softmax.tops_of(seen, top)
    if shape.lazy:
        grown = softmax.outgrown(largest, top, me.factor)
        largest = [arith.select(grown, largest[half], top[half]) for half in range(2)]
    weights, shrink, total = softmax.step(seen, top, largest, [me.stat[2], me.stat[3]], me.factor)
    for i, word in enumerate(softmax.left_operands(weights, "bf16")):
        me.weights[i] = word
    for half in range(2):
        me.stat[half], me.stat[2 + half], me.shrink[half] = largest[half], total[half], shrink[half]


@cute.jit
def hide_edges(products: cute.Tensor, me: Constexpr[Consumer], start: Int32) -> None:
    """Hides keys that a row does not see; most tiles have none, and nothing to do."""
    begin, end = me.view
    if (start < begin) | (start + 2 * cute.size(products) > end):
        hide(products, me, start)


def hide(products: cute.Tensor, me: Consumer, start: Int32) -> None:
    """The same for any tile; the limits of rows are found anew, they would take registers."""
    seen = [me.tile.seen(me.row(half), me.tile.end, me.sequences) for half in range(2)]
    softmax.hide(products, start, [first for first, _ in seen], False)
    softmax.hide(products, start, [last for _, last in seen], True)


def hide_masked(products: cute.Tensor, me: Consumer, start: Int32) -> None:
    """Hides keys that the mask hides."""
    starts, ends = [], []
    for half in range(2):
        row = cutlass.min(me.row(half), me.tile.rows - me.tile.first - 1)
        query = me.tile.query + (me.tile.first + row) // me.sequences.group
        starts.append(ring.address(me.mask.iterator) + Int64(query) * cute.size(me.mask, mode=[1]))
        ends.append(me.tile.seen(row, me.tile.end, me.sequences)[1])
    softmax.hide_masked(products, start, starts, ends)


@cute.jit
def publish(me: Constexpr[Consumer], step: Int32, shape: Constexpr[Shape]) -> None:
    """Shows the weights of an own tile and the largest products so far to the other consumer."""
    g, t, _ = lanes()
    ready = me.base + shape.ready_at + me.number * 16
    ring.wait(ready + 8, me.shown(step, me.number) % 2 ^ 1)
    for half in cutlass.range_constexpr(2):
        row = me.row(half)
        at = me.base + shape.weights_at + me.number * shape.weights_bytes + row * ROW_BYTES + t * 4
        for i in cutlass.range_constexpr(shape.keys // 8):
            block, chunk = divmod(i, COLUMNS // 8)
            ring.store4(at + block * BLOCK_BYTES + ((g ^ chunk) * 16), me.weights[2 * i + half])
        one = arith.select(t == 0, Int32(1), Int32(0))
        attention_mma.store4_if(me.base + shape.tops_at + (me.number * ROWS + row) * 4, me.stat[half], one)
    attention_mma.proxy_fence()
    ring.arrive_if(ready, Int32(1))


@cute.jit
def acknowledge(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """Says that the other consumer's weights were read."""
    at = me.base + shape.ready_at + (1 - me.number) * 16 + 8
    ring.arrive_if(at, arith.select(cute.arch.lane_idx() == 0, Int32(1), Int32(0)))


def follow(me: Consumer, step: Int32, shape: Shape) -> None:
    """Waits for the weights of the other consumer's tile and follows its largest products."""
    other = 1 - me.number
    ring.wait(me.base + shape.ready_at + other * 16, me.shown(step, other) % 2)
    for half in range(2):
        at = me.base + shape.tops_at + (other * ROWS + me.row(half)) * 4
        top = arith.number(Uint32(ring.load4(at)))
        minus = arith.mul(softmax.finite(top), -me.factor, arith.Target.SM90)
        me.shrink[half] = attention_mma.exp2(softmax.fma(me.stat[half], me.factor, minus))
        me.stat[half], me.stat[2 + half] = top, me.stat[2 + half] * me.shrink[half]


@cute.jit
def join_totals(me: Constexpr[Consumer], shape: Constexpr[Shape]) -> None:
    """Adds both consumers' parts of the sums, which are relative to the same by now."""
    thread = cute.arch.thread_idx()[0] % GROUP
    at = me.base + shape.totals_at + thread * 8
    attention_mma.named_barrier(_BARRIER, CONSUMERS * GROUP)
    ring.store8(at + me.number * (GROUP * 8), [arith.bits(me.stat[2 + half]) for half in range(2)])
    attention_mma.named_barrier(_BARRIER, CONSUMERS * GROUP)
    for half in cutlass.range_constexpr(2):
        other = arith.number(Uint32(ring.load4(at + (1 - me.number) * (GROUP * 8) + half * 4)))
        me.stat[2 + half] = me.stat[2 + half] + other
