"""The consumers of the attention kernel: scores, softmax and sums of 64 rows each, and their result.

The scores of a tile of keys are multiplied while the sums over the tile before are; the softmax of those scores falls
on the sums. Consumers take turns at starting their products, so that the tensor cores have one's products while
another has its softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, attention_mma, copies, gmem, mbarrier, smem, softmax, varlen, wgmma
from megamoe.cute.varlen import Sequences, Tile, TileRing
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention.shape import GROUP, QUERY_WARPS, ROWS, Shape

_STEP_ROWS = wgmma.K_STEP * wgmma.ROW_BYTES >> 4  # in units of descriptors
_TURN_BARRIER = 1  # of the first consumer, its turn; 0 is that of the CTA
STATS = 6  # of a lane: largest scores of two rows, their sums, by what sums over values are to shrink
ROWS_FIELD = Tile._fields.index("rows")
_OWN_BARRIER = 4  # of the first consumer, its own warps


class Result(NamedTuple):
    """What the consumers write, and what goes into it besides scores and values.

    Attributes:
        out: (queries * heads, Dv), 16 bits each.
        lse: (queries * heads,) fp32.
        sink: (heads,) fp32; not read unless has_sink.
        has_sink: Whether there is one.
        factor: softmax_scale in base 2, positive.
        mask: (queries, columns) uint8, 0 for a hidden key; not read unless `Shape.masked`.
    """

    out: cute.Tensor
    lse: cute.Tensor
    sink: cute.Tensor
    has_sink: Int32
    factor: Float32
    mask: cute.Tensor


class Place(NamedTuple):
    """A consumer's place.

    Attributes:
        base: Of shared memory.
        consumer: Its number.
        g: Row of a lane among 8; the other one is 8 more.
        t: Pair of columns of a lane.
        wide: The warp's number in its warpgroup.
    """

    base: Int32
    consumer: Int32
    g: Int32
    t: Int32
    wide: Int32

    def row(self, half: int) -> Int32:
        """One of the lane's two rows in the tile."""
        return self.consumer * ROWS + self.wide * 16 + self.g + 8 * half

    def one_lane(self) -> Int32:
        """Not 0 in one lane of a warp."""
        return asm.flag((self.g == 0) & (self.t == 0))


def tile_ring(base: Int32, shape: Shape) -> TileRing:
    """Where the CTA's tiles are handed over: to the warp that loads, those that bring queries, the consumers."""
    return TileRing(base + shape.tile_ring_at, 1 + QUERY_WARPS + shape.consumers * GROUP // WARP)


def queries_barrier(base: Int32, stage: Int32, shape: Shape) -> Int32:
    """Queries are there; 8 on: their place is free."""
    return base + shape.barriers_at + 32 * shape.stages + stage * 16


def keys_barrier(base: Int32, stage: Int32, shape: Shape) -> Int32:
    """Keys of a stage are there; 8 on: their place is free; 16 and 24 on: the same of values."""
    return base + shape.barriers_at + stage * 32


def stage_of(turn: Int32, stages: int) -> tuple[Int32, Int32]:
    """The stage, one of a power of two, of what comes as number `turn`, and the parity of its barriers."""
    return turn & (stages - 1), turn >> (stages.bit_length() - 1) & 1


def wait_turn(consumer: Int32) -> None:
    """Until the consumer before has started its products."""
    mbarrier.named_barrier(consumer + _TURN_BARRIER, 2 * GROUP)


def pass_turn(consumer: Int32, shape: Shape) -> None:
    """Lets the next consumer start its products."""
    following = arith.select(consumer == shape.consumers - 1, Int32(0), consumer + 1)
    mbarrier.arrive_at_named(following + _TURN_BARRIER, 2 * GROUP)


@cute.jit
def attend(base: Int32, sequences: Constexpr[Sequences], result: Constexpr[Result], shape: Constexpr[Shape]) -> None:
    """All tiles of a consumer."""
    lane = cute.arch.lane_idx()
    consumer = cute.arch.make_warp_uniform(cute.arch.warp_idx() // 4 - 1)
    place = Place(base, consumer, lane // 4, lane % 4, cute.arch.warp_idx() % 4)
    acc = cute.make_rmem_tensor((shape.v_dim // 2,), Float32)
    weights = cute.make_rmem_tensor((shape.keys // 4,), Uint32)
    stat = cute.make_rmem_tensor((STATS,), Float32)
    current = cute.make_rmem_tensor((len(Tile._fields),), Int32)
    if consumer == shape.consumers - 1:
        pass_turn(consumer, shape)  # the first one starts
    number = next_tile(current, Int32(0), place, sequences, result, shape)
    turn, loads = Int32(0), Int32(0)
    while current[ROWS_FIELD] != 0:
        tile = tile_of(current)
        steps = tile.steps(shape.keys)
        begin(acc, weights, stat, tile, turn, loads, place, sequences, result, shape)
        go_on(acc, weights, stat, tile, steps, turn, loads, place, sequences, result, shape)
        end(acc, weights, stat, tile, turn + steps - 1, loads, place, sequences, result, shape)
        if cutlass.const_expr(shape.query_stages == 1):
            copies.wait_stores()
            release_queries(loads, place, shape)
        turn, loads = turn + steps, loads + 1
        number = next_tile(current, number, place, sequences, result, shape)
    if consumer == 0:
        wait_turn(consumer)  # the last one, which nobody needs
    copies.wait_stores()


def tile_of(words: cute.Tensor) -> Tile:
    """A tile from its fields."""
    return Tile(*(words[i] for i in range(len(Tile._fields))))


@cute.jit
def next_tile(
    words: cute.Tensor,  # (fields of a Tile,) int32
    number: Int32,
    place: Constexpr[Place],
    sequences: Constexpr[Sequences],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> Int32:
    """Takes tiles from `number` on, up to one with something to see or the end; the number after it."""
    looking = Int32(1)
    while looking != 0:
        tile = varlen.take(tile_ring(place.base, shape), number)
        for i in cutlass.range_constexpr(len(Tile._fields)):
            words[i] = tile[i]
        number = number + 1
        looking = Int32(0)
        if (tile.rows != 0) & (tile.steps(shape.keys) == 0):
            nothing(tile, place, sequences, result, shape)
            looking = Int32(1)
    return number


def queries_of(loads: Int32, place: Place, shape: Shape) -> Int32:
    """Where this consumer's queries number `loads` lie."""
    stage, _ = stage_of(loads, shape.query_stages)
    return place.base + stage * shape.queries_bytes + place.consumer * shape.part_bytes


def wait_queries(loads: Int32, place: Place, shape: Shape) -> None:
    """Until queries number `loads` are there."""
    stage, parity = stage_of(loads, shape.query_stages)
    mbarrier.wait(queries_barrier(place.base, stage, shape), parity)


@cute.jit
def start(acc: cute.Tensor, stat: cute.Tensor, shape: Constexpr[Shape]) -> None:
    """Nothing summed yet."""
    for i, zero in enumerate(wgmma.zeros(shape.v_dim // 2)):
        acc[i] = zero
    for i in cutlass.range_constexpr(2):
        stat[i], stat[2 + i], stat[4 + i] = Float32(softmax.HIDDEN), Float32(0.0), Float32(1.0)


def keep(weights: cute.Tensor, fresh: list[Float32], shape: Shape) -> None:
    """Weights as left operands of the next products."""
    for i, word in enumerate(softmax.left_operands(fresh, shape.kind)):
        weights[i] = word


@cute.jit
def begin(
    acc: cute.Tensor,
    weights: cute.Tensor,
    stat: cute.Tensor,
    tile: Constexpr[Tile],
    turn: Int32,
    loads: Int32,
    place: Constexpr[Place],
    sequences: Constexpr[Sequences],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """The first scores of a tile, with nothing to do meanwhile."""
    start(acc, stat, shape)
    wait_queries(loads, place, shape)
    scores = attention_mma.wait(start_scores(queries_of(loads, place, shape), turn, place, shape))
    release(turn, 8, place, shape)
    keep(
        weights,
        weigh(scores, stat, tile.begin, view_of(tile, place, sequences, result, shape), result.factor),
        shape,
    )


@cute.jit
def go_on(
    acc: cute.Tensor,  # (Dv / 2,) fp32, as `wgmma.mma`
    weights: cute.Tensor,  # (keys / 4,) of the tile of keys before
    stat: cute.Tensor,
    tile: Constexpr[Tile],
    steps: Int32,
    turn: Int32,
    loads: Int32,
    place: Constexpr[Place],
    sequences: Constexpr[Sequences],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """All scores of a tile but the first, and all sums but the last."""
    view = view_of(tile, place, sequences, result, shape)
    queries = queries_of(loads, place, shape)
    for step in cutlass.range(1, steps, unroll=1):
        here = turn + step
        scores, sums = start_both(acc, weights, stat, queries, here, place, shape)
        scores = attention_mma.wait(scores, 1)
        release(here, 8, place, shape)
        fresh = weigh(scores, stat, tile.begin + step * shape.keys, view, result.factor)
        sums, fresh = attention_mma.wait_behind(sums, fresh, [stat[2], stat[3]])
        release(here - 1, 24, place, shape)
        for i, value in enumerate(sums):
            acc[i] = value
        if cutlass.const_expr(not shape.late):
            scale(acc, stat)
        keep(weights, fresh, shape)
        if (step == 1) & (shape.query_stages > 1):
            release_output(loads, place, shape)
    if (steps == 1) & (shape.query_stages > 1):
        release_output(loads, place, shape)
    if cutlass.const_expr(shape.late):
        scale(acc, stat)


@cute.jit
def end(
    acc: cute.Tensor,
    weights: cute.Tensor,
    stat: cute.Tensor,
    tile: Constexpr[Tile],
    last: Int32,
    loads: Int32,
    place: Constexpr[Place],
    sequences: Constexpr[Sequences],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """The last sums of a tile, of the tile of keys number `last` of the CTA, and the result."""
    count, words = shape.v_dim // 2, shape.keys // 4
    ready = attention_mma.fence([acc[i] for i in range(count)] + [weights[i] for i in range(words)])
    sums = attention_mma.wait(start_sums(ready[:count], ready[count:], last, place, shape))
    release(last, 24, place, shape)
    for i, value in enumerate(sums):
        acc[i] = value
    finish(acc, stat, tile, queries_of(loads, place, shape), place, sequences, result, shape)


@cute.jit
def release_output(loads: Int32, place: Constexpr[Place], shape: Constexpr[Shape]) -> None:
    """Gives the place of the output before queries number `loads` back, which has left by now."""
    if loads > 0:
        copies.wait_stores()
        release_queries(loads - 1, place, shape)


def start_both(
    acc: cute.Tensor, weights: cute.Tensor, stat: cute.Tensor, queries: Int32, turn: Int32, place: Place, shape: Shape
) -> tuple[list[Float32], list[Float32]]:
    """Starts the scores of a tile of keys and the sums over the one before, a group each."""
    count, words = shape.v_dim // 2, shape.keys // 4
    wait_turn(place.consumer)
    if shape.late:
        scores = start_scores(queries, turn, place, shape)
        scale(acc, stat)
        ready = attention_mma.fence([acc[i] for i in range(count)] + [weights[i] for i in range(words)])
    else:
        ready = attention_mma.fence([acc[i] for i in range(count)] + [weights[i] for i in range(words)])
        scores = start_scores(queries, turn, place, shape)
    sums = start_sums(ready[:count], ready[count:], turn - 1, place, shape)
    pass_turn(place.consumer, shape)
    return scores, sums


class View(NamedTuple):
    """What the rows of a warp see, keys from one to before another.

    Attributes:
        rows: The lane's two rows.
        begin: From here on all rows of the warp see keys.
        end: Up to here all rows of the warp see keys.
        masks: Where the mask's bytes of the lane's two rows start; None without a mask.
    """

    rows: list[tuple[Int32, Int32]]
    begin: Int32
    end: Int32
    masks: list[Int64] | None


def view_of(tile: Tile, place: Place, sequences: Sequences, result: Result, shape: Shape) -> View:
    """What the rows of this lane and warp see."""
    first = place.consumer * ROWS + place.wide * 16
    begin, _ = tile.seen(first + 15, tile.end, sequences)
    _, end = tile.seen(first, tile.end, sequences)
    rows = [tile.seen(place.row(half), tile.end, sequences) for half in range(2)]
    masks = None
    if shape.masked:
        inside = [cutlass.min(tile.first + place.row(half), tile.rows - 1) // sequences.group for half in range(2)]
        width = cute.size(result.mask, mode=[1])
        masks = [asm.address(result.mask) + Int64(tile.query + query) * width for query in inside]
    return View(rows, begin, end, masks)


def start_scores(queries: Int32, turn: Int32, place: Place, shape: Shape) -> list[Float32]:
    """Starts the products of the queries and a tile of keys, once it is there; a group of its own."""
    stage, parity = stage_of(turn, shape.stages)
    mbarrier.wait(keys_barrier(place.base, stage, shape), parity)
    rows = wgmma.descriptor(queries)
    keys = wgmma.descriptor(place.base + shape.keys_at + stage * shape.keys_bytes)
    wgmma.fence()
    scores = []
    for k in range(shape.head_dim // wgmma.K_STEP):
        block, inner = k // 4, k % 4 * wgmma.K_STEP * 2
        a = rows + (block * ROWS * wgmma.ROW_BYTES + inner >> 4)
        b = keys + (block * shape.block_bytes + inner >> 4)
        if k == 0:
            scores = attention_mma.first_shared(shape.keys // 2, a, b, shape.kind)
        else:
            scores = attention_mma.mma_shared(scores, a, b, shape.kind)
    wgmma.commit()
    return scores


def start_sums(sums: list[Float32], weights: list[Uint32], turn: Int32, place: Place, shape: Shape) -> list[Float32]:
    """Starts adding a tile of values by their weights, once it is there; a group of its own."""
    stage, parity = stage_of(turn, shape.stages)
    mbarrier.wait(keys_barrier(place.base, stage, shape) + 16, parity)
    values = attention_mma.transposed(place.base + shape.values_at + stage * shape.values_bytes, shape.block_bytes)
    for k in range(shape.keys // wgmma.K_STEP):
        sums = attention_mma.mma_transposed(sums, weights[4 * k : 4 * k + 4], values + k * _STEP_ROWS, shape.kind)
    wgmma.commit()
    return sums


def release(turn: Int32, which: int, place: Place, shape: Shape) -> None:
    """Gives the place of a tile of keys (8) or values (24) back, an arrival a warp."""
    stage, _ = stage_of(turn, shape.stages)
    mbarrier.arrive_if(keys_barrier(place.base, stage, shape) + which, place.one_lane())


def release_queries(loads: Int32, place: Place, shape: Shape) -> None:
    """Gives the place of the queries number `loads`, and of the output after them, back, an arrival a warp."""
    stage, _ = stage_of(loads, shape.query_stages)
    cute.arch.sync_warp()
    mbarrier.arrive_if(queries_barrier(place.base, stage, shape) + 8, place.one_lane())


def weigh(scores: list[Float32], stat: cute.Tensor, start: Int32, view: View, factor: Float32) -> list[Float32]:
    """Weights of the scores of the keys from `start` on; updates `stat`."""
    held = cute.make_rmem_tensor((len(scores),), Float32)
    for i, score in enumerate(scores):
        held[i] = score
    hide_edges(held, start, view)
    if view.masks is not None:
        softmax.hide_masked(held, start, view.masks, [last for _, last in view.rows])
    seen, top = [held[i] for i in range(len(scores))], [stat[0], stat[1]]
    largest = softmax.tops_of(seen, top)
    weights, shrink, total = softmax.step(seen, top, largest, [stat[2], stat[3]], factor)
    for half in range(2):
        stat[half], stat[2 + half], stat[4 + half] = largest[half], total[half], shrink[half]
    return weights


def scale(acc: cute.Tensor, stat: cute.Tensor) -> None:
    """Makes sums relative to the largest score that weights are relative to now."""
    for i in range(cute.size(acc)):
        acc[i] = acc[i] * stat[4 + i // 2 % 2]


@cute.jit
def hide_edges(scores: cute.Tensor, start: Int32, view: Constexpr[View]) -> None:
    """Hides keys that a row does not see; most tiles have none, and nothing to do."""
    if start + 2 * cute.size(scores) > view.end:
        softmax.hide(scores, start, [last for _, last in view.rows], True)
    if start < view.begin:
        softmax.hide(scores, start, [first for first, _ in view.rows], False)


@cute.jit
def finish(
    acc: cute.Tensor,
    stat: cute.Tensor,
    tile: Constexpr[Tile],
    queries: Int32,
    place: Constexpr[Place],
    sequences: Constexpr[Sequences],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes a warp's 16 rows: registers to shared memory, where the queries were, then in bulk; nothing comes back."""
    lane = cute.arch.lane_idx()
    scales = []
    for half in cutlass.range_constexpr(2):
        row = place.row(half)
        inside = tile.first + row < tile.rows
        spot = tile.place(arith.select(inside, row, Int32(0)), sequences)
        sink = Float32(softmax.HIDDEN)
        if result.has_sink != 0:
            sink = result.sink[spot % sequences.heads]
        scale, lse = softmax.finish(stat[half], stat[2 + half], result.factor, sink)
        scales.append(scale)
        if inside & (place.t == 0):
            result.lse[spot] = lse
    mbarrier.named_barrier(place.consumer + _OWN_BARRIER, GROUP)  # all warps have multiplied their queries
    own = queries + place.wide * (16 * shape.out_row_bytes)
    to = own + lane % 16 * shape.out_row_bytes + lane // 16 * 16
    for block in cutlass.range_constexpr(shape.v_dim // 16):
        values = [acc[8 * block + i] * scales[i // 2 % 2] for i in range(8)]
        smem.store_matrices(to + block * 32, softmax.left_operands(values, shape.kind))
    smem.proxy_fence()
    cute.arch.sync_warp()
    row = place.consumer * ROWS + place.wide * 16 + lane
    if (lane < 16) & (tile.first + row < tile.rows):
        target = asm.address(result.out) + Int64(tile.place(row, sequences)) * (shape.v_dim * 2)
        copies.store_bulk(target, own + lane * shape.out_row_bytes, shape.v_dim * 2)
        copies.commit_stores()


@cute.jit
def nothing(
    tile: Constexpr[Tile],
    place: Constexpr[Place],
    sequences: Constexpr[Sequences],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """Writes rows that see nothing."""
    lane = cute.arch.lane_idx()
    for local in cutlass.range(16, unroll=1):
        row = place.consumer * ROWS + place.wide * 16 + local
        if tile.first + row < tile.rows:
            spot = tile.place(row, sequences)
            at = asm.address(result.out) + Int64(spot) * (shape.v_dim * 2)
            for chunk in cutlass.range(lane, shape.v_dim // 8, WARP, unroll=1):
                gmem.store16(at + chunk * 16, [Uint32(0)] * 4)
            if lane == 0:
                result.lse[spot] = Float32(softmax.HIDDEN)
