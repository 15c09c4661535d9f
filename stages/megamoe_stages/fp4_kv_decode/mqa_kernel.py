"""The decode kernel for sm_90a where the keys are the values, of 512: FP4 goes from shared memory to left operands.

A CTA takes up to 64 rows (queries times heads of one kv head) and a share of the tokens that they see, found from the
lengths on the device. A warpgroup copies tiles of 64 tokens, two attend (`mqa_attend`).
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, attention_mma, ring
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute import bf16, convert, f16
from megamoe.cute.f16 import DECODED_UNIT
from megamoe_stages.fp4_kv_decode import mqa_attend, mqa_produce
from megamoe_stages.fp4_kv_decode.attend import CONSUMERS_BARRIER, Rows
from megamoe_stages.fp4_kv_decode.kernel import factor, seen
from megamoe_stages.fp4_kv_decode.mqa_attend import LOWEST
from megamoe_stages.fp4_kv_decode.mqa_result import finish, join_pair, store
from megamoe_stages.fp4_kv_decode.mqa_shape import BLOCK_BYTES, CONSUMERS, DIM, GROUP, ROWS, TILE, TURNS, WARPS, Shape
from megamoe_stages.fp4_kv_decode.produce import Tokens, Work
from megamoe_stages.fp4_kv_decode.result import Result, pass_pair

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # all of 64 K
_LARGEST = 14  # queries are brought below 2^15 by a power of two: what fp16 rounds is below 2^-39 of their largest
_BIAS = 127
_LEAST_FACTOR = 1e-37  # stands for 0, so that a hidden score is -inf whatever the scale
_NEVER = 1 << 30  # a tile or token beyond all
_LEAST_RATIO = 2.0**-60  # of the decode scales of two caches


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
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches a CTA for each share of the tokens of 64 rows."""
    group = heads // kv_heads
    batch = cute.size(lengths)
    apart = (indexed != 0) | (extra_indexed != 0)  # each query sees tokens of its own
    rows = group if apart else group * queries
    problems = batch * queries if apart else batch
    scores = softmax_scale * Float32(DECODED_UNIT / math.log(2))
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
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    problem, part, split = cute.arch.block_idx()
    base = ring.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    if thread == 0:
        for i in cutlass.range_constexpr(CONSUMERS * TURNS + TURNS + 2):
            full, empty = GROUP + GROUP // 32, WARPS
            arrivals = full if i < CONSUMERS * TURNS else empty if i < CONSUMERS * TURNS + TURNS else CONSUMERS * GROUP
            ring.init(base + shape.barriers_at + i * 8, arrivals)
        ring.init_fence()
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
    if cutlass.const_expr(shape.extra):
        near = near + near % CONSUMERS  # a turn is of one cache
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
    if cutlass.const_expr(shape.extra):
        share = arith.select(share < near, share + share % CONSUMERS, share)
    skipped = split * share  # tiles of other CTAs
    own = cutlass.max(cutlass.min(tiles - skipped, share), 0)
    rows = rows._replace(near=near - skipped)
    first = start + skipped * TILE
    work = Work(
        tiles=own,
        near=near - skipped,
        tokens=tokens._replace(first=first),
        entries=entries._replace(first=entries.first + skipped * TILE),
        keys=tokens.store(k_codes, k_scales, shape.head_dim),
        values=tokens.store(v_codes, v_scales, shape.head_dim),
        extra=tokens.store(extra_codes, extra_scales, shape.head_dim),
    )
    number = problem * cute.arch.grid_dim()[1] + part
    result = Result(out, lse, sink, has_sink, Float32(1.0), parts, stats, arrived, splits, split, number, Int32(0))

    turns = (own + 1) // CONSUMERS
    cute.arch.sync_threads()
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
        mqa_produce.produce(base, turns * CONSUMERS, work, shape)
        if cutlass.const_expr(shape.paired):
            pass_pair()
    else:
        cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
        consumer = thread // GROUP - 1
        acc = cute.make_rmem_tensor((shape.out_columns // 2,), Float32)
        scale, extra = k_scale[()], extra_scale[()]  # these and the queries come at once
        result = result._replace(v_scale=v_scale[()] * Float32(DECODED_UNIT / convert.DECODED_UNIT))
        negative = arith.select(scores < Float32(0.0), Uint32(0x80008000), Uint32(0))
        ratio = arith.maximum(extra / scale, Float32(_LEAST_RATIO), Target.SM90)
        if thread == GROUP:
            note(base, first, ratio, rows, shape)
        load_queries(thread - GROUP, q, negative, factor(scores * scale), base, rows, shape)
        mqa_attend.attend(acc, base, consumer, turns, shape)
        if cutlass.const_expr(shape.paired):
            rank = split % 2
            join_pair(acc, base, consumer, rank, shape)
            column, problem = rank * shape.out_columns, number * 2 + rank
            half = result._replace(splits=splits // 2, split=split // 2, problem=problem, column=column)
            if consumer == rank:
                finish(acc, base, consumer, rows, half, shape)
        else:  # all tokens
            store(acc, base, consumer, rows, result._replace(column=consumer * shape.out_columns), shape)


def note(base: Int32, first: Int32, ratio: Float32, rows: Rows, shape: Shape) -> None:
    """Leaves in shared memory what masks and scales of a tile follow from: eight words.

    Token that tile 0 starts at; last token that all queries see; the last that some query sees no more; tile from which all
    queries see all that exists; position; window; tile from which scores are those of the second cache; their ratio.
    """
    early = rows.position + rows.first // rows.group
    late = rows.position + (cutlass.min(rows.first + ROWS, rows.count) - 1) // rows.group
    late = arith.select(rows.window != 0, late - rows.window, Int32(-_NEVER))
    every = rows.near if shape.extra else Int32(_NEVER)
    every = arith.select(rows.indexed != 0, Int32(0), every)
    attention_mma.store16(base + shape.facts_at, [Uint32(word) for word in (first, early, late, every)])
    words = [Uint32(word) for word in (rows.position, rows.window, rows.near)]
    attention_mma.store16(base + shape.facts_at + 16, [*words, arith.bits(ratio)])


@cute.jit
def load_queries(
    thread: Int32,
    q: cute.Tensor,
    negative: Uint32,
    unit: Float32,
    base: Int32,
    rows: Constexpr[Rows],
    shape: Constexpr[Shape],
) -> None:
    """Brings the queries into shared memory as right operands, and fills the tables; 16 threads a row, all consumers.

    fp16 of a row's largest value's size; the order of its values is that of the products' k, see `mqa_attend`. Zeros where
    there is no row. `negative` flips their signs: the factor of the scores has none.
    """
    lane = thread % 16
    if thread < 2 * WARPS:
        ring.store4(base + shape.flags_at + thread * 4, Int32(0))
    for i in cutlass.range_constexpr(WARPS * ROWS // (CONSUMERS * GROUP)):
        ring.store4(base + shape.own_at + (i * CONSUMERS * GROUP + thread) * 4, Float32(LOWEST))
    for step in cutlass.range_constexpr(ROWS * 16 // (CONSUMERS * GROUP)):
        local = step * (CONSUMERS * GROUP // 16) + thread // 16
        inside = rows.first + local < rows.count
        row = arith.select(inside, rows.first + local, Int32(0))
        at = ring.address(q.iterator) + Int64(rows.place(row)) * (DIM * 2) + lane * 16
        words = [attention_mma.load16_global(at + t * 256) for t in range(4)]  # (4 t + lane / 4) chunks of 32, word lane % 4
        largest = Uint32(0)
        for t in cutlass.range_constexpr(4):
            words[t] = [arith.select(inside, word ^ negative, word ^ word) for word in words[t]]
            for word in words[t]:
                largest = arith.umax_halves(largest, word & 0x7FFF7FFF, Target.SM90)
        largest = cutlass.max(largest & 0xFFFF, largest >> 16)
        for other in (1, 2, 4, 8):
            largest = cutlass.max(largest, cute.arch.shuffle_sync_bfly(largest, offset=other))
        exponent = cutlass.max(largest >> 7, Uint32(_LARGEST + 1))
        larger = arith.number((Uint32(2 * _BIAS + _LARGEST) - exponent) << 23)
        back = arith.number((exponent - _LARGEST) << 23)
        values = [[v * larger for word in words[t] for v in bf16.unpack(word)] for t in range(4)]
        for odd in cutlass.range_constexpr(2):
            for h in cutlass.range_constexpr(2):
                chunk = lane % 2 * 4 + odd * 2 + h  # of a row of 64 values: of words of 8 two, each of two products
                place = base + lane // 2 * BLOCK_BYTES + local * 128 + ((chunk ^ local) % 8) * 16
                packed = [f16.pack(values[t][odd + 4 * h], values[t][odd + 4 * h + 2]) for t in range(4)]
                attention_mma.store16(place, packed)
        if lane == 0:
            least = arith.maximum(unit * back, Float32(_LEAST_FACTOR), Target.SM90)
            attention_mma.store8(base + shape.table_at + local * 8, [arith.bits(least), arith.bits(Float32(LOWEST))])
            ring.store4(base + shape.queries_at + local * 4, (rows.first + local) // rows.group)
    attention_mma.proxy_fence()
    attention_mma.named_barrier(CONSUMERS_BARRIER, CONSUMERS * GROUP)


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
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
            *(Int32(0) for _ in range(12)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            shape,
        )

    kind = ("extra" if shape.extra else "shared") + ("_paired" if shape.paired else "")
    return KernelSpec(f"decode_d{DIM}_{kind}", target.value, launch, arguments, tuple(shape))
