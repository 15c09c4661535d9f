"""mHC post, mix, collapse, RMSNorm and quantisation as one CuTe DSL kernel, one source for sm_90a and sm_100a.

A cluster of CTAs owns 16 tokens at a time, each CTA a slice of the hidden dims, each warp 64 of them: the new streams
of a group live in registers, in the very places where `mma` wants its left operand and a quantiser its block. The slice
of fn stays in shared memory for good. What must be summed over the hidden dims (24 dot products and the squares of the
streams, then the squares of y) goes round the cluster through distributed shared memory. The warps of a CTA are two
teams, each with a group of its own, so that one computes while the other waits for memory or for its cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Boolean, Constexpr, Float32, Int32, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, cluster, layout, mhc, recipe, strips, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.recipe import BLOCK, Block
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import places
from megamoe_stages.mhc_quant.places import (
    COLUMNS,
    COPIES,
    GROUP,
    OWN_SUMS,
    SHARED_SUMS,
    TEAMS,
    TILES,
    UNIT,
    Area,
    Inputs,
    Outputs,
    Place,
    Shape,
    Words,
)

NORM_DTYPES = {"float32": Float32, "bfloat16": BFloat16}


@cute.jit
def launch(
    x: cute.Tensor,
    f: cute.Tensor,
    post: cute.Tensor,
    comb: cute.Tensor,
    fn: cute.Tensor,
    base: cute.Tensor,
    scale: cute.Tensor,
    norm_weight: cute.Tensor,
    enc: cute.Tensor,
    residual: cute.Tensor,
    normed: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    new_post: cute.Tensor,
    new_comb: cute.Tensor,
    iters: Int32,
    hc_eps: Float32,
    norm_eps: Float32,
    tiled: Int32,
    clusters: Int32,
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches `clusters` clusters, which share the groups of tokens evenly; see Inputs and Outputs."""
    inputs = (x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    outputs = (residual, normed, codes, scales, dec, new_post, new_comb)
    mhc_quant(*inputs, *outputs, target, shape).launch(
        grid=[clusters * shape.ctas, 1, 1],
        block=[TEAMS * shape.team, 1, 1],
        cluster=[shape.ctas, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,  # or ptxas saves registers for a second CTA, for which there is no shared memory
        stream=stream,
    )


@cute.kernel
def mhc_quant(
    x: cute.Tensor,
    f: cute.Tensor,
    post: cute.Tensor,
    comb: cute.Tensor,
    fn: cute.Tensor,
    base: cute.Tensor,
    scale: cute.Tensor,
    norm_weight: cute.Tensor,
    enc: cute.Tensor,
    iters: Int32,
    hc_eps: Float32,
    norm_eps: Float32,
    tiled: Int32,
    residual: cute.Tensor,
    normed: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    new_post: cute.Tensor,
    new_comb: cute.Tensor,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    given = Inputs(x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    out = Outputs(residual, normed, codes, scales, dec, new_post, new_comb)
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    floats = cute.arch.get_dyn_smem(Float32, alignment=128)
    places.set_turn(floats, thread % WARP == 0, places.first_turn(shape), shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    tokens = cute.size(f, mode=[0])
    groups = (tokens + GROUP - 1) // GROUP

    _fetch_fn(floats, thread, place.rank, given, shape)
    _prefetch(place, given, shape)
    if place.seat == 0:
        cute.arch.mbarrier_init(area.sums_here, 1)
        cute.arch.mbarrier_init(area.squares_here, 1)
    cute.arch.mbarrier_init_fence()
    _zero_padding(out, tokens, tiled, cta * (TEAMS * shape.team) + thread, ctas * (TEAMS * shape.team))
    if cta + thread == 0:
        dec[()] = recipe.global_scale(enc[()], target).dec
    cluster.wait_copies()
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    while places.turn_of(floats, shape) < 2 * groups:
        _group(floats, given, out, target, shape)
    cute.arch.cluster_arrive()  # no CTA ends while another may still write to it
    cute.arch.cluster_wait()


@cute.jit
def _fetch_fn(
    floats: cute.Pointer, thread: Int32, rank: Int32, given: Constexpr[Inputs], shape: Constexpr[Shape]
) -> None:
    """Copies this CTA's slice of fn to shared memory, in the order in which `_dots` reads it."""
    hidden = places.hidden_of(given, shape)
    lane, wide = thread % WARP, thread // WARP
    for i in cutlass.range(wide, shape.warps * COPIES, TEAMS * shape.warps, unroll=4):
        column, stream, dim, slot = places.fn_piece(i, lane)
        h = rank * (shape.warps * UNIT) + dim
        valid = h < hidden
        source = column * (STREAMS * hidden) + stream * hidden + arith.select(valid, h, Int32(0))
        cluster.copy16(given.fn.iterator + source, floats + slot * 4, valid)


def _prefetch(place: Place, given: Inputs, shape: Shape) -> None:
    """Brings this warp's share of a group's streams and sublayer outputs into L2, 128 bytes a lane and step."""
    hidden, tokens = places.hidden_of(given, shape), cute.size(given.f, mode=[0])
    start = (place.rank * shape.warps + place.member) * UNIT
    for step in range(0, GROUP * STREAMS, WARP):
        token, stream = (place.turn >> 1) * GROUP + (place.lane + step) // STREAMS, place.lane % STREAMS
        x = given.x.iterator + (cutlass.Int64(token * STREAMS + stream) * hidden + start)
        cluster.prefetch(x, (token < tokens) & (start < hidden))
    token = (place.turn >> 1) * GROUP + place.lane % GROUP
    f = given.f.iterator + (cutlass.Int64(token) * hidden + start)
    cluster.prefetch(f, (token < tokens) & (start < hidden) & (place.lane < GROUP))


@cute.jit
def _zero_padding(out: Constexpr[Outputs], tokens: Int32, tiled: Int32, thread: Int32, threads: Int32) -> None:
    """Writes the scales of the rows that fill up the last 128x4 tiles."""
    rows, tiles = cute.size(out.scales, mode=[0]), cute.size(out.scales, mode=[1]) // layout.TILE_COLS
    if tiled == 1:
        words = cute.recast_ptr(out.scales.iterator, dtype=Uint32)
        view = cute.make_tensor(words, cute.make_layout(rows * tiles))
        for i in cutlass.range(thread, (rows - tokens) * tiles, threads, unroll=1):
            row, tile = tokens + i // tiles, i % tiles
            at = layout.offset_128x4(row, tile * layout.TILE_COLS, tiles * layout.TILE_COLS)
            view[at // layout.TILE_COLS] = Uint32(0)


@cute.jit
def _group(
    floats: cute.Pointer,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """One group of tokens, from the old streams to the quantised input of the next sublayer."""
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    sums = GROUP * SHARED_SUMS + shape.owned * OWN_SUMS
    cluster.expect(area.sums_here, shape.ctas * sums * 4, place.seat == 0)
    cluster.expect(area.squares_here, shape.ctas * GROUP * 4, place.seat == 0)
    streams = _new_streams(floats, given, out, target, shape)
    place = places.place_of(floats, given, shape)
    _prefetch(place._replace(turn=places.next_turn(place.turn, shape)), given, shape)
    _sum_slice(streams, floats, given, target, shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    cute.arch.mbarrier_wait(area.sums_here, place.turn & 1)
    own = _own_logits(place, area, given, out, target, shape)
    pre = _pre(place, area, given, target, shape)
    y = [[mhc.collapse([streams[t][s][w] for s in range(STREAMS)], pre[t], target) for w in range(8)] for t in range(2)]
    _send_squares(y, floats, given, target, shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    weights = _norm_weights(place, given)
    cute.arch.mbarrier_wait(area.squares_here, place.turn & 1)
    for t in cutlass.range_constexpr(2):
        squares = _in_order([area.squares[r, place.row + 8 * t, 0] for r in range(shape.ctas)], target)
        factor = mhc.inverse_rms(squares, places.hidden_of(given, shape), given.norm_eps, target)
        words = [mhc.normalise(y[t][w], factor, weights[2 * w : 2 * w + 2], target) for w in range(8)]
        for c in cutlass.range_constexpr(2):
            places.store_chunk(out.normed, t, c, [words[c * 4 : c * 4 + 4]], place, given, shape)
        _quantize(words, t, places.place_of(floats, given, shape), given, out, target, shape)
    _finish_own(own, place, given, out, target, shape)
    places.set_turn(floats, place.lane == 0, places.next_turn(place.turn, shape), shape)


def _new_streams(floats: cute.Pointer, given: Inputs, out: Outputs, target: Target, shape: Shape) -> list[list[Words]]:
    """The new streams of this thread's tokens: [token][stream][word]; 0 in hidden dims that do not exist."""
    place = places.place_of(floats, given, shape)
    rows = [cutlass.min(places.token_of(t, place), cute.size(given.f, mode=[0]) - 1) for t in range(2)]
    old = []
    for row in rows:
        x = places.chunks_of(given.x, row, place, given, shape)
        old.append([[word for chunk in x for word in places.load_chunk(chunk, s)] for s in range(STREAMS)])
    streams = []
    for t, row in enumerate(rows):
        cute.arch.sync_warp()
        post, comb = places.load_floats(given.post, row, 1), places.load_floats(given.comb, row, STREAMS)
        new: list[Words] = [[] for _ in range(STREAMS)]
        for c, chunk in enumerate(places.chunks_of(given.f, row, place, given, shape)):
            if not shape.whole:
                now = places.place_of(floats, given, shape)
            if c:
                cute.arch.sync_warp()  # or the next token's values would come before there are registers for them
            for w, added in enumerate(places.load_chunk(chunk, 0)):
                mixed = mhc.post_mix([old[t][s][c * 4 + w] for s in range(STREAMS)], added, post, comb, target)
                if not shape.whole:
                    mask = arith.select(now.valid[c], Uint32(0xFFFFFFFF), Uint32(0))
                    mixed = [word & mask for word in mixed]
                for s in range(STREAMS):
                    new[s].append(mixed[s])
            now = places.place_of(floats, given, shape)
            places.store_chunk(out.residual, t, c, [words[-4:] for words in new], now, given, shape)
        streams.append(new)
    return streams


@cute.jit
def _sum_slice(
    streams: Constexpr[list[list[Words]]],
    floats: cute.Pointer,
    given: Constexpr[Inputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Sums the dots and squares over this CTA's slice and sends them to where they are needed."""
    dots, squares = _dots(streams, places.place_of(floats, given, shape), floats, target, shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    partial = area.partial
    for tile in cutlass.range_constexpr(TILES):
        for i in cutlass.range_constexpr(4):
            partial[place.member, place.row + i // 2 * 8, tile * COLUMNS + place.quad * 2 + i % 2] = dots[tile][i]
    if place.quad == 0:
        partial[place.member, place.row, LOGITS] = squares[0]
        partial[place.member, place.row + 8, LOGITS] = squares[1]
    cute.arch.barrier(barrier_id=1 + place.team, number_of_threads=shape.team)
    split = GROUP * SHARED_SUMS
    if place.seat < split:
        token, which = place.seat // SHARED_SUMS, place.seat % SHARED_SUMS
        column = arith.select(which == STREAMS, Int32(LOGITS), which)
        total = _in_order([partial[m, token, column] for m in range(shape.warps)], target)
        slot = places.pointer_to(area.shared, place.rank, token, which)
        for r in cutlass.range_constexpr(shape.ctas):
            cluster.send(total, slot, area.sums_here, Int32(r))
    else:
        for k in cutlass.range_constexpr(0, GROUP * OWN_SUMS, shape.team - split):
            i = place.seat - split + k
            if i < GROUP * OWN_SUMS:
                token, which = i // OWN_SUMS, i % OWN_SUMS
                total = _in_order([partial[m, token, which + STREAMS] for m in range(shape.warps)], target)
                slot = places.pointer_to(area.own, place.rank, token % shape.owned, which)
                cluster.send(total, slot, area.sums_here, token // shape.owned)


def _dots(
    streams: list[list[Words]], place: Place, floats: cute.Pointer, target: Target, shape: Shape
) -> tuple[list[list[Float32]], list[Float32]]:
    """This warp's dots, [tile of columns][as `warp.mma_tf32`], and squares of its two tokens, summed over its lanes."""
    zero = [Float32(0.0)] * 4
    dots = [zero] * TILES
    squares = [Float32(0.0)] * 2
    fn = places.rows_of_words(floats, shape.fn_floats // 4)
    for stream, chunk, half in itertools.product(range(STREAMS), range(2), range(2)):
        left = []
        for s in range(2):
            words = [streams[t][stream][chunk * 4 + half * 2 + s] for t in range(2)]
            # permutes, where the collapse shifts: else the compiler unpacks once and runs out of registers
            left.append([arith.permute(w, Uint32(0), part, target) for part in (0x1044, 0x3244) for w in words])
            for i, word in enumerate(left[s]):
                value = arith.number(word)
                squares[i % 2] = mhc.fma(value, value, squares[i % 2], target)
        for tile in range(TILES):
            block = places.fn_fragment(place.member, stream, chunk, half, tile) * WARP + place.lane
            right = [warp.split_tf32(arith.number(v), target) for v in strips.load_words(fn, block)]
            short = zero  # the tensor core cuts off: only sums of 16 products are left to it
            for s, term in itertools.product(range(2), (1, 0)):  # the small term first
                short = warp.mma_tf32(left[s], [right[2 * s][term], right[2 * s + 1][term]], short)
            dots[tile] = [arith.add(*pair, target) for pair in zip(dots[tile], short, strict=True)]
    return dots, [warp.sum_of_four(value, target) for value in squares]


@cute.jit
def _own_logits(
    place: Constexpr[Place],
    area: Constexpr[Area],
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> cute.Tensor:
    """Writes post of the tokens that this CTA owns; returns the logits of comb, a row a lane of the first warps."""
    logits = cute.make_rmem_tensor((1, STREAMS), Float32)
    logits.fill(0.0)
    slot, first = place.member * 8 + place.row, (place.turn >> 1) * GROUP
    if place.member * 8 < shape.owned:
        safe, row = cutlass.min(slot, shape.owned - 1), place.quad
        token = place.rank * shape.owned + safe
        rms = _inverse_rms(token, area, given, target, shape)
        sums = [area.own[r, safe, row] for r in range(shape.ctas)]
        value = mhc.logit(_in_order(sums, target), rms, given.scale[1], given.base[STREAMS + row], target)
        if (slot < shape.owned) & (first + token < cute.size(given.f, mode=[0])):
            new = arith.mul(mhc.sigmoid(value, target), Float32(mhc.POST_MULTIPLIER), target)
            strips.flat(out.post)[(first + token) * STREAMS + row] = new
        for c in cutlass.range_constexpr(STREAMS):
            at = STREAMS + row * STREAMS + c
            sums = [area.own[r, safe, at] for r in range(shape.ctas)]
            base = given.base[STREAMS + at]
            logits[0, c] = mhc.logit(_in_order(sums, target), rms, given.scale[2], base, target)
    return logits


@cute.jit
def _finish_own(
    logits: cute.Tensor,
    place: Constexpr[Place],
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Sinkhorn for the tokens that this CTA owns: nothing in the group waits for it."""
    if place.member * 8 < shape.owned:
        mhc.sinkhorn(logits, given.iters, given.hc_eps, lambda value: warp.sum_of_four(value, target), target)
        slot = place.member * 8 + place.row
        token = (place.turn >> 1) * GROUP + place.rank * shape.owned + slot
        if (slot < shape.owned) & (token < cute.size(given.f, mode=[0])):
            cute.autovec_copy(logits[0, None], places.rows_of_streams(out.comb)[token * STREAMS + place.quad, None])


def _pre(place: Place, area: Area, given: Inputs, target: Target, shape: Shape) -> list[list[Float32]]:
    """The weights of the collapse for this thread's two tokens; a lane computes one and gets three."""
    pre = []
    for t in range(2):
        token = place.row + 8 * t
        rms = _inverse_rms(token, area, given, target, shape)
        dot = _in_order([area.shared[r, token, place.quad] for r in range(shape.ctas)], target)
        value = mhc.sigmoid(mhc.logit(dot, rms, given.scale[0], given.base[place.quad], target), target)
        mine = arith.add(value, given.hc_eps, target)
        pre.append([cute.arch.shuffle_sync(mine, place.lane // 4 * 4 + s) for s in range(STREAMS)])
    return pre


def _inverse_rms(token: Int32, area: Area, given: Inputs, target: Target, shape: Shape) -> Float32:
    squares = _in_order([area.shared[r, token, STREAMS] for r in range(shape.ctas)], target)
    return mhc.inverse_rms(squares, places.hidden_of(given, shape) * STREAMS, given.norm_eps, target)


@cute.jit
def _send_squares(
    y: Constexpr[list[Words]],
    floats: cute.Pointer,
    given: Constexpr[Inputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Sums the squares of y over this CTA's slice and sends them to every CTA."""
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    partial = area.partial  # everybody has read it, or the sums would not have arrived
    for t in cutlass.range_constexpr(2):
        total = Float32(0.0)
        for word in y[t]:
            total = mhc.add_squares(word, total, target)
        total = warp.sum_of_four(total, target)
        if place.quad == 0:
            partial[place.member, place.row + 8 * t, 0] = total
    cute.arch.barrier(barrier_id=1 + place.team, number_of_threads=shape.team)
    for k in cutlass.range_constexpr(0, GROUP * shape.ctas, shape.team):
        i = place.seat + k
        if i < GROUP * shape.ctas:
            token = i % GROUP
            total = _in_order([partial[m, token, 0] for m in range(shape.warps)], target)
            cluster.send(total, places.pointer_to(area.squares, place.rank, token, 0), area.squares_here, i // GROUP)


@cute.jit
def _quantize(
    words: Constexpr[Words],
    t: Constexpr[int],
    place: Constexpr[Place],
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Quantises a token's 16 normed values of this lane and of its neighbour: two half blocks make a block each."""
    row = places.token_of(t, place)
    here = row < cute.size(given.f, mode=[0])
    even = place.quad % 2 == 0
    got = [warp.from_lane(arith.select(even, words[4 + w], words[w]), 1) for w in range(4)]
    low = [arith.select(even, words[w], got[w]) for w in range(4)]
    high = [arith.select(even, got[w], words[4 + w]) for w in range(4)]
    cols = places.hidden_of(given, shape) // BLOCK
    unit = place.rank * shape.warps + place.member
    col = unit * (UNIT // BLOCK) + place.quad % 2 * 2 + place.quad // 2
    encode = given.enc[()]
    scale = recipe.regular_global_scale(encode, target)
    block = recipe.encode_block([*low, *high], BFloat16, scale, target)
    _store_block(block, row, col, cols, here, given, out)
    if cutlass.const_expr(not target.native_e2m1):  # noqa: SIM102, the inner condition is the GPU's
        if not (scale.regular & block.regular):  # rare: NaN, infinity or saturation
            exact = recipe.global_scale(encode, target)
            _store_block(
                recipe.encode_any_block([*low, *high], BFloat16, exact, target), row, col, cols, here, given, out
            )


@cute.jit
def _store_block(
    block: Constexpr[Block],
    row: Int32,
    col: Int32,
    cols: Int32,
    here: Boolean,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
) -> None:
    stored = layout.tiles(cols) * layout.TILE_COLS  # padding columns of a tile get 0
    at = layout.offset_128x4(row, col, cols)
    if given.tiled == 0:
        stored, at = cols, layout.offset_linear(row, col, cols)
    if here & (col < cols):
        pair = cute.make_rmem_tensor(2, Uint32)
        pair[0], pair[1] = block.low, block.high
        cute.autovec_copy(pair, strips.blocks_of(out.codes, 2)[row * cols + col, None])
    if here & (col < stored):
        strips.flat(out.scales)[at] = Uint8(arith.select(col < cols, block.scale, Uint32(0)))


def _norm_weights(place: Place, given: Inputs) -> list[Float32]:
    """The norm's weights of this thread's 16 hidden dims."""
    weights: list[Float32] = []
    wide = given.norm_weight.element_type is Float32
    for dims in place.dims:
        words = strips.load_words(strips.blocks_of(given.norm_weight, 8 if wide else 4), dims // 8)
        weights += recipe.values(words, given.norm_weight.element_type)
    return weights


def _in_order(values: Sequence[Float32], target: Target) -> Float32:
    """A sum in this very order, so that every CTA and every run finds the same bits."""
    total = values[0]
    for value in values[1:]:
        total = arith.add(total, value, target)
    return total


def spec(shape: Shape, norm_dtype: str, target: Target) -> KernelSpec:
    """The kernel for one cut, any number of tokens, both scale layouts.

    Args:
        shape: How the work is cut.
        norm_dtype: A key of NORM_DTYPES.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        tokens, hidden, wide, half = (
            cute.sym_int32(),
            cute.sym_int32(divisibility=BLOCK),
            cute.sym_int32(divisibility=BLOCK * STREAMS),
            cute.sym_int32(divisibility=BLOCK // 2),
        )

        def compact(dtype: type, *dims: object, align: int = 16) -> object:
            order = tuple(range(len(dims) - 1, -1, -1))
            return make_fake_compact_tensor(dtype, dims, stride_order=order, assumed_align=align)

        def scalar() -> object:
            return make_fake_tensor(Float32, (), (), assumed_align=4)

        streams, vector = compact(BFloat16, tokens, STREAMS, hidden), compact(BFloat16, tokens, hidden)
        per_stream, mixing = compact(Float32, tokens, STREAMS), compact(Float32, tokens, STREAMS, STREAMS)
        read = (
            streams,
            vector,
            per_stream,
            mixing,
            compact(Float32, LOGITS, wide),
            compact(Float32, LOGITS, align=4),
            compact(Float32, 3, align=4),
            compact(NORM_DTYPES[norm_dtype], hidden),
            scalar(),
        )
        scales = compact(Uint8, cute.sym_int32(), cute.sym_int32(), align=4)
        written = (streams, vector, compact(Uint8, tokens, half, align=8), scales, scalar(), per_stream, mixing)
        numbers = (Int32(1), Float32(0.0), Float32(0.0), Int32(0), Int32(1))
        return (*read, *written, *numbers, make_fake_stream(use_tvm_ffi_env_stream=True), target, shape)

    name = f"mhc_quant_{shape.ctas}x{shape.warps}{'' if shape.whole else '_ragged'}_{norm_dtype}"
    return KernelSpec(name, target.value, launch, arguments, (*shape, norm_dtype))
