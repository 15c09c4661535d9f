"""mhc_quant for many tokens: a CuTe DSL kernel that streams, one source for sm_90a and sm_100a.

First half: a cluster has a batch of tokens at a time, each of its CTAs a slice of the hidden dims of all of them. X and
F come straight into registers, some steps ahead, by rows of 256 or 512 bytes; the new streams are written by such rows,
to memory and to a tile in shared memory, from where they are multiplied with fn, which comes tile by tile
(`prefill_mix` has brought it in order). At the end each warp sends its 24 dot products and the squares of each token to
the CTA that owns the token: one barrier of the cluster a batch.

Second half: a warp reads the new streams of its token back, which are still in L2, all hidden dims of them; so
collapse, norm and quantisation need nobody else. Sinkhorn's iteration comes last, a thread a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor

from megamoe.cute import arith, exchange, mhc, recipe, ring, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import blocks, prefill_mix
from megamoe_stages.mhc_quant.kernel import NORM_DTYPES, arguments, zero_padding
from megamoe_stages.mhc_quant.places import CHUNK, GROUP, MATRIX, ROWS, Inputs, Outputs, Words, rows_of_streams
from megamoe_stages.mhc_quant.prefill_cut import (
    AHEAD,
    BARRIER,
    LINE,
    MESSAGE,
    PIECE,
    RUN,
    WARPS,
    WORD,
    Cut,
    Spot,
    clamped,
    clusters,
    factors_of,
    first_half,
    in_tile,
    place_of,
    rank_of,
    second_half,
    spot,
    sums_of,
    tokens_of,
)

SOURCES = 1 + STREAMS  # lines that a new line of every stream is made of: F's, and one of each old stream
STEPS = 2  # for which a thread has loaded its lines
EARLY = 2  # runs of a warp's next token that it loads before the norm of this one
TOKENS = 2  # of a thread when streams are multiplied with fn


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
    pieces: cute.Tensor,
    iters: Int32,
    hc_eps: Float32,
    norm_eps: Float32,
    tiled: Int32,
    sets: Int32,
    stream: CUstream,
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Launches `sets` clusters, which share the batches of tokens evenly; see Inputs and Outputs.

    `pieces` is fn in the order of `prefill_mix`, written by the launch just before.
    """
    given = Inputs(x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    out = Outputs(residual, normed, codes, scales, dec, new_post, new_comb)
    mhc_quant_prefill(given, out, pieces, target, cut).launch(
        grid=[sets * cut.ctas, 1, 1],
        block=[cut.threads, 1, 1],
        cluster=[cut.ctas, 1, 1],
        smem=cut.shared_bytes,
        min_blocks_per_mp=1,  # or ptxas saves registers for a second CTA, for which there is no shared memory
        use_pdl=True,
        stream=stream,
    )


class State:
    """What a thread keeps from tile to tile, in registers.

    Attributes:
        ahead: (STEPS, SOURCES, 4) words of the next steps.
        sums: (TOKENS, 3, 4) dots of this batch, see `prefill_mix.add_dots`.
        squares: (TOKENS,) of this batch.
    """

    def __init__(self) -> None:
        self.ahead = cute.make_rmem_tensor((STEPS * SOURCES * 4,), Uint32)
        self.sums = cute.make_rmem_tensor((TOKENS * 3 * 4,), Float32)
        self.squares = cute.make_rmem_tensor((TOKENS,), Float32)


@cute.kernel
def mhc_quant_prefill(
    given: Inputs, out: Outputs, pieces: cute.Tensor, target: Constexpr[Target], cut: Constexpr[Cut]
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    base = exchange.address(cute.arch.get_dyn_smem(Uint8, alignment=128))
    first, batches = cta // cut.ctas, (tokens_of(given) + cut.batch - 1) // cut.batch
    turns = (batches - first + clusters(cut) - 1) // clusters(cut)
    if thread < 2 * cut.stages:
        arrivals = arith.select(thread < cut.stages, Int32(1), Int32(cut.threads))
        ring.init(base + (cut.barriers_at + thread * BARRIER), arrivals)
    ring.init_fence()
    cute.arch.sync_threads()
    cute.arch.cluster_arrive_relaxed()
    state = State()
    for step in cutlass.range_constexpr(STEPS):
        _load(state, step, first, Int32(0), step, given, cut)
    _fetch_factors(first, Int32(0), base, given, cut)
    if thread == 0:
        cute.arch.griddepcontrol_wait()  # for fn in order; all else was there before that launch
        for n in cutlass.range_constexpr(cut.stages):
            _ask(Int32(n), turns, base, pieces, cut)
    zero_padding(out, tokens_of(given), given.tiled, cta * cut.threads + thread, ctas * cut.threads)
    if cta + thread == 0:
        out.dec[()] = recipe.global_scale(given.enc[()], target).dec
    exchange.wait_copies()
    cute.arch.sync_threads()
    cute.arch.cluster_wait()  # all CTAs run: their shared memory may be written to
    for turn in cutlass.range(turns, unroll=1):
        _first_half(state, turn, turns, base, pieces, given, out, target, cut)
        _second_half(turn, base, given, out, target, cut)
        cute.arch.sync_threads()  # y lies where the next tile goes
    _sinkhorn(turns, given, out, target, cut)


@cute.jit
def _first_half(
    state: Constexpr[State],
    turn: Int32,
    turns: Int32,
    base: Int32,
    pieces: cute.Tensor,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """The new streams of this CTA's hidden dims of a batch, and their sums to the owners of the tokens."""
    _fetch_factors(_batch(turn + 1, cut), (turn + 1) & 1, base, given, cut)
    for part in (state.sums, state.squares):
        for i in cutlass.range_constexpr(cute.size(part)):
            part[i] = Float32(0.0)
    for tile in cutlass.range(cut.tiles, unroll=1):
        number = turn * cut.tiles + tile
        if (cute.arch.thread_idx()[0] == 0) & (number > 0):
            _ask(number + (cut.stages - 1), turns, base, pieces, cut)
        for some in cutlass.range(cut.steps // STEPS, unroll=1):
            _make(state, turn, tile, some, base, given, out, target, cut)
        cute.arch.sync_threads()
        _multiply(state, number, base, target, cut)
        cute.arch.sync_threads()  # the tile may be written anew
    _send_sums(state, turn & 1, base, target, cut)
    exchange.wait_copies()  # of the factors; the barrier shows them to all
    cute.arch.sync_warp()
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


def _batch(turn: Int32, cut: Cut) -> Int32:
    """The batch of this cluster's turn."""
    return cute.arch.block_idx()[0] // cut.ctas + turn * clusters(cut)


@cute.jit
def _ask(number: Int32, turns: Int32, base: Int32, pieces: cute.Tensor, cut: Constexpr[Cut]) -> None:
    """Asks for fn of tile `number`, counted from the launch's beginning, once its stage has been read; one thread."""
    if number < turns * cut.tiles:
        stage, before = number % cut.stages, number // cut.stages - 1
        if before >= 0:
            ring.wait(_was_read(base, stage, cut), before & 1)
        ring.expect(_arrived(base, stage, cut), Int32(cut.fn_bytes))
        tile = rank_of(cut) * cut.tiles + number % cut.tiles
        source = exchange.global_address(pieces) + Int64(tile) * cut.fn_bytes
        ring.copy(source, base + stage * cut.fn_bytes, Int32(cut.fn_bytes), _arrived(base, stage, cut))


def _arrived(base: Int32, stage: Int32, cut: Cut) -> Int32:
    """mbarrier: fn is in a stage."""
    return base + (cut.barriers_at + stage * BARRIER)


def _was_read(base: Int32, stage: Int32, cut: Cut) -> Int32:
    """mbarrier: all threads have read it."""
    return base + (cut.barriers_at + cut.stages * BARRIER + stage * BARRIER)


def _load(state: State, slot: int, batch: Int32, tile: Int32, step: Int32 | int, given: Inputs, cut: Cut) -> None:
    """Loads the lines of this thread's token of a step, or of the last token there is."""
    here = spot(cut)
    row = clamped(batch * cut.batch + place_of(step, here, cut), given)
    streams = first_half(given.x, STREAMS, row, tile, here, cut)
    places = [first_half(given.f, 1, row, tile, here, cut), *(streams + s * cut.hidden * 2 for s in range(STREAMS))]
    for i, place in enumerate(places):
        for w, word in enumerate(exchange.load16_once(place)):
            state.ahead[(slot * SOURCES + i) * 4 + w] = word


@cute.jit
def _fetch_factors(batch: Int32, parity: Int32, base: Int32, given: Constexpr[Inputs], cut: Constexpr[Cut]) -> None:
    """Copies post and comb of a batch's tokens to shared memory, 16 bytes a thread and step."""
    thread, _, _ = cute.arch.thread_idx()
    for first in cutlass.range_constexpr(0, cut.batch * SOURCES, cut.threads):
        place = first + thread
        if place < cut.batch * SOURCES:
            own, part = place // SOURCES, place % SOURCES
            row = clamped(batch * cut.batch + own, given)
            comb = exchange.global_address(given.comb) + Int64(row * (MATRIX * WORD) + (part - 1) * LINE)
            post = exchange.global_address(given.post) + Int64(row * LINE)
            exchange.copy16(arith.select(part > 0, comb, post), factors_of(base, own, parity, cut) + part * LINE)


def _make(
    state: State,
    turn: Int32,
    tile: Int32,
    some: Int32,
    base: Int32,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> None:
    """STEPS steps: writes the new streams of this thread's lines, and loads those that come next."""
    here, batch = spot(cut), _batch(turn, cut)
    last = some == cut.steps // STEPS - 1
    end = last & (tile == cut.tiles - 1)
    next_batch = arith.select(end, _batch(turn + 1, cut), batch)
    next_tile = arith.select(end, Int32(0), arith.select(last, tile + 1, tile))
    next_step = arith.select(last, Int32(0), (some + 1) * STEPS)
    for slot in range(STEPS):
        lines = [[state.ahead[(slot * SOURCES + i) * 4 + w] for w in range(4)] for i in range(SOURCES)]
        place = place_of(some * STEPS + slot, here, cut)
        new = mhc.post_mix(lines, functools.partial(_factors, factors_of(base, place, turn & 1, cut)), target)
        _load(state, slot, next_batch, next_tile, next_step + slot, given, cut)
        row = batch * cut.batch + place
        exists = arith.select(row < tokens_of(given), Int32(1), Int32(0))
        to = first_half(out.residual, STREAMS, row, tile, here, cut)
        kept = in_tile(base, place, here.lane % cut.lanes, cut)
        for s, words in enumerate(new):
            exchange.store16(kept + s * (cut.batch * cut.wide * 2), words)
            ring.store_global16_if(to + s * cut.hidden * 2, words, exists)


def _multiply(state: State, number: Int32, base: Int32, target: Target, cut: Cut) -> None:
    """Adds the products of this warp's part of a tile with fn, and its squares."""
    here = spot(cut)
    stage = number % cut.stages
    ring.wait(_arrived(base, stage, cut), number // cut.stages & 1)
    for some in range(cut.chunks):
        chunk = some * cut.across + here.member
        streams = []
        for t in range(TOKENS):
            at = in_tile(base, here.group * GROUP + here.row + 8 * t, chunk * (CHUNK // 8) + here.quad, cut)
            streams.append([ring.load16(at + s * (cut.batch * cut.wide * 2)) for s in range(STREAMS)])
            squares = prefill_mix.squares(streams[t], here.row, target)
            state.squares[t] = arith.add(state.squares[t], squares, target)
        at = base + (stage * cut.fn_bytes + chunk * (STREAMS * PIECE) + here.lane * LINE)
        for t, quads in enumerate(prefill_mix.add_dots(streams, _sums(state), at)):
            for i, value in enumerate(value for quad in quads for value in quad):
                state.sums[t * 12 + i] = value
    # every thread arrives, so that racecheck sees no lane speak for others, and none before its sums are there: a copy
    # may overtake a load of shared memory that is on its way
    every = functools.reduce(lambda a, b: a & b, (arith.bits(state.sums[i]) for i in range(0, TOKENS * 12, 4)))
    known = every != Uint32(0xFFFFFFFF)  # no NaN that `mma` makes looks like this
    ring.arrive_if(_was_read(base, stage, cut), arith.select(known, Int32(1), Int32(0)))


def _factors(at: Int32, row: int) -> list[Float32]:
    return exchange.load_floats(at + row * LINE, 4)


def _sums(state: State) -> list[prefill_mix.Quads]:
    return [[[state.sums[(t * 3 + part) * 4 + i] for i in range(4)] for part in range(3)] for t in range(TOKENS)]


@cute.jit
def _send_sums(
    state: Constexpr[State], parity: Int32, base: Int32, target: Constexpr[Target], cut: Constexpr[Cut]
) -> None:
    """Sends this warp's sums of each token to the CTA that owns it."""
    here = spot(cut)
    dots = prefill_mix.dots(_sums(state), target)
    for t in cutlass.range_constexpr(TOKENS):
        for i in cutlass.range_constexpr(2):
            at, owner = _place_of(here.group * GROUP + 8 * t + 2 * here.quad + i, parity, base, here, cut)
            for part in cutlass.range_constexpr(LOGITS // ROWS):
                exchange.store_of(at + (here.row + part * ROWS) * WORD, dots[t][2 * part + i], owner)
        at, owner = _place_of(here.group * GROUP + 8 * t + here.row, parity, base, here, cut)
        if here.quad == here.row // 2:
            exchange.store_of(at + LOGITS * WORD, state.squares[t], owner)


def _place_of(place: Int32, parity: Int32, base: Int32, here: Spot, cut: Cut) -> tuple[Int32, Int32]:
    """Where a warp's sums of a batch's token go, in the shared memory of which CTA."""
    sender = here.rank * cut.across + here.member
    return sums_of(base, place % cut.owned, parity, cut) + sender * (MESSAGE * WORD), place // cut.owned


@cute.jit
def _second_half(
    turn: Int32,
    base: Int32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Finishes this warp's own tokens of a batch, one after the other."""
    here = spot(cut)
    lines = cute.make_rmem_tensor((AHEAD * STREAMS * 4,), Uint32)
    first = _batch(turn, cut) * cut.batch + here.rank * cut.owned + here.warp
    tokens = tokens_of(given)
    if first < tokens:
        for i in cutlass.range_constexpr(EARLY):
            _read_back(lines, i, i, first, out, cut)
    for u in cutlass.range(cut.owned // WARPS, unroll=1):
        row = first + u * WARPS
        if row < tokens:
            more = (u + 1 < cut.owned // WARPS) & (row + WARPS < tokens)
            _finish(lines, u * WARPS + here.warp, row, more, turn & 1, base, given, out, target, cut)


@cute.jit
def _finish(
    lines: cute.Tensor,
    own: Int32,
    row: Int32,
    more: Boolean,
    parity: Int32,
    base: Int32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """From a token's new streams to its output: collapse, norm, quantisation.

    `lines` holds the first EARLY runs, and at the end those of the warp's next token where there are `more`.
    """
    for i in cutlass.range_constexpr(EARLY, AHEAD):
        _read_back(lines, i, i, row, out, cut)
    here = spot(cut)
    total = cute.make_rmem_tensor((1,), Float32)
    total[0] = Float32(0.0)
    pre = _pre(own, row, parity, base, given, out, target, cut)
    y_at = base + (cut.tile_at + here.warp * (cut.hidden * 2) + here.lane * LINE)
    for some in cutlass.range(cut.runs // AHEAD - 1, unroll=1):
        for i in cutlass.range_constexpr(AHEAD):
            words = _collapsed(lines, i, pre, target)
            _read_back(lines, i, (some + 1) * AHEAD + i, row, out, cut)
            _keep_y(words, total, y_at + (some * AHEAD + i) * (RUN * 2), target)
    for i in cutlass.range_constexpr(AHEAD):
        _keep_y(_collapsed(lines, i, pre, target), total, y_at + (cut.runs - AHEAD + i) * (RUN * 2), target)
    if more:
        for i in cutlass.range_constexpr(EARLY):
            _read_back(lines, i, i, row + WARPS, out, cut)
    squares = _sum_of_warp(total[0], target)
    factor, encode = mhc.inverse_rms(squares, cut.hidden, given.norm_eps, target), given.enc[()]
    loaded = cute.make_rmem_tensor((2 * (4 + _weight_words(given)),), Uint32)
    _load_pair(loaded, Int32(0), y_at, given)
    for pair in cutlass.range(cut.runs // 2, unroll=1):
        _normalise(loaded, pair, row, y_at, factor, encode, given, out, target, cut)


def _sum_of_warp(value: Float32, target: Target) -> Float32:
    for distance in (16, 8, 4, 2, 1):
        value = arith.add(value, warp.from_lane(value, distance), target)
    return value


def _read_back(lines: cute.Tensor, i: int, run: Int32 | int, row: Int32, out: Outputs, cut: Cut) -> None:
    """Loads a lane's lines of a run of a token's new streams."""
    at = second_half(out.residual, STREAMS, row, spot(cut), cut) + Int64(run) * (RUN * 2)
    for s in range(STREAMS):
        for w, word in enumerate(exchange.load16_once(at + s * cut.hidden * 2)):
            lines[(i * STREAMS + s) * 4 + w] = word


def _collapsed(lines: cute.Tensor, i: int, pre: Sequence[Float32], target: Target) -> Words:
    """y of a lane's line."""
    return [mhc.collapse([lines[(i * STREAMS + s) * 4 + w] for s in range(STREAMS)], pre, target) for w in range(4)]


def _keep_y(words: Words, total: cute.Tensor, at: Int32, target: Target) -> None:
    """Keeps a line of y in shared memory, for this very lane, and adds its squares."""
    exchange.store16(at, words)
    for word in words:
        total[0] = mhc.add_squares(word, total[0], target)


def _pre(
    own: Int32, row: Int32, parity: Int32, base: Int32, given: Inputs, out: Outputs, target: Target, cut: Cut
) -> list[Float32]:
    """The weights of the collapse of this warp's token; lane r computes logit r, and writes it if of post or comb."""
    here = spot(cut)
    first = sums_of(base, own, parity, cut) + cutlass.min(here.lane, LOGITS) * WORD  # the last one has the squares
    parts = [exchange.load_floats(first + i * (MESSAGE * WORD), 1)[0] for i in range(cut.ctas * cut.across)]
    total = functools.reduce(lambda a, b: arith.add(a, b, target), parts)  # in this order in every run
    squares = cute.arch.shuffle_sync(total, LOGITS)
    rms = mhc.inverse_rms(squares, cut.hidden * STREAMS, given.norm_eps, target)
    r = cutlass.min(here.lane, LOGITS - 1)
    kind = arith.select(r < STREAMS, Int32(0), arith.select(r < 2 * STREAMS, Int32(1), Int32(2)))
    value = mhc.logit(total, rms, given.scale[kind], given.base[r], target)
    weight = mhc.sigmoid(value, target)
    _write_logits(row, value, weight, here, out, target)
    mine = arith.add(weight, given.hc_eps, target)
    return [cute.arch.shuffle_sync(mine, s) for s in range(STREAMS)]


@cute.jit
def _write_logits(
    row: Int32,
    value: Float32,
    weight: Float32,
    here: Constexpr[Spot],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
) -> None:
    """Writes a token's new post, and the logits of comb in comb's place."""
    is_post = here.lane < 2 * STREAMS
    post = arith.mul(weight, Float32(mhc.POST_MULTIPLIER), target)
    at = arith.select(
        is_post,
        exchange.global_address(out.post) + Int64((row * STREAMS + here.lane - STREAMS) * WORD),
        exchange.global_address(out.comb) + Int64((row * MATRIX + here.lane - 2 * STREAMS) * WORD),
    )
    if (here.lane >= STREAMS) & (here.lane < LOGITS):
        exchange.store_global(at, arith.select(is_post, post, value))


def _weight_words(given: Inputs) -> int:
    """Words that 8 of the norm's weights take."""
    return 8 * int(given.norm_weight.element_type.width) // 32


def _load_pair(loaded: cute.Tensor, pair: Int32, y_at: Int32, given: Inputs) -> None:
    """Loads a lane's lines of y and of the norm's weights, which are in L1, of two runs."""
    words, count = [], _weight_words(given)
    for i in range(2):
        words += ring.load16(y_at + (pair * 2 + i) * (RUN * 2))
        eight = (pair * 2 + i) * (RUN // 8) + warp.thread() % WARP
        at = exchange.global_address(given.norm_weight) + Int64(eight * (count * WORD))
        words += [word for k in range(0, count, 4) for word in exchange.load16(at + k * WORD)]
    for i, word in enumerate(words):
        loaded[i] = word


def _normalise(
    loaded: cute.Tensor,
    pair: Int32,
    row: Int32,
    y_at: Int32,
    factor: Float32,
    encode: Float32,
    given: Inputs,
    out: Outputs,
    target: Target,
    cut: Cut,
) -> None:
    """Norm and quantisation of two runs of a token, which are `loaded`; two half blocks make a block each."""
    here, halves, count = spot(cut), [], 4 + _weight_words(given)
    to = second_half(out.normed, 1, row, here, cut) + Int64(pair) * (2 * RUN * 2)
    for i in range(2):
        words = [loaded[i * count + k] for k in range(count)]
        weights = recipe.values(words[4:], given.norm_weight.element_type)
        line = [mhc.normalise(words[w], factor, weights[2 * w : 2 * w + 2], target) for w in range(4)]
        ring.store_global16_if(to + i * (RUN * 2), line, Int32(1))
        halves.append(line)
    _load_pair(loaded, cutlass.min(pair + 1, cut.runs // 2 - 1), y_at, given)
    even = here.lane % 2 == 0
    got = [warp.from_lane(arith.select(even, b, a), 1) for a, b in zip(*halves, strict=True)]
    low = [arith.select(even, a, other) for a, other in zip(halves[0], got, strict=True)]
    high = [arith.select(even, other, b) for b, other in zip(halves[1], got, strict=True)]
    col = (pair * 2 + here.lane % 2) * (RUN // BLOCK) + here.lane // 2
    cols = cut.hidden // BLOCK
    blocks.quantize([*low, *high], row, col, cols, row < tokens_of(given), encode, given, out, target)


@cute.jit
def _sinkhorn(
    turns: Int32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Turns the logits of this CTA's own tokens into comb; a thread a token."""
    here, (thread, _, _) = spot(cut), cute.arch.thread_idx()
    rows = rows_of_streams(out.comb)
    for i in cutlass.range(thread, turns * cut.owned, cut.threads, unroll=1):
        row = _batch(i // cut.owned, cut) * cut.batch + here.rank * cut.owned + i % cut.owned
        if row < tokens_of(given):
            comb = cute.make_rmem_tensor(cute.make_layout((STREAMS, STREAMS), stride=(STREAMS, 1)), Float32)
            for r in cutlass.range_constexpr(STREAMS):
                cute.autovec_copy(rows[row * STREAMS + r, None], comb[r, None])
            mhc.sinkhorn(comb, given.iters, given.hc_eps, target)
            for r in cutlass.range_constexpr(STREAMS):
                cute.autovec_copy(comb[r, None], rows[row * STREAMS + r, None])


def spec(cut: Cut, norm_dtype: str, target: Target) -> KernelSpec:
    """The kernel for one cut, any number of tokens, both scale layouts.

    Args:
        cut: How the work is cut.
        norm_dtype: A key of NORM_DTYPES.
        target: A GPU.
    """
    name = f"mhc_quant_prefill_{cut.hidden}_{norm_dtype}"

    def make() -> tuple[object, ...]:
        *tensors, iters, hc_eps, norm_eps, tiled, sets, stream, _, _ = arguments(NORM_DTYPES[norm_dtype], target, cut)
        pieces = make_fake_compact_tensor(Uint8, (cute.sym_int32(divisibility=PIECE),), assumed_align=LINE)
        return (*tensors, pieces, iters, hc_eps, norm_eps, tiled, sets, stream, target, cut)

    return KernelSpec(name, target.value, launch, make, (*cut, norm_dtype))
