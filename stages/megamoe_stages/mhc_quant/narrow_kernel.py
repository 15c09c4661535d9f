"""mhc_quant for few hidden dims: a CuTe DSL kernel whose streams stay in registers, for sm_90a and sm_100a.

A cluster of CTAs owns 16 tokens at a time, each CTA a slice of the hidden dims, each warp 64 of them: the new streams
of a group live in registers, in the very places where `mma` wants its right operand and a quantiser its block. The
slice of fn stays in shared memory for good. What must be summed over the hidden dims (24 dot products and the squares
of the streams, then the squares of y) goes round the cluster through distributed shared memory. The warps of a CTA are
teams, each with a group of its own, so that some compute while others wait for memory or for their cluster. Sinkhorn's
iteration comes last, a lane a token: its chain is long, and nothing else in the kernel needs comb.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, asm, cluster, copies, gmem, mbarrier, mhc, recipe, smem, strips, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import blocks
from megamoe_stages.mhc_quant import narrow_mix as mix
from megamoe_stages.mhc_quant import narrow_places as places
from megamoe_stages.mhc_quant.narrow_places import GROUP, OWN_SUMS, UNIT, Area, Place, Shape
from megamoe_stages.mhc_quant.tensors import (
    MATRIX,
    NORM_DTYPES,
    ROWS,
    Inputs,
    Outputs,
    Words,
    arguments,
    rows_of_streams,
    zero_padding,
)


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
        block=[shape.all_warps * WARP, 1, 1],
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

    if place.seat == 0:
        for bar, sends in zip((area.sums_here, area.squares_here, area.all_logits), (*shape.sends, 0), strict=True):
            mbarrier.init(asm.address(bar), 1 + sends)
    if thread == 0:
        mbarrier.init(asm.address(places.fn_here(floats, shape)), shape.all_warps * WARP)
    mbarrier.init_fence()
    cute.arch.sync_threads()
    cute.arch.cluster_arrive_relaxed()
    _prefetch(place, given, shape)
    _fetch_factors(place.turn, place, area, given)
    mix.fetch_fn(floats, given, target, shape)
    zero_padding(out, tokens, tiled, cta * (shape.all_warps * WARP) + thread, ctas * (shape.all_warps * WARP))
    if cta + thread == 0:
        dec[()] = recipe.global_scale(enc[()], target).dec
    copies.wait_all()
    mbarrier.named_barrier(1 + place.team, shape.team)  # the factors have come
    cute.arch.cluster_wait()
    ahead = _load_ahead(place.turn, floats, given, shape)
    while places.turn_of(floats, shape) < 2 * groups:
        ahead = _group(ahead, floats, given, out, target, shape)
    _finish_neighbour(floats, given, out, target, shape)
    cute.arch.cluster_arrive_relaxed()  # no CTA ends while another may still write to it
    cute.arch.cluster_wait()


@cute.jit
def _fetch_factors(turn: Int32, place: Constexpr[Place], area: Constexpr[Area], given: Constexpr[Inputs]) -> None:
    """Copies post and comb of a turn's tokens to shared memory, zeros for tokens that do not exist."""
    first, tokens = (turn >> 1) * GROUP, cute.size(given.f, mode=[0])
    if place.seat < GROUP * STREAMS:
        token, part = place.seat // STREAMS, place.seat % STREAMS
        valid = first + token < tokens
        source = given.comb.iterator + (arith.select(valid, first + token, Int32(0)) * MATRIX + part * STREAMS)
        copies.copy16(
            asm.address(places.pointer_to(area.factors, token, STREAMS + part * STREAMS)),
            asm.address(source),
            arith.select(valid, Int32(16), Int32(0)),
        )
    elif place.seat < GROUP * (STREAMS + 1):
        token = place.seat - GROUP * STREAMS
        valid = first + token < tokens
        source = given.post.iterator + arith.select(valid, first + token, Int32(0)) * STREAMS
        copies.copy16(
            asm.address(places.pointer_to(area.factors, token, 0)),
            asm.address(source),
            arith.select(valid, Int32(16), Int32(0)),
        )


def _prefetch(place: Place, given: Inputs, shape: Shape) -> None:
    """Brings this warp's share of a group's streams and sublayer outputs into L2, 128 bytes a lane and step."""
    hidden, tokens = places.hidden_of(given, shape), cute.size(given.f, mode=[0])
    start = (place.rank * shape.warps + place.member) * UNIT
    for step in range(0, GROUP * STREAMS, WARP):
        token, stream = (place.turn >> 1) * GROUP + (place.lane + step) // STREAMS, place.lane % STREAMS
        x = given.x.iterator + (cutlass.Int64(token * STREAMS + stream) * hidden + start)
        gmem.prefetch(asm.address(x), (token < tokens) & (start < hidden))
    token = (place.turn >> 1) * GROUP + place.lane % GROUP
    f = given.f.iterator + (cutlass.Int64(token) * hidden + start)
    gmem.prefetch(asm.address(f), (token < tokens) & (start < hidden) & (place.lane < GROUP))


def _group(ahead: Words, floats: cute.Pointer, given: Inputs, out: Outputs, target: Target, shape: Shape) -> Words:
    """One group of tokens, from the old streams to the quantised input of the next sublayer.

    Takes the words of this thread's first token, which were loaded ahead, and returns those of its next group: from the
    collapse on there are registers for them, and so they come while the team waits for its cluster.
    """
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    sums = GROUP * (STREAMS + 1) + shape.owned * OWN_SUMS
    travels = 4 if shape.ctas > 1 else 0  # bytes of a number: in a cluster of one CTA each send is an arrival
    mbarrier.expect_if(asm.address(area.sums_here), shape.ctas * sums * travels, place.seat == 0)
    mbarrier.expect_if(asm.address(area.squares_here), shape.ctas * GROUP * travels, place.seat == 0)
    streams = _new_streams(ahead, floats, given, out, target, shape)
    place = places.place_of(floats, given, shape)
    _prefetch(place._replace(turn=places.next_turn(place.turn, shape)), given, shape)
    _sum_slice(streams, floats, given, target, shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    _fetch_factors(places.next_turn(place.turn, shape), place, area, given)
    cute.arch.mbarrier_wait(area.sums_here, place.turn & 1)
    pre = _pre(place, area, given, target, shape)
    y = [[mhc.collapse([streams[t][s][w] for s in range(STREAMS)], pre[t], target) for w in range(8)] for t in range(2)]
    place = places.place_of(floats, given, shape)
    ahead = _load_ahead(places.next_turn(place.turn, shape), floats, given, shape)
    copies.wait_all()  # of the factors; the barrier in here shows them to the team
    _send_squares(y, floats, given, target, shape)
    _write_logits(floats, given, out, target, shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape)
    weights = _norm_weights(place, given)
    cute.arch.mbarrier_wait(area.squares_here, place.turn & 1)
    for t in range(2):
        squares = _in_order([area.y[r, place.row + 8 * t] for r in range(shape.ctas)], target)
        factor = mhc.inverse_rms(squares, places.hidden_of(given, shape), given.norm_eps, target)
        words = [mhc.normalise(y[t][w], factor, weights[2 * w : 2 * w + 2], target) for w in range(8)]
        for c in range(2):
            places.store_chunk(out.normed, t, c, [words[c * 4 : c * 4 + 4]], place, given, shape)
        _quantize(words, t, places.place_of(floats, given, shape), given, out, target, shape)
    places.set_turn(floats, place.lane == 0, places.next_turn(place.turn, shape), shape)
    return ahead


def _new_streams(
    ahead: Words, floats: cute.Pointer, given: Inputs, out: Outputs, target: Target, shape: Shape
) -> list[list[Words]]:
    """The new streams of this thread's tokens: [token][stream][word]; 0 in hidden dims that do not exist."""
    turn = places.place_of(floats, given, shape).turn
    loaded = [ahead, _load_token(1, (0,), turn, floats, given, shape)]
    streams = []
    for t in range(2):
        new: list[Words] = [[] for _ in range(STREAMS)]
        for c in range(2):
            if t == 0 and c == 1:
                cute.arch.sync_warp()  # no earlier: there are no registers for them
                loaded[1] += _load_token(1, (1,), turn, floats, given, shape)
            chunk = loaded[t][c * 20 : c * 20 + 20]
            place = places.place_of(floats, given, shape)
            factors = functools.partial(_factors, places.area_of(floats, place.team, shape), place.row + 8 * t)
            mixed = mhc.post_mix([chunk[i : i + 4] for i in range(0, 20, 4)], factors, target)
            if not shape.whole:
                mask = arith.select(place.valid[c], Uint32(0xFFFFFFFF), Uint32(0))
                mixed = [[word & mask for word in words] for words in mixed]
            for words, more in zip(new, mixed, strict=True):
                words += more
            places.store_chunk(out.residual, t, c, mixed, places.place_of(floats, given, shape), given, shape)
        streams.append(new)
    return streams


def _load_ahead(turn: Int32, floats: cute.Pointer, given: Inputs, shape: Shape) -> Words:
    """This thread's words of its first token in a turn."""
    return _load_token(0, (0, 1), turn, floats, given, shape)


def _load_token(t: int, chunks: Sequence[int], turn: Int32, floats: cute.Pointer, given: Inputs, shape: Shape) -> Words:
    """This thread's words of its token number t in a turn: of a chunk 4 of the sublayer's output, then 4 a stream."""
    place = places.place_of(floats, given, shape)._replace(turn=turn)
    row = cutlass.min(places.token_of(t, place), cute.size(given.f, mode=[0]) - 1)
    x, f = (places.chunks_of(tensor, row, place, given, shape) for tensor in (given.x, given.f))
    words: Words = []
    for c in chunks:
        words += places.load_chunk(f[c], 0) + [word for s in range(STREAMS) for word in places.load_chunk(x[c], s)]
    return words


def _factors(area: Area, token: Int32, row: int) -> list[Float32]:
    """Factors of the group's token: row 0 is post, the others are comb's."""
    cute.arch.sync_warp()  # or the compiler loads all rows at once, and spills
    rows = cute.make_tensor(
        area.factors.iterator, cute.make_layout((GROUP * (STREAMS + 1), STREAMS), stride=(STREAMS, 1))
    )
    four = cute.make_rmem_tensor(STREAMS, Float32)
    cute.autovec_copy(rows[token * (STREAMS + 1) + row, None], four)
    return [four[i] for i in range(STREAMS)]


@cute.jit
def _sum_slice(
    streams: Constexpr[list[list[Words]]],
    floats: cute.Pointer,
    given: Constexpr[Inputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Sums the dots and squares over this CTA's slice and sends them to where they are needed."""
    squares = mix.squares(streams, target)
    place = places.place_of(floats, given, shape)
    partial = places.area_of(floats, place.team, shape).partial_streams
    mine = [arith.select(place.row % 2 == 0, even, odd) for even, odd in squares]
    if place.quad == place.row // 2:
        partial[place.member, place.row] = mine[0]
        partial[place.member, place.row + 8] = mine[1]
    cute.arch.mbarrier_wait(places.fn_here(floats, shape), 0)
    dots = mix.dots(streams, places.place_of(floats, given, shape), floats, target, shape)
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape, place.turn)
    partial = area.partial
    for t in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(6):
            partial[place.member, t * 8 + place.quad * 2 + i % 2, i // 2 * ROWS + place.row] = dots[t][i]
    mbarrier.named_barrier(1 + place.team, shape.team)
    for k in cutlass.range_constexpr(0, GROUP * shape.ctas, shape.team):
        i = place.seat + k
        if i < GROUP * shape.ctas:
            token, rank = i % GROUP, i // GROUP
            total = _sum_of_four(area.partial, token * LOGITS, target)
            _send(total, places.pointer_to(area.pre, place.rank, token, 0), area.sums_here, rank, shape)
    fours = OWN_SUMS // 4
    for k in cutlass.range_constexpr(0, GROUP * fours, shape.team):
        i = place.seat + k
        if i < GROUP * fours:
            token, which = i // fours, i % fours * 4
            total = _sum_of_four(area.partial, token * LOGITS + STREAMS + which, target)
            slot = places.pointer_to(area.own, place.rank, token % shape.owned, which)
            _send(total, slot, area.sums_here, token // shape.owned, shape)
    i = shape.team - 1 - place.seat  # the seats that have done less so far
    _send_to_all(area.partial_streams, area.streams, area.sums_here, i, place.rank, target, shape)


@cute.jit
def _send_to_all(
    partial: cute.Tensor,
    slots: cute.Tensor,
    arrived: cute.Pointer,
    i: Int32,
    rank: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Sums a value a token over the team's warps and sends it to every CTA; i counts the threads."""
    fours = GROUP // 4
    if i < fours * shape.ctas:
        total = _sum_of_four(partial, i % fours * 4, target)
        _send(total, places.pointer_to(slots, rank, i % fours * 4), arrived, i // fours, shape)


def _send(values: list[Float32], slot: cute.Pointer, arrived: cute.Pointer, rank: Int32, shape: Shape) -> None:
    """Sends four numbers to a CTA; a CTA alone keeps them by a plain store: memcheck takes `st.async` there amiss."""
    if shape.ctas > 1:
        cluster.send(values, asm.address(slot), asm.address(arrived), rank)
    else:
        smem.store16(asm.address(slot), values)
        cute.arch.mbarrier_arrive(arrived)


def _sum_of_four(partial: cute.Tensor, first: Int32, target: Target) -> list[Float32]:
    """Sums over the team's warps, in their order, of four neighbours from the element `first` of a warp's part on."""
    warps, size = partial.shape[0], cute.size(partial) // partial.shape[0]
    fours = cute.make_tensor(partial.iterator, cute.make_layout((warps, size // 4, 4), stride=(size, 4, 1)))
    loaded = []
    for m in range(warps):
        four = cute.make_rmem_tensor(4, Float32)
        cute.autovec_copy(fours[m, first // 4, None], four)
        loaded.append([four[i] for i in range(4)])
    return [_in_order(values, target) for values in zip(*loaded, strict=True)]


@cute.jit
def _write_logits(
    floats: cute.Pointer,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """The team's first warp writes post of the tokens that this CTA owns, and the logits of comb in comb's place."""
    place = places.place_of(floats, given, shape)
    area = places.area_of(floats, place.team, shape, place.turn)
    if place.member == 0:
        tokens = cute.size(given.f, mode=[0])
        for i in cutlass.range(place.lane, shape.owned * OWN_SUMS, WARP, unroll=1):
            owned, which = i // OWN_SUMS, i % OWN_SUMS
            token = place.rank * shape.owned + owned
            number = (place.turn >> 1) * GROUP + token
            squares = _in_order([area.streams[r, token] for r in range(shape.ctas)], target)
            rms = _inverse_rms(squares, given, target, shape)
            dot = _in_order([area.own[r, owned, which] for r in range(shape.ctas)], target)
            scale = arith.select(which < STREAMS, given.scale[1], given.scale[2])
            value = mhc.logit(dot, rms, scale, given.base[STREAMS + which], target)
            if number < tokens:
                if which < STREAMS:
                    new = arith.mul(mhc.sigmoid(value, target), Float32(mhc.POST_MULTIPLIER), target)
                    strips.flat(out.post)[number * STREAMS + which] = new
                else:
                    strips.flat(out.comb)[number * MATRIX + which - STREAMS] = value
        cute.arch.sync_warp()
        if (place.lane == 0) & ((places.next_turn(place.turn, shape) >> 1) * GROUP >= tokens):
            cute.arch.mbarrier_arrive(area.all_logits)


@cute.jit
def _finish_neighbour(
    floats: cute.Pointer,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Turns the next team's logits into comb, a lane a token: with few tokens that team is busy and this one is not."""
    place = places.place_of(floats, given, shape)
    team = (place.team + 1) % shape.teams
    area = places.area_of(floats, team, shape)
    (cta, _, _), (ctas, _, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    clusters, tokens = ctas // shape.ctas, cute.size(given.f, mode=[0])
    first, step = cta // shape.ctas + team * clusters, clusters * shape.teams
    mine = ((tokens + GROUP - 1) // GROUP - first + step - 1) // step * shape.owned
    if first * GROUP < tokens:
        cute.arch.mbarrier_wait(area.all_logits, 0)
        for i in cutlass.range(place.seat, mine, shape.team, unroll=1):
            token = (first + i // shape.owned * step) * GROUP + place.rank * shape.owned + i % shape.owned
            if token < tokens:
                rows = rows_of_streams(out.comb)
                comb = cute.make_rmem_tensor(cute.make_layout((STREAMS, STREAMS), stride=(STREAMS, 1)), Float32)
                for r in cutlass.range_constexpr(STREAMS):
                    cute.autovec_copy(rows[token * STREAMS + r, None], comb[r, None])
                mhc.sinkhorn(comb, given.iters, given.hc_eps, target)
                for r in cutlass.range_constexpr(STREAMS):
                    cute.autovec_copy(comb[r, None], rows[token * STREAMS + r, None])


def _pre(place: Place, area: Area, given: Inputs, target: Target, shape: Shape) -> list[list[Float32]]:
    """The weights of the collapse for this thread's two tokens; a lane computes one and gets three."""
    pre = []
    for t in range(2):
        token = place.row + 8 * t
        squares = _in_order([area.streams[r, token] for r in range(shape.ctas)], target)
        rms = _inverse_rms(squares, given, target, shape)
        dot = _in_order([area.pre[r, token, place.quad] for r in range(shape.ctas)], target)
        value = mhc.sigmoid(mhc.logit(dot, rms, given.scale[0], given.base[place.quad], target), target)
        mine = arith.add(value, given.hc_eps, target)
        pre.append([cute.arch.shuffle_sync(mine, place.lane // 4 * 4 + s) for s in range(STREAMS)])
    return pre


def _inverse_rms(squares: Float32, given: Inputs, target: Target, shape: Shape) -> Float32:
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
    partial = area.partial_y
    for t in cutlass.range_constexpr(2):
        total = Float32(0.0)
        for word in y[t]:
            total = mhc.add_squares(word, total, target)
        total = warp.sum_of_four(total, target)
        if place.quad == 0:
            partial[place.member, place.row + 8 * t] = total
    mbarrier.named_barrier(1 + place.team, shape.team)
    _send_to_all(area.partial_y, area.y, area.squares_here, place.seat, place.rank, target, shape)


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
    blocks.quantize([*low, *high], row, col, cols, here, given.enc[()], given, out, target)


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
    name = f"mhc_quant_narrow_{shape.ctas}x{shape.warps}{'' if shape.whole else '_ragged'}_{norm_dtype}"
    make = functools.partial(arguments, NORM_DTYPES[norm_dtype], target, shape)
    return KernelSpec(name, target.value, launch, make, (*shape, norm_dtype))
