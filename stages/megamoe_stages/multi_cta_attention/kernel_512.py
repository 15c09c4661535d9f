"""Attention at head_dim 512 for sm_90a: the columns of the output split over two warpgroups.

64 rows (queries times the heads of a kv head) of 512 fp32 columns are half of the registers of an SM, so a CTA has no
more. Two CTAs of a cluster work on neighbouring rows and share every tile of keys and values, or L2 could not
keep up: 2 KB a key and 64 rows is what 32 clocks of products need. `attend_512` has the order of things.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, attention_mma, mask_bits, multicast, ring
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.mask_bits import MaskBits
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention import attend_512, produce_512, result_512
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.produce_512 import Source
from megamoe_stages.multi_cta_attention.rows_512 import Mask, Rows, Work, find_sequence, work_of
from megamoe_stages.multi_cta_attention.shape_512 import (
    BLOCK_BYTES,
    CONSUMERS,
    DIM,
    GROUP,
    ROW_BYTES,
    ROWS,
    THREADS,
    Shape,
)

PRODUCER_REGISTERS, CONSUMER_REGISTERS = (
    24,
    240,
)  # together no more than the launch gives: 3 * 168, or they wait forever
HEADS_TOGETHER = int(__import__("os").environ.get("HT", "16"))
_CHUNKS = 8  # of 16 bytes of a row of 128
_LOADS_BARRIER = 2


class Attention(NamedTuple):
    """What all kernels of this schedule read, and the lse that they write.

    Attributes:
        q: (queries, heads, 512) bf16.
        keys: Boxes of the keys.
        values: Boxes of the values.
        cu_seqlens_q: (sequences + 1,) int32.
        cu_seqlens_k: (sequences + 1,) int32.
        sink: (heads,) fp32; not read unless has_sink.
        lse: (queries * heads,) fp32.
        kv_heads: Of keys and values.
        group: Divides by the heads of a kv head.
        factor: Makes scores in base 2 of products.
        causal: Whether keys behind the query's position are hidden.
        window: Keys that a query sees up to its position; 0 for all.
        has_sink: Whether there are sinks.
    """

    q: cute.Tensor
    keys: Boxes
    values: Boxes
    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    sink: cute.Tensor
    lse: cute.Tensor
    kv_heads: Int32
    group: cute.FastDivmodDivisorV2
    factor: Float32
    causal: Int32
    window: Int32
    has_sink: Int32


Finish = Callable[[Consumer, Rows], None]
Fetch = Callable[[Int32, Rows], None]


@cute.jit
def launch(
    q: cute.Tensor,  # (queries, heads, 512) bf16
    k: cute.Tensor,  # (keys, kv_heads, 512) bf16
    v: cute.Tensor,  # the same
    cu_seqlens_q: cute.Tensor,  # (sequences + 1,) int32
    cu_seqlens_k: cute.Tensor,  # (sequences + 1,) int32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    out: cute.Tensor,  # (queries, heads, 512) bf16
    lse: cute.Tensor,  # (queries, heads) fp32
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches a cluster for each piece of rows of each sequence and kv head."""
    given = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, softmax_scale, causal, window, has_sink, shape)
    start(kernel(*given, out, None, None, None, shape), q, k, cu_seqlens_q, stream, shape)


@cute.jit
def launch_masked(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    mask: cute.Tensor,  # (queries, columns) uint8, 0 for a hidden key
    words: cute.Tensor,  # (queries, 2 a tile of 64 columns) int32, a place for the mask's bits
    ends: cute.Tensor,  # (queries,) int32, for where its rows end
    entries: Int32,  # keys at a sequence's end that have no position, and that the mask is of; 0: it is of all
    out: cute.Tensor,
    lse: cute.Tensor,
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Packs the mask, then launches as `launch` does."""
    mask_bits.start_packing(mask, MaskBits(words, ends), stream)
    given = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, softmax_scale, causal, window, has_sink, shape)
    start(kernel(*given, out, words, ends, entries, shape), q, k, cu_seqlens_q, stream, shape)


def prepare(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    lse: cute.Tensor,
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    shape: Shape,
) -> Attention:
    """What a kernel gets, on the host; see `launch`."""
    lse = cute.make_tensor(lse.iterator, cute.make_layout(cute.size(lse)))
    keys = multicast.boxes(k, *produce_512.key_box(shape), shape.ctas)
    values = multicast.boxes(v, *produce_512.value_box(shape), shape.ctas)
    kv_heads = k.shape[1]
    group = cute.FastDivmodDivisorV2(q.shape[1] // kv_heads)
    factor = softmax_scale * Float32(1 / math.log(2))
    return Attention(
        q, keys, values, cu_seqlens_q, cu_seqlens_k, sink, lse, kv_heads, group, factor, causal, window, has_sink
    )


def start(
    kernel: Any, q: cute.Tensor, k: cute.Tensor, cu_seqlens_q: cute.Tensor, stream: CUstream, shape: Shape
) -> None:
    """Launches a kernel of this schedule: a cluster a piece of rows, some without work where sequences end early."""
    queries, heads, _ = q.shape
    kv_heads = k.shape[1]
    pieces = queries * (heads // kv_heads) // (shape.ctas * ROWS) + (cute.size(cu_seqlens_q) - 1)
    kernel.launch(
        grid=[pieces * kv_heads * shape.ctas, 1, 1],
        block=[THREADS, 1, 1],
        cluster=[shape.ctas, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        stream=stream,
    )


@cute.kernel
def kernel(
    q: cute.Tensor,
    keys: Boxes,
    values: Boxes,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    lse: cute.Tensor,
    kv_heads: Int32,
    group: cute.FastDivmodDivisorV2,
    factor: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    out: cute.Tensor,
    words: cute.Tensor | None,
    ends: cute.Tensor | None,
    entries: Int32 | None,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""

    def finish(me: Consumer, rows: Rows) -> None:
        result_512.store(me, rows, out, shape)

    given = Attention(
        q, keys, values, cu_seqlens_q, cu_seqlens_k, sink, lse, kv_heads, group, factor, causal, window, has_sink
    )
    work_on_rows(given, mask_of(words, ends, entries), finish, shape)


def mask_of(words: cute.Tensor | None, ends: cute.Tensor | None, entries: Int32 | None) -> Mask | None:
    """The mask of a kernel's arguments."""
    return None if words is None or ends is None or entries is None else Mask(MaskBits(words, ends), entries)


@cute.jit
def work_on_rows(
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    finish: Constexpr[Finish],
    shape: Constexpr[Shape],
    fetch: Constexpr[Fetch | None] = None,
) -> None:
    """The whole kernel, for all threads of a CTA.

    Args:
        given: What is read.
        mask: A mask of one's own, when the shape is masked.
        finish: Gets a consumer whose sums have become the output, fp32, and writes it; its ring is free.
        shape: How the work is cut.
        fetch: Gets the shared memory's address in a warp of the producers and brings what `finish` wants to where the
            queries are, behind `shape.queries_read_at`.
    """
    cta, _, _ = cute.arch.block_idx()
    rank = cta % shape.ctas
    _, heads, _ = given.q.shape
    group = heads // given.kv_heads
    cluster_rows = shape.ctas * ROWS
    number, kv_head = place_in_order(cta // shape.ctas, given.kv_heads, shape)
    sequence, piece, pieces = find_sequence(number, given.cu_seqlens_q, group, cluster_rows)
    if sequence < cute.size(given.cu_seqlens_q) - 1:
        query, key = given.cu_seqlens_q[sequence], given.cu_seqlens_k[sequence]
        queries, keys = given.cu_seqlens_q[sequence + 1] - query, given.cu_seqlens_k[sequence + 1] - key
        entries = Int32(0) if mask is None else cutlass.min(mask.entries, keys)
        cluster_first = (pieces - 1 - piece) * cluster_rows  # those with most keys first
        rows = Rows(
            first=cluster_first + rank * ROWS,
            count=queries * group,
            group=given.group,
            query=query,
            heads=heads,
            head=kv_head * group,
            position=keys - entries - queries,
            keys=keys - entries,
            entries=entries,
            causal=given.causal,
            window=given.window,
        )
        work = work_of(rows, key, kv_head, cluster_first, mask, shape)
        share_work(given, Source(given.keys, given.values, rank), rows, work, mask, finish, shape, fetch)


def place_in_order(number: Int32, kv_heads: Int32, shape: Shape) -> tuple[Int32, Int32]:
    """Which piece of rows, of all sequences', and which kv head comes as `number`.

    The pieces with most keys come first, of some heads together: of few, so that their keys stay in L2, but not one head
    after the other, or the last head's longest piece would begin when nothing is left to do beside it.
    """
    across, _, _ = cute.arch.grid_dim()
    pieces = across // shape.ctas // kv_heads
    first = number // (HEADS_TOGETHER * pieces) * HEADS_TOGETHER
    rest = number - first * pieces
    heads = cutlass.min(kv_heads - first, HEADS_TOGETHER)
    return cute.arch.make_warp_uniform(rest // heads), cute.arch.make_warp_uniform(first + rest % heads)


@cute.jit
def share_work(
    given: Constexpr[Attention],
    source: Constexpr[Source],
    rows: Constexpr[Rows],
    work: Constexpr[Work],
    mask: Constexpr[Mask | None],
    finish: Constexpr[Finish],
    shape: Constexpr[Shape],
    fetch: Constexpr[Fetch | None],
) -> None:
    """What the threads of a CTA do."""
    thread, _, _ = cute.arch.thread_idx()
    base = ring.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        for i in cutlass.range_constexpr(CONSUMERS * shape.slots):
            ring.init(base + shape.barriers_at + i * 16, 1)
            ring.init(base + shape.barriers_at + i * 16 + 8, shape.ctas * GROUP // WARP)
        for i in cutlass.range_constexpr(CONSUMERS):
            ring.init(base + shape.ready_at + i * 16, GROUP)
            ring.init(base + shape.ready_at + i * 16 + 8, GROUP // WARP)
        if cutlass.const_expr(fetch is not None):
            ring.init(base + shape.queries_read_at, CONSUMERS * GROUP // WARP)
            ring.init(base + shape.fetched_at, 1)
        ring.init_fence()
    meet(shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < CONSUMERS:
            produce_512.produce(base, warp, source, work, shape)
        if cutlass.const_expr(fetch is not None):
            if warp == CONSUMERS:
                fetch(base, rows)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        load_queries(given.q, base, rows)
        me = attend_512.Consumer(base, thread // GROUP - 1, given.factor, mask)
        attend_512.attend(me, rows, work, fetch is not None, shape)
        result_512.finish_rows(me, rows, given.lse, given.sink, given.has_sink)
        finish(me, rows)
    if cutlass.const_expr(shape.ctas > 1):
        meet(shape)  # nobody leaves while the others write to it


def meet(shape: Shape) -> None:
    """A barrier of the cluster."""
    if shape.ctas > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


@cute.jit
def load_queries(q: cute.Tensor, base: Int32, rows: Constexpr[Rows]) -> None:
    """Brings the rows of q into shared memory, zeros where there are none; both consumers."""
    thread = cute.arch.thread_idx()[0] - GROUP
    chunks = DIM // _CHUNKS
    for i in cutlass.range(ROWS * chunks // (CONSUMERS * GROUP), unroll=4):
        item = thread + i * (CONSUMERS * GROUP)
        row, chunk = item // chunks, item % chunks
        at = base + chunk // _CHUNKS * BLOCK_BYTES + row * ROW_BYTES + ((chunk ^ row) % _CHUNKS) * 16
        inside = rows.first + row < rows.count
        place = rows.place(arith.select(inside, rows.first + row, Int32(0)))
        size = arith.select(inside, Int32(16), Int32(0))
        attention_mma.copy16(at, ring.address(q.iterator) + (place * DIM + chunk * 8) * 2, size)
    attention_mma.commit_copies()
    attention_mma.wait_copies(0)
    attention_mma.proxy_fence()
    attention_mma.named_barrier(_LOADS_BARRIER, CONSUMERS * GROUP)


def tensors() -> list[object]:
    """Fake q, k, v, cu_seqlens of both, sink and lse, to compile for any sizes."""
    size = cute.sym_int32
    kv_heads = size()

    def heads_of(heads: object) -> object:
        return make_fake_compact_tensor(BFloat16, (size(), heads, DIM), stride_order=(2, 1, 0), assumed_align=16)

    def vector(dtype: type) -> object:
        return make_fake_compact_tensor(dtype, (size(),), stride_order=(0,), assumed_align=4)

    cu_seqlens = [vector(Int32) for _ in range(2)]
    lse = make_fake_compact_tensor(Float32, (size(), size()), stride_order=(1, 0), assumed_align=4)
    return [heads_of(size()), heads_of(kv_heads), heads_of(kv_heads), *cu_seqlens, vector(Float32), lse]


def masked_arguments() -> list[object]:
    """Fake mask, words, ends and entries."""
    return [*mask_bits.tensors(), Int32(0)]


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        *given, lse = tensors()
        out = tensors()[0]
        if shape.masked:
            given += masked_arguments()
        numbers = Float32(0), *(Int32(0) for _ in range(3))
        return (*given, out, lse, *numbers, make_fake_stream(use_tvm_ffi_env_stream=True), shape)

    function = launch_masked if shape.masked else launch
    return KernelSpec(f"d512_{name_of(shape)}", target.value, function, arguments, tuple(shape))


def name_of(shape: Shape) -> str:
    """For names of kernels."""
    return f"{shape.ctas}x{shape.chunk}{'_masked' if shape.masked else ''}"
