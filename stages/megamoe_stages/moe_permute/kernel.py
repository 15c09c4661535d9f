"""The permutation kernel in CuTe DSL: a stable counting sort in one launch, one source for sm_90a and sm_100a.

Each warp owns a run of visits. It counts them by expert in counters of its own; a thread an expert then sums these over
the warps of its CTA, and through distributed shared memory over the CTAs of its cluster, which with a scan over the
experts gives every warp its first row in every expert. In a second pass a warp gives rows out, 32 visits at a time:
lanes of equal expert find each other by `match`, and the order of lanes is the order of rows. Only counts cross from
one warp to another, so the result does not depend on who was first.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Int32, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import asm, cluster
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.warp import WARP
from megamoe_stages.moe_permute.limits import MAX_EXPERTS

_NOBODY = MAX_EXPERTS  # expert of a lane that has no visit


class Shape(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        threads: Of a CTA, at least MAX_EXPERTS.
        ctas: Of the one cluster.
    """

    threads: int
    ctas: int

    @property
    def warps(self) -> int:
        """Of a CTA."""
        return self.threads // WARP

    @property
    def counters(self) -> int:
        """Words of shared memory before the totals."""
        return self.warps * MAX_EXPERTS

    @property
    def shared_bytes(self) -> int:
        """Counters of every warp and expert, totals and first rows of every expert, and a sum a warp."""
        return 4 * (self.counters + 2 * MAX_EXPERTS + WARP)


SHAPES = (Shape(512, 1), Shape(512, 8), Shape(1024, 8))
_UP_TO = (1024, 12288)  # visits for the first and second shape, where they were the fastest on an H200: see NOTES.md


def cut(visits: int) -> Shape:
    """The shape for so many visits."""
    return SHAPES[sum(visits > most for most in _UP_TO)]


@cute.jit
def launch(
    indices: cute.Tensor,  # (M * step,) int32, a visit's expert in every step-th word
    tokens: cute.Tensor,  # (M,) int32
    rows: cute.Tensor,  # (M,) int32
    offsets: cute.Tensor,  # (E + 1,) int32
    top_k: Int32,
    stream: CUstream,
    step: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Launches one cluster."""
    slots = cute.FastDivmodDivisorV2(top_k)
    moe_permute(indices, tokens, rows, offsets, slots, step, shape).launch(
        grid=[shape.ctas, 1, 1],
        block=[shape.threads, 1, 1],
        cluster=[shape.ctas, 1, 1],
        smem=shape.shared_bytes,
        use_pdl=True,
        stream=stream,
    )


@cute.kernel
def moe_permute(
    indices: cute.Tensor,
    tokens: cute.Tensor,
    rows: cute.Tensor,
    offsets: cute.Tensor,
    slots: cute.FastDivmodDivisorV2,
    step: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    rank, _, _ = cute.arch.block_idx()
    lane, wide = thread % WARP, thread // WARP
    visits, experts = cute.size(rows), cute.size(offsets) - 1
    words = cute.arch.get_dyn_smem(Int32, alignment=16)
    mine = _view(words + wide * MAX_EXPERTS, MAX_EXPERTS)  # this warp's counters
    first_row = _view(words + shape.counters + MAX_EXPERTS, MAX_EXPERTS)
    steps = (visits + (shape.warps * shape.ctas * WARP - 1)) // (shape.warps * shape.ctas * WARP)
    begin = (rank * shape.warps + wide) * steps * WARP + lane

    for e in cutlass.range(lane, experts, WARP, unroll=4):
        mine[e] = Int32(0)
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()  # what stands above overlaps with the end of the kernel before
    cute.arch.sync_warp()
    for i in cutlass.range(steps, unroll=4):
        visit = begin + i * WARP
        if visit < visits:
            cute.arch.atomic_add(mine.iterator + _expert(indices, visit, experts, step), Int32(1))
    cute.arch.sync_threads()

    base = _first_rows(words, thread, rank, experts, offsets, visits, shape)
    if thread < experts:
        first_row[thread] = base
    cute.arch.sync_threads()

    below = (Uint32(1) << Uint32(lane)) - 1
    for i in cutlass.range(steps, unroll=1):
        visit = begin + i * WARP
        expert = Int32(_NOBODY)
        if visit < visits:
            expert = _expert(indices, visit, experts, step)
        peers = cute.arch.match_sync(0xFFFFFFFF, expert)
        before = Int32(cute.arch.popc(Uint32(peers) & below))
        row = Int32(0)
        if visit < visits:
            row = mine[expert] + before
        cute.arch.sync_warp()
        if visit < visits:
            if before == 0:
                mine[expert] = row + Int32(cute.arch.popc(peers))
            row = row + first_row[expert]
            token, _ = divmod(visit, slots)
            rows[visit] = row
            tokens[row] = token
        cute.arch.sync_warp()
    if cutlass.const_expr(shape.ctas > 1):
        cute.arch.cluster_wait()  # no CTA ends while another may still read its totals


@cute.jit
def _first_rows(
    words: cute.Pointer,
    thread: Int32,
    rank: Int32,
    experts: Int32,
    offsets: cute.Tensor,
    visits: Int32,
    shape: Constexpr[Shape],
) -> Int32:
    """The first row of this thread's expert that is this CTA's; counters become rows before the warp's own.

    The CTA of rank 0 also writes the offsets.
    """
    counters = cute.make_tensor(words, cute.make_layout((shape.warps, MAX_EXPERTS), stride=(MAX_EXPERTS, 1)))
    totals = _view(words + shape.counters, MAX_EXPERTS)
    sums = _view(words + shape.counters + 2 * MAX_EXPERTS, WARP)
    lane, wide = thread % WARP, thread // WARP
    total = Int32(0)
    if thread < experts:
        counts = [counters[w, thread] for w in range(shape.warps)]
        for w in cutlass.range_constexpr(shape.warps):
            counters[w, thread] = total
            total = total + counts[w]
    everywhere, in_lower = total, Int32(0)
    if cutlass.const_expr(shape.ctas > 1):
        if thread < experts:
            totals[thread] = total
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        if thread < experts:
            there = [cluster.load4(asm.address(totals) + 4 * thread, Int32(r)) for r in range(shape.ctas)]
            everywhere = there[0]
            for r in cutlass.range_constexpr(1, shape.ctas):
                everywhere = everywhere + there[r]
            for r in cutlass.range_constexpr(shape.ctas - 1):
                if r < rank:
                    in_lower = in_lower + there[r]
        cute.arch.cluster_arrive()
    upto = _scan(everywhere, lane)
    if lane == WARP - 1:
        sums[wide] = upto
    cute.arch.sync_threads()
    warps = MAX_EXPERTS // WARP
    of_warps = Int32(0)
    if lane < warps:
        of_warps = sums[lane]
    of_warps = _scan(of_warps, lane)
    earlier = cute.arch.shuffle_sync(of_warps, (wide + WARP - 1) % WARP)
    start = upto - everywhere
    if (wide > 0) & (wide < warps):
        start = start + earlier
    if rank == 0:
        if thread < experts:
            offsets[thread] = start
        if thread == 0:
            offsets[experts] = visits
    return start + in_lower


@cute.jit
def _scan(value: Int32, lane: Int32) -> Int32:
    """Sum over this lane and those before it."""
    total = value
    for i in cutlass.range_constexpr(5):
        other = cute.arch.shuffle_sync_up(total, 1 << i, mask_and_clamp=0)
        if lane >= 1 << i:
            total = total + other
    return total


def _expert(indices: cute.Tensor, visit: Int32, experts: Int32, step: int) -> Int32:
    """A visit's expert; clamped, so that no index leads out of the counters."""
    return cutlass.min(cutlass.max(indices[visit * step], Int32(0)), experts - 1)


def _view(words: cute.Pointer, size: int) -> cute.Tensor:
    return cute.make_tensor(words, cute.make_layout(size))


def spec(shape: Shape, index_bytes: int, target: Target) -> KernelSpec:
    """The kernel for one cut, any numbers of visits and experts that `limits` allows.

    Args:
        shape: How the work is cut.
        index_bytes: Of an index, 4 or 8.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        def vector(size: object) -> object:
            return make_fake_compact_tensor(Int32, (size,), stride_order=(0,), assumed_align=4)

        visits = cute.sym_int32()
        read, offsets = vector(cute.sym_int32()), vector(cute.sym_int32())
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (read, vector(visits), vector(visits), offsets, Int32(1), stream, index_bytes // 4, shape)

    name = f"moe_permute_{shape.ctas}x{shape.threads}_int{8 * index_bytes}"
    return KernelSpec(name, target.value, launch, arguments, (*shape, index_bytes))
