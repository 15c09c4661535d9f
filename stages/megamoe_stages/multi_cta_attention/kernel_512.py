"""Attention at head_dim 512 for sm_90a: the columns of the output split over two warpgroups.

64 rows (queries times the heads of a kv head) of 512 fp32 columns are half of the registers of an SM, so a CTA has no
more. Two CTAs of a cluster work on neighbouring rows and share every tile of keys and values, or L2 could not
keep up: 2 KB a key and 64 rows is what 32 clocks of products need. `attend_512` has the order of things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import attention_mma, multicast, ring, softmax, varlen
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.multicast import Boxes
from megamoe.cute.varlen import Sequences, Tile
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention import attend_512, produce_512, result_512
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.produce_512 import Source
from megamoe_stages.multi_cta_attention.shape_512 import CONSUMERS, DIM, GROUP, ROWS, THREADS, Shape
from megamoe_stages.multi_cta_attention.tiles_512 import find_piece, tile_of

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # together no more than the launch gives, 3 * 168, or all wait forever
_LOADS_BARRIER = 2


class Attention(NamedTuple):
    """What all kernels of this schedule read, and the lse that they write.

    Attributes:
        q: (queries * heads, 512) bf16.
        keys: Boxes of the keys.
        values: Boxes of the values.
        cu_q: (sequences + 1,) int32.
        cu_k: (sequences + 1,) int32.
        sink: (heads,) fp32; not read unless has_sink.
        lse: (queries * heads,) fp32.
        factor: softmax_scale in base 2, positive.
        heads: Of q.
        kv_heads: Of keys and values.
        causal: Not 0: keys after the query's position are hidden.
        window: Keys that a query sees up to its position; 0 for all.
        has_sink: Not 0: there are sinks.
        mask: (queries, columns) uint8, 0 for a hidden key; not read unless the shape is masked.
    """

    q: cute.Tensor
    keys: Boxes
    values: Boxes
    cu_q: cute.Tensor
    cu_k: cute.Tensor
    sink: cute.Tensor
    lse: cute.Tensor
    factor: Float32
    heads: Int32
    kv_heads: Int32
    causal: Int32
    window: Int32
    has_sink: Int32
    mask: cute.Tensor


Finish = Callable[[Consumer], None]


@cute.jit
def launch(
    q: cute.Tensor,  # (queries * heads, 512) bf16
    k: cute.Tensor,  # (keys, kv_heads, 512) bf16
    v: cute.Tensor,  # the same
    cu_q: cute.Tensor,  # (sequences + 1,) int32
    cu_k: cute.Tensor,  # (sequences + 1,) int32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    out: cute.Tensor,  # (queries * heads, 512) bf16
    lse: cute.Tensor,  # (queries * heads,) fp32
    mask: cute.Tensor,  # (queries, columns) uint8; not read unless the shape is masked
    softmax_scale: Float32,  # positive
    heads: Int32,
    causal: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    ctas: Int32,  # most that there may be, where they are persistent
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches a cluster for each piece of rows of each sequence and kv head."""
    numbers = (softmax_scale, heads, causal, window, has_sink)
    given = prepare(q, k, v, cu_q, cu_k, sink, lse, mask, *numbers, shape)
    kernel(*given, out, shape).launch(
        grid=grid(given, ctas, shape),
        block=[THREADS, 1, 1],
        cluster=[shape.ctas, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        stream=stream,
    )


def prepare(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_q: cute.Tensor,
    cu_k: cute.Tensor,
    sink: cute.Tensor,
    lse: cute.Tensor,
    mask: cute.Tensor,
    softmax_scale: Float32,
    heads: Int32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    shape: Shape,
) -> Attention:
    """What a kernel gets, on the host; see `launch`."""
    keys = multicast.boxes(k, *produce_512.key_box(shape), shape.ctas)
    values = multicast.boxes(v, *produce_512.value_box(shape), shape.ctas)
    factor = softmax_scale * Float32(softmax.LOG2E)
    return Attention(q, keys, values, cu_q, cu_k, sink, lse, factor, heads, k.shape[1], causal, window, has_sink, mask)


def grid(given: Attention, ctas: Int32, shape: Shape) -> list[Int32]:
    """CTAs of a launch: a cluster a piece of rows, some without work where sequences end early, or `ctas` at most."""
    pieces = most_pieces(given, shape)
    if shape.persistent:
        return [cutlass.min(pieces * given.kv_heads, ctas // shape.ctas) * shape.ctas, 1, 1]
    return [pieces * shape.ctas, given.kv_heads, 1]


def most_pieces(given: Attention, shape: Shape) -> Int32:
    """Pieces of rows of a kv head that there may be."""
    rows = given.q.shape[0] // given.kv_heads  # of all sequences
    return rows // (shape.ctas * ROWS) + (cute.size(given.cu_q) - 1)


@cute.kernel
def kernel(
    q: cute.Tensor,
    keys: Boxes,
    values: Boxes,
    cu_q: cute.Tensor,
    cu_k: cute.Tensor,
    sink: cute.Tensor,
    lse: cute.Tensor,
    factor: Float32,
    heads: Int32,
    kv_heads: Int32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    mask: cute.Tensor,
    out: cute.Tensor,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""

    def finish(me: Consumer) -> None:
        result_512.store(me, out, shape)

    given = Attention(q, keys, values, cu_q, cu_k, sink, lse, factor, heads, kv_heads, causal, window, has_sink, mask)
    work(given, finish, shape)


@cute.jit
def work(given: Constexpr[Attention], finish: Constexpr[Finish], shape: Constexpr[Shape]) -> None:
    """The whole kernel, for all threads of a CTA.

    Args:
        given: What is read.
        finish: Gets a consumer whose sums have become the output, fp32, and writes it; the queries' place is free.
        shape: How the work is cut.
    """
    sequences = sequences_of(given, shape)
    if cutlass.const_expr(shape.persistent):
        share_work(given, sequences, finish, shape)
    else:
        number, _, _ = cute.arch.block_idx()
        sequence, _ = find_piece(number // shape.ctas, sequences, shape)
        if sequence < cute.size(given.cu_q) - 1:
            share_work(given, sequences, finish, shape)


def sequences_of(given: Attention, shape: Shape) -> Sequences:
    """What is attended to."""
    columns = cute.size(given.mask, mode=[1]) if shape.masked else None
    return Sequences(given.cu_q, given.cu_k, given.heads, given.kv_heads, given.causal, given.window, columns)


@cute.jit
def share_work(
    given: Constexpr[Attention],
    sequences: Constexpr[Sequences],
    finish: Constexpr[Finish],
    shape: Constexpr[Shape],
) -> None:
    """What the threads of a CTA do."""
    thread, _, _ = cute.arch.thread_idx()
    number, _, _ = cute.arch.block_idx()
    rank = number % shape.ctas
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
        if warp < CONSUMERS:
            cursor = cute.make_rmem_tensor((2,), Int32)
            cursor[0], cursor[1] = Int32(0), Int32(0)
            source = Source(given.keys, given.values, rank)

            def load(tile: Tile) -> None:
                produce_512.produce(base, warp, cursor, source, tile, shape)

            for_each_piece(load, given, sequences, rank, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        me = Consumer(base, thread // GROUP - 1, sequences, given.factor, given.mask, shape)

        def attend(tile: Tile) -> None:
            attend_piece(me, tile, given, finish, shape)

        for_each_piece(attend, given, sequences, rank, shape)
    if cutlass.const_expr(shape.ctas > 1):
        meet(shape)  # nobody leaves while the others write to it


@cute.jit
def for_each_piece(
    do: Constexpr[Callable[[Tile], None]],
    given: Constexpr[Attention],
    sequences: Constexpr[Sequences],
    rank: Int32,
    shape: Constexpr[Shape],
) -> None:
    """Calls `do` with the rows of this CTA in each piece of its cluster."""
    number, kv_head, _ = cute.arch.block_idx()
    if cutlass.const_expr(shape.persistent):
        across, _, _ = cute.arch.grid_dim()
        pieces = most_pieces(given, shape)
        for index in cutlass.range(number // shape.ctas, pieces * given.kv_heads, across // shape.ctas, unroll=1):
            kv_head = index // pieces
            sequence, piece = find_piece(index - kv_head * pieces, sequences, shape)
            if sequence < cute.size(given.cu_q) - 1:
                do(tile_of(sequence, piece, rank, kv_head, sequences, shape))
    else:
        sequence, piece = find_piece(number // shape.ctas, sequences, shape)
        do(tile_of(sequence, piece, rank, kv_head, sequences, shape))


@cute.jit
def attend_piece(
    me: Constexpr[Consumer],
    tile: Constexpr[Tile],
    given: Constexpr[Attention],
    finish: Constexpr[Finish],
    shape: Constexpr[Shape],
) -> None:
    """What a consumer does for the rows of a tile."""
    thread = cute.arch.thread_idx()[0] - GROUP
    if cutlass.const_expr(shape.persistent):  # the output of the last rows has left the queries' place
        attention_mma.named_barrier(_LOADS_BARRIER, CONSUMERS * GROUP)
    varlen.load_rows(given.q, me.base, tile, 0, ROWS, me.sequences, thread, CONSUMERS * GROUP)
    attention_mma.commit_copies()
    attention_mma.wait_copies(0)
    attention_mma.proxy_fence()
    attention_mma.named_barrier(_LOADS_BARRIER, CONSUMERS * GROUP)
    me.start(tile)
    attend_512.attend(me, shape)
    result_512.finish_rows(me, given.lse, given.sink, given.has_sink)
    finish(me)


def meet(shape: Shape) -> None:
    """A barrier of the cluster."""
    if shape.ctas > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


def tensors() -> list[object]:
    """Fake q, k, v, cu_seqlens of both, sink, lse and mask, to compile for any sizes."""
    size = cute.sym_int32
    keys, kv_heads = size(), size()

    def tensor(dtype: type, sizes: tuple[object, ...], align: int) -> object:
        order = tuple(reversed(range(len(sizes))))
        return make_fake_compact_tensor(dtype, sizes, stride_order=order, assumed_align=align)

    given = [tensor(BFloat16, (size(), DIM), 16)]
    given += [tensor(BFloat16, (keys, kv_heads, DIM), 16) for _ in range(2)]
    given += [tensor(Int32, (size(),), 4) for _ in range(2)]
    return [*given, *(tensor(Float32, (size(),), 4) for _ in range(2)), tensor(Uint8, (size(), size()), 1)]


def numbers() -> tuple[object, ...]:
    """Stand-ins for the numbers of a launch."""
    return Float32(0), *(Int32(0) for _ in range(5))


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        *given, lse, mask = tensors()
        out = tensors()[0]
        return (*given, out, lse, mask, *numbers(), make_fake_stream(use_tvm_ffi_env_stream=True), shape)

    return KernelSpec(f"attend_d512_{name_of(shape)}", target.value, launch, arguments, tuple(shape))


def name_of(shape: Shape) -> str:
    """For names of kernels."""
    kinds = [
        name for name, on in (("lazy", shape.lazy), ("persistent", shape.persistent), ("masked", shape.masked)) if on
    ]
    return "_".join([f"{shape.keys}_{shape.ctas}x{shape.chunk}", *kinds])
