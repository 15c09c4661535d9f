"""Main loop of a grouped GEMM with prepared NVFP4 weights on sm_90a: weights decoded in registers, many rows an expert.

Swapped: the weights are wgmma's left operand, tokens its columns. A CTA has four producer warps and two consumer
warpgroups, and walks over pieces of work: 128 or 256 weight rows of an expert times up to `Shape.tokens` of its tokens.
A consumer warp owns 16 or 32 neighbouring weight rows of a piece, a tile of 16 or two. The producers fill a ring of
stages, 128 of k each, with bulk copies of prepared weights (`numerics.fragments`) and of packed activations (`pack`); a
consumer decodes 32 of k of a tile while the tensor cores multiply what it decoded before.

Where there are fewer pieces than SMs, several CTAs share the k of each (`Shape.split`): a warp leaves its sums in
global memory, and the last one to do so of those with the same rows adds them all up, in the order of k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Numeric, Uint8, Uint32, cute

from megamoe.cute import arith, exchange, fragments, ring, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.warp import WARP

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups
THREADS = GROUP * (1 + CONSUMERS)
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
TILE_ROWS = 16  # weight rows of a prepared tile
CONSUMER_WARPS = CONSUMERS * GROUP // WARP
SLAB_ROWS = 64  # rows that are prepared together
STAGE_K = 128
SLAB_CODES, SLAB_SCALES = SLAB_ROWS * STAGE_K // 2, SLAB_ROWS * STAGE_K // 16  # bytes
SLAB_TILES = SLAB_ROWS // TILE_ROWS
TILE_CODES, TILE_SCALES = SLAB_CODES // SLAB_TILES, SLAB_SCALES // SLAB_TILES
BLOCK_K = 64  # k of a swizzled row of activations
STEPS = 4  # of a stage, 32 of k each
TILES_TOGETHER = 8  # token tiles of one expert
SUMS_ASKED = 16  # times 16 bytes of others' sums that a thread asks for before it waits
ALIGNMENT = 8  # packed rows of an expert start at its multiples, or the swizzle would not fit
MAX_EXPERTS = 2 * THREADS
DECODED_UNIT = 2.0**7  # what one in the product of decoded weights stands for


class Shape(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        widths: Of pieces in tokens, multiples of 8 in rising order, each with a main loop of its own. With more than
            three up to 128 ptxas sees too few registers and lets no product overlap the next decode.
        stages: Of the ring.
        staging: Bytes of shared memory that the epilogue gets.
        tiles: Of 16 weight rows, of a consumer warp.
        experts: Most there may be.
        split: CTAs may share the k of a piece.
        in_flight: Groups of products that may run while an operand is decoded; with two tiles ptxas lets only one.
    """

    widths: tuple[int, ...]
    stages: int
    staging: int
    tiles: int = 2
    experts: int = MAX_EXPERTS
    split: bool = False
    in_flight: int = 1

    @property
    def dense(self) -> bool:
        """There is one expert, whose rows the host knows."""
        return self.experts == 1

    @property
    def rows(self) -> int:
        """Weight rows of a piece."""
        return CONSUMER_WARPS * self.tiles * TILE_ROWS

    @property
    def slabs(self) -> int:
        """Of a piece."""
        return self.rows // SLAB_ROWS

    @property
    def tokens(self) -> int:
        """Most of a piece."""
        return self.widths[-1]

    @property
    def weights_at(self) -> int:
        """Where in a stage the weights start."""
        return self.tokens * STAGE_K * 2

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return self.weights_at + self.slabs * (SLAB_CODES + SLAB_SCALES)

    @property
    def staging_at(self) -> int:
        """Where the epilogue's memory starts."""
        return self.stages * self.stage_bytes

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers start: one of full stages, one of empty ones."""
        return self.staging_at + self.staging

    @property
    def counts_at(self) -> int:
        """Where the numbers of token tiles before each expert start; the experts' first rows follow; not if dense."""
        return self.barriers_at + self.stages * 16

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.counts_at + (0 if self.dense else 8 * (self.experts + 1))


class Operands(NamedTuple):
    """What the main loop reads.

    Attributes:
        codes: (experts, padded rows, padded k / 2) uint8, prepared.
        scales: (experts, padded rows, padded k / 16) uint8, prepared.
        packed: (padded k / 64, capacity, 64) bf16: see `pack`.
        offsets: (experts + 1,) int32.
        sums: fp32, room for `sums_of` each piece's parts; not touched unless `Shape.split`.
        arrived: (pieces * CONSUMER_WARPS,) int32, zeros.
        parts: CTAs that share a piece.
        rows: Tokens of the only expert; not read unless `Shape.dense`.
        tiles: Of those tokens.
    """

    codes: cute.Tensor
    scales: cute.Tensor
    packed: cute.Tensor
    offsets: cute.Tensor
    sums: cute.Tensor
    arrived: cute.Tensor
    parts: Int32
    rows: Int32
    tiles: Int32

    @property
    def experts(self) -> Int32:
        """Number of experts."""
        return cute.size(self.codes, mode=[0])

    @property
    def slabs(self) -> Int32:
        """Of 64 rows, of an expert."""
        return cute.size(self.codes, mode=[1]) // SLAB_ROWS

    def row_pieces(self, shape: Shape) -> Int32:
        """Pieces side by side that cover the weight rows of an expert."""
        return (cute.size(self.codes, mode=[1]) + (shape.rows - 1)) // shape.rows

    @property
    def k_stages(self) -> Int32:
        """Stages that a piece goes through."""
        return cute.size(self.codes, mode=[2]) // (STAGE_K // 2)

    @property
    def capacity(self) -> Int32:
        """Rows that there is room for in `packed`."""
        return cute.size(self.packed, mode=[1])


class Piece(NamedTuple):
    """One piece of work.

    Attributes:
        expert: Whose weights.
        row_piece: Which rows of them.
        first: The first token, of those of the expert.
        valid: Tokens.
        width: They with the padding.
        start: First row of the expert in the sorted order.
    """

    expert: Int32
    row_piece: Int32
    first: Int32
    valid: Int32
    width: Int32
    start: Int32


def share_of(shape: Shape, operands: Operands) -> tuple[Int32, Int32 | int]:
    """Which part of the k of its pieces this CTA has, and of how many."""
    if not shape.split:
        return Int32(0), 1
    return cute.arch.block_idx()[0] % operands.parts, operands.parts


def stages_of(shape: Shape, operands: Operands) -> tuple[Int32, Int32]:
    """The first stage of this CTA's share of k, and how many there are."""
    part, parts = share_of(shape, operands)
    if not shape.split:
        return Int32(0), operands.k_stages
    first, end = (operands.k_stages * (part + i) // parts for i in range(2))
    return first, end - first


def packed_start(start: Int32, expert: Int32) -> Int32:
    """Where the rows of an expert start in the packed activations: aligned, and no two experts overlap."""
    return (start + ALIGNMENT * expert) & -ALIGNMENT


def packed_capacity(rows: int, experts: int, tokens: int) -> int:
    """Rows of packed activations; the last piece may read beyond the last row."""
    return rows + ALIGNMENT * experts + tokens


@cute.jit
def count_tiles(base: Int32, thread: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]) -> None:
    """Fills the numbers of token tiles before each expert and their first rows; all threads, two barriers."""
    lane, wide, experts = thread % WARP, thread // WARP, operands.experts
    counts = base + shape.counts_at
    starts = counts + 4 * (shape.experts + 1)
    rows = [operands.offsets[cutlass.min(2 * thread + i, experts)] for i in range(3)]
    tiles = [(rows[i + 1] - rows[i] + (shape.tokens - 1)) // shape.tokens for i in range(2)]
    total = tiles[0] + tiles[1]
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(total, 1 << step, mask_and_clamp=0)
        total = total + arith.select(lane >= 1 << step, below, Int32(0))
    if lane == WARP - 1:
        ring.store4(base + wide * 4, total)  # the stages are not in use yet
    cute.arch.sync_threads()
    for other in cutlass.range_constexpr(THREADS // WARP):
        total = total + arith.select(wide > other, ring.load4(base + other * 4), Int32(0))
    for i in cutlass.range_constexpr(2):
        if 2 * thread + i < experts:
            ring.store4(counts + (2 * thread + i) * 4, total - tiles[1] - (tiles[0] if i == 0 else 0))
            ring.store4(starts + (2 * thread + i) * 4, rows[i])
    if (2 * thread < experts) & (2 * thread + 2 >= experts):
        ring.store4(counts + experts * 4, total)
        ring.store4(starts + experts * 4, operands.offsets[experts])
    cute.arch.sync_threads()


def pieces(base: Int32, operands: Operands, shape: Shape) -> Int32:
    """How many there are in all."""
    if shape.dense:
        return operands.tiles * operands.row_pieces(shape)
    return ring.load4(base + shape.counts_at + operands.experts * 4) * operands.row_pieces(shape)


@cute.jit
def expert_of(
    piece: Int32, expert: Int32, base: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]
) -> Int32:
    """Whose a piece is, given an expert not behind it; the whole warp looks together."""
    lane = cute.arch.lane_idx()
    here = expert
    passed = Int32(WARP)
    while passed == WARP:
        ahead = cutlass.min(here + 1 + lane, operands.experts)
        before = ring.load4(base + shape.counts_at + ahead * 4) * operands.row_pieces(shape)
        passed = cute.arch.popc(cute.arch.vote_ballot_sync((before <= piece) & (here + 1 + lane <= operands.experts)))
        here = here + passed
    return here


def piece_of(number: Int32, expert: Int32, base: Int32, operands: Operands, shape: Shape) -> Piece:
    """A piece of an expert: token tiles of the same weights are neighbours."""
    if shape.dense:
        return _dense_piece(number, operands, shape)
    counts = base + shape.counts_at
    starts = counts + 4 * (shape.experts + 1)
    before, after = (ring.load4(counts + (expert + i) * 4) for i in range(2))
    start, end = (ring.load4(starts + (expert + i) * 4) for i in range(2))
    tiles, local = after - before, number - before * operands.row_pieces(shape)
    row_piece = local // tiles
    width = _width_of((end - start + tiles - 1) // tiles, shape)
    first = (local - row_piece * tiles) * width
    valid = cutlass.min(width, end - start - first)
    return Piece(expert, row_piece, first, valid, _width_of(valid, shape), start)


def _dense_piece(number: Int32, operands: Operands, shape: Shape) -> Piece:
    """The same for the only expert, up to TILES_TOGETHER token tiles at a time, so that they stay in L2."""
    around = operands.row_pieces(shape) * TILES_TOGETHER
    first_tile = number // around * TILES_TOGETHER
    together = cutlass.min(operands.tiles - first_tile, TILES_TOGETHER)
    local = number - first_tile * operands.row_pieces(shape)
    row_piece = local // together
    width = _width_of((operands.rows + operands.tiles - 1) // operands.tiles, shape)
    first = (first_tile + local - row_piece * together) * width
    valid = cutlass.min(width, operands.rows - first)
    return Piece(Int32(0), row_piece, first, valid, _width_of(valid, shape), Int32(0))


def _width_of(tokens: Int32, shape: Shape) -> Int32:
    width = Int32(shape.tokens)
    for smaller in reversed(shape.widths[:-1]):
        width = arith.select(tokens <= smaller, Int32(smaller), width)
    return width


@cute.jit
def produce(base: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]) -> None:
    """A producer warp fills the ring for all pieces of this CTA: the first two with tokens, the last with weights."""
    total = pieces(base, operands, shape)
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    mine = warp - (GROUP // WARP - shape.slabs)  # which slab
    number, turns = turn(shape, operands)
    first_stage, k_stages = stages_of(shape, operands)
    expert, stage, parity = Int32(0), Int32(0), Int32(1)
    if warp < 2:
        cute.arch.griddepcontrol_wait()  # the tokens are packed; all else was there before `pack` let this grid start
    while number < total:
        if cutlass.const_expr(not shape.dense):
            expert = expert_of(number, expert, base, operands, shape)
        piece = piece_of(number, expert, base, operands, shape)
        if lane == 0:
            place = Int64(expert * operands.slabs + piece.row_piece * shape.slabs + mine) * operands.k_stages
            place = place + first_stage
            codes = ring.address(operands.codes.iterator) + place * SLAB_CODES
            scales = ring.address(operands.scales.iterator) + place * SLAB_SCALES
            rows = piece.width * wgmma.ROW_BYTES
            block = Int64(operands.capacity) * wgmma.ROW_BYTES
            tokens = ring.address(operands.packed.iterator)
            tokens = tokens + Int64(packed_start(piece.start, expert) + piece.first) * wgmma.ROW_BYTES
            tokens = tokens + (2 * first_stage + warp) * block
            weights = (mine >= 0) & (mine < slabs_of(piece, operands, shape))
            size = arith.select(warp < 2, rows, Int32(0))
            size = size + arith.select(weights, Int32(SLAB_CODES + SLAB_SCALES), Int32(0))
            for _ in cutlass.range(k_stages, unroll=1):
                full = base + shape.barriers_at + stage * 16
                at = base + stage * shape.stage_bytes
                ring.wait(full + 8, parity)
                ring.expect(full, size)  # all warps, or one with nothing to copy might fall a phase behind
                if warp < 2:
                    ring.copy(tokens, at + warp * (shape.weights_at // 2), rows, full)
                if weights:
                    there = at + shape.weights_at + mine * SLAB_CODES
                    ring.copy(codes, there, Int32(SLAB_CODES), full)
                    there = at + (shape.weights_at + shape.slabs * SLAB_CODES) + mine * SLAB_SCALES
                    ring.copy(scales, there, Int32(SLAB_SCALES), full)
                tokens, codes, scales = tokens + 2 * block, codes + SLAB_CODES, scales + SLAB_SCALES
                stage, parity = _next(stage, parity, shape)
        stage, parity = cute.arch.shuffle_sync(stage, 0), cute.arch.shuffle_sync(parity, 0)
        number = number + turns


def turn(shape: Shape, operands: Operands) -> tuple[Int32, Int32]:
    """This CTA's first piece, and how many CTAs, or groups of them, take turns."""
    _, parts = share_of(shape, operands)
    return cute.arch.block_idx()[0] // parts, cute.arch.grid_dim()[0] // parts


def slabs_of(piece: Piece, operands: Operands, shape: Shape) -> Int32:
    """Of the slabs of a piece those that exist."""
    return cutlass.min(operands.slabs - piece.row_piece * shape.slabs, shape.slabs)


def _next(stage: Int32, parity: Int32, shape: Shape) -> tuple[Int32, Int32]:
    last = stage == shape.stages - 1
    return arith.select(last, Int32(0), stage + 1), arith.select(last, parity ^ 1, parity)


@cute.jit
def accumulate(
    acc: cute.Tensor,
    base: Int32,
    slabs: Int32,
    k_stages: Int32,
    stage: Int32,
    parity: Int32,
    width: Constexpr[int],
    shape: Constexpr[Shape],
) -> tuple[Int32, Int32]:
    """Sums so many stages of a piece with so many slabs: acc[tile, i], i as `wgmma.mma`; returns the next stage.

    The products of a tile and a step, 32 of k, are a group; while groups run, the operand of the next one is decoded.
    At the end of a piece that is an operand nobody needs, of the last stage again.
    """
    count, tiles = width // 2, shape.tiles
    for t in cutlass.range_constexpr(tiles):
        _keep(acc, t, wgmma.zeros(count))
    masks = fragments.masks(Target.SM90)
    lane = cute.arch.lane_idx()
    tile = cutlass.min(warp_of_consumers(), slabs * (SLAB_TILES // tiles) - 1) * tiles  # one that exists, in any case
    codes = base + (shape.weights_at + lane * 16) + tile * TILE_CODES
    scales = base + (shape.weights_at + shape.slabs * SLAB_CODES + lane // 4 * 16) + tile * TILE_SCALES
    ready = cute.make_rmem_tensor(8, Uint32)  # decoded for the first group
    words = cute.make_rmem_tensor((tiles, 8), Uint32)  # codes of half a stage, then scales
    ring.wait(base + shape.barriers_at + stage * 16, parity)
    for t in cutlass.range_constexpr(tiles):
        _keep(words, t, _first_words(t, codes + stage * shape.stage_bytes, scales + stage * shape.stage_bytes))
    _keep(ready, None, decode([words[0, i] for i in range(8)], 0, masks))
    before, started = stage, Int32(0)
    for k in cutlass.range(k_stages, unroll=1):
        sums = [[acc[t, i] for i in range(count)] for t in range(tiles)]
        raw = [[words[t, i] for i in range(8)] for t in range(tiles)]
        left = [ready[i] for i in range(8)]
        tokens = wgmma.descriptor(base + stage * shape.stage_bytes)
        next_stage, next_parity = _next(stage, parity, shape)
        more = arith.select(k + 1 < k_stages, Int32(1), Int32(0))
        there = arith.select(more == 1, next_stage, stage) * shape.stage_bytes
        for group in cutlass.range_constexpr(STEPS * tiles):
            step, t = group // tiles, group % tiles
            wgmma.fence()
            for i in cutlass.range_constexpr(2):
                b = tokens + (step // 2 * (shape.weights_at // 2 >> 4) + (step % 2 * 2 + i) * 2)
                sums[t] = wgmma.mma(sums[t], left[4 * i : 4 * i + 4], b)
            wgmma.commit()
            wgmma.wait(shape.in_flight)
            if cutlass.const_expr(group == shape.in_flight - 1):
                _release(base, before, started, shape)  # its last group is done
            if cutlass.const_expr(step == STEPS - 1):
                if cutlass.const_expr(t == 0):
                    ring.wait_if(base + shape.barriers_at + next_stage * 16, next_parity, more)
                raw[t] = _first_words(t, codes + there, scales + there)
            after, other = (group + 1) // tiles % STEPS, (group + 1) % tiles
            left = decode(raw[other], after, masks)
            if cutlass.const_expr(after == 1):
                half = ring.load16(codes + (stage * shape.stage_bytes + other * TILE_CODES + TILE_CODES // 2))
                raw[other] = half + raw[other][4:]
        for t in cutlass.range_constexpr(tiles):
            _keep(words, t, raw[t])
            _keep(acc, t, sums[t])
        _keep(ready, None, left)
        before, started = stage, Int32(1)
        stage, parity = next_stage, next_parity
    wgmma.wait(0)
    _release(base, before, Int32(1), shape)
    return stage, parity


def _keep(kept: cute.Tensor, row: int | None, words: Sequence[Numeric]) -> None:
    """Writes registers that are carried through a loop."""
    for i, word in enumerate(words):
        if row is None:
            kept[i] = word
        else:
            kept[row, i] = word


def _first_words(tile: int, codes: Int32, scales: Int32) -> list[Uint32]:
    """Codes of the first half of a stage, and scales of all of it."""
    return ring.load16(codes + tile * TILE_CODES) + ring.load16(scales + tile * TILE_SCALES)


def sums_bytes(shape: Shape) -> int:
    """Of one CTA's sums of a piece, of any width."""
    return CONSUMER_WARPS * WARP * shape.tiles * shape.tokens * 2


@cute.jit
def gather(
    acc: cute.Tensor,
    number: Int32,
    valid: Int32,
    width: Constexpr[int],
    operands: Constexpr[Operands],
    shape: Constexpr[Shape],
) -> Boolean:
    """Leaves a warp's sums in global memory; if those of all parts are there, adds them up in the order of k.

    Returns:
        Whether acc holds the sums of all k now.
    """
    lane, warp = cute.arch.lane_idx(), warp_of_consumers()
    part, parts = share_of(shape, operands)
    groups, run = width // 8, CONSUMER_WARPS * WARP * 16  # bytes of four sums of each thread
    size = Int64(sums_bytes(shape))
    first = ring.address(operands.sums.iterator) + Int64(number * parts) * size + (warp * WARP + lane) * 16
    mine = first + part * size
    for c in cutlass.range_constexpr(groups):
        for t in cutlass.range_constexpr(shape.tiles):
            words = [arith.bits(acc[t, c * 4 + i]) for i in range(4)]
            there = arith.select(c * 8 < valid, Int32(1), Int32(0))
            ring.store_global16_if(mine + (c * shape.tiles + t) * run, words, there)
    cute.arch.sync_warp()
    before = Int32(0)
    if lane == 0:
        place = ring.address(operands.arrived.iterator) + (number * CONSUMER_WARPS + warp) * 4
        before = exchange.count_and_tell(place)
    last = cute.arch.shuffle_sync(before, 0) == parts - 1
    cute.arch.sync_warp()
    if last:
        if parts == 2:
            _add_other(acc, first + (1 - part) * size, valid, width, run, shape)
        else:
            _add_all(acc, first, parts, size, valid, width, run, shape)
    return last


def _chunks(width: int, shape: Shape) -> list[list[tuple[int, int]]]:
    """(tile, group of 8 tokens) of all sums, in runs that are asked for together."""
    step = max(1, SUMS_ASKED // 2 // shape.tiles)
    groups = range(width // 8)
    return [[(t, g) for g in groups[c : c + step] for t in range(shape.tiles)] for c in range(0, len(groups), step)]


@cute.jit
def _add_other(
    acc: cute.Tensor,
    other: Int64,
    valid: Int32,
    width: Constexpr[int],
    run: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Adds the sums of the other of two parts: a + b is b + a."""
    for here in _chunks(width, shape):
        if here[0][1] * 8 < valid:
            found = _sums_at(other, here, run, shape)
            for j, (t, g) in enumerate(here):
                for i in cutlass.range_constexpr(4):
                    acc[t, g * 4 + i] = arith.add(acc[t, g * 4 + i], found[j][i], Target.SM90)


@cute.jit
def _add_all(
    acc: cute.Tensor,
    first: Int64,
    parts: Int32,
    size: Int64,
    valid: Int32,
    width: Constexpr[int],
    run: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Replaces the sums by those of all parts, added up in the order of k."""
    for here in _chunks(width, shape):
        for t, g in here:
            for i in cutlass.range_constexpr(4):
                acc[t, g * 4 + i] = Float32(0.0)  # not needed any more, whoever is valid
        if here[0][1] * 8 < valid:
            at_once = max(1, SUMS_ASKED // len(here))  # parts
            total = cute.make_rmem_tensor((len(here), 4), Float32)
            total.fill(0.0)
            for start in cutlass.range(0, parts, at_once, unroll=1):
                found = [
                    _sums_at(first + cutlass.min(start + p, parts - 1) * size, here, run, shape) for p in range(at_once)
                ]
                for p in cutlass.range_constexpr(at_once):
                    for j in cutlass.range_constexpr(len(here)):
                        for i in cutlass.range_constexpr(4):
                            more = arith.add(total[j, i], found[p][j][i], Target.SM90)
                            total[j, i] = arith.select(start + p < parts, more, total[j, i])
            for j, (t, g) in enumerate(here):
                for i in cutlass.range_constexpr(4):
                    acc[t, g * 4 + i] = total[j, i]


def _sums_at(at: Int64, here: list[tuple[int, int]], run: int, shape: Shape) -> list[list[Float32]]:
    """A part's sums of some tiles and groups of tokens."""
    words = [exchange.load16(at + (g * shape.tiles + t) * run) for t, g in here]
    return [[arith.number(word) for word in four] for four in words]


def _release(base: Int32, stage: Int32, condition: Int32, shape: Shape) -> None:
    """Gives a stage back, one arrival a warp."""
    mine = arith.select((cute.arch.lane_idx() == 0) & (condition != 0), Int32(1), Int32(0))
    ring.arrive_if(base + shape.barriers_at + stage * 16 + 8, mine)


def warp_of_consumers() -> Int32:
    """Number of a warp among those of both consumers; its tiles are neighbours."""
    return cute.arch.warp_idx() - GROUP // WARP


def decode(raw: list[Uint32], step: int, masks: fragments.Masks) -> list[Uint32]:
    """The left operand of a step's two products from half a stage's codes and the scales of all."""
    x, y = raw[step % 2 * 2], raw[step % 2 * 2 + 1]
    return fragments.decode_pair(x, y, raw[4 + step], Target.SM90, masks)


@cute.jit
def work(
    operands: Constexpr[Operands],
    finish: Constexpr[Callable[[cute.Tensor, Piece, int, Int32], None]],
    shape: Constexpr[Shape],
) -> None:
    """The whole kernel, for all threads of a CTA; `pack` must be what comes before it in the stream.

    Args:
        operands: What is multiplied.
        finish: Gets the sums of a piece, as `accumulate` leaves them, the piece, its width and the address of
            `Shape.staging` bytes; only whole warps of consumers call it.
        shape: How the work is cut.
    """
    thread, _, _ = cute.arch.thread_idx()
    base = ring.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        for stage in cutlass.range_constexpr(shape.stages):
            ring.init(base + shape.barriers_at + stage * 16, GROUP // WARP)
            ring.init(base + shape.barriers_at + stage * 16 + 8, CONSUMER_WARPS)
        ring.init_fence()
    cute.arch.griddepcontrol_launch_dependents()
    if cutlass.const_expr(shape.dense):
        cute.arch.sync_threads()
    else:
        count_tiles(base, thread, operands, shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        produce(base, operands, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        total = pieces(base, operands, shape)
        number, turns = turn(shape, operands)
        _, k_stages = stages_of(shape, operands)
        expert, stage, parity = Int32(0), Int32(0), Int32(0)
        while number < total:
            if cutlass.const_expr(not shape.dense):
                expert = expert_of(number, expert, base, operands, shape)
            piece = piece_of(number, expert, base, operands, shape)
            slabs = slabs_of(piece, operands, shape)
            for width in shape.widths:
                if piece.width == width:
                    acc = cute.make_rmem_tensor((shape.tiles, width // 2), Float32)
                    stage, parity = accumulate(acc, base, slabs, k_stages, stage, parity, width, shape)
                    if cutlass.const_expr(shape.split):
                        whole = operands.parts == 1
                        if not whole:
                            whole = gather(acc, number, piece.valid, width, operands, shape)
                        if whole:
                            finish(acc, piece, width, base + shape.staging_at)
                    else:
                        finish(acc, piece, width, base + shape.staging_at)
            number = number + turns
