"""mhc_quant for many tokens: one CuTe DSL kernel that works in two halves, one source for sm_90a and sm_100a.

First half: some CTAs have 16 tokens at a time, each CTA a slice of the hidden dims and that slice of fn in shared
memory for good. Each warp computes the new streams of 64 hidden dims, writes them, and multiplies them with fn while
they are in registers. The 24 dot products and the squares of the slice go to the CTA that owns the token.

Second half: the owner reads the token's new streams back, which are in L2, all hidden dims of them; so collapse, norm
and quantisation need no other CTA. The CTAs meet in global memory, since clusters of 16 would leave a seventh of an
H200 idle: a cooperative launch makes sure that all of them run.

The warps of a CTA are teams, each with a group of its own. Sinkhorn's iteration comes last, a thread a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_compact_tensor

from megamoe.cute import arith, exchange, mhc, recipe, ring, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import blocks, prefill_mix
from megamoe_stages.mhc_quant.kernel import NORM_DTYPES, arguments, zero_padding
from megamoe_stages.mhc_quant.places import (
    CHUNK,
    FACTORS,
    GROUP,
    MATRIX,
    ROWS,
    UNIT,
    Inputs,
    Outputs,
    Words,
    rows_of_streams,
)
from megamoe_stages.mhc_quant.prefill_cut import (
    BARRIER,
    LINE,
    MESSAGE,
    RUN,
    SHARE,
    WORD,
    Cut,
    Source,
    Spot,
    Turn,
    area,
    arrived,
    counter,
    first_half,
    first_turn,
    groups_of_a_turn,
    message,
    owned_token,
    parity_of,
    second_half,
    set_turn,
    share,
    spot,
    staged,
    staged_layout,
    tokens_of,
    turn_of,
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
    work: cute.Tensor,
    iters: Int32,
    hc_eps: Float32,
    norm_eps: Float32,
    tiled: Int32,
    sets: Int32,
    stream: CUstream,
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Launches `sets` sets of CTAs, with a group of tokens for every team at least; see Inputs and Outputs.

    `work` is for the exchange of sums; its counters are 0 before and after.
    """
    inputs = (x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    outputs = (residual, normed, codes, scales, dec, new_post, new_comb)
    layout = cute.make_layout(
        (cut.hidden, cute.size(f, mode=[0]), STREAMS), stride=(1, STREAMS * cut.hidden, cut.hidden)
    )
    box = (CHUNK, ROWS, STREAMS)
    atom, tensor = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), cute.make_tensor(x.iterator, layout), staged_layout(), box
    )
    mhc_quant_prefill(*inputs, *outputs, work, atom, tensor, target, cut).launch(
        grid=[sets * cut.ctas, 1, 1],
        block=[cut.all_warps * WARP, 1, 1],
        cooperative=True,
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
    work: cute.Tensor,
    atom: cute.CopyAtom,
    streams: cute.Tensor,
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """The kernel; see the module."""
    given = Inputs(x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    out = Outputs(residual, normed, codes, scales, dec, new_post, new_comb)
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    shared = cute.arch.get_dyn_smem(BFloat16, alignment=128)
    floats, source, here = exchange.address(shared), Source(atom, streams), spot(cut)
    groups = (tokens_of(given) + GROUP - 1) // GROUP
    group = first_turn(cut) >> 1
    set_turn(floats, first_turn(cut), cut)
    if thread < cut.all_warps * cut.stages:
        ring.init(floats + (cut.barriers_at + thread * BARRIER), 1)
    ring.init_fence()
    cute.arch.sync_threads()
    _fetch_factors(Turn(group, Int32(0)), floats, given, cut)
    for t in range(cut.stages):
        _ask(t, 0, group, shared, source, cut)
    ahead = _load_f(0, group, given, cut)
    prefill_mix.fetch_fn(floats, here, given, target, cut)
    _fetch_weights(floats, given, target, cut)
    zero_padding(out, tokens_of(given), tiled, cta * (cut.all_warps * WARP) + thread, ctas * (cut.all_warps * WARP))
    if cta + thread == 0:
        dec[()] = recipe.global_scale(enc[()], target).dec
    exchange.wait_copies()
    cute.arch.sync_threads()
    while turn_of(floats, cut).group < groups:
        ahead = _turn(ahead, shared, source, work, given, out, target, cut)
    turn = turn_of(floats, cut)
    last = Turn(turn.group - groups_of_a_turn(cut), turn.parity ^ 1)
    _sinkhorn(last.group, groups_of_a_turn(cut), given, out, target, cut)
    exchange.wait_copies()  # of a group that is not there
    for t in range(cut.stages):
        ring.wait(arrived(floats, spot(cut), t, cut), Int32(0))
    _leave(work, cut)


def _turn(
    ahead: Words,
    shared: cute.Pointer,
    source: Source,
    work: cute.Tensor,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> Words:
    """Both halves of a group.

    Takes F of the group's chunk 0, and returns that of the team's next group.
    """
    base = exchange.address(shared)
    sums, squares = prefill_mix.no_sums(), [Float32(0.0)] * 2
    for chunk in range(2):
        streams, more = _new_streams(chunk, ahead, shared, source, given, out, target, cut)
        turn = turn_of(base, cut)
        if chunk == 0:
            ahead = _load_f(1, turn.group, given, cut)
            _fetch_factors(Turn(turn.group + groups_of_a_turn(cut), turn.parity ^ 1), base, given, cut)
        else:
            ahead = _load_f(0, turn.group + groups_of_a_turn(cut), given, cut)
        squares = [arith.add(*pair, target) for pair in zip(squares, more, strict=True)]
        sums = prefill_mix.add_dots(streams, chunk, sums, base, spot(cut))
    _keep_sums(prefill_mix.dots(sums, target), squares, base, cut)
    exchange.wait_copies()  # of the factors: the barrier shows them to the team
    exchange.meet(1 + spot(cut).team, cut.team)
    _send_sums(base, work, target, cut)
    turn = turn_of(base, cut)
    _second_half(turn, base, work, given, out, target, cut)
    turn = turn_of(base, cut)
    set_turn(base, 2 * (turn.group + groups_of_a_turn(cut)) + (turn.parity ^ 1), cut)
    return ahead


def _load_f(chunk: int, group: Int32, given: Inputs, cut: Cut) -> Words:
    """A chunk of the sublayer's output of this thread's two tokens of a group; where there is none, the last one's."""
    here, words = spot(cut), []
    for t in range(2):
        row = cutlass.min(group * GROUP + here.row + 8 * t, tokens_of(given) - 1)
        words += exchange.load16_once(first_half(given.f, 1, row, chunk, here, cut))
    return words


@cute.jit
def _ask(
    t: Constexpr[int],
    chunk: Constexpr[int],
    group: Int32,
    shared: cute.Pointer,
    source: Constexpr[Source],
    cut: Constexpr[Cut],
) -> None:
    """Asks for a chunk of the streams of this warp's tokens 8 t to 8 t + 7 of a group; there come zeros for none.

    All lanes have read what is there before.
    """
    here = spot(cut)
    cute.arch.sync_warp()
    bar = arrived(exchange.address(shared), here, t, cut)
    if here.lane == 0:
        ring.expect(bar, Int32(cut.staged_bytes))
    box = (CHUNK, ROWS, STREAMS)
    place = ((here.rank * cut.warps + here.member) * (UNIT // CHUNK) + chunk, group * (GROUP // ROWS) + t, 0)
    tile = cute.local_tile(source.tensor, box, place)
    room = cute.make_tensor((shared + staged(here, t, cut) // 2).align(128), staged_layout())
    to, origin = cpasync.tma_partition(
        source.atom, 0, cute.make_layout(1), cute.group_modes(room, 0, 3), cute.group_modes(tile, 0, 3)
    )
    pointer = (shared + (cut.barriers_at // 2 + (here.wide * cut.stages + t % cut.stages) * (BARRIER // 2))).align(8)
    cute.copy(source.atom, origin, to, tma_bar_ptr=cute.recast_ptr(pointer, dtype=Int64))


@cute.jit
def _fetch_factors(turn: Constexpr[Turn], base: Int32, given: Constexpr[Inputs], cut: Constexpr[Cut]) -> None:
    """Copies post and comb of a group's tokens to shared memory, 16 bytes a thread."""
    here = spot(cut)
    seat = here.member * WARP + here.lane
    token = arith.select(seat < GROUP * STREAMS, seat // STREAMS, seat - GROUP * STREAMS)
    row = cutlass.min(turn.group * GROUP + token, tokens_of(given) - 1)
    part = arith.select(seat < GROUP * STREAMS, seat % STREAMS + 1, Int32(0))
    comb = exchange.global_address(given.comb) + Int64(row * (MATRIX * WORD) + (part - 1) * LINE)
    source = arith.select(part > 0, comb, exchange.global_address(given.post) + Int64(row * LINE))
    if seat < GROUP * (STREAMS + 1):
        exchange.copy16(source, _factors_at(token, turn.parity, base, here, cut) + part * LINE)


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
            for i in cutlass.range_constexpr(2):
                exchange.store_floats(_weights_at(base, run, i, here, cut), weights[4 * i : 4 * i + 4])


def _weights_at(base: Int32, run: Int32, i: int, here: Spot, cut: Cut) -> Int32:
    """Where a lane's weights 4 i to 4 i + 3 of a run of hidden dims lie."""
    return base + (cut.weights_at + i * WARP * LINE) + (run * (2 * WARP * LINE) + here.lane * LINE)


def _read_weights(run: Int32, lane: Int32, given: Inputs) -> list[Float32]:
    """The norm's weights of a lane's 8 dims of a run, from global memory."""
    dtype = given.norm_weight.element_type
    size = dtype.width // 8
    at = exchange.global_address(given.norm_weight) + Int64((run * RUN + lane * 8) * size)
    words = [word for i in range(8 * size // LINE) for word in exchange.load16(at + i * LINE)]
    return recipe.values(words, dtype)


def _new_streams(
    chunk: int,
    ahead: Words,
    shared: cute.Pointer,
    source: Source,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> tuple[list[list[Words]], list[Float32]]:
    """The new streams of a chunk of this thread's two tokens, [token][stream][word], which it writes; their squares.

    Asks for what comes next to a place once it has used what was there: a copy may not overtake the reads.
    """
    streams, squares, base = [], [], exchange.address(shared)
    for t in range(2):
        here, turn = spot(cut), turn_of(base, cut)
        ring.wait(arrived(base, here, t, cut), Int32(parity_of(chunk, t, cut)))
        at = base + staged(here, t, cut) + here.lane * LINE
        lines = [ahead[4 * t : 4 * t + 4]]
        lines += [ring.load16(at + s * (ROWS * CHUNK * 2)) for s in range(STREAMS)]
        factors_at = _factors_at(here.row + 8 * t, turn.parity, base, here, cut)
        factors = functools.partial(_factors, factors_at)
        new = mhc.post_mix(lines, factors, target)
        token = turn.group * GROUP + here.row + 8 * t
        exists = arith.select(token < tokens_of(given), Int32(1), Int32(0))
        at = first_half(out.residual, STREAMS, token, chunk, here, cut)
        for s, four in enumerate(new):
            ring.store_global16_if(at + s * cut.hidden * 2, four, exists)
        streams.append(new)
        if t + cut.stages < 2:
            _ask(t + 1, chunk, turn.group, shared, source, cut)
        elif chunk == 0:
            _ask((t + cut.stages) % 2, 1, turn.group, shared, source, cut)
        else:
            _ask((t + cut.stages) % 2, 0, turn.group + groups_of_a_turn(cut), shared, source, cut)
        squares.append(prefill_mix.squares(new, spot(cut), target))
    return streams, squares


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
def _send_sums(base: Int32, work: cute.Tensor, target: Constexpr[Target], cut: Constexpr[Cut]) -> None:
    """Sums over the team's warps and sends each token's sums to its owner, then says so."""
    here = spot(cut)
    at = area(base, here, cut)
    seat, parity = here.member * WARP + here.lane, turn_of(base, cut).parity
    fours = LOGITS // 4
    if seat < GROUP * fours:
        token, four = seat // fours, seat % fours
        rows = [at + cut.partial_at + m * (GROUP * LOGITS * WORD) + seat * LINE for m in range(cut.warps)]
        loaded = [exchange.load_floats(row, 4) for row in rows]
        sums = [_in_order(values, target) for values in zip(*loaded, strict=True)]
        words = [value.bitcast(Uint32) for value in sums]
        ring.store_global16_if(message(work, token, here.rank, parity, here, cut) + four * LINE, words, Int32(1))
    elif seat < GROUP * (fours + 1):
        token = seat - GROUP * fours
        parts = [exchange.load_floats(at + cut.squares_at + (m * GROUP + token) * WORD, 1)[0] for m in range(cut.warps)]
        exchange.store_global(
            message(work, token, here.rank, parity, here, cut) + fours * LINE, _in_order(parts, target)
        )
    number = 1 + cut.teams + here.team
    if here.member == 0:
        exchange.meet(number, cut.team)  # all sums have been sent, all streams written
        if here.lane == 0:
            exchange.count(counter(work, here, cut))
    else:
        exchange.pass_by(number, cut.team)


def _second_half(
    turn: Turn, base: Int32, work: cute.Tensor, given: Inputs, out: Outputs, target: Target, cut: Cut
) -> None:
    """From the new streams of this warp's token to its output: collapse, norm, quantisation of 1024 hidden dims."""
    here, group, parity = spot(cut), turn.group, turn.parity
    token = owned_token(group, here, cut)
    row = cutlass.min(token, tokens_of(given) - 1)
    exchange.wait_count(counter(work, here, cut), (group // groups_of_a_turn(cut) + 1) * cut.ctas)
    at = second_half(out.residual, STREAMS, row, here, cut)
    runs, encode = SHARE // RUN, given.enc[()]
    lines = [[exchange.load16_once(at + (s * cut.hidden + i * RUN) * 2) for s in range(STREAMS)] for i in range(runs)]
    pre = _pre(token, parity, work, given, out, target, cut)
    y, total = [], Float32(0.0)
    for run in lines:
        words = [mhc.collapse([stream[w] for stream in run], pre, target) for w in range(4)]
        for word in words:
            total = mhc.add_squares(word, total, target)
        y.append(words)
    for distance in (16, 8, 4, 2, 1):
        total = arith.add(total, warp.from_lane(total, distance), target)
    here = spot(cut)
    _keep_y_squares(total, area(base, here, cut) + cut.y_squares_at + here.member * WORD, here)
    exchange.meet(1 + here.team, cut.team)
    factor = mhc.inverse_rms(_y_squares(base, target, cut), cut.hidden, given.norm_eps, target)
    for i in range(0, runs, 2):
        _finish(i, y[i : i + 2], factor, encode, group, base, given, out, target, cut)


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
    token: Int32, parity: Int32, work: cute.Tensor, given: Inputs, out: Outputs, target: Target, cut: Cut
) -> list[Float32]:
    """The weights of the collapse of this warp's token; lane r computes logit r, and writes it if of post or comb."""
    here = spot(cut)
    lane = cutlass.min(here.lane, LOGITS)  # that one has the squares
    place = here.rank * cut.owned + here.member // cut.sharers
    first = message(work, place, 0, parity, here, cut) + Int64(lane * WORD)
    got = [exchange.load_float(first + r * (MESSAGE * WORD)) for r in range(cut.ctas)]
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
    first: int,
    y: list[Words],
    factor: Float32,
    encode: Float32,
    group: Int32,
    base: Int32,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> None:
    """Norm and quantisation of two runs of a warp's share, `first` and the next: two half blocks make a block each."""
    here = spot(cut)
    token = owned_token(group, here, cut)
    exists = token < tokens_of(given)
    flag = arith.select(exists, Int32(1), Int32(0))
    halves = []
    for i, line in enumerate(y):
        run = share(here, cut) * (SHARE // RUN) + (first + i)
        if cut.roomy:
            weights = [
                value for k in range(2) for value in exchange.load_floats(_weights_at(base, run, k, here, cut), 4)
            ]
        else:
            weights = _read_weights(run, here.lane, given)
        words = [mhc.normalise(line[w], factor, weights[2 * w : 2 * w + 2], target) for w in range(4)]
        at = second_half(out.normed, 1, token, here, cut) + (first + i) * RUN * 2
        ring.store_global16_if(at, words, flag)
        halves.append(words)
    even = here.lane % 2 == 0
    got = [warp.from_lane(arith.select(even, b, a), 1) for a, b in zip(*halves, strict=True)]
    low = [arith.select(even, a, other) for a, other in zip(halves[0], got, strict=True)]
    high = [arith.select(even, other, b) for b, other in zip(halves[1], got, strict=True)]
    col = share(here, cut) * (SHARE // BLOCK) + (first + here.lane % 2) * (RUN // BLOCK) + here.lane // 2
    blocks.quantize([*low, *high], token, col, cut.hidden // BLOCK, exists, encode, given, out, target)


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


@cute.jit
def _leave(work: cute.Tensor, cut: Constexpr[Cut]) -> None:
    """The last CTA of a team's to leave makes its counters 0 again: nobody waits for them any more."""
    here = spot(cut)
    exchange.meet(1 + here.team, cut.team)
    if (here.member == 0) & (here.lane == 0):
        at = counter(work, here, cut)
        if exchange.count_and_tell(at + WORD) == cut.ctas - 1:
            exchange.store_global(at, Float32(0.0))
            exchange.store_global(at + WORD, Float32(0.0))


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

    def make() -> tuple[object, ...]:
        *tensors, iters, hc_eps, norm_eps, tiled, sets, stream, _, _ = arguments(NORM_DTYPES[norm_dtype], target, cut)
        work = make_fake_compact_tensor(Float32, (cute.sym_int32(),), assumed_align=LINE)
        return (*tensors, work, iters, hc_eps, norm_eps, tiled, sets, stream, target, cut)

    return KernelSpec(name, target.value, launch, make, (*cut, norm_dtype))
