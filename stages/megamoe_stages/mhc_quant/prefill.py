"""mhc_quant for many tokens: one CuTe DSL kernel that works in two halves, one source for sm_90a and sm_100a.

First half: a cluster of CTAs has 16 tokens at a time, each CTA a slice of the hidden dims and that slice of fn in shared memory
for good. Each warp computes the new streams of 64 hidden dims, writes them, and multiplies them with fn while they are in
registers. The 24 dot products and the squares of the slice go to the CTA that owns the token.

Second half: the owner reads the token's new streams back, which are in L2, all hidden dims of them; so collapse, norm and
quantisation need no other CTA. It comes one group after the first half, so nobody waits for a cluster that is late.

The warps of a CTA are teams, each with a group of its own. Sinkhorn's iteration comes last, a thread a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, exchange, mhc, recipe, ring, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import blocks, prefill_mix
from megamoe_stages.mhc_quant.kernel import NORM_DTYPES, arguments, zero_padding
from megamoe_stages.mhc_quant.places import FACTORS, GROUP, MATRIX, ROWS, Inputs, Outputs, Words, rows_of_streams
from megamoe_stages.mhc_quant.prefill_cut import (
    LINE,
    MESSAGE,
    RUN,
    SHARE,
    WORD,
    Cut,
    Spot,
    area,
    barrier,
    first_half,
    owned_token,
    second_half,
    share,
    spot,
    staged,
    tokens_of,
)

LANE_BYTES = 2 * BLOCK  # of a block of bf16


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
    cut: Constexpr[Cut],
) -> None:
    """Launches `clusters` clusters, with a group of tokens for every team at least; see Inputs and Outputs."""
    inputs = (x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    outputs = (residual, normed, codes, scales, dec, new_post, new_comb)
    mhc_quant_prefill(*inputs, *outputs, target, cut).launch(
        grid=[clusters * cut.ctas, 1, 1],
        block=[cut.all_warps * WARP, 1, 1],
        cluster=[cut.ctas, 1, 1],
        smem=cut.shared_bytes,
        min_blocks_per_mp=1,  # or ptxas saves registers for a second CTA, for which there is no shared memory
        stream=stream,
    )


@cute.kernel
def mhc_quant_prefill(
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
    cut: Constexpr[Cut],
) -> None:
    """The kernel; see the module."""
    given = Inputs(x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    out = Outputs(residual, normed, codes, scales, dec, new_post, new_comb)
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    floats = exchange.address(cute.arch.get_dyn_smem(Float32, alignment=128))
    here = spot(cut)
    groups = (tokens_of(given) + GROUP - 1) // GROUP
    step = ctas // cut.ctas * cut.teams
    group = cta // cut.ctas * cut.teams + here.team  # neighbours in a CTA
    if thread < cut.teams:
        ring.init(floats + (cut.barriers_at + thread * 8), cut.ctas)
    ring.init_fence()
    cute.arch.sync_threads()
    cute.arch.cluster_arrive_relaxed()
    _fetch_factors(group, Int32(0), floats, given, cut)
    ahead = _request(0, group, floats, given, cut)
    prefill_mix.fetch_fn(floats, here, given, target, cut)
    _fetch_weights(floats, given, target, cut)
    zero_padding(out, tokens_of(given), tiled, cta * (cut.all_warps * WARP) + thread, ctas * (cut.all_warps * WARP))
    if cta + thread == 0:
        dec[()] = recipe.global_scale(enc[()], target).dec
    exchange.wait_copies()
    cute.arch.sync_threads()
    cute.arch.cluster_wait()
    turn = Int32(0)
    ahead = _turn(group, group, turn, ahead, floats, given, out, target, cut, follows=False)
    while group + step < groups:
        turn ^= 1
        group += step
        ahead = _turn(group, group - step, turn, ahead, floats, given, out, target, cut, follows=True)
    _second_half(group, turn, floats, given, out, target, cut)
    _sinkhorn(group, step, given, out, target, cut)
    exchange.wait_copies()  # of a group that is not there
    cute.arch.cluster_arrive_relaxed()  # no CTA ends while another may still write to it
    cute.arch.cluster_wait()


def _turn(
    group: Int32,
    last: Int32,
    turn: Int32,
    ahead: Words,
    base: Int32,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
    *,
    follows: bool,
) -> Words:
    """The first half of a group, and the second half of the team's `last` one where this `follows` one.

    Takes what `_request` loaded of the group's chunk 0, and returns that of the team's next group. The second half is in
    the middle, so that each chunk is on its way while something else is done.
    """
    step = cute.arch.grid_dim()[0] // cut.ctas * cut.teams
    sums, squares = prefill_mix.no_sums(), [Float32(0.0)] * 2
    for chunk in range(2):
        if chunk and follows:
            _second_half(last, turn ^ 1, base, given, out, target, cut)
        exchange.wait_copies()
        streams = _new_streams(chunk, ahead, group, turn, base, given, out, target, cut)
        if chunk:
            ahead = _request(0, group + step, base, given, cut)
        else:
            ahead = _request(1, group, base, given, cut)
            _fetch_factors(group + step, turn ^ 1, base, given, cut)
        more = prefill_mix.squares(streams, spot(cut), target)
        squares = [arith.add(*pair, target) for pair in zip(squares, more, strict=True)]
        sums = prefill_mix.add_dots(streams, chunk, sums, base, spot(cut))
    _keep_sums(prefill_mix.dots(sums, target), squares, base, cut)
    exchange.meet(1 + spot(cut).team, cut.team)
    _send_sums(turn, base, target, cut)
    return ahead


def _request(chunk: int, group: Int32, base: Int32, given: Inputs, cut: Cut) -> Words:
    """Asks for a chunk of this thread's two tokens; of those that do not exist, the last one's instead.

    Returns the words that come in registers: of each token a line of F, then, where there is no room for them in shared
    memory, a line of every stream.
    """
    here, words = spot(cut), []
    for t in range(2):
        row = cutlass.min(group * GROUP + here.row + 8 * t, tokens_of(given) - 1)
        words += exchange.load16_once(first_half(given.f, 1, row, chunk, here, cut))
        x = first_half(given.x, STREAMS, row, chunk, here, cut)
        for s in range(STREAMS):
            at = x + s * cut.hidden * 2
            if cut.roomy:
                exchange.copy16(at, staged(base, here, t, s, cut))
            else:
                words += exchange.load16_once(at)
    return words


@cute.jit
def _fetch_factors(group: Int32, parity: Int32, base: Int32, given: Constexpr[Inputs], cut: Constexpr[Cut]) -> None:
    """Copies post and comb of a group's tokens to shared memory, 16 bytes a thread."""
    here = spot(cut)
    seat = here.member * WARP + here.lane
    token = arith.select(seat < GROUP * STREAMS, seat // STREAMS, seat - GROUP * STREAMS)
    row = cutlass.min(group * GROUP + token, tokens_of(given) - 1)
    part = arith.select(seat < GROUP * STREAMS, seat % STREAMS + 1, Int32(0))
    comb = exchange.global_address(given.comb) + Int64(row * (MATRIX * WORD) + (part - 1) * LINE)
    source = arith.select(part > 0, comb, exchange.global_address(given.post) + Int64(row * LINE))
    if seat < GROUP * (STREAMS + 1):
        exchange.copy16(source, _factors_at(token, parity, base, here, cut) + part * LINE)


def _factors_at(token: Int32, parity: Int32, base: Int32, here: Spot, cut: Cut) -> Int32:
    """Where post and comb of a group's token lie."""
    return area(base, here, cut) + (parity * GROUP + token) * (FACTORS * WORD)


@cute.jit
def _fetch_weights(base: Int32, given: Constexpr[Inputs], target: Constexpr[Target], cut: Constexpr[Cut]) -> None:
    """Brings the norm's weights to shared memory, each lane's lines of four side by side."""
    if cutlass.const_expr(cut.roomy):
        here = spot(cut)
        for run in cutlass.range(here.wide, cut.hidden // RUN, cut.all_warps, unroll=1):
            weights = _read_weights(run, here.lane, given)
            for i in cutlass.range_constexpr(BLOCK // 4):
                exchange.store_floats(_weights_at(base, run, i, here, cut), weights[4 * i : 4 * i + 4])


def _weights_at(base: Int32, run: Int32, i: int, here: Spot, cut: Cut) -> Int32:
    """Where a lane's weights 4 i to 4 i + 3 of a run of hidden dims lie."""
    return base + (cut.weights_at + i * WARP * LINE) + (run * (BLOCK // 4 * WARP * LINE) + here.lane * LINE)


def _read_weights(run: Int32, lane: Int32, given: Inputs) -> list[Float32]:
    """The norm's weights of a lane's block of a run of hidden dims, from global memory."""
    dtype = given.norm_weight.element_type
    size = dtype.width // 8
    at = exchange.global_address(given.norm_weight) + Int64((run * RUN + lane * BLOCK) * size)
    words = [word for i in range(BLOCK * size // LINE) for word in exchange.load16(at + i * LINE)]
    return recipe.values(words, dtype)


def _new_streams(
    chunk: int,
    ahead: Words,
    group: Int32,
    parity: Int32,
    base: Int32,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> list[list[Words]]:
    """The new streams of a chunk of this thread's two tokens, [token][stream][word], which it writes too."""
    streams = []
    for t in range(2):
        here = spot(cut)
        if cut.roomy:
            lines = [ahead[4 * t : 4 * t + 4]]
            lines += [ring.load16(staged(base, here, t, s, cut)) for s in range(STREAMS)]
        else:
            mine = ahead[20 * t : 20 * t + 20]
            lines = [mine[i : i + 4] for i in range(0, 20, 4)]
        factors_at = _factors_at(here.row + 8 * t, parity, base, here, cut)
        factors = functools.partial(_factors, factors_at)
        new = mhc.post_mix(lines, factors, target)
        token = group * GROUP + here.row + 8 * t
        exists = arith.select(token < tokens_of(given), Int32(1), Int32(0))
        at = first_half(out.residual, STREAMS, token, chunk, here, cut)
        for s, words in enumerate(new):
            ring.store_global16_if(at + s * cut.hidden * 2, words, exists)
        streams.append(new)
    return streams


def _factors(at: Int32, row: int) -> list[Float32]:
    return exchange.load_floats(at + row * LINE, 4)


@cute.jit
def _keep_sums(
    dots: Constexpr[list[list[Float32]]], squares: Constexpr[list[Float32]], base: Int32, cut: Constexpr[Cut]
) -> None:
    """Writes this warp's sums to shared memory."""
    here = spot(cut)
    at = area(base, here, cut)
    rows = at + (cut.partial_at + here.member * (GROUP * LOGITS * WORD)) + (here.quad * 2 * LOGITS + here.row) * WORD
    for t in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(6):
            exchange.store_floats(rows + ((t * 8 + i % 2) * LOGITS + i // 2 * ROWS) * WORD, [dots[t][i]])
    if here.quad == here.row // 2:
        for t in cutlass.range_constexpr(2):
            token = here.member * GROUP + here.row + 8 * t
            exchange.store_floats(at + cut.squares_at + token * WORD, [squares[t]])


@cute.jit
def _send_sums(parity: Int32, base: Int32, target: Constexpr[Target], cut: Constexpr[Cut]) -> None:
    """Sums over the team's warps and sends each token's sums to its owner, then says so."""
    here = spot(cut)
    at = area(base, here, cut)
    seat = here.member * WARP + here.lane
    fours = LOGITS // 4
    if seat < GROUP * fours:
        token, four = seat // fours, seat % fours
        rows = [at + cut.partial_at + m * (GROUP * LOGITS * WORD) + seat * LINE for m in range(cut.warps)]
        loaded = [exchange.load_floats(row, 4) for row in rows]
        sums = [_in_order(values, target) for values in zip(*loaded, strict=True)]
        exchange.store4(_message_at(at, token, here.rank, parity, cut) + four * LINE, sums, token // cut.owned)
    elif seat < GROUP * (fours + 1):
        token = seat - GROUP * fours
        parts = [exchange.load_floats(at + cut.squares_at + (m * GROUP + token) * WORD, 1)[0] for m in range(cut.warps)]
        message = [_in_order(parts, target), Float32(0.0), Float32(0.0), Float32(0.0)]
        exchange.store4(_message_at(at, token, here.rank, parity, cut) + fours * LINE, message, token // cut.owned)
    number = 1 + cut.teams + here.team
    if here.member == 0:
        exchange.meet(number, cut.team)  # all sums have been sent, all streams written
        if here.lane < cut.ctas:
            exchange.arrive(barrier(base, here, cut), here.lane)
    else:
        exchange.pass_by(number, cut.team)


def _message_at(area_at: Int32, token: Int32, rank: Int32 | int, parity: Int32, cut: Cut) -> Int32:
    """Where a CTA's sums for a token of a group lie at its owner."""
    slot = token % cut.owned * cut.ctas + rank
    return area_at + cut.received_at + parity * cut.received_bytes + slot * (MESSAGE * WORD)


def _second_half(
    group: Int32, parity: Int32, base: Int32, given: Inputs, out: Outputs, target: Target, cut: Cut
) -> None:
    """From the new streams of this warp's token to its output: collapse, norm, quantisation of 1024 hidden dims."""
    here = spot(cut)
    token = owned_token(group, here, cut)
    row = cutlass.min(token, tokens_of(given) - 1)
    exchange.wait(barrier(base, here, cut), parity)
    at = second_half(out.residual, STREAMS * cut.hidden * 2, LANE_BYTES, row, here, cut)
    lines = [_load_block(at + b * RUN * 2, cut) for b in range(2)]
    pre = _pre(token, parity, base, given, out, target, cut)
    y, total = [], Float32(0.0)
    for block in lines:
        words = [mhc.collapse([stream[w] for stream in block], pre, target) for w in range(BLOCK // 2)]
        for word in words:
            total = mhc.add_squares(word, total, target)
        y.append(words)
    for distance in (16, 8, 4, 2, 1):
        total = arith.add(total, warp.from_lane(total, distance), target)
    here = spot(cut)
    _keep_y_squares(total, area(base, here, cut) + cut.y_squares_at + here.member * WORD, here)
    exchange.meet(1 + here.team, cut.team)
    factor = mhc.inverse_rms(_y_squares(base, target, cut), cut.hidden, given.norm_eps, target)
    for b in range(2):
        _finish(b, y[b], factor, group, base, given, out, target, cut)


def _load_block(at: Int64, cut: Cut) -> list[Words]:
    """The words of a block of every stream."""
    streams = []
    for s in range(STREAMS):
        words = exchange.load16_once(at + s * cut.hidden * 2)
        streams.append(words + exchange.load16_once(at + (s * cut.hidden * 2 + LINE)))
    return streams


@cute.jit
def _keep_y_squares(total: Float32, at: Int32, here: Constexpr[Spot]) -> None:
    if here.lane == 0:
        exchange.store_floats(at, [total])


def _y_squares(base: Int32, target: Target, cut: Cut) -> Float32:
    """The squares of y of this warp's token."""
    here = spot(cut)
    first = area(base, here, cut) + cut.y_squares_at + here.member // cut.sharers * (cut.sharers * WORD)
    return _in_order([exchange.load_floats(first + m * WORD, 1)[0] for m in range(cut.sharers)], target)


def _pre(
    token: Int32, parity: Int32, base: Int32, given: Inputs, out: Outputs, target: Target, cut: Cut
) -> list[Float32]:
    """The weights of the collapse of this warp's token; lane r computes logit r of all, and writes it if it is none of these."""
    here = spot(cut)
    lane = cutlass.min(here.lane, LOGITS)  # that one has the squares
    first = _message_at(area(base, here, cut), here.member // cut.sharers, 0, parity, cut) + lane * WORD
    got = [exchange.load_floats(first + r * (MESSAGE * WORD), 1)[0] for r in range(cut.ctas)]
    total = _in_order(got, target)
    squares = cute.arch.shuffle_sync(total, LOGITS)
    rms = mhc.inverse_rms(squares, cut.hidden * STREAMS, given.norm_eps, target)
    r = cutlass.min(here.lane, LOGITS - 1)
    kind = arith.select(r < STREAMS, Int32(0), arith.select(r < 2 * STREAMS, Int32(1), Int32(2)))
    value = mhc.logit(total, rms, given.scale[kind], given.base[r], target)
    weight = mhc.sigmoid(value, target)
    _write_logits(token, value, weight, given, out, target, cut)
    mine = arith.add(weight, given.hc_eps, target)
    return [cute.arch.shuffle_sync(mine, s) for s in range(STREAMS)]


@cute.jit
def _write_logits(
    token: Int32,
    value: Float32,
    weight: Float32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """The first of a token's warps writes its new post, and the logits of comb in comb's place."""
    here = spot(cut)
    is_post = here.lane < 2 * STREAMS
    post = arith.mul(weight, Float32(mhc.POST_MULTIPLIER), target)
    at = arith.select(
        is_post,
        exchange.global_address(out.post) + Int64((token * STREAMS + here.lane - STREAMS) * WORD),
        exchange.global_address(out.comb) + Int64((token * MATRIX + here.lane - 2 * STREAMS) * WORD),
    )
    mine = (here.lane >= STREAMS) & (here.lane < LOGITS) & (token < tokens_of(given)) & (share(here, cut) == 0)
    if mine:
        exchange.store_global(at, arith.select(is_post, post, value))


def _finish(
    b: int,
    y: Words,
    factor: Float32,
    group: Int32,
    base: Int32,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> None:
    """Norm and quantisation of a lane's block b, 0 or 1."""
    here = spot(cut)
    run = share(here, cut) * (SHARE // RUN) + b
    if cut.roomy:
        places = [_weights_at(base, run, i, here, cut) for i in range(BLOCK // 4)]
        weights = [value for at in places for value in exchange.load_floats(at, 4)]
    else:
        weights = _read_weights(run, here.lane, given)
    words = [mhc.normalise(y[w], factor, weights[2 * w : 2 * w + 2], target) for w in range(BLOCK // 2)]
    token = owned_token(group, here, cut)
    exists = token < tokens_of(given)
    at = second_half(out.normed, cut.hidden * 2, LANE_BYTES, token, here, cut) + b * RUN * 2
    flag = arith.select(exists, Int32(1), Int32(0))
    for half in range(2):
        ring.store_global16_if(at + half * LINE, words[4 * half : 4 * half + 4], flag)
    col = run * (RUN // BLOCK) + here.lane
    blocks.quantize(words, token, col, cut.hidden // BLOCK, exists, given, out, target)


@cute.jit
def _sinkhorn(
    group: Int32,
    step: Int32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Turns the logits of this team's tokens, the last of them in `group`, into comb; a thread a token."""
    here = spot(cut)
    exchange.meet(1 + here.team, cut.team)
    seat = here.member * WARP + here.lane
    mine = (group // step + 1) * cut.owned
    rows = rows_of_streams(out.comb)
    for i in cutlass.range(seat, mine, cut.team, unroll=1):
        token = (group - i // cut.owned * step) * GROUP + here.rank * cut.owned + i % cut.owned
        if token < tokens_of(given):
            comb = cute.make_rmem_tensor(cute.make_layout((STREAMS, STREAMS), stride=(STREAMS, 1)), Float32)
            for r in cutlass.range_constexpr(STREAMS):
                cute.autovec_copy(rows[token * STREAMS + r, None], comb[r, None])
            mhc.sinkhorn(comb, given.iters, given.hc_eps, target)
            for r in cutlass.range_constexpr(STREAMS):
                cute.autovec_copy(comb[r, None], rows[token * STREAMS + r, None])


def _in_order(values: Sequence[Float32], target: Target) -> Float32:
    """A sum in this very order, so that every run finds the same bits."""
    return functools.reduce(lambda total, value: arith.add(total, value, target), values)


def spec(cut: Cut, norm_dtype: str, target: Target) -> KernelSpec:
    """The kernel for one cut, any number of tokens that gives every team a group, both scale layouts.

    Args:
        cut: How the work is cut.
        norm_dtype: A key of NORM_DTYPES.
        target: A GPU.
    """
    name = f"mhc_quant_prefill_{cut.hidden}_{norm_dtype}"
    make = functools.partial(arguments, NORM_DTYPES[norm_dtype], target, cut)
    return KernelSpec(name, target.value, launch, make, (*cut, norm_dtype))
