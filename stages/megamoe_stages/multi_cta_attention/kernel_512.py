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
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, attention_mma, mask_bits, multicast, ring
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import CHUNK
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
_CHUNKS = ROW_BYTES // CHUNK
_ROWS_AT_ONCE = WARP // _CHUNKS
_LOADS_BARRIER = 2


class Attention(NamedTuple):
    """What all kernels of this schedule read, and the lse that they write.

    Attributes:
        q: (queries, heads, 512) bf16 or fp16.
        keys: Boxes of the keys.
        values: Boxes of the values.
        cu_seqlens_q: (sequences + 1,) int32.
        cu_seqlens_k: (sequences + 1,) int32.
        sink: (heads,) fp32; not read unless has_sink.
        lse: (queries * heads,) fp32.
        kv_heads: Of keys and values.
        group: Divides by the heads of a kv head.
        pieces: Divides by how many pieces of rows a kv head can have.
        together: Divides by how many kv heads' pieces come together.
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
    pieces: cute.FastDivmodDivisorV2
    together: cute.FastDivmodDivisorV2
    factor: Float32
    causal: Int32
    window: Int32
    has_sink: Int32


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
    words: cute.Tensor,  # (queries, mask_bits.width_of(columns)) int32, a place for the mask's bits
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
    bits = mask_bits.bits_of(words)
    mask_bits.start_packing(mask, bits, stream)
    given = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, softmax_scale, causal, window, has_sink, shape)
    start(kernel(*given, out, *bits, entries, shape), q, k, cu_seqlens_q, stream, shape)


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
    pieces, together = (cute.FastDivmodDivisorV2(number) for number in order_of(q, k, cu_seqlens_q, shape))
    read = (q, keys, values, cu_seqlens_q, cu_seqlens_k, sink)
    return Attention(*read, lse, kv_heads, group, pieces, together, factor, causal, window, has_sink)


def order_of(q: cute.Tensor, k: cute.Tensor, cu_seqlens_q: cute.Tensor, shape: Shape) -> tuple[Int32, Int32]:
    """As many pieces of rows as a kv head can have, and how many heads' pieces come together; on the host.

    The pieces with most keys come first, of some heads together: of few, so that their keys stay in L2, but not of one
    head after the other, or the last head's longest piece would begin when nothing is left to do beside it.
    """
    queries, heads, _ = q.shape
    kv_heads = k.shape[1]
    pieces = queries * (heads // kv_heads) // (shape.ctas * ROWS) + (cute.size(cu_seqlens_q) - 1)
    several = cutlass.max(kv_heads * pieces // PIECES_TOGETHER, 1)
    together = (kv_heads + (several - 1)) // several
    return pieces, arith.select(pieces < PIECES_ALONE, together, Int32(1))


def start(
    kernel: Any,
    q: cute.Tensor,
    k: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    stream: CUstream,
    shape: Shape,
    most: int = 0,
) -> None:
    """Launches a kernel of this schedule: a cluster a piece of rows, some without work where sequences end early."""
    pieces, together = order_of(q, k, cu_seqlens_q, shape)
    clusters = (k.shape[1] + (together - 1)) // together * together * pieces
    if shape.persistent:
        clusters = cutlass.min(clusters, most)
    kernel.launch(
        grid=[clusters * shape.ctas, 1, 1],
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
    pieces: cute.FastDivmodDivisorV2,
    together: cute.FastDivmodDivisorV2,
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

    read = (q, keys, values, cu_seqlens_q, cu_seqlens_k, sink)
    given = Attention(*read, lse, kv_heads, group, pieces, together, factor, causal, window, has_sink)
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
        finish: Gets a consumer whose sums have become the output, fp32, and writes it; its ring is free unless the
            kernel is persistent, the weights' place always. That of a persistent kernel waits for the next queries and
            asks for the next rows' first scores (`attend_512.ask`).
        shape: How the work is cut.
        fetch: Of a persistent kernel: gets the shared memory's address in a warp of the producers and brings to
            `shape.angles_at` what `finish` waits for at `shape.fetched_at`.
    """
    if cutlass.const_expr(shape.persistent):
        share_work(given, mask, finish, fetch, None, shape)
    else:
        piece = piece_of(given, Int32(0), mask, shape)
        if piece.exists:
            share_work(given, mask, finish, fetch, piece, shape)


@cute.jit
def share_work(
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    finish: Constexpr[Finish],
    fetch: Constexpr[Fetch | None],
    only: Constexpr[Piece | None],
    shape: Constexpr[Shape],
) -> None:
    """What the threads of a CTA do: for one piece of rows, or for those of its turns."""
    thread, _, _ = cute.arch.thread_idx()
    base = ring.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        make_barriers(base, shape)
    meet(shape)
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < CONSUMERS:
            supply(base, warp, given, mask, only, shape)
        elif cutlass.const_expr(only is None):
            prepare_turns(base, warp, given, mask, fetch, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        me = attend_512.Consumer(base, thread // GROUP - 1, given.factor, mask)
        if cutlass.const_expr(only is not None):
            load_queries(given.q, base, only.rows, thread // WARP - GROUP // WARP, CONSUMERS * GROUP // WARP)
            show_queries()
            attention_mma.named_barrier(_LOADS_BARRIER, CONSUMERS * GROUP)
            consume(me, only, given, finish, shape)
        else:
            take_pieces(me, given, mask, finish, shape)
    if cutlass.const_expr(shape.ctas > 1):
        meet(shape)  # nobody leaves while the others write to it


def make_barriers(base: Int32, shape: Shape) -> None:
    """The mbarriers of a CTA."""
    for i in range(CONSUMERS * shape.slots):
        ring.init(base + shape.barriers_at + i * 16, 1)
        ring.init(base + shape.barriers_at + i * 16 + 8, shape.ctas * GROUP // WARP)
    for i in range(CONSUMERS):
        ring.init(base + shape.ready_at + i * 16, GROUP)
        ring.init(base + shape.ready_at + i * 16 + 8, GROUP // WARP)
    ring.init(base + shape.fetched_at, 1)
    if shape.persistent:
        ring.init(base + shape.queries_read_at, CONSUMERS * GROUP // WARP)
        ring.init(base + shape.queries_there_at, GROUP // WARP - CONSUMERS)
        ring.init(base + shape.turned_at, CONSUMERS * GROUP // WARP)
    ring.init_fence()


class Piece(NamedTuple):
    """Rows of a cluster.

    Attributes:
        exists: Whether there are any; nothing else counts where not.
        rows: Of the CTA.
        first: Of the cluster.
        token: The sequence's first key, among all.
        kv_head: Which head of the keys.
    """

    exists: Boolean
    rows: Rows
    first: Int32
    token: Int32
    kv_head: Int32


def piece_of(given: Attention, turn: Int32, mask: Mask | None, shape: Shape) -> Piece:
    """What a CTA works on in its turn."""
    cta, _, _ = cute.arch.block_idx()
    cluster, rank = cta // shape.ctas, cta % shape.ctas
    if shape.persistent:  # back and forth over the pieces of heads that come together, so that long and short ones meet
        clusters, turns = clusters_and_turns(given, shape)
        several, turn_of_these = turn // turns, turn % turns
        place = (cluster + several // 2) % clusters  # so that not always the same ones get nothing
        number = turn_of_these * clusters + arith.select(turn % 2 == 0, place, clusters - 1 - place)
        number, head = divmod(number, given.together)
    else:
        rest, head = divmod(cluster, given.together)
        several, number = divmod(rest, given.pieces)
    kv_head = cute.arch.make_warp_uniform(several * given.together.divisor + head)
    heads, group = given.q.shape[1], given.group.divisor
    cluster_rows = shape.ctas * ROWS
    sequences = cute.size(given.cu_seqlens_q) - 1
    sequence, piece, count = find_sequence(number, given.cu_seqlens_q, group, cluster_rows)
    exists = (kv_head < given.kv_heads) & (sequence < sequences) & (number < given.pieces.divisor)
    sequence = cutlass.min(sequence, sequences - 1)
    query, key = given.cu_seqlens_q[sequence], given.cu_seqlens_k[sequence]
    queries, keys = given.cu_seqlens_q[sequence + 1] - query, given.cu_seqlens_k[sequence + 1] - key
    entries = Int32(0) if mask is None else cutlass.min(mask.entries, keys)
    first = (count - 1 - piece) * cluster_rows  # those with most keys first
    rows = Rows(
        first=first + rank * ROWS,
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
    return Piece(exists, rows, first, key, kv_head)


def clusters_and_turns(given: Attention, shape: Shape) -> tuple[Int32, Int32]:
    """Of a persistent kernel: its clusters, and their turns at the pieces of heads that come together."""
    across, _, _ = cute.arch.grid_dim()
    clusters = across // shape.ctas
    return clusters, (given.together.divisor * given.pieces.divisor + (clusters - 1)) // clusters


def turns_of(given: Attention, shape: Shape) -> Int32:
    """How many pieces of rows a persistent CTA may get."""
    _, turns = clusters_and_turns(given, shape)
    together = given.together.divisor
    return Int32(cute.arch.make_warp_uniform((given.kv_heads + (together - 1)) // together * turns))


@cute.jit
def supply(
    base: Int32,
    warp: Int32,
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    only: Constexpr[Piece | None],
    shape: Constexpr[Shape],
) -> None:
    """Keeps a consumer's ring full."""
    cursor = cute.make_rmem_tensor((2,), Int32)
    cursor[0], cursor[1] = Int32(0), Int32(0)
    source = Source(given.keys, given.values, cute.arch.block_idx()[0] % shape.ctas)
    if cutlass.const_expr(only is not None):
        produce_512.produce(base, warp, cursor, source, work_on(only, mask, shape), shape)
    else:
        for turn in cutlass.range(turns_of(given, shape), unroll=1):
            piece = piece_of(given, turn, mask, shape)
            if piece.exists:
                produce_512.produce(base, warp, cursor, source, work_on(piece, mask, shape), shape)
        nothing = Work(Int32(0), Int32(0), Int32(0), Int32(0))
        produce_512.produce(base, warp, cursor, source, nothing, shape)


@cute.jit
def prepare_turns(
    base: Int32,
    warp: Int32,
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    fetch: Constexpr[Fetch],
    shape: Constexpr[Shape],
) -> None:
    """Brings the queries of each turn as soon as those before were read, and tells the consumers of it; two warps."""
    first = arith.select(cute.arch.lane_idx() == 0, Int32(1), Int32(0))
    done = Int32(0)
    for turn in cutlass.range(turns_of(given, shape), unroll=1):
        piece = piece_of(given, turn, mask, shape)
        if piece.exists:
            ring.wait(base + shape.queries_read_at, done % 2 ^ 1)
            load_queries(given.q, base, piece.rows, warp - CONSUMERS, GROUP // WARP - CONSUMERS)
            if warp == CONSUMERS:
                tell(base, piece, shape)
            show_queries()
            cute.arch.sync_warp()
            ring.arrive_if(base + shape.queries_there_at, first)
            if warp == CONSUMERS:
                ring.wait(base + shape.turned_at, done % 2 ^ 1)
                fetch(base, piece.rows)
            done = done + 1
    ring.wait(base + shape.queries_read_at, done % 2 ^ 1)
    if warp == CONSUMERS:
        attention_mma.store16(base + shape.record_at, [Uint32(0)] * 4)
        cute.arch.sync_warp()
    ring.arrive_if(base + shape.queries_there_at, first)


def tell(base: Int32, piece: Piece, shape: Shape) -> None:
    """Writes which rows the consumers have next; a warp."""
    rows = piece.rows
    words = [Uint32(word) for word in (Int32(1), piece.first, rows.count, rows.query, rows.head, rows.position)]
    words += [Uint32(rows.keys), Uint32(rows.entries)]
    for i in range(2):
        attention_mma.store16(base + shape.record_at + 16 * i, words[4 * i : 4 * i + 4])


def told(base: Int32, shape: Shape) -> list[Int32]:
    """What `tell` wrote."""
    at = base + shape.record_at
    return [cute.arch.make_warp_uniform(Int32(word)) for i in range(2) for word in ring.load16(at + 16 * i)]


@cute.jit
def take_pieces(
    me: Constexpr[Consumer],
    given: Constexpr[Attention],
    mask: Constexpr[Mask | None],
    finish: Constexpr[Finish],
    shape: Constexpr[Shape],
) -> None:
    """A persistent CTA's pieces of rows, for a consumer."""
    ring.wait(me.base + shape.queries_there_at, Int32(0))
    scores: list[Float32] = []
    held: list[Int32] = []
    for part in cutlass.range_constexpr(attend_512.ASKED_PARTS):
        scores, held = attend_512.ask(me, scores, held, part, shape)
    attend_512.keep_scores(me, scores, held, shape)
    going, first, count, query, head, position, keys, entries = told(me.base, shape)
    while going != 0:
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
        consume(me, Piece(Boolean(True), rows, first, Int32(0), Int32(0)), given, finish, shape)
        going, first, count, query, head, position, keys, entries = told(me.base, shape)


def work_on(piece: Piece, mask: Mask | None, shape: Shape) -> Work:
    """The keys of a piece of rows."""
    return work_of(piece.rows, piece.token, piece.kv_head, piece.first, mask, shape)


def consume(me: Consumer, piece: Piece, given: Attention, finish: Finish, shape: Shape) -> None:
    """A piece of rows, whose queries are there; the sequence's place among all keys is not needed."""
    work = work_on(piece, me.mask, shape)
    attend_512.begin(me)
    attend_512.attend(me, piece.rows, work, shape)
    sinks = cute.make_rmem_tensor((2,), Float32)
    result_512.load_sinks(sinks, piece.rows, given.sink, given.has_sink)
    attend_512.add_last(me, piece.rows, work, shape)
    result_512.finish_rows(me, piece.rows, given.lse, sinks)
    finish(me, piece.rows)
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
    chunk = lane % _CHUNKS
    for i in cutlass.range(ROWS // warps // _ROWS_AT_ONCE, unroll=1):
        row = (i * warps + warp) * _ROWS_AT_ONCE + lane // _CHUNKS
        inside = rows.first + row < rows.count
        place = rows.place(arith.select(inside, rows.first + row, Int32(0)))
        size = arith.select(inside, Int32(CHUNK), Int32(0))
        source = ring.address(q.iterator) + (place * (2 * DIM) + chunk * CHUNK)
        target = base + row * ROW_BYTES + ((chunk ^ row) & (_CHUNKS - 1)) * CHUNK
        for block in cutlass.range_constexpr(BLOCKS):
            attention_mma.copy16(target + block * BLOCK_BYTES, source + block * ROW_BYTES, size)
    attention_mma.commit_copies()


def show_queries() -> None:
    """Waits for what this thread has loaded of the queries, for the tensor cores."""
    attention_mma.wait_copies(0)
    attention_mma.proxy_fence()


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
        numbers = Float32(0), *(Int32(0) for _ in range(3))
        return (*given, out, lse, *numbers, make_fake_stream(use_tvm_ffi_env_stream=True), shape)

    function = launch_masked if shape.masked else launch
    return KernelSpec(f"d512_{name_of(shape)}", target.value, function, arguments, tuple(shape))


def name_of(shape: Shape) -> str:
    """For names of kernels."""
    flags = [name for name in ("masked", "persistent") if getattr(shape, name)]
    return "_".join([f"{shape.ctas}x{shape.chunk}", *flags, *([] if shape.dtype == DTYPES[0] else [shape.dtype])])
