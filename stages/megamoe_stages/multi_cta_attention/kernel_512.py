"""Attention at head_dim 512 for sm_90a: the columns of the output split over two warpgroups.

64 rows (queries times the heads of a kv head) of 512 fp32 columns are half of the registers of an SM, so a CTA has no
more. Two CTAs of a cluster work on neighbouring rows and share every tile of keys and values, or L2 could not
keep up: 2 KB a key and 64 rows is what 32 clocks of products need. `attend_512` has the order of things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, asm, copies, mask_bits, mbarrier, multicast, smem, softmax
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import CHUNK
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention import attend_512, produce_512, result_512
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.pieces_512 import Attention, Order, piece_of, tell, tell_end, told, work_on
from megamoe_stages.multi_cta_attention.produce_512 import Source
from megamoe_stages.multi_cta_attention.rows_512 import CHUNKS, ROWS_AT_ONCE, Mask, Rows, chunk_at, work_of
from megamoe_stages.multi_cta_attention.shape_512 import (
    BLOCK_BYTES,
    BLOCKS,
    CONSUMERS,
    DIM,
    DTYPES,
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
PIECES_TOGETHER = 128  # of rows, at least, of the heads that come together: twice what runs at a time
PIECES_ALONE = 64  # of a head that comes alone

Finish = Callable[[Consumer, Rows], None]
Fetch = Callable[[Int32, Rows], None]


@cute.jit
def launch(
    q: cute.Tensor,  # (queries, heads, 512) bf16 or fp16
    k: cute.Tensor,  # (keys, kv_heads, 512), as q
    v: cute.Tensor,  # the same
    cu_seqlens_q: cute.Tensor,  # (sequences + 1,) int32
    cu_seqlens_k: cute.Tensor,  # (sequences + 1,) int32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    out: cute.Tensor,  # (queries, heads, 512) bf16 or fp16
    lse: cute.Tensor,  # (queries, heads) fp32
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    sms: Int32,  # of the GPU
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches persistent clusters that take turns at the pieces of rows of all sequences and kv heads."""
    numbers = (softmax_scale, causal, window, has_sink, sms)
    given = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, *numbers, shape)
    start(kernel(given, None, out, shape), given.order, stream, shape)


@cute.jit
def launch_masked(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    mask: cute.Tensor,  # (queries, columns) uint8, 0 for a hidden key
    words: cute.Tensor,  # (queries, mask_bits.width_of(columns)) int32, a place for the mask's bits
    entries: Int32,  # keys at a sequence's end that have no position, and that the mask is of; 0: it is of all
    out: cute.Tensor,
    lse: cute.Tensor,
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    sms: Int32,  # of the GPU
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Packs the mask, then launches as `launch` does."""
    bits = mask_bits.bits_of(words)
    mask_bits.start_packing(mask, bits, stream)
    numbers = (softmax_scale, causal, window, has_sink, sms)
    given = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, *numbers, shape)
    start(kernel(given, Mask(bits, entries), out, shape), given.order, stream, shape)


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
    sms: Int32,
    shape: Shape,
) -> Attention:
    """What a kernel gets, on the host; see `launch`."""
    lse = cute.make_tensor(lse.iterator, cute.make_layout(cute.size(lse)))
    keys = multicast.boxes(k, *produce_512.key_box(shape), shape.ctas)
    values = multicast.boxes(v, *produce_512.value_box(shape), shape.ctas)
    kv_heads = k.shape[1]
    group = cute.FastDivmodDivisorV2(q.shape[1] // kv_heads)
    factor = softmax_scale * Float32(softmax.LOG2E)
    pieces, together, clusters = order_of(q, k, cu_seqlens_q, sms, shape)
    turns = (pieces * together + (clusters - 1)) // clusters
    by = cute.FastDivmodDivisorV2
    order = Order(by(pieces), by(together), by(clusters), by(turns), kv_heads // together * turns)
    read = (q, keys, values, cu_seqlens_q, cu_seqlens_k, sink)
    return Attention(*read, lse, order, group, factor, causal, window, has_sink)


@cute.jit
def order_of(
    q: cute.Tensor, k: cute.Tensor, cu_seqlens_q: cute.Tensor, sms: Int32, shape: Constexpr[Shape]
) -> tuple[Int32, Int32, Int32]:
    """Of `Order`, on the host: pieces, heads that come together, and as many clusters as the SMs hold or have work.

    The pieces with most keys come first, of some heads together: of few, so that their keys stay in L2, but not of one
    head after the other, or the last head's longest piece would begin when nothing is left to do beside it. Together
    come as many heads each time, or the last ones would leave clusters without work.
    """
    queries, heads, _ = q.shape
    kv_heads = k.shape[1]
    pieces = queries * (heads // kv_heads) // (shape.ctas * ROWS) + (cute.size(cu_seqlens_q) - 1)
    several = cutlass.max(kv_heads * pieces // PIECES_TOGETHER, 1)
    together = arith.select(pieces < PIECES_ALONE, (kv_heads + (several - 1)) // several, Int32(1))
    while kv_heads % together != 0:
        together = together + 1
    return pieces, together, cutlass.min(kv_heads * pieces, sms // shape.ctas)


def start(kernel: Any, order: Order, stream: CUstream, shape: Shape) -> None:
    """Launches a kernel of this schedule."""
    kernel.launch(
        grid=[order.clusters.divisor * shape.ctas, 1, 1],
        block=[THREADS, 1, 1],
        cluster=[shape.ctas, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        stream=stream,
    )


@cute.kernel
def kernel(
    given: Attention,
    mask: Mask | None,
    out: cute.Tensor,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""

    def finish(me: Consumer, rows: Rows) -> None:
        result_512.store(me, rows, out, shape)

    work_on_rows(given, mask, finish, shape)


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
        finish: Gets a consumer whose sums have become the output, fp32, and writes it; the weights' place is free.
        shape: How the work is cut.
        fetch: Gets the shared memory's address in a warp of the producers, and brings to `shape.angles_at` what
            `finish` waits for at `shape.fetched_at` and gives back at `shape.turned_at`.
    """
    thread, _, _ = cute.arch.thread_idx()
    base = asm.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        make_barriers(base, shape)
    meet(shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < CONSUMERS:
            supply(base, warp, given, mask, shape)
        else:
            prepare_turns(base, warp, given, mask, fetch, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        me = attend_512.Consumer(base, thread // GROUP - 1, given.factor, mask)
        take_pieces(me, given, mask, finish, shape)
    if cutlass.const_expr(shape.ctas > 1):
        meet(shape)  # nobody leaves while the others write to it


def make_barriers(base: Int32, shape: Shape) -> None:
    """The mbarriers of a CTA."""
    for i in range(CONSUMERS * shape.slots):
        mbarrier.init(base + shape.barriers_at + i * 16, 1)
        mbarrier.init(base + shape.barriers_at + i * 16 + 8, shape.ctas * GROUP // WARP)
    for i in range(CONSUMERS):
        mbarrier.init(base + shape.ready_at + i * 16, GROUP)
        mbarrier.init(base + shape.ready_at + i * 16 + 8, GROUP // WARP)
    mbarrier.init(base + shape.queries_read_at, CONSUMERS * GROUP)
    mbarrier.init(base + shape.queries_there_at, GROUP - CONSUMERS * WARP)
    mbarrier.init(base + shape.fetched_at, WARP)
    mbarrier.init(base + shape.turned_at, CONSUMERS * GROUP)
    mbarrier.init_fence()


@cute.jit
def supply(
    base: Int32,
    warp: Int32,
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    shape: Constexpr[Shape],
) -> None:
    """Keeps a consumer's ring full."""
    cursor = cute.make_rmem_tensor((2,), Int32)
    cursor[0], cursor[1] = Int32(0), Int32(0)
    source = Source(given.keys, given.values, cute.arch.block_idx()[0] % shape.ctas)
    for turn in cutlass.range(given.order.all_turns, unroll=1):
        piece = piece_of(given, turn, mask, shape)
        if piece.exists:
            produce_512.produce(base, warp, cursor, source, work_on(piece, mask, shape), shape)


@cute.jit
def prepare_turns(
    base: Int32,
    warp: Int32,
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    fetch: Constexpr[Fetch | None],
    shape: Constexpr[Shape],
) -> None:
    """Brings the queries of each turn as soon as those before were read, and tells the consumers of it; two warps."""
    done = Int32(0)
    for turn in cutlass.range(given.order.all_turns, unroll=1):
        piece = piece_of(given, turn, mask, shape)
        if piece.exists:
            mbarrier.wait(base + shape.queries_read_at, done % 2 ^ 1)
            load_queries(given.q, base, piece.rows, warp - CONSUMERS, GROUP // WARP - CONSUMERS)
            if warp == CONSUMERS:
                tell(base, piece, shape)
            show_queries()
            mbarrier.arrive_if(base + shape.queries_there_at, Int32(1))
            if cutlass.const_expr(fetch is not None):
                fetch_next(base, warp, fetch, piece.rows, done, shape)
            done = done + 1
    mbarrier.wait(base + shape.queries_read_at, done % 2 ^ 1)
    if warp == CONSUMERS:
        tell_end(base, shape)
    mbarrier.arrive_if(base + shape.queries_there_at, Int32(1))


@cute.jit
def fetch_next(
    base: Int32,
    warp: Int32,
    fetch: Constexpr[Fetch],
    rows: Constexpr[Rows],
    done: Int32,
    shape: Constexpr[Shape],
) -> None:
    """Brings what the epilogue needs as soon as that before was read; one of the two warps."""
    if warp == CONSUMERS:
        mbarrier.wait(base + shape.turned_at, done % 2 ^ 1)
        fetch(base, rows)


@cute.jit
def take_pieces(
    me: Constexpr[Consumer],
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    finish: Constexpr[Finish],
    shape: Constexpr[Shape],
) -> None:
    """The CTA's pieces of rows, for a consumer."""
    going = Int32(1)
    while going != 0:
        mbarrier.wait(me.base + shape.queries_there_at, me.before[0] // 4)
        going, first, count, query, head, position, keys, entries = told(me.base, shape)
        rows = Rows(
            first=first + cute.arch.block_idx()[0] % shape.ctas * ROWS,
            count=count,
            group=given.group,
            query=query,
            heads=given.q.shape[1],
            head=head,
            position=position,
            keys=keys,
            entries=Int32(0) if mask is None else entries,
            causal=given.causal,
            window=given.window,
        )
        if going != 0:
            consume(me, rows, first, given, finish, shape)


def consume(me: Consumer, rows: Rows, first: Int32, given: Attention, finish: Finish, shape: Shape) -> None:
    """Rows whose queries are there; `first` is the cluster's first one."""
    work = work_of(rows, Int32(0), Int32(0), first, me.mask, shape)  # where the keys are is nothing to a consumer
    attend_512.begin(me)
    attend_512.attend(me, rows, work, shape)
    sinks = cute.make_rmem_tensor((2,), Float32)
    result_512.load_sinks(sinks, rows, given.sink, given.has_sink)
    attend_512.add_last(me, rows, work, shape)
    result_512.finish_rows(me, rows, given.lse, sinks)
    finish(me, rows)
    attend_512.end(me, work.tiles)


def meet(shape: Shape) -> None:
    """A barrier of the cluster."""
    if shape.ctas > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


@cute.jit
def load_queries(q: cute.Tensor, base: Int32, rows: Constexpr[Rows], warp: Int32, warps: Constexpr[int]) -> None:
    """Starts to bring the rows of q into shared memory, zeros where there are none; one of so many warps.

    Eight lanes share a row, so a warp finds four rows' places at a time.
    """
    lane = cute.arch.lane_idx()
    chunk = lane % CHUNKS
    for i in cutlass.range(ROWS // warps // ROWS_AT_ONCE, unroll=1):
        row = (i * warps + warp) * ROWS_AT_ONCE + lane // CHUNKS
        inside = rows.first + row < rows.count
        place = rows.place(arith.select(inside, rows.first + row, Int32(0)))
        size = arith.select(inside, Int32(CHUNK), Int32(0))
        source = asm.address(q) + (place * (2 * DIM) + chunk * CHUNK)
        target = chunk_at(base, row, chunk)
        for block in cutlass.range_constexpr(BLOCKS):
            copies.copy16(target + block * BLOCK_BYTES, source + block * ROW_BYTES, size)
    copies.commit()


def show_queries() -> None:
    """Waits for what this thread has loaded of the queries, for the tensor cores."""
    copies.wait(0)
    smem.proxy_fence()


def tensors(dtype: str = DTYPES[0]) -> list[object]:
    """Fake q, k, v, cu_seqlens of both, sink and lse, to compile for any sizes."""
    size = cute.sym_int32
    kv_heads = size()

    def heads_of(heads: object) -> object:
        element = {"bfloat16": BFloat16, "float16": Float16}[dtype]
        return make_fake_compact_tensor(element, (size(), heads, DIM), stride_order=(2, 1, 0), assumed_align=16)

    def vector(dtype: type) -> object:
        return make_fake_compact_tensor(dtype, (size(),), stride_order=(0,), assumed_align=4)

    cu_seqlens = [vector(Int32) for _ in range(2)]
    lse = make_fake_compact_tensor(Float32, (size(), size()), stride_order=(1, 0), assumed_align=4)
    return [heads_of(size()), heads_of(kv_heads), heads_of(kv_heads), *cu_seqlens, vector(Float32), lse]


def masked_arguments() -> list[object]:
    """Fake mask, words and entries."""
    return [*mask_bits.tensors(), Int32(0)]


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        *given, lse = tensors(shape.dtype)
        out = tensors(shape.dtype)[0]
        if shape.masked:
            given += masked_arguments()
        numbers = Float32(0), *(Int32(0) for _ in range(4))
        return (*given, out, lse, *numbers, make_fake_stream(use_tvm_ffi_env_stream=True), shape)

    function = launch_masked if shape.masked else launch
    return KernelSpec(f"d512_{name_of(shape)}", target.value, function, arguments, tuple(shape))


def name_of(shape: Shape) -> str:
    """For names of kernels."""
    flags = ["masked"] * shape.masked + [shape.dtype] * (shape.dtype != DTYPES[0])
    return "_".join([f"{shape.ctas}x{shape.chunk}", *flags])
