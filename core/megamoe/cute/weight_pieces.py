"""How the work of `weight_gemm` is cut into pieces, and where in shared memory a CTA keeps what.

A piece is 128 or 256 weight rows of an expert times up to `Shape.tokens` of its tokens. Of several experts a CTA takes
the next piece when it has loaded one: a producer warp counts, finds the piece, and tells the others in shared memory.
Of one expert the CTAs take turns; where there are fewer pieces than SMs, several share the k of each (`Shape.split`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Int32, cute

from megamoe.cute import arith, asm, gmem, mbarrier, smem
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups
THREADS = GROUP * (1 + CONSUMERS)
TILE_ROWS = 16  # weight rows of a prepared tile
CONSUMER_WARPS = CONSUMERS * GROUP // WARP
SLAB_ROWS = 64  # rows that are prepared together
STAGE_K = 128
SLAB_CODES, SLAB_SCALES = SLAB_ROWS * STAGE_K // 2, SLAB_ROWS * STAGE_K // 16  # bytes
SLAB_TILES = SLAB_ROWS // TILE_ROWS
TILE_CODES, TILE_SCALES = SLAB_CODES // SLAB_TILES, SLAB_SCALES // SLAB_TILES
BLOCK_K = 64  # k of a swizzled row of activations
TILES_TOGETHER = 8  # token tiles of one expert
ALIGNMENT = 8  # packed rows of an expert start at its multiples, or the swizzle would not fit
ORDER_BITS = 4
ORDERS = 1 << ORDER_BITS  # places for the pieces of a CTA: more than stages, so none is written before it was read
ORDER_BYTES = 32  # a piece
MAX_EXPERTS = 2 * THREADS  # a thread counts the tiles of two


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
        in_flight: Groups of products that may run while an operand is decoded; with two tiles, or `halves`, ptxas lets
            only one.
        direct: Activations come as they are, by a tensor map; else `pack` has brought them in order.
        guarded: A piece's last stage does not load words again that nobody needs; faster or slower, see NOTES.
        cluster: CTAs, neighbours in weight rows, that bring the tokens of their pieces together; 1 unless `direct`.
        halves: The first and the second 64 k of a stage's tokens come one behind the other, and products do not wait
            for the second; only if `direct`.
        ahead: A piece's first weights are asked into the L2 before its first stage is free, those of a CTA's first
            piece while the grid before may still run; only if `direct`.
    """

    widths: tuple[int, ...]
    stages: int
    staging: int
    tiles: int = 2
    experts: int = MAX_EXPERTS
    split: bool = False
    in_flight: int = 1
    direct: bool = False
    guarded: bool = False
    cluster: int = 1
    halves: bool = False
    ahead: bool = False

    @property
    def dense(self) -> bool:
        """There is one expert, whose rows the host knows."""
        return self.experts == 1

    @property
    def rows(self) -> int:
        """Weight rows of a piece."""
        return CONSUMER_WARPS * self.tiles * TILE_ROWS

    @property
    def box(self) -> int:
        """Tokens that are copied at once if `direct`."""
        return math.gcd(*self.widths, self.tokens // self.cluster)

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
        return self.seconds_at + (self.stages * 8 if self.halves else 0)

    @property
    def seconds_at(self) -> int:
        """Where the mbarriers of the second halves of stages' tokens start; only if `halves`."""
        return self.barriers_at + self.stages * 16

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.counts_at if self.dense else self.orders_at + ORDERS * (ORDER_BYTES + mbarrier.BARRIER_BYTES)

    @property
    def orders_at(self) -> int:
        """Where the pieces that a CTA has taken are told, then an mbarrier for each; not if dense."""
        return -(-(self.counts_at + 8 * (self.experts + 1)) // 16) * 16


class Operands(NamedTuple):
    """What the main loop reads.

    Attributes:
        codes: (experts, padded rows, padded k / 2) uint8, prepared.
        scales: (experts, padded rows, padded k / 16) uint8, prepared.
        packed: (padded k / 64, capacity, 64) bf16: see `pack`; if `Shape.direct` boxes of (`Shape.box` tokens, 64 k).
        offsets: (experts + 1,) int32.
        sums: fp32, room for `sums_of` each piece's parts; not touched unless `Shape.split`.
        arrived: int32, zeros: (pieces * CONSUMER_WARPS,) if `Shape.split`; of experts (1,): see `tell_piece`.
        parts: CTAs that share a piece.
        rows: Tokens of the only expert; not read unless `Shape.dense`.
        tiles: Of those tokens.
    """

    codes: cute.Tensor
    scales: cute.Tensor
    packed: cute.Tensor | Boxes
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
        """Pieces, or those of a cluster, side by side that cover the weight rows of an expert."""
        rows = shape.rows * shape.cluster
        return (cute.size(self.codes, mode=[1]) + (rows - 1)) // rows

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
        smem.store4(base + wide * 4, total)  # the stages are not in use yet
    cute.arch.sync_threads()
    for other in cutlass.range_constexpr(THREADS // WARP):
        total = total + arith.select(wide > other, smem.load4(base + other * 4), Int32(0))
    for i in cutlass.range_constexpr(2):
        if 2 * thread + i < experts:
            smem.store4(counts + (2 * thread + i) * 4, total - tiles[1] - (tiles[0] if i == 0 else 0))
            smem.store4(starts + (2 * thread + i) * 4, rows[i])
    if (2 * thread < experts) & (2 * thread + 2 >= experts):
        smem.store4(counts + experts * 4, total)
        smem.store4(starts + experts * 4, operands.offsets[experts])
    cute.arch.sync_threads()


def pieces(base: Int32, operands: Operands, shape: Shape) -> Int32:
    """How many there are in all."""
    if shape.dense:
        return operands.tiles * operands.row_pieces(shape)
    return smem.load4(base + shape.counts_at + operands.experts * 4) * operands.row_pieces(shape)


def turn(shape: Shape, operands: Operands) -> tuple[Int32, Int32]:
    """What `piece_of` calls this CTA's first piece, and how far on its next one is."""
    if not shape.dense:
        return Int32(0), Int32(1)
    _, parts = share_of(shape, operands)
    together = parts * shape.cluster
    return cute.arch.block_idx()[0] // together, cute.arch.grid_dim()[0] // together


def exists(number: Int32, base: Int32, operands: Operands, shape: Shape) -> Boolean:
    """Whether this CTA has a piece called so; of several experts not before it has been told."""
    if shape.dense:
        return number < pieces(base, operands, shape)
    mbarrier.wait(_told(base, number, shape), number >> ORDER_BITS & 1)
    return smem.load4(_order(base, number, shape)) >= 0


def piece_of(number: Int32, base: Int32, operands: Operands, shape: Shape) -> Piece:
    """A piece that exists: of the only expert the number-th of all, of several experts the number-th of this CTA."""
    if shape.dense:
        return _dense_piece(number, operands, shape)
    order = _order(base, number, shape)
    words = [*smem.load_words(order, 4), *smem.load_words(order + 16, 2)]
    return Piece(*(Int32(word) for word in words))


@cute.jit
def tell_piece(
    base: Int32, number: Int32, expert: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]
) -> Int32:
    """Warp 0 takes the number-th piece of this CTA and tells the others, or that there is none; nothing if dense.

    Each CTA counts once for each piece beyond its first and once for finding none, a CTA without a first piece never:
    in all as often as there are pieces, so that the counter, which goes from `total - 1` to 0, ends where it began.

    Args:
        base: Of the shared memory.
        number: 0, 1 and so on; the first piece of a CTA is fixed.
        expert: Of the piece before, for warp 0; the next one's is not before it.
        operands: Of the kernel.
        shape: Of the kernel.

    Returns:
        The piece's expert, for warp 0.
    """
    if cutlass.const_expr(not shape.dense):
        lane, total, order = cute.arch.lane_idx(), pieces(base, operands, shape), _order(base, number, shape)
        if cute.arch.warp_idx() == 0:
            place, taken = cute.arch.block_idx()[0], Int32(0)
            if number > 0:
                if lane == 0:
                    taken = gmem.count_round(asm.address(operands.arrived), total - 1)
                place = cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(taken, 0)
            if place < total:
                expert = expert_of(place, expert, base, operands, shape)
                piece = _expert_piece(place, expert, base, operands, shape)
                if lane == 0:
                    smem.store16(order, piece[:4])
                    smem.store8(order + 16, piece[4:])
            elif lane == 0:
                smem.store4(order, Int32(-1))
            if lane == 0:
                mbarrier.arrive(_told(base, number, shape))
    return expert


def init_orders(base: Int32, shape: Shape) -> None:
    """Makes the mbarriers of `tell_piece`; one thread does."""
    for number in range(0 if shape.dense else ORDERS):
        mbarrier.init(_told(base, Int32(number), shape), 1)


def _order(base: Int32, number: Int32, shape: Shape) -> Int32:
    return base + shape.orders_at + (number & ORDERS - 1) * ORDER_BYTES


def _told(base: Int32, number: Int32, shape: Shape) -> Int32:
    return base + (shape.orders_at + ORDERS * ORDER_BYTES) + (number & ORDERS - 1) * mbarrier.BARRIER_BYTES


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
        before = smem.load4(base + shape.counts_at + ahead * 4) * operands.row_pieces(shape)
        passed = cute.arch.popc(cute.arch.vote_ballot_sync((before <= piece) & (here + 1 + lane <= operands.experts)))
        here = here + passed
    return here


def _expert_piece(number: Int32, expert: Int32, base: Int32, operands: Operands, shape: Shape) -> Piece:
    """The number-th of all pieces, one of this expert: token tiles of the same weights are neighbours."""
    counts = base + shape.counts_at
    starts = counts + 4 * (shape.experts + 1)
    before, after = (smem.load4(counts + (expert + i) * 4) for i in range(2))
    start, end = (smem.load4(starts + (expert + i) * 4) for i in range(2))
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
    width = _width_of(valid, shape)
    if shape.cluster > 1:
        row_piece = row_piece * shape.cluster + cute.arch.block_idx()[0] % shape.cluster
        last = (operands.slabs - 1) // shape.slabs
        valid = arith.select(row_piece > last, Int32(0), valid)  # only brings tokens, and multiplies for nobody
        row_piece = cutlass.min(row_piece, last)
    return Piece(Int32(0), row_piece, first, valid, width, Int32(0))


def _width_of(tokens: Int32, shape: Shape) -> Int32:
    width = Int32(shape.tokens)
    for smaller in reversed(shape.widths[:-1]):
        width = arith.select(tokens <= smaller, Int32(smaller), width)
    return width


def slabs_of(piece: Piece, operands: Operands, shape: Shape) -> Int32:
    """Of the slabs of a piece those that exist."""
    return cutlass.min(operands.slabs - piece.row_piece * shape.slabs, shape.slabs)


def stage_after(stage: Int32, parity: Int32, shape: Shape) -> tuple[Int32, Int32]:
    """The one after a stage of the ring, and its parity."""
    last = stage == shape.stages - 1
    return arith.select(last, Int32(0), stage + 1), arith.select(last, parity ^ 1, parity)


def warp_of_consumers() -> Int32:
    """Number of a warp among those of both consumers; its tiles are neighbours."""
    return cute.arch.warp_idx() - GROUP // WARP
