"""The warps of `wide_kernel` that finish tokens: weights of the collapse, collapse, norm, quantisation.

A warp has eight tokens of a tile of 64 hidden dims, a thread a block of 16. The norm of a turn is done behind the
collapse of the next one, while the squares of y are on their way. These warps also ask for the streams of later turns;
where there is a clerk it does that, and computes the weights.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, copies, gmem, mbarrier, mhc, multicast, recipe, smem, warp
from megamoe.cute.arith import Target
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.multicast import Boxes
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import blocks
from megamoe_stages.mhc_quant.tensors import MATRIX, Inputs, Outputs, Words, zero_padding
from megamoe_stages.mhc_quant.wide_cut import (
    F_AHEAD,
    FINISHING,
    FN_ASKED,
    LINE,
    MESSAGE,
    SQUARES,
    TILE,
    WARPS,
    WORD,
    Cut,
    Spot,
    arrived_of,
    bars,
    clerk_or,
    factors_of,
    first_of,
    in_stage,
    logits_bar,
    send,
    spot,
    squares_bar,
    tokens_of,
)
from megamoe_stages.mhc_quant.wide_make import load_f


@cute.jit
def finish_all(
    turns: Int32,
    base: Int32,
    x: Boxes,
    f: Boxes,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Collapse of a turn, then norm and quantisation of the turn before."""
    here = spot(cut)
    if cutlass.const_expr(not cut.clerks):
        _load_first(turns, here, base, x, f, given, cut)
    _load_norm(here, base, given, cut)
    enc = given.enc[()]
    _start(here, given, out, target)
    site, own = _site(here, given), cut.busy - 1 - here.warp  # whose weights it computes; the first warps load
    cute.arch.cluster_wait()  # all CTAs run: their shared memory may be written to
    if cutlass.const_expr(not cut.clerks):
        _weigh(Int32(0), turns, own, site, here, base, given, out, target, cut)
    before, y = cute.make_rmem_tensor((8,), Uint32), cute.make_rmem_tensor((8,), Uint32)
    for i in cutlass.range_constexpr(8):
        before[i] = y[i] = Uint32(0)
    for turn in cutlass.range(turns + 1, unroll=1):
        if turn < turns:
            _collapse(y, turn, here, base, target, cut)
            mbarrier.named_barrier(FINISHING, cut.busy * WARP)
            if cutlass.const_expr(cut.clerks):
                mbarrier.arrive_if(bars(base, turn % cut.stages, cut).collapsed, _first_thread(here))
            _send_squares(turn, here, base, target, cut)
            if cutlass.const_expr(not cut.clerks):
                _refill(turn, turns, here, base, x, given, cut)
                _weigh(turn + 1, turns, own, site, here, base, given, out, target, cut)
        if turn > 0:
            _norm(before, turn - 1, turns, enc, here, base, given, out, target, cut)
        for i in cutlass.range_constexpr(8):
            before[i] = y[i]


@cute.jit
def clerk(
    turns: Int32,
    base: Int32,
    x: Boxes,
    f: Boxes,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """What those that finish have no time for, where there is a warp for it: weights of the collapse, and streams."""
    here = spot(cut)
    _load_first(turns, here, base, x, f, given, cut)
    _start(here, given, out, target)
    site = _site(here, given)
    cute.arch.cluster_wait()
    for own in cutlass.range_constexpr(cut.owned):
        _weigh(Int32(0), turns, Int32(own), site, here, base, given, out, target, cut)
    for turn in cutlass.range(turns, unroll=1):
        for own in cutlass.range_constexpr(cut.owned):
            _weigh(turn + 1, turns, Int32(own), site, here, base, given, out, target, cut)
        mbarrier.wait(bars(base, turn % cut.stages, cut).collapsed, turn // cut.stages & 1)
        _refill(turn, turns, here, base, x, given, cut)


def _first_thread(here: Spot) -> Int32:
    return asm.flag((here.warp == 0) & (here.lane == 0))


class Site(NamedTuple):
    """What the logit of a lane is multiplied by, and what is added."""

    scale: Float32
    base: Float32


def _site(here: Spot, given: Inputs) -> Site:
    r = cutlass.min(here.lane, LOGITS - 1)
    kind = arith.select(r < STREAMS, Int32(0), arith.select(r < 2 * STREAMS, Int32(1), Int32(2)))
    return Site(given.scale[kind], given.base[r])


@cute.jit
def _load_norm(here: Constexpr[Spot], base: Int32, given: Constexpr[Inputs], cut: Constexpr[Cut]) -> None:
    """Brings the norm's weights of this CTA's dims to shared memory, 16 bytes a thread; a barrier shows them."""
    width = int(given.norm_weight.element_type.width) // 8
    thread = here.warp * WARP + here.lane
    if thread < cut.dims * width // LINE:
        start = asm.address(given.norm_weight) + Int64(here.rank * (cut.dims * width) + thread * LINE)
        smem.store16(base + (cut.norm_at + thread * LINE), gmem.load16(start))


@cute.jit
def _start(here: Constexpr[Spot], given: Constexpr[Inputs], out: Constexpr[Outputs], target: Constexpr[Target]) -> None:
    """Writes what depends on no token."""
    (cta, _, _), (ctas, _, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    thread = here.warp * WARP + here.lane
    zero_padding(out, tokens_of(given), given.tiled, cta * (WARPS * WARP) + thread, ctas * (WARPS * WARP))
    if cta + thread == 0:
        out.dec[()] = recipe.global_scale(given.enc[()], target).dec


@cute.jit
def _load_first(
    turns: Int32, here: Constexpr[Spot], base: Int32, x: Boxes, f: Boxes, given: Constexpr[Inputs], cut: Constexpr[Cut]
) -> None:
    for turn in cutlass.range_constexpr(cut.stages):
        if cutlass.const_expr(turn == 1):  # fn goes first: nothing begins without it
            mbarrier.named_barrier(FN_ASKED, cut.asking)
        _load(Int32(turn), turns, here, base, x, given, cut)
        if cutlass.const_expr(turn < F_AHEAD):
            load_f(Int32(turn), turns, clerk_or(STREAMS + 1, cut), here, base, f, cut)


@cute.jit
def _load(
    turn: Int32,
    turns: Int32,
    here: Constexpr[Spot],
    base: Int32,
    x: Boxes,
    given: Constexpr[Inputs],
    cut: Constexpr[Cut],
) -> None:
    """Asks for streams, post and comb of a turn, if there is one; the clerk, or each of five warps for its part."""
    if turn < turns:
        stage, first, block = turn % cut.stages, first_of(turn, cut), here.rank * cut.tiles
        full, slot = bars(base, stage, cut).full, base + stage * cut.stage_bytes
        if cutlass.const_expr(cut.clerks):
            for s in cutlass.range_constexpr(STREAMS):
                multicast.load_box(x, first, s, block, slot + s * cut.stream_bytes, full)
        elif here.warp < STREAMS:
            multicast.load_box(x, first, here.warp, block, slot + here.warp * cut.stream_bytes, full)
        if (here.warp == clerk_or(STREAMS, cut)) & (here.lane == 0):
            there = cutlass.min(tokens_of(given) - first, cut.group)
            mbarrier.expect(full, cut.stage_bytes + cut.stream_bytes + there * (cut.factor_bytes // cut.group))
            for row, tensor, size in ((1, given.comb, MATRIX), (0, given.post, STREAMS)):
                source = asm.address(tensor) + Int64(first) * (size * WORD)
                copies.load_bulk(factors_of(base, stage, Int32(0), row, cut), source, there * (size * WORD), full)


@cute.jit
def _refill(
    turn: Int32,
    turns: Int32,
    here: Constexpr[Spot],
    base: Int32,
    x: Boxes,
    given: Constexpr[Inputs],
    cut: Constexpr[Cut],
) -> None:
    """Behind a turn's collapse: expects the next weights, and loads into its stage."""
    if turn + cut.stages < turns:
        bar = bars(base, turn % cut.stages, cut)
        if (here.warp == clerk_or(0, cut)) & (here.lane == 0):
            mbarrier.expect(bar.pre, Int32(cut.pre_bytes))
        mbarrier.wait(bar.stored, turn // cut.stages & 1)
        _load(turn + cut.stages, turns, here, base, x, given, cut)


def _collapse(y: cute.Tensor, turn: Int32, here: Spot, base: Int32, target: Target, cut: Cut) -> None:
    """y of this thread's block, rounded, and the tile's squares of it."""
    stage, phase = turn % cut.stages, turn // cut.stages & 1
    mbarrier.wait(bars(base, stage, cut).made, phase)
    mbarrier.wait(bars(base, stage, cut).pre, phase)
    pre = smem.load_floats(base + (cut.pre_at + stage * cut.pre_bytes + here.token * LINE), 4)
    total = Float32(0.0)
    for j in range(2):
        at = in_stage(base, stage, here.tile, here.token, 2 * here.quad + j, cut)
        lines = [smem.load16(at + s * cut.stream_bytes) for s in range(STREAMS)]
        for w in range(4):
            word = mhc.collapse([line[w] for line in lines], pre, target)
            total = mhc.add_squares(word, total, target)
            y[j * 4 + w] = word
    _keep_squares(warp.sum_of_four(total, target), turn, here, base, cut)


@cute.jit
def _keep_squares(total: Float32, turn: Int32, here: Constexpr[Spot], base: Int32, cut: Constexpr[Cut]) -> None:
    """Writes a token's squares of a tile to shared memory."""
    if here.quad == 0:
        place = ((turn & 1) * cut.tiles + here.tile) * cut.group + here.token
        smem.store4(base + (cut.tile_squares_at + place * WORD), total)


@cute.jit
def _send_squares(
    turn: Int32, here: Constexpr[Spot], base: Int32, target: Constexpr[Target], cut: Constexpr[Cut]
) -> None:
    """Sends the squares of y of this CTA's dims to all CTAs, 16 bytes a thread."""
    thread = here.warp * WARP + here.lane
    if thread < cut.ctas * (cut.group // 4):
        part = thread % (cut.group // 4)
        at = base + (cut.tile_squares_at + (turn & 1) * (cut.tiles * cut.group * WORD) + part * LINE)
        total = smem.load_floats(at, 4)
        for i in cutlass.range_constexpr(1, cut.tiles):
            more = smem.load_floats(at + i * (cut.group * WORD), 4)
            total = [arith.add(a, b, target) for a, b in zip(total, more, strict=True)]
        to = base + (cut.squares_at + turn % SQUARES * cut.squares_bytes + here.rank * (cut.group * WORD) + part * LINE)
        send(total, to, squares_bar(base, turn, cut), thread // (cut.group // 4))


@cute.jit
def _weigh(
    turn: Int32,
    turns: Int32,
    own: Int32,
    site: Constexpr[Site],
    here: Constexpr[Spot],
    base: Int32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Adds up the sums of one of this CTA's own tokens, and tells all CTAs its weights of the collapse; a warp."""
    token = here.rank * cut.owned + own
    if (turn < turns) & (own < cut.owned) & (token < cut.group):
        stage = turn % cut.stages
        mbarrier.wait(bars(base, stage, cut).sums, turn // cut.stages & 1)
        r = cutlass.min(here.lane, LOGITS)  # the last one has the squares
        first = arrived_of(base, stage, own, 0, cut) + r * WORD
        parts = [smem.load_floats(first + i * (MESSAGE * WORD), 1)[0] for i in range(cut.ctas)]
        total = functools.reduce(lambda a, b: arith.add(a, b, target), parts)
        squares = cute.arch.shuffle_sync(total, LOGITS)
        if (own == 0) & (here.lane == 0) & (turn + cut.stages < turns):
            mbarrier.expect(bars(base, stage, cut).sums, Int32(cut.arrived_bytes))
        rms = mhc.inverse_rms(squares, cut.hidden * STREAMS, given.norm_eps, target)
        value = mhc.logit(total, rms, site.scale, site.base, target)
        weight = mhc.sigmoid(value, target)
        mine = arith.add(weight, given.hc_eps, target)
        pre = [cute.arch.shuffle_sync(mine, s) for s in range(STREAMS)]
        if here.lane < cut.ctas:
            to = base + (cut.pre_at + stage * cut.pre_bytes + token * LINE)
            send(pre, to, bars(base, stage, cut).pre, here.lane)
        row = first_of(turn, cut) + token
        _write_logits(row, value, weight, row < tokens_of(given), here, out, target)
        mbarrier.arrive_if(logits_bar(base, cut), turn == turns - 1)


@cute.jit
def _write_logits(
    row: Int32,
    value: Float32,
    weight: Float32,
    there: Boolean,
    here: Constexpr[Spot],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
) -> None:
    """Writes a token's new post, and the logits of comb in comb's place."""
    is_post = here.lane < 2 * STREAMS
    post = arith.mul(weight, Float32(mhc.POST_MULTIPLIER), target)
    at = arith.select(
        is_post,
        asm.address(out.post) + Int64((row * STREAMS + here.lane - STREAMS) * WORD),
        asm.address(out.comb) + Int64((row * MATRIX + here.lane - 2 * STREAMS) * WORD),
    )
    if there & (here.lane >= STREAMS) & (here.lane < LOGITS):
        gmem.store4(at, arith.select(is_post, post, value))


@cute.jit
def _norm(
    y: cute.Tensor,
    turn: Int32,
    turns: Int32,
    enc: Float32,
    here: Constexpr[Spot],
    base: Int32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Norm and quantisation of this thread's block of a turn."""
    width = int(given.norm_weight.element_type.width) // 8
    dims = here.rank * cut.dims + here.tile * TILE + here.quad * BLOCK
    at = base + (cut.norm_at + (here.tile * TILE + here.quad * BLOCK) * width)
    loaded = [word for k in range(width) for word in smem.load16(at + k * LINE)]
    mbarrier.wait(squares_bar(base, turn, cut), turn // SQUARES & 1)
    first = base + (cut.squares_at + turn % SQUARES * cut.squares_bytes + here.token * WORD)
    parts = [smem.load_floats(first + i * (cut.group * WORD), 1)[0] for i in range(cut.ctas)]
    squares = functools.reduce(lambda a, b: arith.add(a, b, target), parts)
    factor = mhc.inverse_rms(squares, cut.hidden, given.norm_eps, target)
    weights = recipe.values(loaded, given.norm_weight.element_type)
    words = [mhc.normalise(y[w], factor, weights[2 * w : 2 * w + 2], target) for w in range(8)]
    row = first_of(turn, cut) + here.token
    there = row < tokens_of(given)
    _write_normed(words, row, dims, there, here, out, cut)
    blocks.quantize(words, row, dims // BLOCK, cut.hidden // BLOCK, there, enc, given, out, target)
    if (here.warp == 0) & (here.lane == 0) & (turn + SQUARES < turns):
        mbarrier.expect(squares_bar(base, turn, cut), Int32(cut.squares_bytes))


def _write_normed(words: Words, row: Int32, dims: Int32, there: Boolean, here: Spot, out: Outputs, cut: Cut) -> None:
    """Writes two neighbours' blocks, 32 bytes in a row at once: each lane half of one and half of the other."""
    even = here.quad % 2 == 0
    got = [warp.from_lane(arith.select(even, words[4 + w], words[w]), 1) for w in range(4)]
    start = (dims // (2 * BLOCK) * (2 * BLOCK) + here.quad % 2 * 8) * 2
    to = asm.address(out.normed) + (Int64(row) * (cut.hidden * 2) + Int64(start))
    condition = asm.flag(there)
    own, other = words[:4], words[4:]
    gmem.store16_if(to, [arith.select(even, a, b) for a, b in zip(own, got, strict=True)], condition)
    second = [arith.select(even, a, b) for a, b in zip(got, other, strict=True)]
    gmem.store16_if(to + 2 * BLOCK, second, condition)
