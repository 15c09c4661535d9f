"""The decode kernel for grouped queries on sm_90a: bound by memory, FP4 goes straight from the cache to left operands.

Every warp has its own run of tiles of 64 tokens, its own room for bulk copies and its own online softmax: no warp waits
for another until the runs of its CTA are done. There is room for the keys of one tile and the values of one, filled
again as soon as their words are in registers: the keys of the next tile are on their way while the values of this one
are added, and the other way round.
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, asm, bf16, f16, gmem, mbarrier, smem
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.warp import WARP
from megamoe_stages.fp4_kv_decode import gqa_attend as attend
from megamoe_stages.fp4_kv_decode import gqa_result as result_of
from megamoe_stages.fp4_kv_decode import gqa_work as work
from megamoe_stages.fp4_kv_decode.gqa_attend import LOWEST, Limits
from megamoe_stages.fp4_kv_decode.gqa_result import Place, Result, finish, join_all
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, STEPS, TILE, Shape
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
    count: Int32,  # pages of the cache
    window: Int32,  # 0 for none
    has_sink: Int32,
    fresh: Int32,  # tokens of each sequence that the launch before, `append`, appends; 0 where there is none
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
        count,
        pages,
        window,
        has_sink,
        fresh,
        shape,
    ).launch(
        grid=[cute.size(parts, mode=[0]) // 2, 1, 1],
        block=[shape.warps * WARP, 1, 1],
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
    count: Int32,
    pages: cute.FastDivmodDivisorV2,
    window: Int32,
    has_sink: Int32,
    fresh: Int32,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module.

    Behind `append`, which starts this one only when all kernels before it have ended, nothing but the copies of its
    tokens has to wait.
    """
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    wide = cute.arch.make_warp_uniform(thread // WARP)
    base = Uint32(asm.address(cute.arch.get_dyn_smem(Uint8, alignment=128)))
    group = heads // kv_heads
    sides = tuple(asm.address(tensor) for tensor in (k_codes, k_scales, v_codes, v_scales))
    cache = Cache(sides, block_table, lengths, pages, page, count, kv_heads, queries, window, fresh)
    result = Result(out, lse, sink, has_sink, v_scale, parts, stats, arrived, queries, heads, group)
    ring_at = base + wide * shape.ring_bytes
    barriers = base + shape.barriers_at + wide * (2 * mbarrier.BARRIER_BYTES)
    shift = work.run_shift(cache)
    if thread < 2 * shape.warps:
        mbarrier.init(Int32(base) + shape.barriers_at + thread * mbarrier.BARRIER_BYTES, Int32(2 * STEPS) >> shift)
        mbarrier.init_fence()
    if thread == 0:
        work.put_sides(base, cache, shape)
    cute.arch.griddepcontrol_launch_dependents()
    if fresh == 0:
        cute.arch.griddepcontrol_wait()  # what stands above overlaps with the end of the kernel before
    *numbers, own_length = work.cut(cache, shape)
    share = Share(*numbers)
    tile = share.start(cta * shape.warps + wide)
    stop = share.start(cta * shape.warps + wide + 1)
    sequence, origin, length = work.find(tile, own_length, cache)
    tile = tile + asm.flag((tile - origin) % work.places_of(length, cache) == 0)
    if thread == 0:
        smem.store16(base + shape.share_at, [Uint32(word) for word in (*share, Int32(0))])
    result_of.no_record(base, shape)
    acc = cute.make_rmem_tensor((4 * shape.quads,), Float32)
    operands = cute.make_rmem_tensor((shape.column_blocks * shape.key_blocks * 8,), Uint32)
    factor = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    top = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    total = cute.make_rmem_tensor((2 * shape.column_blocks,), Float32)
    x = cute.make_rmem_tensor((STEPS * shape.column_blocks * 4,), Float32)
    parity, pages, row, home = Int32(0), Uint32(0), Int32(0), Int32(0)
    cute.arch.sync_threads()
    if tile < stop:
        pages, home = start_copies(tile, stop, sequence, origin, length, base, ring_at, barriers, cache, shape)
    while tile < stop:
        tiles = work.tiles_of(length, cache)  # of the problem
        kv_head = (tile - origin) // (tiles + 1)
        problem_start = origin + kv_head * (tiles + 1) + 1
        own = cutlass.min(problem_start + tiles, stop) - tile
        first = work.first_token(length, cache) // TILE + tile - problem_start
        inner_start = arith.select(window != 0, cutlass.max(length - window, 0) + (TILE - 1), Int32(0)) // TILE
        inner_end = length - cutlass.max(queries - 1, fresh)  # old tokens that all queries see
        inner_end = cutlass.min(inner_end, work.held(length, cache)) // TILE
        state = base + shape.state_at + wide * 32
        starts = asm.flag(tile == problem_start)
        ends = asm.flag(tile + own == problem_start + tiles)
        smem.store16(state, [Uint32(word) for word in (tile + own, stop, origin, length)])
        smem.store16(state + 16, [Uint32(word) for word in (sequence, kv_head, starts, ends)])
        if (starts == 0) | (ends == 0):
            result_of.put_record(base, Place(sequence, kv_head), problem_start, tiles, starts, ends, shape)
        cute.arch.sync_warp()
        load_queries(q, operands, factor, sequence, kv_head, unit * k_scale[()], result, shape)
        for i in cutlass.range_constexpr(4 * shape.quads):
            acc[i] = Float32(0.0)
        for i in cutlass.range_constexpr(2 * shape.column_blocks):
            top[i], total[i] = Float32(LOWEST), Float32(0.0)
        for now in cutlass.range(first, first + own, unroll=1):
            inner = (now >= inner_start) & (now < inner_end) & (pages == every_page(shift))
            more = now + 1 < first + own
            mbarrier.wait(barriers, parity)
            for j in cutlass.range_constexpr(STEPS):
                codes, scales = attend.load_keys(ring_at, j, shape)
                if cutlass.const_expr(j + 1 == STEPS):
                    cute.arch.sync_warp()
                    mine = work.copier(base, cache, shape)
                    row = work.row_of(now + 1, home, kv_head, cache, mine)
                    if now + 1 >= inner_end:
                        cute.arch.griddepcontrol_wait()  # for new tokens
                    work.copy_if(more, row, 0, ring_at, barriers, mine, shape)
                sums = attend.scores(codes, scales, operands, shape)
                for n in cutlass.range_constexpr(shape.column_blocks):
                    for k in cutlass.range_constexpr(4):
                        x[(j * shape.column_blocks + n) * 4 + k] = sums[n][k]
            if not inner:
                attend.hide(x, now, pages, shift, factor, limits_of(length_of(state), cache, group), shape)
            attend.weigh(x, acc, top, total, factor, shape)
            weights = [attend.operands(x, j, shape) for j in range(STEPS)]

            values_at = ring_at + shape.values_at
            mbarrier.wait(barriers + mbarrier.BARRIER_BYTES, parity)
            if not inner:
                attend.clear(values_at, now, pages, shift, limits_of(length_of(state), cache, group), shape)
            for j in cutlass.range_constexpr(STEPS):
                codes, scales = attend.load_values(values_at, j, shape)
                if cutlass.const_expr(j + 1 == STEPS):
                    cute.arch.sync_warp()
                    mine = work.copier(base, cache, shape)
                    work.copy_if(more, row, 1, values_at, barriers + mbarrier.BARRIER_BYTES, mine, shape)
                    pages = pages_of(home, shift)
                    home = work.home_of(now + 2, now + 2 < first + own, sequence, cache, mine.token)
                attend.add_values(acc, codes, scales, weights[j], shape)
            parity = parity ^ 1

        tile, stop, origin, length = (Int32(word) for word in smem.load16(state))
        sequence, kv_head, starts, ends = (Int32(word) for word in smem.load16(state + 16))
        place = Place(sequence, kv_head)
        if (ends != 0) & (kv_head == kv_heads - 1):
            sequence = sequence + 1
            origin = tile
            if tile + 1 < stop:
                length = lengths[sequence]
        tile = tile + ends
        if tile < stop:
            pages, home = start_copies(tile, stop, sequence, origin, length, base, ring_at, barriers, cache, shape)
        finish(acc, top, total, base, starts != 0, ends != 0, place, result, shape)
    cute.arch.griddepcontrol_wait()  # no kernel behind this one starts before the one in front has ended
    cute.arch.sync_threads()
    join_all(base, kv_heads, result, shape)


def length_of(state: Uint32) -> Int32:
    """The length among what waits in shared memory."""
    return Int32(smem.load16(state)[3])


def limits_of(length: Int32, cache: Cache, group: Int32) -> Limits:
    """What the queries of a sequence see; only tiles at its edges need it, so nothing of it waits in registers."""
    return Limits(
        work.first_token(length, cache), work.held(length, cache), length - cache.queries, cache.window, group
    )


def pages_of(home: Int32, shift: Int32) -> Uint32:
    """Which runs of a tile lie on pages, given the page of what each lane copies: bit 2i for run i."""
    return Uint32(cute.arch.vote_ballot_sync(home >= 0)) & every_page(shift)


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
    base: Uint32,
    ring_at: Uint32,
    barriers: Uint32,
    cache: Constexpr[Cache],
    shape: Constexpr[Shape],
) -> tuple[Uint32, Int32]:
    """Asks for the first tile of a warp's run of a problem.

    Returns:
        Which of its runs of tokens lie on pages; this lane's page of the tile behind it.
    """
    mine = work.copier(base, cache, shape)
    places = work.places_of(length, cache)
    kv_head = (tile - origin) // places
    done = tile - origin - kv_head * places - 1
    own = cutlass.min(places - 1 - done, stop - tile)
    first = work.first_token(length, cache) // TILE + done
    homes = [work.home_of(first + i, i < own, sequence, cache, mine.token) for i in range(2)]
    row = work.row_of(first, homes[0], kv_head, cache, mine)
    always = cutlass.Boolean(True)
    if (first + 1) * TILE > length - cache.fresh:
        cute.arch.griddepcontrol_wait()  # for new tokens
    work.copy_if(always, row, 0, ring_at, barriers, mine, shape)
    work.copy_if(always, row, 1, ring_at + shape.values_at, barriers + mbarrier.BARRIER_BYTES, mine, shape)
    return pages_of(homes[0], work.run_shift(cache)), homes[1]


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
            at = asm.address(q) + (Int64(row) * shape.head_dim + t * (16 * shape.key_blocks)) * 2
            for i in cutlass.range_constexpr(2 * shape.key_blocks):
                for k, word in enumerate(gmem.load16(at + 16 * i)):
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
            *(Int32(0) for _ in range(8)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            shape,
        )

    name = f"decode_gqa_d{shape.head_dim}_v{shape.v_dim}_{shape.columns}"
    return KernelSpec(name, target.value, launch, arguments, tuple(shape))
