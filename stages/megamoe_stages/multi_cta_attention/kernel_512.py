"""Attention at head_dim 512 for sm_90a: the columns of the output split over two warpgroups.

64 rows (queries times the heads of a kv head) of 512 fp32 columns are half of the registers of an SM, so a CTA has no
more. Two CTAs of a cluster work on neighbouring rows and share every tile of keys and values, or L2 could not
keep up: 2 KB a key and 64 rows is what 32 clocks of products need. `attend_512` has the order of things.
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, attention_mma, multicast, ring
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention import attend_512, produce_512, result_512
from megamoe_stages.multi_cta_attention.produce_512 import Source
from megamoe_stages.multi_cta_attention.result_512 import Result
from megamoe_stages.multi_cta_attention.rows_512 import Rows, Work, find_sequence, work_of
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

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 32, 240
_CHUNKS = 8  # of 16 bytes of a row of 128
_LOADS_BARRIER = 2


@cute.jit
def launch(
    q: cute.Tensor,  # (queries, heads, 512) bf16
    k: cute.Tensor,  # (keys, kv_heads, 512) bf16
    v: cute.Tensor,  # the same; k itself when shared
    cu_seqlens_q: cute.Tensor,  # (sequences + 1,) int32
    cu_seqlens_k: cute.Tensor,  # (sequences + 1,) int32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    out: cute.Tensor,  # (queries, heads, 512) bf16
    lse: cute.Tensor,  # (queries * heads,) fp32
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches a cluster for each piece of rows of each sequence and kv head."""
    queries, heads, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    keys = multicast.boxes(k, *produce_512.key_box(shape), shape.ctas)
    values = keys if shape.shared else multicast.boxes(v, *produce_512.value_box(shape), shape.ctas)
    pieces = queries * group // (shape.ctas * ROWS) + (cute.size(cu_seqlens_q) - 1)  # or fewer: sequences end early
    kernel(
        q,
        keys,
        values,
        cu_seqlens_q,
        cu_seqlens_k,
        sink,
        out,
        lse,
        softmax_scale * Float32(1 / math.log(2)),
        causal,
        window,
        has_sink,
        kv_heads,
        cute.FastDivmodDivisorV2(group),
        shape,
    ).launch(
        grid=[pieces * shape.ctas, kv_heads, 1],
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
    out: cute.Tensor,
    lse: cute.Tensor,
    factor: Float32,  # softmax_scale in base 2
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    kv_heads: Int32,
    by_group: cute.FastDivmodDivisorV2,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    number, kv_head, _ = cute.arch.block_idx()
    _, heads, _ = q.shape
    group = heads // kv_heads
    cluster_rows = shape.ctas * ROWS
    sequence, piece, pieces = find_sequence(number // shape.ctas, cu_seqlens_q, group, cluster_rows)
    if sequence < cute.size(cu_seqlens_q) - 1:
        rank = number % shape.ctas
        first_query, first_key = cu_seqlens_q[sequence], cu_seqlens_k[sequence]
        own_queries, own_keys = cu_seqlens_q[sequence + 1] - first_query, cu_seqlens_k[sequence + 1] - first_key
        cluster_first = (pieces - 1 - piece) * cluster_rows  # those with most keys first
        rows = Rows(
            first=cluster_first + rank * ROWS,
            count=own_queries * group,
            group=by_group,
            query=first_query,
            heads=heads,
            head=kv_head * group,
            position=own_keys - own_queries,
            keys=own_keys,
            causal=causal,
            window=window,
        )
        work = work_of(rows, first_key, kv_head, cluster_first, shape)
        attend_rows(q, Source(keys, values, rank), rows, work, Result(out, lse, sink, has_sink), factor, shape)


@cute.jit
def attend_rows(
    q: cute.Tensor,
    source: Constexpr[Source],
    rows: Constexpr[Rows],
    work: Constexpr[Work],
    result: Constexpr[Result],
    factor: Float32,
    shape: Constexpr[Shape],
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
        ring.init_fence()
    meet(shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if cutlass.const_expr(shape.shared):
            if warp == 0:
                produce_512.produce_shared(base, source, work, shape)
        elif warp < CONSUMERS:
            produce_512.produce(base, warp, source, work, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        load_queries(q, base, rows)
        me = attend_512.Consumer(base, thread // GROUP - 1, shape)
        attend_512.attend(me, factor, rows, work, shape)
        result_512.finish_rows(me, rows, result)
        result_512.store(me, rows, result, shape)
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


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def heads_of(dtype: type) -> object:
            return make_fake_compact_tensor(dtype, (size(), size(), DIM), stride_order=(2, 1, 0), assumed_align=16)

        def vector(dtype: type) -> object:
            return make_fake_compact_tensor(dtype, (size(),), stride_order=(0,), assumed_align=4)

        k = make_fake_compact_tensor(BFloat16, (size(), (kv := size()), DIM), stride_order=(2, 1, 0), assumed_align=16)
        v = make_fake_compact_tensor(BFloat16, (size(), kv, DIM), stride_order=(2, 1, 0), assumed_align=16)
        return (
            heads_of(BFloat16),
            k,
            v,
            vector(Int32),
            vector(Int32),
            vector(Float32),
            heads_of(BFloat16),
            vector(Float32),
            Float32(0),
            *(Int32(0) for _ in range(3)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            shape,
        )

    kind = "shared" if shape.shared else "separate"
    return KernelSpec(f"d512_{kind}_{shape.tile}_{shape.ctas}x{shape.chunk}", target.value, launch, arguments, tuple(shape))
