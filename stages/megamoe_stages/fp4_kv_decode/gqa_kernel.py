"""The decode kernel for grouped queries on sm_90a: bound by memory, FP4 goes straight from the cache to left operands.

Every warp has its own run of tiles of 64 tokens, its own ring of bulk copies and its own online softmax: no warp waits
for another until the runs of its CTA are done. Keys and values of a tile arrive one after the other in the ring, and a
place is filled again as soon as its words are in registers.
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, bf16, bulk, f16, ring
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.fp4_kv_decode import gqa_attend as attend
from megamoe_stages.fp4_kv_decode import gqa_work as work
from megamoe_stages.fp4_kv_decode.gqa_attend import LOWEST, Limits
from megamoe_stages.fp4_kv_decode.gqa_result import Place, Result, finish, join_all
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, STEPS, TILE, WARP, Shape
from megamoe_stages.fp4_kv_decode.gqa_work import Cache, Share

_LARGEST = 14  # queries are brought below 2^15 by a power of two: what fp16 rounds is below 2^-39 of their largest
_BIAS = 127
_LEAST_FACTOR = 1e-37  # stands for 0, so that a hidden score is -inf whatever the scale


@cute.jit
def launch(
    q: cute.Tensor,  # (batch * queries * heads, D) bf16
    k_codes: cute.Tensor,  # (pages * kv_heads * page, D/2) uint8
    k_scales: cute.Tensor,  # (pages * kv_heads * page, D/16) uint8
    v_codes: cute.Tensor,  # the same with Dv
    v_scales: cute.Tensor,
    block_table: cute.Tensor,  # (batch, max_pages) int32
    lengths: cute.Tensor,  # (batch,) int32
    k_scale: cute.Tensor,  # () fp32
    v_scale: cute.Tensor,  # () fp32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    out: cute.Tensor,  # (batch * queries * heads, Dv) bf16
    lse: cute.Tensor,  # (batch * queries * heads,) fp32
    parts: cute.Tensor,  # (2 CTAs, sums) fp32
    stats: cute.Tensor,  # (2 CTAs, columns * 2) fp32
    arrived: cute.Tensor,  # (batch * kv_heads,) int32, zeros
    softmax_scale: Float32,
    queries: Int32,
    heads: Int32,
    kv_heads: Int32,
    page: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches a CTA for each pair of parts."""
    pages = cute.FastDivmodDivisorV2(page)
    kernel(
        q,
        k_codes,
        k_scales,
        v_codes,
        v_scales,
        block_table,
        lengths,
        k_scale,
        v_scale,
        sink,
        out,
        lse,
        parts,
        stats,
        arrived,
        softmax_scale * Float32(f16.DECODED_UNIT / math.log(2)),
        queries,
        heads,
        kv_heads,
        page,
        pages,
        window,
        has_sink,
        shape,
    ).launch(
        grid=[cute.size(parts, mode=[0]) // 2, 1, 1],
        block=[shape.warps * WARP, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
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
    k_scale: cute.Tensor,
    v_scale: cute.Tensor,
    sink: cute.Tensor,
    out: cute.Tensor,
    lse: cute.Tensor,
    parts: cute.Tensor,
    stats: cute.Tensor,
    arrived: cute.Tensor,
    unit: Float32,  # softmax_scale in units of the decoded products, base 2
    queries: Int32,
    heads: Int32,
    kv_heads: Int32,
    page: Int32,
    pages: cute.FastDivmodDivisorV2,
    window: Int32,
    has_sink: Int32,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    wide = cute.arch.make_warp_uniform(thread // WARP)
    base = bulk.shared_address(cute.arch.get_dyn_smem(Uint8, alignment=128))
    group = heads // kv_heads
    sides = tuple(ring.address(tensor.iterator) for tensor in (k_codes, k_scales, v_codes, v_scales))
    cache = Cache(sides, block_table, lengths, pages, page, kv_heads, queries, window)
    result = Result(out, lse, sink, has_sink, v_scale, parts, stats, arrived, queries, heads, group)
    ring_at = base + wide * shape.ring_bytes
    barriers = base + shape.barriers_at + wide * (shape.slots * bulk.BARRIER_BYTES)
    mine = work.copier(cache, shape)
    shift = work.run_shift(cache)
    if thread == 0:
        for number in cutlass.range(shape.warps * shape.slots, unroll=1):
            ring.init(Int32(base) + shape.barriers_at + number * bulk.BARRIER_BYTES, Int32(2 * STEPS) >> shift)
        ring.init_fence()
    share = Share(*work.cut(cache, shape))
    begin = share.start(cta * shape.warps + wide)
    stop = share.start(cta * shape.warps + wide + 1)
    tile = begin
    sequence, origin = work.find(tile, cache)
    acc = cute.make_rmem_tensor((4 * shape.quads,), Float32)
    operands = cute.make_rmem_tensor((shape.column_blocks * shape.key_blocks * 8,), Uint32)
    factor = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    top = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    total = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    x = cute.make_rmem_tensor((STEPS * shape.column_blocks * 4,), Float32)
    slot, parity, pages_ahead, row, home = Int32(0), Int32(0), Uint32(0), Int32(0), Int32(0)
    length = Int32(0)
    cute.arch.sync_threads()
    if tile < stop:
        length = lengths[sequence]
        pages_ahead, row, home = start_copies(
            tile, stop, sequence, origin, length, slot, ring_at, barriers, cache, mine, shape
        )
    while tile < stop:
        count = work.tiles_of(length, cache)  # of the problem
        kv_head = (tile - origin) // count
        problem_start = origin + kv_head * count
        own = cutlass.min(problem_start + count, stop) - tile
        start = work.first_token(length, cache)
        first = start // TILE + tile - problem_start
        limits = Limits(start, work.held(length, cache), length - queries, window, group)
        inner_start = arith.select(window != 0, cutlass.max(length - window, 0) + (TILE - 1), Int32(0)) // TILE
        inner_end = cutlass.min(limits.position + 1, limits.end) // TILE
        load_queries(q, operands, factor, sequence, kv_head, unit * k_scale[()], result, shape)
        for i in cutlass.range_constexpr(4 * shape.quads):
            acc[i] = Float32(0.0)
        for i in cutlass.range_constexpr(2 * shape.column_blocks):
            top[i], total[i] = Float32(LOWEST), Float32(0.0)
        for i in cutlass.range(own, unroll=1):
            now = first + i
            pages_here = pages_ahead >> (8 * shape.ahead) & 0xFF
            inner = (now >= inner_start) & (now < inner_end) & (pages_here == every_page(shift))

            at, barrier = ring_at + slot * shape.slot_bytes, barriers + slot * bulk.BARRIER_BYTES
            bulk.barrier_wait(barrier, parity)
            ready = attend.load_keys(at, 0, shape)
            for j in cutlass.range_constexpr(STEPS):
                codes, scales = ready
                if cutlass.const_expr(j + 1 < STEPS):
                    ready = attend.load_keys(at, j + 1, shape)
                if cutlass.const_expr(j + 2 == STEPS):
                    cute.arch.sync_warp()
                    work.copy_values(row, i + shape.ahead < own, at, barrier, mine, shape)
                sums = attend.scores(codes, scales, operands, shape)
                for n in cutlass.range_constexpr(shape.column_blocks):
                    for k in cutlass.range_constexpr(4):
                        x[(j * shape.column_blocks + n) * 4 + k] = sums[n][k]
            slot, parity = advance(slot, parity, shape)
            if not inner:
                attend.hide(x, now, pages_here, shift, factor, limits, shape)
            attend.weigh(x, acc, top, total, factor, shape)
            weights = [attend.operands(x, j, shape) for j in range(STEPS)]

            at, barrier = ring_at + slot * shape.slot_bytes, barriers + slot * bulk.BARRIER_BYTES
            ahead = now + (shape.ahead + 1)
            bulk.barrier_wait(barrier, parity)
            if not inner:
                attend.clear(at, now, pages_here, shift, limits, shape)
            ready = attend.load_values(at, 0, shape)
            for j in cutlass.range_constexpr(STEPS):
                codes, scales = ready
                if cutlass.const_expr(j + 1 < STEPS):
                    ready = attend.load_values(at, j + 1, shape)
                if cutlass.const_expr(j + 2 == STEPS):
                    cute.arch.sync_warp()
                    row = work.row_of(ahead, home, kv_head, cache, mine)
                    work.copy_keys(row, i + (shape.ahead + 1) < own, at, barrier, mine, shape)
                    pages_ahead = pages_ahead << 8 | pages_of(home)
                    home = work.home_of(ahead + 1, i + (shape.ahead + 2) < own, sequence, cache, mine.token)
                attend.add_values(acc, codes, scales, weights[j], shape)
            slot, parity = advance(slot, parity, shape)

        place = Place(sequence, kv_head)
        starts, ends = tile == problem_start, tile + own == problem_start + count
        tile = tile + own
        if ends & (kv_head == kv_heads - 1):
            sequence = sequence + 1
            origin = tile
            if tile < stop:
                length = lengths[sequence]
        if tile < stop:
            pages_ahead, row, home = start_copies(
                tile, stop, sequence, origin, length, slot, ring_at, barriers, cache, mine, shape
            )
        finish(acc, top, total, base, starts, ends, place, result, shape)
    cute.arch.sync_threads()
    join_all(base, share, cache, result, shape)


def advance(slot: Int32, parity: Int32, shape: Shape) -> tuple[Int32, Int32]:
    """The next slot of the ring, and the parity of its phase."""
    last = slot == shape.slots - 1
    return arith.select(last, Int32(0), slot + 1), arith.select(last, parity ^ 1, parity)


def pages_of(home: Int32) -> Uint32:
    """Which runs of a tile lie on pages, given the page of what each lane copies: bit 2i for run i."""
    return Uint32(cute.arch.vote_ballot_sync(home >= 0)) & 0x55


def every_page(shift: Int32) -> Uint32:
    """All runs of a tile."""
    return Uint32(0x55) >> Uint32(8 - (8 >> shift))


@cute.jit
def start_copies(
    tile: Int32,
    stop: Int32,
    sequence: Int32,
    origin: Int32,
    length: Int32,
    slot: Int32,
    ring_at: Uint32,
    barriers: Uint32,
    cache: Constexpr[Cache],
    mine: Constexpr[work.Copier],
    shape: Constexpr[Shape],
) -> tuple[Uint32, Int32, Int32]:
    """Asks for what the ring holds of the warp's first tiles of a segment.

    Returns:
        Which of these tiles' runs lie on pages, 8 bits each; this lane's row of the last one; its page of the next one.
    """
    count = work.tiles_of(length, cache)
    kv_head = (tile - origin) // count
    done = tile - origin - kv_head * count
    own = cutlass.min(count - done, stop - tile)
    first = work.first_token(length, cache) // TILE + done
    homes = [work.home_of(first + i, i < own, sequence, cache, mine.token) for i in range(shape.ahead + 2)]
    pages_ahead, row = Uint32(0), Int32(0)
    for i in cutlass.range_constexpr(shape.ahead + 1):
        row = work.row_of(first + i, homes[i], kv_head, cache, mine)
        work.copy_keys(row, i < own, ring_at + slot * shape.slot_bytes, barriers + slot * 8, mine, shape)
        slot, _ = advance(slot, slot, shape)
        if cutlass.const_expr(i < shape.ahead):
            work.copy_values(row, i < own, ring_at + slot * shape.slot_bytes, barriers + slot * 8, mine, shape)
            slot, _ = advance(slot, slot, shape)
        pages_ahead = pages_ahead << 8 | pages_of(homes[i])
    return pages_ahead, row, homes[shape.ahead + 1]


@cute.jit
def load_queries(
    q: cute.Tensor,
    operands: cute.Tensor,
    factor: cute.Tensor,
    sequence: Int32,
    kv_head: Int32,
    unit: Float32,
    result: Constexpr[Result],
    shape: Constexpr[Shape],
) -> None:
    """The columns as right operands, fp16 of their largest value's size, and by what their scores are multiplied."""
    g, t = attend.lanes()
    words = cute.make_rmem_tensor((8 * shape.key_blocks,), Uint32)
    for n in cutlass.range_constexpr(shape.column_blocks):
        column = n * COLUMNS + g
        words.fill(Uint32(0))
        if column < result.group * result.queries:
            query = column // result.group
            head = kv_head * result.group + column - query * result.group
            row = (sequence * result.queries + query) * result.heads + head
            at = ring.address(q.iterator) + (Int64(row) * shape.head_dim + t * (16 * shape.key_blocks)) * 2
            for i in cutlass.range_constexpr(2 * shape.key_blocks):
                for k, word in enumerate(bulk.load_global4(at + 16 * i)):
                    words[4 * i + k] = word
        largest = Uint32(0)
        for i in cutlass.range_constexpr(8 * shape.key_blocks):
            largest = arith.umax_halves(largest, words[i] & 0x7FFF7FFF, Target.SM90)
        largest = cutlass.max(largest & 0xFFFF, largest >> 16)
        for step in (1, 2):
            largest = cutlass.max(largest, cute.arch.shuffle_sync_bfly(largest, offset=step))
        exponent = cutlass.max(largest >> 7, Uint32(_LARGEST + 1))
        larger = arith.number((Uint32(2 * _BIAS + _LARGEST) - exponent) << 23)
        back = arith.number((exponent - _LARGEST) << 23)
        for i in cutlass.range_constexpr(2 * shape.key_blocks):
            values = [v * larger for k in range(4) for v in bf16.unpack(words[4 * i + k])]
            for k, start in enumerate((0, 4, 1, 5)):  # values 0, 2 and 4, 6, then the odd ones
                place = ((n * shape.key_blocks + i // 2) * 2 + i % 2) * 4 + k
                operands[place] = f16.pack(values[start], values[start + 2])
        for c in cutlass.range_constexpr(2):
            own = unit * cute.arch.shuffle_sync(back, 8 * t + 4 * c)
            factor[2 * n + c] = arith.select(own == Float32(0.0), Float32(_LEAST_FACTOR), own)


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def matrix(dtype: type, columns: object, align: int) -> object:
            return make_fake_compact_tensor(dtype, (size(), columns), stride_order=(1, 0), assumed_align=align)

        def vector(dtype: type) -> object:
            return make_fake_compact_tensor(dtype, (size(),), stride_order=(0,), assumed_align=4)

        caches = [matrix(Uint8, dim // part, 16) for dim in (shape.head_dim, shape.v_dim) for part in (2, 16)]
        scalars = [make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(2)]
        return (
            matrix(BFloat16, shape.head_dim, 16),
            *caches,
            matrix(Int32, size(), 4),
            vector(Int32),
            *scalars,
            vector(Float32),
            matrix(BFloat16, shape.v_dim, 16),
            vector(Float32),
            matrix(Float32, shape.part_floats, 16),
            matrix(Float32, 2 * shape.columns, 16),
            vector(Int32),
            Float32(0),
            *(Int32(0) for _ in range(6)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            shape,
        )

    name = f"decode_gqa_d{shape.head_dim}_v{shape.v_dim}_{shape.columns}"
    return KernelSpec(name, target.value, launch, arguments, tuple(shape))
