"""The decode kernels for sm_90a that attend with wgmma.

A CTA takes up to 64 rows (queries times heads of one kv head) and a share of the tokens that they see, found from the
lengths on the device. Where values are apart from keys, one or two warpgroups copy tiles of 64 tokens and decode them
to bf16 in shared memory, and two attend. Where the keys are the values, see `mqa`.
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, asm, convert, f16, gmem, mbarrier, smem
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.fp4_kv_decode import attend, mqa, mqa_shape, produce
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, Rows
from megamoe_stages.fp4_kv_decode.result import Result, finish, join_consumers
from megamoe_stages.fp4_kv_decode.shape import BLOCK_BYTES, CONSUMERS, GROUP, ROWS, TILE, Shape
from megamoe_stages.fp4_kv_decode.tokens import Tokens, Work

PRODUCER_REGISTERS = {1: 72, 2: 48}  # by their number
CONSUMER_REGISTERS = {1: 216, 2: 208}  # what is left of 64 K
_LEAST_FACTOR = 2.0**-100  # for a softmax_scale of 0
_BATCH = 8  # loads of queries in flight


@cute.jit
def launch(
    q: cute.Tensor,  # (batch * queries * heads, D) bf16
    k_codes: cute.Tensor,  # (pages * kv_heads * page, D/2) uint8
    k_scales: cute.Tensor,  # (pages * kv_heads * page, D/16) uint8
    v_codes: cute.Tensor,  # the same with Dv; the keys' when shared
    v_scales: cute.Tensor,
    block_table: cute.Tensor,  # (batch, max_pages) int32
    lengths: cute.Tensor,  # (batch,) int32
    indices: cute.Tensor,  # (batch * queries, picked) int32; not read unless indexed
    extra_codes: cute.Tensor,  # (pages * kv_heads * page, D/2) uint8 of the second cache; the first where there is none
    extra_scales: cute.Tensor,
    extra_table: cute.Tensor,
    extra_lengths: cute.Tensor,
    extra_indices: cute.Tensor,  # not read unless extra_indexed
    extra_scale: cute.Tensor,  # () fp32
    k_scale: cute.Tensor,  # () fp32
    v_scale: cute.Tensor,  # () fp32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    out: cute.Tensor,  # (batch * queries * heads, Dv) bf16
    lse: cute.Tensor,  # (batch * queries * heads,) fp32
    parts: cute.Tensor,  # these three as `result.Result` has them; not used where there is one part
    stats: cute.Tensor,
    arrived: cute.Tensor,
    softmax_scale: Float32,
    queries: Int32,
    heads: Int32,
    kv_heads: Int32,
    page: Int32,
    pages: Int32,
    extra_page: Int32,
    extra_pages: Int32,
    window: Int32,  # 0 for none
    indexed: Int32,
    extra_indexed: Int32,
    has_sink: Int32,
    splits: Int32,
    fresh: Int32,  # tokens of each sequence that the launch before, `append`, appends; 0 where there is none
    stream: CUstream,
    shape: Constexpr[Shape | mqa_shape.Shape],
) -> None:
    """Launches a CTA for each share of the tokens of 64 rows."""
    group = heads // kv_heads
    batch = cute.size(lengths)
    apart = (indexed != 0) | (extra_indexed != 0)  # each query sees tokens of its own
    rows = group if apart else group * queries
    problems = batch * queries if apart else batch
    unit = f16.DECODED_UNIT if shape.shared else convert.DECODED_UNIT
    scores = softmax_scale * Float32(unit / math.log(2))
    by_page, by_extra_page = cute.FastDivmodDivisorV2(page), cute.FastDivmodDivisorV2(extra_page)
    kernel(
        q,
        k_codes,
        k_scales,
        v_codes,
        v_scales,
        block_table,
        lengths,
        indices,
        extra_codes,
        extra_scales,
        extra_table,
        extra_lengths,
        extra_indices,
        extra_scale,
        k_scale,
        v_scale,
        sink,
        out,
        lse,
        parts,
        stats,
        arrived,
        scores,
        queries,
        heads,
        kv_heads,
        page,
        pages,
        by_page,
        extra_page,
        extra_pages,
        by_extra_page,
        window,
        indexed,
        extra_indexed,
        has_sink,
        splits,
        fresh,
        shape,
    ).launch(
        grid=[problems, cute.ceil_div(rows, ROWS) * kv_heads, splits],
        block=[shape.threads, 1, 1],
        cluster=[1, 1, 2 if shape.paired else 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        use_pdl=True,
        stream=stream,
    )


@cute.kernel
def kernel(
    q: cute.Tensor,
    k_codes: cute.Tensor,
    k_scales: cute.Tensor,
    v_codes: cute.Tensor,
    v_scales: cute.Tensor,
    block_table: cute.Tensor,
    lengths: cute.Tensor,
    indices: cute.Tensor,
    extra_codes: cute.Tensor,
    extra_scales: cute.Tensor,
    extra_table: cute.Tensor,
    extra_lengths: cute.Tensor,
    extra_indices: cute.Tensor,
    extra_scale: cute.Tensor,
    k_scale: cute.Tensor,
    v_scale: cute.Tensor,
    sink: cute.Tensor,
    out: cute.Tensor,
    lse: cute.Tensor,
    parts: cute.Tensor,
    stats: cute.Tensor,
    arrived: cute.Tensor,
    scores: Float32,  # softmax_scale in units of the decoded products, base 2
    queries: Int32,
    heads: Int32,
    kv_heads: Int32,
    page: Int32,
    pages: Int32,
    by_page: cute.FastDivmodDivisorV2,
    extra_page: Int32,
    extra_pages: Int32,
    by_extra_page: cute.FastDivmodDivisorV2,
    window: Int32,
    indexed: Int32,
    extra_indexed: Int32,
    has_sink: Int32,
    splits: Int32,
    fresh: Int32,
    shape: Constexpr[Shape | mqa_shape.Shape],
) -> None:
    """The kernel; see the module.

    Behind `append`, which starts this one only when all kernels before it have ended, nothing but the copies of its
    tokens has to wait; see `tokens.wait_for_appended`.
    """
    thread, _, _ = cute.arch.thread_idx()
    problem, part, split = cute.arch.block_idx()
    base = asm.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        if cutlass.const_expr(shape.shared):
            mqa.init_barriers(base, shape)
        else:
            init_barriers(base, shape)
        mbarrier.init_fence()
    if fresh == 0:
        cute.arch.griddepcontrol_wait()  # for what earlier launches write: so far this one has looked at nothing

    row_block, kv_head = part // kv_heads, part % kv_heads
    group = heads // kv_heads
    apart = (indexed != 0) | (extra_indexed != 0)
    sequence = arith.select(apart, problem // queries, problem)
    length = lengths[sequence]
    rows = Rows(
        first=row_block * ROWS,
        count=arith.select(apart, group, group * queries),
        group=group,
        position=length - queries + arith.select(apart, problem % queries, Int32(0)),
        window=window,
        indexed=indexed,
        near=Int32(0),
        query=arith.select(apart, problem, problem * queries),
        heads=heads,
        head=kv_head * group,
    )
    held = cutlass.min(length, cute.size(block_table, mode=[1]) * page)
    start, end = seen(rows, held, cute.size(indices, mode=[1]))
    tokens = Tokens(
        block_table, indices, indexed, sequence, problem, held, start, end, by_page, page, pages, kv_heads, kv_head
    )
    near = (cutlass.max(end - start, 0) + (TILE - 1)) // TILE
    tiles, entries = near, tokens
    if cutlass.const_expr(shape.extra):
        held = cutlass.min(extra_lengths[sequence], cute.size(extra_table, mode=[1]) * extra_page)
        end = arith.select(extra_indexed != 0, cute.size(extra_indices, mode=[1]), held)
        tiles = near + (cutlass.max(end, 0) + (TILE - 1)) // TILE
        entries = Tokens(
            extra_table,
            extra_indices,
            extra_indexed,
            sequence,
            problem,
            held,
            -near * TILE,
            end,
            by_extra_page,
            extra_page,
            extra_pages,
            kv_heads,
            kv_head,
        )
    share = (tiles + splits - 1) // splits
    skipped = split * share  # tiles of other CTAs
    own = cutlass.max(cutlass.min(tiles - skipped, share), 0)
    rows = rows._replace(near=near - skipped)
    first = start + skipped * TILE
    work = Work(
        tiles=own,
        near=near - skipped,
        fresh=first_fresh(length - fresh, fresh, first, near - skipped, indexed),
        tokens=tokens._replace(first=first),
        entries=entries._replace(first=entries.first + skipped * TILE),
        keys=tokens.store(k_codes, k_scales, shape.head_dim),
        values=tokens.store(v_codes, v_scales, shape.v_dim),
        extra=tokens.store(extra_codes, extra_scales, shape.head_dim),
    )
    number = problem * cute.arch.grid_dim()[1] + part
    unit = v_scale[()] * Float32(f16.DECODED_UNIT if shape.shared else convert.DECODED_UNIT)
    result = Result(out, lse, sink, has_sink, unit, parts, stats, arrived, splits, split, number, Int32(0))

    cute.arch.sync_threads()
    if cutlass.const_expr(shape.shared):
        mqa.run(base, q, scores, (k_scale, extra_scale), own, first, work, rows, result, shape)
    else:
        run(base, q, scores * k_scale[()], own, first, work, rows, result, shape)


def first_fresh(old: Int32, fresh: Int32, first: Int32, near: Int32, indexed: Int32) -> Int32:
    """`Work.fresh` of a CTA whose first cache starts at token `first` and has `near` tiles, of `old` tokens before."""
    tile = arith.select(indexed != 0, Int32(0), cutlass.max(old - first, 0) // TILE)
    return arith.select((fresh != 0) & (near > 0), tile, Int32(-1))


def init_barriers(base: Int32, shape: Shape) -> None:
    """Makes the mbarriers of decoded tiles; a thread."""
    for buffer in range(shape.buffers):
        mbarrier.init(base + shape.barriers_at + buffer * 16, shape.producer_threads)
        mbarrier.init(base + shape.barriers_at + buffer * 16 + 8, GROUP // 32)


@cute.jit
def run(
    base: Int32,
    q: cute.Tensor,
    scores: Float32,
    own: Int32,
    first: Int32,
    work: Constexpr[Work],
    rows: Constexpr[Rows],
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """What the threads of a CTA do, whose `own` tiles start at token `first`; products times `scores` are scores."""
    thread, _, _ = cute.arch.thread_idx()
    if thread < shape.producer_threads:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS[shape.producers])
        produce.produce(base, work, shape)
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[shape.producers])
        consumer = thread // GROUP - shape.producers
        acc = cute.make_rmem_tensor((shape.out_columns // 2,), Float32)
        stat = cute.make_rmem_tensor((4,), Float32)
        load_queries(thread - shape.producer_threads, q, sign(scores), base, rows, shape)
        attend.attend(acc, stat, base, consumer, own, first, factor(scores), rows, shape)
        join_consumers(acc, stat, base, consumer, shape)
        if consumer == 0:
            finish(acc, stat, base, rows, result, shape)


def seen(rows: Rows, held: Int32, picked: Int32) -> tuple[Int32, Int32]:
    """The tokens that some row of the CTA may see, from one to before another; places in the list when indexed."""
    last = cutlass.min(rows.first + ROWS, rows.count) - 1
    end = cutlass.min(held, rows.position + last // rows.group + 1)
    start = rows.position + rows.first // rows.group - rows.window + 1
    start = arith.select(rows.window != 0, cutlass.max(start, 0), Int32(0))
    some = rows.indexed != 0
    return arith.select(some, Int32(0), start), arith.select(some, picked, end)


def factor(scores: Float32) -> Float32:
    """The size of a factor of scores, above 0, so that a product that stands for nothing visible stays -inf."""
    return arith.maximum(arith.magnitude(scores, Target.SM90), Float32(_LEAST_FACTOR), Target.SM90)


def sign(scores: Float32) -> Uint32:
    """What flips the signs of a pair of queries where a factor of scores is below 0: `factor` has none."""
    return Uint32(arith.select(scores < Float32(0.0), Uint32(0x80008000), Uint32(0)))


def load_queries(thread: Int32, q: cute.Tensor, negative: Uint32, base: Int32, rows: Rows, shape: Shape) -> None:
    """Brings the queries into shared memory, in the order of decoded values; zeros where there is no row.

    `negative` flips their signs: the factor of the scores has none.
    """
    chunks, threads = shape.head_dim // 8, CONSUMERS * GROUP
    count = ROWS * chunks // threads
    for start in range(0, count, _BATCH):
        places, loaded = [], []
        for i in range(start, min(start + _BATCH, count)):
            row, chunk = (thread + i * threads) // chunks, (thread + i * threads) % chunks
            inside = rows.first + row < rows.count
            place = rows.place(arith.select(inside, rows.first + row, Int32(0)))
            at = asm.address(q) + (Int64(place) * shape.head_dim + chunk * 8) * 2
            loaded.append((inside, gmem.load16(at)))
            places.append(base + chunk // 8 * BLOCK_BYTES + row * 128 + ((chunk ^ row) % 8) * 16)
        for place, (inside, words) in zip(places, loaded, strict=True):
            words = [arith.select(inside, word ^ negative, word ^ word) for word in produce.value_order(words)]
            smem.store16(place, words)
    smem.proxy_fence()
    mbarrier.named_barrier(CONSUMERS_BARRIER, threads)


def spec(shape: Shape | mqa_shape.Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def matrix(dtype: type, columns: object, align: int) -> object:
            return make_fake_compact_tensor(dtype, (size(), columns), stride_order=(1, 0), assumed_align=align)

        def vector(dtype: type) -> object:
            return make_fake_compact_tensor(dtype, (size(),), stride_order=(0,), assumed_align=4)

        dims = (shape.head_dim, shape.v_dim, shape.head_dim)
        caches = [matrix(Uint8, dim // part, 16) for dim in dims for part in (2, 16)]
        scalars = [make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(3)]
        return (
            matrix(BFloat16, shape.head_dim, 16),
            *caches[:4],
            matrix(Int32, size(), 4),
            vector(Int32),
            matrix(Int32, size(), 4),
            *caches[4:],
            matrix(Int32, size(), 4),
            vector(Int32),
            matrix(Int32, size(), 4),
            *scalars,
            vector(Float32),
            matrix(BFloat16, shape.v_dim, 16),
            vector(Float32),
            matrix(Float32, shape.out_columns, 16),
            matrix(Float32, 2, 4),
            vector(Int32),
            Float32(0),
            *(Int32(0) for _ in range(13)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            shape,
        )

    return KernelSpec(shape.name, target.value, launch, arguments, tuple(shape))
