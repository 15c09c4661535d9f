"""Main loop of a grouped GEMM with prepared NVFP4 weights on sm_90a: weights decoded in registers, many rows an expert.

Swapped: the weights are wgmma's left operand, tokens its columns. A CTA has four producer warps and two consumer
warpgroups, and walks over pieces of work: 128 or 256 weight rows of an expert times up to `Shape.tokens` of its tokens.
A consumer warp owns 16 or 32 neighbouring weight rows of a piece, a tile of 16 or two. The producers fill a ring of
stages, 128 of k each, with bulk copies of prepared weights (`numerics.fragments`) and of activations, packed (`pack`)
or, if `Shape.direct`, as they are; a consumer decodes 32 of k of a tile while the tensor cores multiply what it decoded
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Numeric, Uint8, Uint32, cute

from megamoe.cute import arith, asm, cluster, copies, fragments, mbarrier, multicast, smem, split_sums, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.warp import WARP
from megamoe.cute.weight_pieces import (
    CONSUMER_WARPS,
    GROUP,
    SLAB_CODES,
    SLAB_SCALES,
    SLAB_TILES,
    TILE_CODES,
    TILE_SCALES,
    Operands,
    Piece,
    Shape,
    count_tiles,
    exists,
    init_orders,
    packed_start,
    piece_of,
    slabs_of,
    stage_after,
    stages_of,
    tell_piece,
    turn,
    warp_of_consumers,
)

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
STEPS = 4  # of a stage, 32 of k each
DECODED_UNIT = 2.0**7  # what one in the product of decoded weights stands for


@cute.jit
def produce(base: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]) -> None:
    """A producer warp fills the ring for all pieces of this CTA.

    The first two bring tokens, if `Shape.halves` the first one alone; the last ones weights.
    """
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    mine = warp - (GROUP // WARP - shape.slabs)  # which slab
    number, turns = turn(shape, operands)
    first_stage, k_stages = stages_of(shape, operands)
    expert, stage, parity = Int32(0), Int32(0), Int32(1)
    expert = tell_piece(base, number, expert, operands, shape)
    if warp < (0 if shape.direct else 2):
        cute.arch.griddepcontrol_wait()  # the tokens are packed; all else was there before `pack` let this grid start
    while exists(number, base, operands, shape):
        piece = piece_of(number, base, operands, shape)
        if cutlass.const_expr(shape.direct):
            stage, parity = _produce_piece(base, piece, operands, stage, parity, shape)
        elif lane == 0:
            place = Int64(piece.expert * operands.slabs + piece.row_piece * shape.slabs + mine) * operands.k_stages
            place = place + first_stage
            codes = asm.address(operands.codes) + place * SLAB_CODES
            scales = asm.address(operands.scales) + place * SLAB_SCALES
            rows = piece.width * wgmma.ROW_BYTES
            block = Int64(operands.capacity) * wgmma.ROW_BYTES
            tokens = asm.address(operands.packed)
            tokens = tokens + Int64(packed_start(piece.start, piece.expert) + piece.first) * wgmma.ROW_BYTES
            tokens = tokens + (2 * first_stage + warp) * block
            weights = (mine >= 0) & (mine < slabs_of(piece, operands, shape))
            size = arith.select(warp < 2, rows, Int32(0))
            size = size + arith.select(weights, Int32(SLAB_CODES + SLAB_SCALES), Int32(0))
            for _ in cutlass.range(k_stages, unroll=1):
                full = base + shape.barriers_at + stage * 16
                at = base + stage * shape.stage_bytes
                mbarrier.wait(full + 8, parity)
                mbarrier.expect(full, size)  # all warps, or one with nothing to copy might fall a phase behind
                if warp < 2:
                    copies.load_bulk(at + warp * (shape.weights_at // 2), tokens, rows, full)
                if weights:
                    _copy_slab(codes, scales, mine, at, full, shape)
                tokens, codes, scales = tokens + 2 * block, codes + SLAB_CODES, scales + SLAB_SCALES
                stage, parity = stage_after(stage, parity, shape)
        stage, parity = cute.arch.shuffle_sync(stage, 0), cute.arch.shuffle_sync(parity, 0)
        number = number + turns
        expert = tell_piece(base, number, expert, operands, shape)


@cute.jit
def _produce_piece(
    base: Int32,
    piece: Constexpr[Piece],
    operands: Constexpr[Operands],
    stage: Int32,
    parity: Int32,
    shape: Constexpr[Shape],
) -> tuple[Int32, Int32]:
    """`produce` for a piece whose tokens come as they are: a box at a time, and a whole warp starts it."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    mine = warp - (GROUP // WARP - shape.slabs)
    first_stage, k_stages = stages_of(shape, operands)
    place = Int64(piece.row_piece * shape.slabs + mine) * operands.k_stages + first_stage
    codes = asm.address(operands.codes) + place * SLAB_CODES
    scales = asm.address(operands.scales) + place * SLAB_SCALES
    weights = (mine >= 0) & (mine < slabs_of(piece, operands, shape))
    rows = piece.width * wgmma.ROW_BYTES
    size = arith.select(warp < (1 if shape.halves else 2), rows, Int32(0))
    size = size + arith.select(weights, Int32(SLAB_CODES + SLAB_SCALES), Int32(0))
    block = 2 * first_stage + (0 if shape.halves else warp)
    if weights & (lane == 0):
        soon = cutlass.min(k_stages, shape.stages)
        if cutlass.const_expr(shape.ahead):  # not loaded: the grid before may have written them
            copies.prefetch_bulk(codes, SLAB_CODES * soon)
            copies.prefetch_bulk(scales, SLAB_SCALES * soon)
    cute.arch.griddepcontrol_wait()  # there is no `pack` that did
    for _ in cutlass.range(k_stages, unroll=1):
        full = base + shape.barriers_at + stage * 16
        at = base + stage * shape.stage_bytes
        mbarrier.wait(full + 8, parity)
        mbarrier.expect_if(full, size, lane == 0)
        if cutlass.const_expr(shape.halves):
            if warp == 0:  # the same warp, or the halves would come together
                second = base + shape.seconds_at + stage * 8
                mbarrier.expect_if(second, rows, lane == 0)
                _copy_boxes(operands, piece, block, at, full, shape)
                _copy_boxes(operands, piece, block + 1, at + shape.weights_at // 2, second, shape)
        elif warp < 2:
            _copy_boxes(operands, piece, block, at + warp * (shape.weights_at // 2), full, shape)
        if weights & (lane == 0):
            _copy_slab(codes, scales, mine, at, full, shape)
        codes, scales, block = codes + SLAB_CODES, scales + SLAB_SCALES, block + 2
        stage, parity = stage_after(stage, parity, shape)
    return stage, parity


@cute.jit
def _copy_boxes(
    operands: Constexpr[Operands],
    piece: Constexpr[Piece],
    block: Int32,
    slot: Int32,
    full: Int32,
    shape: Constexpr[Shape],
) -> None:
    """Starts the copies of the tokens of 64 k that this CTA brings; a whole warp."""
    rank = cute.arch.block_idx()[0] % shape.cluster
    for i in cutlass.range_constexpr(shape.tokens // shape.box):
        if (i * shape.box < piece.width) & (i % shape.cluster == rank):
            to = slot + i * (shape.box * wgmma.ROW_BYTES)
            multicast.load_box(operands.packed, piece.first + i * shape.box, Int32(0), block, to, full)


def _copy_slab(codes: Int64, scales: Int64, number: Int32, stage: Int32, full: Int32, shape: Shape) -> None:
    """Starts the copies of a slab of a piece to its place in a stage."""
    weights = stage + shape.weights_at
    copies.load_bulk(weights + number * SLAB_CODES, codes, Int32(SLAB_CODES), full)
    copies.load_bulk(weights + shape.slabs * SLAB_CODES + number * SLAB_SCALES, scales, Int32(SLAB_SCALES), full)


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
    At the end of a piece that is an operand nobody needs, of the last stage again or of words that were there before.
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
    mbarrier.wait(base + shape.barriers_at + stage * 16, parity)
    for t in cutlass.range_constexpr(tiles):
        _keep(words, t, _first_words(t, codes + stage * shape.stage_bytes, scales + stage * shape.stage_bytes))
    _keep(ready, None, decode([words[0, i] for i in range(8)], 0, masks))
    before, started = stage, Int32(0)
    for k in cutlass.range(k_stages, unroll=1):
        sums = [[acc[t, i] for i in range(count)] for t in range(tiles)]
        raw = [[words[t, i] for i in range(8)] for t in range(tiles)]
        left = [ready[i] for i in range(8)]
        tokens = wgmma.descriptor(base + stage * shape.stage_bytes)
        next_stage, next_parity = stage_after(stage, parity, shape)
        more = asm.flag(k + 1 < k_stages)
        ahead = next_stage
        if cutlass.const_expr(not shape.guarded):
            ahead = arith.select(more == 1, next_stage, stage)
        there = ahead * shape.stage_bytes
        for group in cutlass.range_constexpr(STEPS * tiles):
            step, t = group // tiles, group % tiles
            wgmma.fence()
            for i in cutlass.range_constexpr(2):
                b = tokens + (step // 2 * (shape.weights_at // 2 >> 4) + (step % 2 * 2 + i) * 2)
                sums[t] = wgmma.mma(sums[t], left[4 * i : 4 * i + 4], b)
            wgmma.commit()
            wgmma.wait(shape.in_flight)
            if cutlass.const_expr(shape.halves and group == STEPS // 2 * tiles - 1):
                mbarrier.wait(base + shape.seconds_at + stage * 8, parity)
            if cutlass.const_expr(group == shape.in_flight - 1):
                _release(base, before, started, shape)  # its last group is done
            if cutlass.const_expr(step == STEPS - 1):
                if cutlass.const_expr(t == 0):
                    mbarrier.wait_if(base + shape.barriers_at + next_stage * 16, next_parity, more)
                if cutlass.const_expr(shape.guarded):
                    raw[t] = _first_words_if(t, codes + there, scales + there, raw[t], more)
                else:
                    raw[t] = _first_words(t, codes + there, scales + there)
            after, other = (group + 1) // tiles % STEPS, (group + 1) % tiles
            left = decode(raw[other], after, masks)
            if cutlass.const_expr(after == 1):
                half = smem.load16(codes + (stage * shape.stage_bytes + other * TILE_CODES + TILE_CODES // 2))
                raw[other] = half + raw[other][4:]
        for t in cutlass.range_constexpr(tiles):
            _keep(words, t, raw[t])
            _keep(acc, t, sums[t])
        _keep(ready, None, left)
        before, started = stage, Int32(1)
        stage, parity = next_stage, next_parity
    wgmma.wait(0)
    landed = arith.hidden_zero(Target.SM90)
    if cutlass.const_expr(not shape.guarded):
        for i in cutlass.range_constexpr(8):
            landed = landed & words[tiles - 1, i]  # 0: no copy may come before these loads, though nobody needs them
    _release(base, before, Int32(1) + Int32(landed), shape)
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
    return smem.load16(codes + tile * TILE_CODES) + smem.load16(scales + tile * TILE_SCALES)


def _first_words_if(tile: int, codes: Int32, scales: Int32, words: Sequence[Uint32], condition: Int32) -> list[Uint32]:
    """`_first_words` where the condition is not 0, else the words given."""
    given = ((codes + tile * TILE_CODES, words[:4]), (scales + tile * TILE_SCALES, words[4:]))
    return [word for place, kept in given for word in smem.load16_if(place, kept, condition)]


def _release(base: Int32, stage: Int32, condition: Int32, shape: Shape) -> None:
    """Gives a stage back; all lanes arrive: racecheck orders only threads that do so themselves."""
    barrier, there = base + shape.barriers_at + stage * 16 + 8, asm.flag(condition != 0)
    if shape.cluster > 1:
        for rank in range(shape.cluster):
            cluster.arrive_at_if(barrier, Int32(rank), there)  # any of the cluster may write there next
    else:
        mbarrier.arrive_if(barrier, there)


def _uniform(number: Int32) -> Int32:
    """What all lanes have, in a uniform register; else ptxas works an address out anew in each turn of a loop."""
    return Int32(asm.value(Int32, "redux.sync.min.s32 $0, $1, 0xffffffff;", number))


def decode(raw: list[Uint32], step: int, masks: fragments.Masks) -> list[Uint32]:
    """The left operand of a step's two products from half a stage's codes and the scales of all."""
    x, y = raw[step % 2 * 2], raw[step % 2 * 2 + 1]
    return fragments.decode_pair(x, y, raw[4 + step], Target.SM90, masks)


@cute.jit
def work(
    operands: Constexpr[Operands],
    fetch: Constexpr[Callable[[Piece], list[Float32]]],
    finish: Constexpr[Callable[[cute.Tensor, Piece, int, Int32, list[Float32]], None]],
    shape: Constexpr[Shape],
) -> None:
    """The whole kernel, for all threads of a CTA; unless `Shape.direct`, `pack` comes right before it in the stream.

    Args:
        operands: What is multiplied.
        fetch: From a piece to the numbers that its results are multiplied by; they are there when the sums are.
        finish: Gets the sums of a piece, as `accumulate` leaves them, the piece, its width, the address of
            `Shape.staging` bytes and what was fetched; only whole warps of consumers call it.
        shape: How the work is cut.
    """
    thread, _, _ = cute.arch.thread_idx()
    base = _uniform(asm.address(cute.arch.get_dyn_smem(Uint8, alignment=1024)))
    if thread == 0:
        for stage in cutlass.range_constexpr(shape.stages):
            mbarrier.init(base + shape.barriers_at + stage * 16, GROUP // WARP)
            mbarrier.init(base + shape.barriers_at + stage * 16 + 8, CONSUMER_WARPS * WARP * shape.cluster)
            if cutlass.const_expr(shape.halves):
                mbarrier.init(base + shape.seconds_at + stage * 8, 1)
        init_orders(base, shape)
        mbarrier.init_fence()
    cute.arch.griddepcontrol_launch_dependents()
    if cutlass.const_expr(shape.cluster > 1):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    elif cutlass.const_expr(shape.dense):
        cute.arch.sync_threads()
    else:
        count_tiles(base, thread, operands, shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        produce(base, operands, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        number, turns = turn(shape, operands)
        _, k_stages = stages_of(shape, operands)
        stage, parity = Int32(0), Int32(0)
        if cutlass.const_expr(shape.direct):
            cute.arch.griddepcontrol_wait()  # nor are alphas read, or results written, before
        while exists(number, base, operands, shape):
            piece = piece_of(number, base, operands, shape)
            slabs = slabs_of(piece, operands, shape)
            factors = fetch(piece)
            for width in shape.widths:
                if piece.width == width:
                    acc = cute.make_rmem_tensor((shape.tiles, width // 2), Float32)
                    stage, parity = accumulate(acc, base, slabs, k_stages, stage, parity, width, shape)
                    if cutlass.const_expr(shape.split):
                        whole = operands.parts == 1
                        if not whole:
                            whole = split_sums.gather(acc, number, piece.valid, width, operands, shape)
                        if whole:
                            finish(acc, piece, width, base + shape.staging_at, factors)
                    else:
                        finish(acc, piece, width, base + shape.staging_at, factors)
            number = number + turns
    if cutlass.const_expr(shape.cluster > 1):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()  # nobody writes to a CTA that has ended
