"""mhc_quant for the models' hidden dims: a CuTe DSL kernel whose streams stay on the chip, for sm_90a and sm_100a.

A cluster has groups of 16 or 8 tokens one after the other, each of its CTAs a slice of the hidden dims. The copy engine
brings streams and F to shared memory, some groups ahead. Half of the warps (`wide_make`) make the new streams in
place, multiply them with fn, which stays on the chip too, and have the copy engine write them; their sums go to the CTA
that owns the token, which tells all CTAs the weights of the collapse. The other warps (`wide_finish`) collapse the
streams where they lie, exchange the squares of y, norm and quantise; those that made do Sinkhorn's iteration meanwhile.

Nobody gets a message that there is no room for. The sums of a turn, and then its weights, are sent only after its
streams have come, and these were asked for when the turn that had the stage before them was collapsed: its messages had
been read then. Squares of a turn are sent by who has those of two turns before from everybody, and nobody sends these
before having read those of two turns before them: SQUARES buffers are enough. At the start those that make load fn at
once: it is the barrier of the cluster, behind that, which shows them the mbarriers.
"""

from __future__ import annotations

import functools

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Uint8, cute
from cutlass.cute.nvgpu import cpasync

from megamoe.cute import asm, mbarrier, multicast, smem, strips, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mhc import STREAMS
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import wide_finish, wide_make
from megamoe_stages.mhc_quant.tensors import NORM_DTYPES, Inputs, Outputs, arguments
from megamoe_stages.mhc_quant.wide_cut import (
    MESSAGE,
    SQUARES,
    STARTED,
    SUMS,
    THREADS,
    WARPS,
    WORD,
    Cut,
    bars,
    logits_bar,
    squares_bar,
    tokens_of,
)

MAKER_REGISTERS, FINISHER_REGISTERS = 184, 72  # of a thread; 256 together, as the launch gives two threads


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
    sets: Int32,
    stream: CUstream,
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """Launches `sets` clusters, which share the groups of tokens evenly; see Inputs and Outputs."""
    given = Inputs(x, f, post, comb, fn, base, scale, norm_weight, enc, iters, hc_eps, norm_eps, tiled)
    out = Outputs(residual, normed, codes, scales, dec, new_post, new_comb)
    old, added = (multicast.boxes(_rows(t, n, cut), cut.group, cut.tiles, 1) for t, n in ((x, STREAMS), (f, 1)))
    new = multicast.boxes_to_write(_rows(residual, STREAMS, cut), cut.group, cut.tiles)
    mhc_quant_wide(given, out, old, added, new, target, cut).launch(
        grid=[sets * cut.ctas, 1, 1],
        block=[THREADS, 1, 1],
        cluster=[cut.ctas, 1, 1],
        smem=cut.shared_bytes,
        min_blocks_per_mp=1,
        use_pdl=True,
        stream=stream,
    )


def _rows(tensor: cute.Tensor, streams: int, cut: Cut) -> cute.Tensor:
    """A tensor as (tokens, streams, H), with H known to the compiler."""
    tokens, hidden = cute.size(tensor, mode=[0]), cut.hidden
    layout = cute.make_layout((tokens, streams, hidden), stride=(streams * hidden, hidden, 1))
    return cute.make_tensor(tensor.iterator, layout)


@cute.kernel
def mhc_quant_wide(
    given: Inputs,
    out: Outputs,
    x: Boxes,
    f: Boxes,
    residual: Boxes,
    target: Constexpr[Target],
    cut: Constexpr[Cut],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    base = asm.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    sets = ctas // cut.ctas
    turns = ((tokens_of(given) + cut.group - 1) // cut.group - cta // cut.ctas + sets - 1) // sets
    maker = thread < WARPS * WARP
    if thread == WARPS * WARP:
        for boxes in (x, f, residual):
            cpasync.prefetch_descriptor(boxes.info.atom)
    strips.wait_for_previous()
    strips.let_next_start()
    if maker:
        cute.arch.setmaxregister_increase(MAKER_REGISTERS)
        cute.arch.cluster_arrive()
        if warp.warp_number() < cut.busy:
            wide_make.make_all(turns, base, residual, f, given, out, target, cut)
        elif cutlass.const_expr(cut.clerks):
            wide_make.clerk(turns, base, residual, f, cut)
    else:
        cute.arch.setmaxregister_decrease(FINISHER_REGISTERS)
        finisher = thread - WARPS * WARP
        if finisher == 0:
            _init(base, cut)
        if finisher < cut.group:
            for i in cutlass.range_constexpr(SUMS, MESSAGE):  # padding that is sent along
                smem.store4(base + (cut.sums_at + (finisher * MESSAGE + i) * WORD), Float32(0.0))
        mbarrier.named_barrier(STARTED, WARPS * WARP)  # those that make wait for the cluster
        cute.arch.cluster_arrive()
        if warp.warp_number() < WARPS + cut.busy:
            wide_finish.finish_all(turns, base, x, f, given, out, target, cut)
        elif cutlass.const_expr(cut.clerks):
            wide_finish.clerk(turns, base, x, f, given, out, target, cut)


def _init(base: Int32, cut: Cut) -> None:
    """Makes the mbarriers, and tells them what the first turns send; one thread."""
    for stage in range(cut.stages):
        bar = bars(base, stage, cut)
        for barrier, arrivals in zip(bar, (1, cut.busy * WARP, 1, 1, 1, 1), strict=True):
            mbarrier.init(barrier, arrivals)
    for turn in range(SQUARES):
        mbarrier.init(squares_bar(base, turn, cut), 1)
    mbarrier.init(logits_bar(base, cut), cut.owned * WARP)
    mbarrier.init_fence()
    for stage in range(cut.stages):
        bar = bars(base, stage, cut)
        mbarrier.expect(bar.sums, Int32(cut.arrived_bytes))
        mbarrier.expect(bar.pre, Int32(cut.pre_bytes))
    for turn in range(SQUARES):
        mbarrier.expect(squares_bar(base, turn, cut), Int32(cut.squares_bytes))


def spec(cut: Cut, norm_dtype: str, target: Target) -> KernelSpec:
    """The kernel for one cut, any number of tokens, both scale layouts.

    Args:
        cut: How the work is cut.
        norm_dtype: A key of NORM_DTYPES.
        target: A GPU.
    """
    name = f"mhc_quant_wide_{cut.hidden}_{norm_dtype}"
    make = functools.partial(arguments, NORM_DTYPES[norm_dtype], target, cut)
    return KernelSpec(name, target.value, launch, make, (*cut, norm_dtype))
