"""The warps of `wide_kernel` that make new streams, and multiply them with fn.

They replace the streams where they lie. Each warp adds up its hidden dims' 24 dots and squares of every token, a few
threads add up the warps', and what a CTA has found goes to the CTA that owns the token. At the end they do Sinkhorn's
iteration for the CTA's own tokens, while the others finish the last ones. Their clerk, where there is one, has the new
streams written and asks for F.
"""

from __future__ import annotations

import functools

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, asm, copies, gmem, mbarrier, mhc, multicast, smem
from megamoe.cute.arith import Target
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP, mma
from megamoe_stages.mhc_quant import wide_mix
from megamoe_stages.mhc_quant.tensors import ROWS, Inputs, Outputs, Words, rows_of_streams
from megamoe_stages.mhc_quant.wide_cut import (
    F_AHEAD,
    FN_ASKED,
    LINE,
    MAKING,
    MESSAGE,
    PARTS,
    PASSES,
    SUMS,
    TILE,
    WORD,
    Cut,
    Spot,
    arrived_of,
    bars,
    clerk_or,
    f_of,
    factors_of,
    first_of,
    in_f,
    in_stage,
    logits_bar,
    place_of,
    send,
    spot,
    token_at,
    tokens_of,
)


@cute.jit
def make_all(
    turns: Int32,
    base: Int32,
    residual: Boxes,
    f: Boxes,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """New streams, their dots with fn and their squares, turn by turn; comb of this CTA's own tokens at the end."""
    here = spot(cut)
    fn = _load_fn(here, base, given, target, cut)
    cute.arch.cluster_wait()  # all CTAs run: their shared memory may be written to
    for turn in cutlass.range(turns, unroll=1):
        stage = turn % cut.stages
        mbarrier.wait(bars(base, stage, cut).full, turn // cut.stages & 1)
        _make(fn, turn, stage, here, base, given, target, cut)
        smem.proxy_fence()
        mbarrier.arrive_if(bars(base, stage, cut).made, Int32(1))
        mbarrier.named_barrier(MAKING, cut.busy * WARP)
        if cutlass.const_expr(not cut.clerks):
            _store(turn, stage, here, base, residual, cut)
            load_f(turn + F_AHEAD, turns, 1, here, base, f, cut)
        _add_partial(here, base, target, cut)
        mbarrier.named_barrier(MAKING, cut.busy * WARP)
        _send_sums(stage, here, base, cut)
        if cutlass.const_expr(not cut.clerks):
            _stored(stage, here, base, cut)
    if here.rank * cut.owned < cut.group:
        mbarrier.wait(logits_bar(base, cut), Int32(0))
        _sinkhorn(turns, here, given, out, target, cut)


@cute.jit
def clerk(turns: Int32, base: Int32, residual: Boxes, f: Boxes, cut: Constexpr[Cut]) -> None:
    """What those that make have no time for, where there is a warp for it: has streams written, and asks for F."""
    here = spot(cut)
    cute.arch.cluster_wait()
    for turn in cutlass.range(turns, unroll=1):
        stage = turn % cut.stages
        mbarrier.wait(bars(base, stage, cut).made, turn // cut.stages & 1)
        _store(turn, stage, here, base, residual, cut)
        load_f(turn + F_AHEAD, turns, cut.busy, here, base, f, cut)
        _stored(stage, here, base, cut)


def _load_fn(here: Spot, base: Int32, given: Inputs, target: Target, cut: Cut) -> list[Words]:
    """This thread's parts of fn that stay in registers; the others go to shared memory."""
    kept, slot = [], 0
    for side in range(cut.sides):
        _, eight = here.made(side, cut)
        loaded = [
            [_eight_of_fn(group, s, eight, here, given, cut) for group in range(LOGITS // ROWS)] for s in range(STREAMS)
        ]
        if side == 0:
            mbarrier.arrive_at_named(FN_ASKED, cut.asking)
        for s, groups in enumerate(loaded):  # all of these loads are under way by now
            parts = wide_mix.parts_of(groups, target)
            for half in range(2):
                number = (side * STREAMS + s) * 2 + half
                held, mine = cut.held(number), parts[half * PARTS : (half + 1) * PARTS]
                kept += mine[:held]
                for part in mine[held:]:
                    smem.store16(_fn_slot(slot, here, base, cut), part)
                    slot += 1
    return kept


def _eight_of_fn(group: int, stream: int, eight: Int32, here: Spot, given: Inputs, cut: Cut) -> Words:
    start = asm.address(given.fn) + Int64(source_of(group, stream, eight, here, cut)) * WORD
    return [*gmem.load16(start), *gmem.load16(start + LINE)]


def source_of(group: int, stream: int, eight: Int32, here: Spot, cut: Cut) -> Int32:
    """Where in fn the lane's 8 values of a row group and a stream begin."""
    dims = here.rank * cut.dims + here.tile * TILE + eight * 8
    return (group * ROWS + here.row) * (STREAMS * cut.hidden) + stream * cut.hidden + dims


def _fn_slot(number: int, here: Spot, base: Int32, cut: Cut) -> Int32:
    """Where one of the lane's parts of fn lies in shared memory."""
    return base + (cut.fn_at + ((here.warp * cut.fn_slots + number) * WARP + here.lane) * LINE)


def _make(
    fn: list[Words], turn: Int32, stage: Int32, here: Spot, base: Int32, given: Inputs, target: Target, cut: Cut
) -> None:
    """Replaces this thread's eights by the new streams, and leaves the warp's sums."""
    last = tokens_of(given) - 1 - first_of(turn, cut)
    sums = [[[Float32(0.0)] * 4 for _ in range(PARTS)] for _ in range(cut.halves)]
    squares = [Float32(0.0)] * cut.halves
    for number in range(PASSES):
        if number % cut.sides == 0:
            kept, slot = iter(fn), 0
        half_of_group = number // cut.sides
        token, eight = here.made(number, cut)
        at = in_stage(base, stage, here.tile, token, eight, cut)
        lines = [smem.load16(in_f(base, turn, here.tile, token, eight, cut))]
        lines += [smem.load16(at + s * cut.stream_bytes) for s in range(STREAMS)]
        known = cutlass.min(token, last)  # there are no factors of tokens that are not
        new = mhc.post_mix(lines, functools.partial(_factors, base, stage, known, cut), target)
        for s, words in enumerate(new):
            smem.store16(at + s * cut.stream_bytes, words)
        found = wide_mix.squares(new, here.row, target)
        squares[half_of_group] = arith.add(squares[half_of_group], found, target) if number % cut.sides else found
        quads = sums[half_of_group]
        for s, words in enumerate(new):
            for half in range(2):
                held = cut.held((number % cut.sides * STREAMS + s) * 2 + half)
                left = [next(kept) for _ in range(held)]
                while len(left) < PARTS:
                    left.append(smem.load16(_fn_slot(slot, here, base, cut)))
                    slot += 1
                right = words[half * 2 : half * 2 + 2]
                quads = [mma(a, right, quad) for a, quad in zip(left, quads, strict=True)]
        sums[half_of_group] = quads
    _keep_partial(wide_mix.dots(sums, target), squares, here, base, cut)


def _factors(base: Int32, stage: Int32, token: Int32, cut: Cut, row: int) -> list[Float32]:
    return smem.load_floats(factors_of(base, stage, token, row, cut), 4)


@cute.jit
def _keep_partial(
    dots: Constexpr[list[list[Float32]]],
    squares: Constexpr[list[Float32]],
    here: Constexpr[Spot],
    base: Int32,
    cut: Constexpr[Cut],
) -> None:
    """Writes a warp's sums of a group to shared memory."""
    at = base + (cut.partial_at + here.warp * cut.partial_bytes)
    for part in cutlass.range_constexpr(LOGITS // ROWS):
        values = [pair for rows in dots for pair in rows[2 * part : 2 * part + 2]]
        to = at + ((part * ROWS + here.row) * cut.group + here.quad * len(values)) * WORD
        if cutlass.const_expr(len(values) == 4):
            smem.store16(to, values)
        else:
            for i in cutlass.range_constexpr(2):
                smem.store4(to + i * WORD, values[i])
    if here.quad == here.row // 2:
        for t in cutlass.range_constexpr(cut.halves):
            place = LOGITS * cut.group + place_of(here.row, t, cut)
            smem.store4(at + place * WORD, squares[t])


@cute.jit
def _add_partial(here: Constexpr[Spot], base: Int32, target: Constexpr[Target], cut: Constexpr[Cut]) -> None:
    """Adds what the warps found, four tokens a thread, in the same order in every run."""
    thread = here.warp * WARP + here.lane
    if thread < SUMS * (cut.group // 4):
        row, quarter = thread // (cut.group // 4), thread % (cut.group // 4)
        at = base + (cut.partial_at + thread * LINE)
        total = smem.load_floats(at, 4)
        for w in cutlass.range_constexpr(1, cut.busy):
            more = smem.load_floats(at + w * cut.partial_bytes, 4)
            total = [arith.add(a, b, target) for a, b in zip(total, more, strict=True)]
        for i in cutlass.range_constexpr(4):
            place = token_at(quarter, i, cut) * MESSAGE + row
            smem.store4(base + (cut.sums_at + place * WORD), total[i])


@cute.jit
def _send_sums(stage: Int32, here: Constexpr[Spot], base: Int32, cut: Constexpr[Cut]) -> None:
    """Sends this CTA's sums of each token to the CTA that owns it, 16 bytes a thread."""
    thread = here.warp * WARP + here.lane
    if thread < cut.group * (MESSAGE // 4):
        token, part = thread // (MESSAGE // 4), thread % (MESSAGE // 4)
        values = smem.load_floats(base + (cut.sums_at + thread * LINE), 4)
        to = arrived_of(base, stage, token % cut.owned, here.rank, cut) + part * LINE
        send(values, to, bars(base, stage, cut).sums, token // cut.owned)


@cute.jit
def load_f(
    turn: Int32, turns: Int32, by: Constexpr[int], here: Constexpr[Spot], base: Int32, f: Boxes, cut: Constexpr[Cut]
) -> None:
    """Asks for F of a turn, if there is one; the warp `by`."""
    if (here.warp == by) & (turn < turns):
        full = bars(base, turn % cut.stages, cut).full
        multicast.load_box(f, first_of(turn, cut), 0, here.rank * cut.tiles, f_of(base, turn, cut), full)


@cute.jit
def _store(turn: Int32, stage: Int32, here: Constexpr[Spot], base: Int32, residual: Boxes, cut: Constexpr[Cut]) -> None:
    """Has the copy engine write the new streams; the clerk, or the first warp."""
    if here.warp == clerk_or(0, cut):
        for s in cutlass.range_constexpr(STREAMS):
            slot = base + stage * cut.stage_bytes + s * cut.stream_bytes
            multicast.store_box(residual, first_of(turn, cut), s, here.rank * cut.tiles, slot)
        copies.commit_stores()


@cute.jit
def _stored(stage: Int32, here: Constexpr[Spot], base: Int32, cut: Constexpr[Cut]) -> None:
    """Waits until the copy engine has read the stage, and says so; who had it written."""
    if here.warp == clerk_or(0, cut):
        copies.wait_stores()
        cute.arch.sync_warp()  # one lane asked for the stores, and only its own wait is for them
        mbarrier.arrive_if(bars(base, stage, cut).stored, here.lane == 0)


@cute.jit
def _sinkhorn(
    turns: Int32,
    here: Constexpr[Spot],
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Turns the logits of this CTA's own tokens into comb; a thread a token."""
    rows = rows_of_streams(out.comb)
    for i in cutlass.range(here.warp * WARP + here.lane, turns * cut.owned, cut.busy * WARP, unroll=1):
        row = first_of(i // cut.owned, cut) + here.rank * cut.owned + i % cut.owned
        if row < tokens_of(given):
            comb = cute.make_rmem_tensor(cute.make_layout((STREAMS, STREAMS), stride=(STREAMS, 1)), Float32)
            for r in cutlass.range_constexpr(STREAMS):
                cute.autovec_copy(rows[row * STREAMS + r, None], comb[r, None])
            mhc.sinkhorn(comb, given.iters, given.hc_eps, target)
            for r in cutlass.range_constexpr(STREAMS):
                cute.autovec_copy(comb[r, None], rows[row * STREAMS + r, None])
