"""Main loop of a grouped GEMM with prepared NVFP4 weights on sm_90a: weights decoded in registers, many rows an expert.

Swapped: the weights are wgmma's left operand, tokens its columns. A CTA has four producer warps and two consumer
warpgroups, and walks over pieces of work: 256 weight rows of an expert times up to `Shape.tokens` of its tokens. A
consumer warp owns 32 neighbouring weight rows of a piece, two tiles of 16. The producers fill a ring of stages, 128 of
k each, with bulk copies of prepared weights (`numerics.fragments`) and of packed activations (`pack`); a consumer
decodes 32 of k while the tensor cores multiply the 32 before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute

from megamoe.cute import arith, fragments, ring, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.warp import WARP

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups
THREADS = GROUP * (1 + CONSUMERS)
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
TILE_ROWS = 16  # weight rows of a prepared tile
TILES = 2  # of a consumer warp
ROWS = CONSUMERS * GROUP // WARP * TILES * TILE_ROWS  # weight rows of a piece
SLAB_ROWS = 64  # rows that are prepared together
SLABS = ROWS // SLAB_ROWS
STAGE_K = 128
SLAB_CODES, SLAB_SCALES = SLAB_ROWS * STAGE_K // 2, SLAB_ROWS * STAGE_K // 16  # bytes
SLAB_TILES = SLAB_ROWS // TILE_ROWS
TILE_CODES, TILE_SCALES = SLAB_CODES // SLAB_TILES, SLAB_SCALES // SLAB_TILES
BLOCK_K = 64  # k of a swizzled row of activations
STEPS = 4  # of a stage, 32 of k each
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
        shared: The CTAs of a cluster share the k of a piece, and its results.
    """

    widths: tuple[int, ...]
    stages: int
    staging: int
    shared: bool = False

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
        return self.weights_at + SLABS * (SLAB_CODES + SLAB_SCALES)

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
        """Where the numbers of token tiles before each expert start; the experts' first rows follow."""
        return self.barriers_at + self.stages * 16

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.counts_at + 8 * (MAX_EXPERTS + 1)


class Operands(NamedTuple):
    """What the main loop reads.

    Attributes:
        codes: (experts, padded rows, padded k / 2) uint8, prepared.
        scales: (experts, padded rows, padded k / 16) uint8, prepared.
        packed: (padded k / 64, capacity, 64) bf16: see `pack`.
        offsets: (experts + 1,) int32.
    """

    codes: cute.Tensor
    scales: cute.Tensor
    packed: cute.Tensor
    offsets: cute.Tensor

    @property
    def experts(self) -> Int32:
        """Number of experts."""
        return cute.size(self.codes, mode=[0])

    @property
    def slabs(self) -> Int32:
        """Of 64 rows, of an expert."""
        return cute.size(self.codes, mode=[1]) // SLAB_ROWS

    @property
    def row_pieces(self) -> Int32:
        """Pieces side by side that cover the weight rows of an expert."""
        return (cute.size(self.codes, mode=[1]) + (ROWS - 1)) // ROWS

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


class Share(NamedTuple):
    """What a CTA of a cluster has of a piece: of its k, and of its groups of 8 tokens those of its rank modulo `ctas`.

    Attributes:
        rank: In the cluster.
        ctas: Of the cluster.
    """

    rank: Int32 | int
    ctas: Int32 | int

    def holds(self, group: int) -> Boolean | bool:
        """Whether the CTA has the results of a group."""
        return True if isinstance(self.rank, int) else group % self.ctas == self.rank


def share(shape: Shape) -> Share:
    """This CTA's."""
    return Share(cute.arch.block_idx_in_cluster(), cute.arch.cluster_size()) if shape.shared else Share(0, 1)


def stages_of(part: Share, operands: Operands) -> tuple[Int32, Int32]:
    """The first stage of a CTA's share of k, and how many there are."""
    if isinstance(part.rank, int):
        return Int32(0), operands.k_stages
    first, end = (operands.k_stages * (part.rank + i) // part.ctas for i in range(2))
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
    starts = counts + 4 * (MAX_EXPERTS + 1)
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
    return ring.load4(base + shape.counts_at + operands.experts * 4) * operands.row_pieces


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
        before = ring.load4(base + shape.counts_at + ahead * 4) * operands.row_pieces
        passed = cute.arch.popc(cute.arch.vote_ballot_sync((before <= piece) & (here + 1 + lane <= operands.experts)))
        here = here + passed
    return here


def piece_of(number: Int32, expert: Int32, base: Int32, operands: Operands, shape: Shape) -> Piece:
    """A piece of an expert: token tiles of the same weights are neighbours."""
    counts = base + shape.counts_at
    starts = counts + 4 * (MAX_EXPERTS + 1)
    before, after = (ring.load4(counts + (expert + i) * 4) for i in range(2))
    start, end = (ring.load4(starts + (expert + i) * 4) for i in range(2))
    tiles, local = after - before, number - before * operands.row_pieces
    row_piece = local // tiles
    width = _width_of((end - start + tiles - 1) // tiles, shape)
    first = (local - row_piece * tiles) * width
    valid = cutlass.min(width, end - start - first)
    return Piece(expert, row_piece, first, valid, _width_of(valid, shape), start)


def _width_of(tokens: Int32, shape: Shape) -> Int32:
    width = Int32(shape.tokens)
    for smaller in reversed(shape.widths[:-1]):
        width = arith.select(tokens <= smaller, Int32(smaller), width)
    return width


@cute.jit
def produce(base: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]) -> None:
    """A producer warp fills the ring for all pieces of this CTA with a slab of weights; the first two with tokens."""
    total = pieces(base, operands, shape)
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    part = share(shape)
    number, ctas = _turn(part)
    first_stage, k_stages = stages_of(part, operands)
    expert, stage, parity = Int32(0), Int32(0), Int32(1)
    while number < total:
        expert = expert_of(number, expert, base, operands, shape)
        piece = piece_of(number, expert, base, operands, shape)
        if lane == 0:
            slab = piece.row_piece * SLABS
            place = Int64(expert * operands.slabs + slab + warp) * operands.k_stages + first_stage
            codes = ring.address(operands.codes.iterator) + place * SLAB_CODES
            scales = ring.address(operands.scales.iterator) + place * SLAB_SCALES
            rows = piece.width * wgmma.ROW_BYTES
            block = Int64(operands.capacity) * wgmma.ROW_BYTES
            tokens = ring.address(operands.packed.iterator)
            tokens = tokens + Int64(packed_start(piece.start, expert) + piece.first) * wgmma.ROW_BYTES
            tokens = tokens + (2 * first_stage + warp) * block
            slabs = slabs_of(piece, operands)
            size = arith.select(warp < 2, rows, Int32(0))
            size = size + arith.select(warp < slabs, Int32(SLAB_CODES + SLAB_SCALES), Int32(0))
            for _ in cutlass.range(k_stages, unroll=1):
                full = base + shape.barriers_at + stage * 16
                at = base + stage * shape.stage_bytes
                ring.wait(full + 8, parity)
                ring.expect(full, size)  # all warps, or one with nothing to copy might fall a phase behind
                if warp < 2:
                    ring.copy(tokens, at + warp * (shape.weights_at // 2), rows, full)
                if warp < slabs:
                    there = at + shape.weights_at + warp * SLAB_CODES
                    ring.copy(codes, there, Int32(SLAB_CODES), full)
                    there = at + (shape.weights_at + SLABS * SLAB_CODES) + warp * SLAB_SCALES
                    ring.copy(scales, there, Int32(SLAB_SCALES), full)
                tokens, codes, scales = tokens + 2 * block, codes + SLAB_CODES, scales + SLAB_SCALES
                stage, parity = _next(stage, parity, shape)
        stage, parity = cute.arch.shuffle_sync(stage, 0), cute.arch.shuffle_sync(parity, 0)
        number = number + ctas
        if cutlass.const_expr(shape.shared):
            for _ in cutlass.range_constexpr(2):
                _meet()
            cute.arch.sync_threads()  # the sums that were exchanged lay where the stages are


def _turn(part: Share) -> tuple[Int32, Int32]:
    """This CTA's first piece, and how many CTAs, or clusters, take turns."""
    return cute.arch.block_idx()[0] // part.ctas, cute.arch.grid_dim()[0] // part.ctas


def _meet() -> None:
    """Waits for all threads of the cluster."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


def slabs_of(piece: Piece, operands: Operands) -> Int32:
    """Of the slabs of a piece those that exist."""
    return cutlass.min(operands.slabs - piece.row_piece * SLABS, SLABS)


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
    operands: Constexpr[Operands],
    shape: Constexpr[Shape],
) -> tuple[Int32, Int32]:
    """Sums so many stages of a piece with so many slabs: acc[tile, i], i as `wgmma.mma`; returns the next stage.

    While the products of a step run, the operands of the next are decoded. At the end of a piece that is a step nobody
    needs, of the last stage again.
    """
    count = width // 2
    for t in cutlass.range_constexpr(TILES):
        for i, zero in enumerate(wgmma.zeros(count)):
            acc[t, i] = zero
    masks = fragments.masks(Target.SM90)
    lane = cute.arch.lane_idx()
    tile = cutlass.min(warp_of_consumers(), slabs * (SLAB_TILES // TILES) - 1) * TILES  # one that exists, in any case
    codes = base + (shape.weights_at + lane * 16) + tile * TILE_CODES
    scales = base + (shape.weights_at + SLABS * SLAB_CODES + lane // 4 * 16) + tile * TILE_SCALES
    ready = cute.make_rmem_tensor((TILES, 8), Uint32)  # decoded for the first step
    words = cute.make_rmem_tensor((TILES, 8), Uint32)  # codes of half a stage, then scales
    ring.wait(base + shape.barriers_at + stage * 16, parity)
    _begin(ready, words, codes + stage * shape.stage_bytes, scales + stage * shape.stage_bytes, masks)
    before, started = stage, Int32(0)
    for k in cutlass.range(k_stages, unroll=1):
        sums = [[acc[t, i] for i in range(count)] for t in range(TILES)]
        left = [[ready[t, i] for i in range(8)] for t in range(TILES)]
        raw = [[words[t, i] for i in range(8)] for t in range(TILES)]
        tokens = wgmma.descriptor(base + stage * shape.stage_bytes)
        next_stage, next_parity = _next(stage, parity, shape)
        for step in cutlass.range_constexpr(STEPS):
            wgmma.fence()
            for i in cutlass.range_constexpr(2):
                b = tokens + (step // 2 * (shape.weights_at // 2 >> 4) + (step % 2 * 2 + i) * 2)
                for t in cutlass.range_constexpr(TILES):
                    sums[t] = wgmma.mma(sums[t], left[t][4 * i : 4 * i + 4], b)
            wgmma.commit()
            wgmma.wait(1)
            if cutlass.const_expr(step == 0):
                _release(base, before, started, shape)
            if cutlass.const_expr(step == 1):
                second = codes + (stage * shape.stage_bytes + TILE_CODES // 2)
                for t in cutlass.range_constexpr(TILES):
                    raw[t] = ring.load16(second + t * TILE_CODES) + raw[t][4:]
            if cutlass.const_expr(step < STEPS - 1):
                left = [decode(raw[t], step + 1, masks) for t in range(TILES)]
        more = k + 1 < k_stages
        ring.wait_if(base + shape.barriers_at + next_stage * 16, next_parity, arith.select(more, Int32(1), Int32(0)))
        there = arith.select(more, next_stage, stage) * shape.stage_bytes
        _begin(ready, words, codes + there, scales + there, masks)
        for t in cutlass.range_constexpr(TILES):
            for i in cutlass.range_constexpr(count):
                acc[t, i] = sums[t][i]
        before, started = stage, Int32(1)
        stage, parity = next_stage, next_parity
    wgmma.wait(0)
    _release(base, before, Int32(1), shape)
    return stage, parity


@cute.jit
def exchange(
    acc: cute.Tensor,
    base: Int32,
    valid: Int32,
    width: Constexpr[int],
    part: Constexpr[Share],
) -> None:
    """Adds up the sums of all CTAs of the cluster, in the order of their ranks, for the groups that this one holds."""
    groups, size = width // 8, CONSUMERS * GROUP * 16  # bytes of four sums of each thread
    slots = (groups + part.ctas - 1) // part.ctas * TILES  # from one sender's sums to the next one's
    mine = base + (warp_of_consumers() * WARP + cute.arch.lane_idx()) * 16
    _meet()  # nobody needs the stages any more: the sums go there
    for group in cutlass.range_constexpr(groups):
        if group * 8 < valid:
            for t in cutlass.range_constexpr(TILES):
                at = mine + (part.rank * slots + group // part.ctas * TILES + t) * size
                ring.store16_of(at, [acc[t, group * 4 + i] for i in range(4)], group % part.ctas)
    _meet()
    for group in cutlass.range_constexpr(groups):
        if part.holds(group) & (group * 8 < valid):
            for t in cutlass.range_constexpr(TILES):
                first = mine + (group // part.ctas * TILES + t) * size
                total = cute.make_rmem_tensor(4, Float32)
                for i, word in enumerate(ring.load16(first)):
                    total[i] = arith.number(word)
                for rank in cutlass.range(1, part.ctas, unroll=1):
                    for i, word in enumerate(ring.load16(first + rank * slots * size)):
                        total[i] = arith.add(total[i], arith.number(word), Target.SM90)
                for i in cutlass.range_constexpr(4):
                    acc[t, group * 4 + i] = total[i]


def _release(base: Int32, stage: Int32, condition: Int32, shape: Shape) -> None:
    """Gives a stage back, one arrival a warp."""
    mine = arith.select((cute.arch.lane_idx() == 0) & (condition != 0), Int32(1), Int32(0))
    ring.arrive_if(base + shape.barriers_at + stage * 16 + 8, mine)


def _begin(ready: cute.Tensor, words: cute.Tensor, codes: Int32, scales: Int32, masks: fragments.Masks) -> None:
    """Loads codes of the first half of a stage, and its scales, and decodes the first step."""
    raw = [ring.load16(codes + t * TILE_CODES) + ring.load16(scales + t * TILE_SCALES) for t in range(TILES)]
    for t in range(TILES):
        for i, word in enumerate(raw[t]):
            words[t, i] = word
        for i, word in enumerate(decode(raw[t], 0, masks)):
            ready[t, i] = word


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
    finish: Constexpr[Callable[[cute.Tensor, Piece, int, Int32, Share], None]],
    shape: Constexpr[Shape],
) -> None:
    """The whole kernel, for all threads of a CTA.

    Args:
        operands: What is multiplied.
        finish: Gets the sums of a piece, as `accumulate` leaves them, the piece, its width, the address of
            `Shape.staging` bytes and which groups are this CTA's; only consumers call it.
        shape: How the work is cut.
    """
    thread, _, _ = cute.arch.thread_idx()
    base = ring.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        for stage in cutlass.range_constexpr(shape.stages):
            ring.init(base + shape.barriers_at + stage * 16, GROUP // WARP)
            ring.init(base + shape.barriers_at + stage * 16 + 8, CONSUMERS * GROUP // WARP)
        ring.init_fence()
    cute.arch.griddepcontrol_wait()  # what came before in the stream is done; up to here it may still have run
    cute.arch.griddepcontrol_launch_dependents()
    count_tiles(base, thread, operands, shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        produce(base, operands, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        total = pieces(base, operands, shape)
        part = share(shape)
        number, ctas = _turn(part)
        _, k_stages = stages_of(part, operands)
        expert, stage, parity = Int32(0), Int32(0), Int32(0)
        while number < total:
            expert = expert_of(number, expert, base, operands, shape)
            piece = piece_of(number, expert, base, operands, shape)
            slabs = slabs_of(piece, operands)
            for width in shape.widths:
                if piece.width == width:
                    acc = cute.make_rmem_tensor((TILES, width // 2), Float32)
                    stage, parity = accumulate(acc, base, slabs, k_stages, stage, parity, width, operands, shape)
                    if cutlass.const_expr(shape.shared):
                        exchange(acc, base, piece.valid, width, part)
                    finish(acc, piece, width, base + shape.staging_at, part)
            number = number + ctas
            if cutlass.const_expr(shape.shared):
                cute.arch.sync_threads()
