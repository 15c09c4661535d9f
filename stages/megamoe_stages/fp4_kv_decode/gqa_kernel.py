"""The decode kernel for grouped queries on sm_90a: bound by memory, FP4 goes straight from the cache to left operands.

Each of eight warps takes every eighth tile of 32 tokens of its CTA's run, has its own ring of bulk copies and its own
online softmax: while a run lasts no warp waits for another. Keys and values of a tile arrive separately, and
their places are filled again as soon as their words are in registers.
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, attention_mma, bf16, bulk, f16, ring
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode import gqa_attend as attend
from megamoe_stages.fp4_kv_decode import gqa_work as work
from megamoe_stages.fp4_kv_decode.gqa_attend import LOWEST, Limits
from megamoe_stages.fp4_kv_decode.gqa_result import Result, Segment, finish
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, HALF, TILE, WARPS, Shape
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
        block=[WARPS * WARP, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=shape.ctas_an_sm,
        preferred_smem_carveout=100,  # percent; else the compiler would ask this machine's GPU
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
    lane, wide = thread % WARP, cute.arch.make_warp_uniform(thread // WARP)
    base = bulk.shared_address(cute.arch.get_dyn_smem(Uint8, alignment=128))
    group = heads // kv_heads
    sides = tuple(ring.address(tensor.iterator) for tensor in (k_codes, k_scales, v_codes, v_scales))
    cache = Cache(sides, block_table, lengths, pages, page, kv_heads, queries, window)
    result = Result(out, lse, sink, has_sink, v_scale, parts, stats, arrived, queries, heads, group)
    barriers = base + shape.barriers_at + wide * (shape.stages * 16)
    rings = base + wide * (shape.stages * shape.stage_bytes)
    if lane == 0:
        for_keys, for_values = work.arrivals(cache)
        for stage in cutlass.range_constexpr(shape.stages):
            ring.init(Int32(barriers) + stage * 16, for_keys)
            ring.init(Int32(barriers) + stage * 16 + 8, for_values)
        ring.init_fence()
    cute.arch.sync_warp()

    share = Share(*work.cut(cache))
    tile, stop = share.start(cta), share.start(cta + 1)
    sequence, origin = work.find(tile, cache)
    mine = work.copier(cache, shape)
    acc = cute.make_rmem_tensor((4 * shape.quads,), Float32)
    operands = cute.make_rmem_tensor((shape.column_blocks * shape.key_blocks * 8,), Uint32)
    factor = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    top = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    total = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    x = cute.make_rmem_tensor((TILE // HALF * shape.column_blocks * 4,), Float32)
    marks = cute.make_rmem_tensor((8,), Uint32)
    stage, parity, exist, home = Int32(0), Int32(0), Uint32(0), Int32(0)
    length = Int32(0)
    if tile < stop:
        length = lengths[sequence]
        exist, home = start_copies(tile, stop, sequence, origin, length, stage, exist, rings, barriers, cache, mine, shape)
    while tile < stop:
        count = work.tiles_of(length, cache)  # of the problem
        kv_head = (tile - origin) // count
        problem_start = origin + kv_head * count
        done = tile - problem_start
        here = cutlass.min(count - done, stop - tile)
        start = work.first_token(length, cache)
        first = start // TILE + done + wide
        own = (here - wide + (WARPS - 1)) // WARPS
        limits = Limits(start, work.held(length, cache), length - queries, window, group)
        load_queries(q, operands, factor, sequence, kv_head, unit * k_scale[()], result, shape)
        for i in cutlass.range_constexpr(4 * shape.quads):
            acc[i] = Float32(0.0)
        for i in cutlass.range_constexpr(2 * shape.column_blocks):
            top[i], total[i] = Float32(LOWEST), Float32(0.0)
        for i in cutlass.range(own, unroll=1):
            now = first + i * WARPS
            slot, barrier = rings + stage * shape.stage_bytes, barriers + stage * 16
            ahead = now + shape.stages * WARPS
            further = arith.select(i + shape.stages < own, Int32(1), Int32(0))
            source = work.source_of(ahead, home, kv_head, cache, mine)
            seen = exist >> (2 * shape.stages - 2) & 3  # which halves of this tile lie on pages
            inner = (now * TILE >= limits.start) & ((now + 1) * TILE - 1 <= limits.position) & (seen == 3)
            inner = inner & ((now + 1) * TILE <= limits.end)
            inner = inner & ((window == 0) | (now * TILE > length - 1 - window))

            bulk.barrier_wait(barrier, parity)
            words = [attend.key_words(slot, j, shape) for j in range(TILE // HALF)]
            scales = [attend.key_scales(slot, j, shape) for j in range(TILE // HALF)]
            cute.arch.sync_warp()
            work.copy_if(further, mine.keys, source, slot, barrier, mine)
            for j in cutlass.range_constexpr(TILE // HALF):
                sums = attend.scores(words[j], scales[j], operands, shape)
                for n in cutlass.range_constexpr(shape.column_blocks):
                    for k in cutlass.range_constexpr(4):
                        x[(j * shape.column_blocks + n) * 4 + k] = sums[n][k]
            if not inner:
                attend.hide(x, now, seen, factor, limits, shape)
            attend.weigh(x, acc, top, total, factor, shape)
            weights = [attend.operands(x, j, shape) for j in range(TILE // HALF)]

            bulk.barrier_wait(barrier + 8, parity)
            words = [attend.value_words(slot, j, shape) for j in range(TILE // HALF)]
            for j in cutlass.range_constexpr(TILE // HALF):
                for k, word in enumerate(attend.value_scales(slot, j, shape)):
                    marks[4 * j + k] = word
            cute.arch.sync_warp()
            work.copy_if(further, mine.values, source, slot, barrier + 8, mine)
            exist = exist << 2 | halves_of(home, cache)
            home = work.home_of(ahead + WARPS, i + shape.stages + 1 < own, sequence, cache, mine.token)
            if not inner:
                attend.clear(marks, now, seen, limits)
            for j in cutlass.range_constexpr(TILE // HALF):
                attend.add_values(acc, words[j], [marks[4 * j + k] for k in range(4)], weights[j], shape)
            parity = arith.select(stage == shape.stages - 1, parity ^ 1, parity)
            stage = arith.select(stage == shape.stages - 1, Int32(0), stage + 1)

        first_cta = share.owner(problem_start)
        parts_here = share.owner(problem_start + count - 1) - first_cta + 1
        segment = Segment(sequence, kv_head, sequence * kv_heads + kv_head, first_cta, parts_here)
        part_slot = arith.select(first_cta == cta, Int32(1), Int32(0))
        tile = tile + here
        if (tile - problem_start == count) & (kv_head == kv_heads - 1):
            sequence = sequence + 1
            origin = tile
            if tile < stop:
                length = lengths[sequence]
        if tile < stop:
            exist, home = start_copies(
                tile, stop, sequence, origin, length, stage, exist, rings, barriers, cache, mine, shape
            )
        finish(acc, top, total, base, wide, segment, part_slot, result, shape)


def halves_of(home: Int32, cache: Cache) -> Uint32:
    """Which halves of a tile lie on pages, given the pages of what each lane copies: bit 0 the first, bit 1 the second."""
    first, second = cute.arch.shuffle_sync(home, 0), cute.arch.shuffle_sync(home, 4)
    whole = cache.page_size % TILE == 0
    second = arith.select(whole, first, second)
    low = arith.select(first >= 0, Uint32(1), Uint32(0))
    return Uint32(low | arith.select(second >= 0, Uint32(2), Uint32(0)))


@cute.jit
def start_copies(
    tile: Int32,
    stop: Int32,
    sequence: Int32,
    origin: Int32,
    length: Int32,
    stage: Int32,
    exist: Uint32,
    rings: Uint32,
    barriers: Uint32,
    cache: Constexpr[Cache],
    mine: Constexpr[work.Copier],
    shape: Constexpr[Shape],
) -> tuple[Uint32, Int32]:
    """Asks for the warp's first tiles of a segment; which halves of them exist, and the page of the one after them."""
    thread, _, _ = cute.arch.thread_idx()
    wide = cute.arch.make_warp_uniform(thread // WARP)
    count = work.tiles_of(length, cache)
    kv_head = (tile - origin) // count
    done = tile - origin - kv_head * count
    own = (cutlass.min(count - done, stop - tile) - wide + (WARPS - 1)) // WARPS
    first = work.first_token(length, cache) // TILE + done + wide
    homes = [
        work.home_of(first + i * WARPS, i < own, sequence, cache, mine.token) for i in range(shape.stages + 1)
    ]
    for i in cutlass.range_constexpr(shape.stages):
        place = stage + i
        place = arith.select(place >= shape.stages, place - shape.stages, place)
        further = arith.select(i < own, Int32(1), Int32(0))
        source = work.source_of(first + i * WARPS, homes[i], kv_head, cache, mine)
        slot, barrier = rings + place * shape.stage_bytes, barriers + place * 16
        barrier = barrier + arith.select(mine.values != 0, Int32(8), Int32(0))
        work.copy_if(further, mine.keys | mine.values, source, slot, barrier, mine)
        exist = exist << 2 | halves_of(homes[i], cache)
    return exist, homes[shape.stages]


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
