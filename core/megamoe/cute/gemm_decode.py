"""Grouped GEMM for few rows an expert: every SM streams weights, the rows wait in shared memory.

The work is a list of passes, each an expert and up to 8 * `tiles` of its rows, times groups of 64 weight rows; the CTAs
take equal runs of it. One warp of a CTA asks for the weights, a slab of 64 rows x 128 k at a time, through a ring of
bulk copies that never waits for the arithmetic of an item to end. Eight pairs of warps take the slabs in turn, so each
pair has an eighth of an item's k; they leave their sums in one of two buffers in shared memory, where two more warps
add them, always in the same order, and do what the op does with the result. An item is never shared between CTAs.

    consumers   16 warps: weights as the left operand, rows as columns of `mma` m16n8k16
    epilogue     2 warps
    producer     1 warp: 19 in all, since from 21 on a quarter of an SM has six, which leaves a thread 80 registers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, copies, fragments, gmem, layout, mbarrier, smem
from megamoe.cute.arith import Target
from megamoe.cute.decode_limits import (
    BARRIERS,
    COLUMNS,
    CONSUMERS,
    EPILOGUE,
    GROUP_ROWS,
    MAX_PASSES,
    PAIR_TILES,
    PASSES,
    PRODUCER,
    ROWS,
    SHARED_BYTES,
    SLAB_BYTES,
    SLAB_CODES,
    SLAB_K,
    SLICES,
    SUMS,
    SUMS_BUFFER,
    SUMS_ROW,
    SUMS_SLICE,
    THREADS,
)
from megamoe.cute.warp import WARP, mma

# shared memory, in bytes; the rest in `decode_limits`
_FULL, _EMPTY, _SUMS_FULL, _SUMS_EMPTY, _TOTALS = 0, 512, 1024, 1040, 1088


class Shape(NamedTuple):
    """Compile-time facts of a kernel.

    Attributes:
        tiles: Columns of a pass, in units of 8.
        quantized: Activations are NVFP4, else bf16.
        indexed: Rows are gathered by an index.
    """

    tiles: int
    quantized: bool
    indexed: bool


class Problem(NamedTuple):
    """What the main loop reads.

    Attributes:
        codes: uint8 (E, Np, Kp/2), hopper layout.
        scales: uint8 (E, Np, Kp/16), hopper layout.
        a: bf16 (rows, K), or uint8 (rows, K/2) codes.
        a_scales: uint8 E4M3, linear or 128x4; not read for bf16.
        offsets: int32 (E + 1).
        row_index: int32 (M,); not read unless `Shape.indexed`.
        k: Logical K.
        a_tiled: Whether `a_scales` are 128x4.
        stages: Slabs in the ring.
    """

    codes: cute.Tensor
    scales: cute.Tensor
    a: cute.Tensor
    a_scales: cute.Tensor
    offsets: cute.Tensor
    row_index: cute.Tensor
    k: Int32
    a_tiled: Int32
    stages: Int32


class Span(NamedTuple):
    """A CTA's share: `items` of them from group `group` of its first pass on; `units` slabs each."""

    items: Int32
    group: Int32
    groups: Int32
    units: Int32


class Pass(NamedTuple):
    """An expert's rows `row` to `row + rows`."""

    expert: Int32
    row: Int32
    rows: Int32


class Sums(NamedTuple):
    """What an epilogue thread gets: the place of eight sums.

    Attributes:
        where: The pass.
        column: Row of activations within the pass, where it is below `where.rows`.
        group: Group of 64 weight rows.
        part: 0 to 7, which eight of them.
        address: Of the column's sums in the first slice.
    """

    where: Pass
    column: Int32
    group: Int32
    part: Int32
    address: Uint32


class Epilogue(NamedTuple):
    """What an op does with sums, in the threads of the epilogue warps; everything else is read and written here.

    Attributes:
        begin: Called once with the thread's number among all of the grid, and how many there are.
        fetch: From the place of sums that are not there yet to what `finish` needs besides.
        finish: Takes the sums and what was fetched; adds the slices up with `add_slices`.
    """

    begin: Callable[[Int32, Int32], None]
    fetch: Callable[[Sums], Any]
    finish: Callable[[Sums, Any], None]


@cute.jit
def run(
    problem: Constexpr[Problem],
    epilogue: Constexpr[Epilogue],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """The body of a kernel of THREADS threads; nothing may be read or written before it."""
    thread, _, _ = cute.arch.thread_idx()
    base = cute.arch.get_dyn_smem(Int32, alignment=128)
    shared = Uint32(asm.address(base))
    if thread == 0:
        for number in cutlass.range(BARRIERS):
            mbarrier.init(shared + _FULL + number * 8, 1)
            mbarrier.init(shared + _EMPTY + number * 8, CONSUMERS // SLICES)
        for buffer in cutlass.range_constexpr(2):
            mbarrier.init(shared + _SUMS_FULL + buffer * 8, CONSUMERS * WARP)
            mbarrier.init(shared + _SUMS_EMPTY + buffer * 8, EPILOGUE * WARP)
        mbarrier.init_fence()
    cute.arch.griddepcontrol_wait()  # what came before in the stream is done; up to here it may still have run
    cute.arch.griddepcontrol_launch_dependents()
    span = _share(problem, base, thread, shape)
    warp = cute.arch.make_warp_uniform(thread // WARP)
    if warp < CONSUMERS:
        _consume(problem, span, base, shared, thread, target, shape)
    elif warp < PRODUCER:
        _finish(span, base, shared, thread - CONSUMERS * WARP, epilogue)
    elif thread == PRODUCER * WARP:
        _produce(problem, span, base, shared)


@cute.jit
def _share(problem: Constexpr[Problem], base: cute.Pointer, thread: Int32, shape: Constexpr[Shape]) -> Span:
    """Divides the work: each thread counts the passes of one expert."""
    experts = cute.size(problem.codes, mode=[0])
    groups = cute.size(problem.codes, mode=[1]) // GROUP_ROWS
    units = cute.size(problem.codes, mode=[2]) // (SLAB_K // 2)
    totals = cute.make_tensor(base + _TOTALS // 4, cute.make_layout(WARP))
    passes = cute.make_tensor(base + PASSES // 4, cute.make_layout((MAX_PASSES, 4), stride=(4, 1)))
    row, end = Int32(0), Int32(0)
    if thread < experts:
        row, end = problem.offsets[thread], problem.offsets[thread + 1]
    most = shape.tiles * COLUMNS
    mine = (end - row + (most - 1)) // most
    through = _warp_scan(mine, thread % WARP)
    if thread % WARP == WARP - 1:
        totals[thread // WARP] = through
    if thread == 0:
        totals[THREADS // WARP] = Int32(0)  # is loaded with its neighbours
    cute.arch.sync_threads()
    first, total = through - mine, Int32(0)
    for warp in cutlass.range_constexpr(THREADS // WARP):
        count = totals[warp]
        first = first + arith.select(warp < thread // WARP, count, Int32(0))
        total = total + count
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    items = total * groups
    begin, stop = items * cta // ctas, items * (cta + 1) // ctas  # MAX_ROWS and MAX_N keep these within 32 bits
    low = begin // groups
    for number in cutlass.range(cutlass.max(first, low), cutlass.min(first + mine, (stop + groups - 1) // groups)):
        at = number - low
        start = row + (number - first) * most
        passes[at, 0], passes[at, 1] = thread, start
        passes[at, 2], passes[at, 3] = cutlass.min(end - start, most), Int32(0)
    cute.arch.sync_threads()
    return Span(stop - begin, begin - low * groups, groups, units)


def _warp_scan(value: Int32, lane: Int32) -> Int32:
    """The sum of the lanes up to and with this one."""
    for step in (1, 2, 4, 8, 16):
        below = cute.arch.shuffle_sync_up(value, step)
        value = value + arith.select(lane >= step, below, Int32(0))
    return value


def _pass(base: cute.Pointer, number: Int32) -> Pass:
    passes = cute.make_tensor(base + PASSES // 4, cute.make_layout((MAX_PASSES, 4), stride=(4, 1)))
    return Pass(passes[number, 0], passes[number, 1], passes[number, 2])


def _barrier(first: Uint32, slab: Int32) -> Uint32:
    return first + (slab & (BARRIERS - 1)) * mbarrier.BARRIER_BYTES


@cute.jit
def _produce(problem: Constexpr[Problem], span: Constexpr[Span], base: cute.Pointer, shared: Uint32) -> None:
    """Asks for all slabs of this CTA, one thread."""
    policy = copies.evict_first()
    codes, scales = asm.address(problem.codes), asm.address(problem.scales)
    ring = shared + SHARED_BYTES - Uint32(problem.stages) * SLAB_BYTES
    stage, turn, group, number = Int32(0), Int32(0), span.group, Int32(0)
    for _item in cutlass.range(span.items, unroll=1):
        slab = (Int64(_pass(base, number).expert) * span.groups + group) * span.units
        for _unit in cutlass.range(span.units, unroll=1):
            before = turn - problem.stages  # was in this stage
            if before >= 0:
                mbarrier.wait(_barrier(shared + _EMPTY, before), before >> 6 & 1)
            full, slot = _barrier(shared + _FULL, turn), ring + stage * SLAB_BYTES
            mbarrier.expect(full, SLAB_BYTES)
            copies.load_bulk(slot, codes + slab * SLAB_CODES, SLAB_CODES, full, policy)
            copies.load_bulk(
                slot + SLAB_CODES, scales + slab * (SLAB_BYTES - SLAB_CODES), SLAB_BYTES - SLAB_CODES, full, policy
            )
            slab, turn, stage = slab + 1, turn + 1, stage + 1
            if stage == problem.stages:
                stage = Int32(0)
        group = group + 1
        if group == span.groups:
            group, number = Int32(0), number + 1


@cute.jit
def _consume(
    problem: Constexpr[Problem],
    span: Constexpr[Span],
    base: cute.Pointer,
    shared: Uint32,
    thread: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Multiplies; warp w has slice w % 8 of the slabs and tiles 2 (w // 8) and the next of each."""
    lane, warp = thread % WARP, cute.arch.make_warp_uniform(thread // WARP)
    piece, half = warp % SLICES, warp // SLICES
    ring = shared + SHARED_BYTES - Uint32(problem.stages) * SLAB_BYTES
    lane_codes = half * (PAIR_TILES * 1024) + lane * 16
    lane_scales = SLAB_CODES + half * (PAIR_TILES * 128) + lane // 4 * 16
    sums_at = shared + SUMS + piece * SUMS_SLICE + (lane % 4) * (2 * SUMS_ROW)
    sums_at = sums_at + (half * (PAIR_TILES * 16) + lane // 4) * 4
    unit, stage, slab = piece, piece, piece
    group, number, turn = span.group, Int32(0), Int32(0)
    fresh = Boolean(True)
    masks = fragments.masks(target)
    for _item in cutlass.range(span.items, unroll=1):
        where = _pass(base, number)
        live = _tiles(where)
        if fresh:
            mbarrier.named_barrier(1, CONSUMERS * WARP)
            _stage_rows(problem, where, span.units, shared, thread, target, shape)
            mbarrier.named_barrier(1, CONSUMERS * WARP)
        acc = cute.make_rmem_tensor(PAIR_TILES * shape.tiles * 4, Float32)
        acc.fill(0.0)
        while unit < span.units:
            slot = ring + stage * SLAB_BYTES
            mbarrier.wait(_barrier(shared + _FULL, slab), slab >> 6 & 1)
            codes = [[smem.load16(slot + lane_codes + (t * 2 + h) * 512) for h in range(2)] for t in range(PAIR_TILES)]
            scales = [smem.load16(slot + lane_scales + t * 128) for t in range(PAIR_TILES)]
            rows = shared + ROWS + unit * (4 * shape.tiles * 512) + lane * 16
            if cutlass.const_expr(shape.tiles == 1):
                _multiply(acc, codes, scales, rows, 1, masks, target, shape)
            else:
                for i in cutlass.range_constexpr(shape.tiles):
                    if live == i + 1:
                        _multiply(acc, codes, scales, rows, i + 1, masks, target, shape)
            cute.arch.sync_warp()  # and not before the products: until then the loads above may be on their way
            mbarrier.arrive_if(_barrier(shared + _EMPTY, slab), lane == 0)
            unit, slab, stage = unit + SLICES, slab + SLICES, stage + SLICES
            if stage >= problem.stages:
                stage = stage - problem.stages
        unit = unit - span.units
        for n in cutlass.range_constexpr(shape.tiles):
            if n < live:
                buffer = turn & 1
                mbarrier.wait(shared + _SUMS_EMPTY + buffer * 8, (turn >> 1 & 1) ^ 1)
                for t in cutlass.range_constexpr(PAIR_TILES):
                    for i in cutlass.range_constexpr(4):
                        at = i % 2 * SUMS_ROW + (t * 16 + i // 2 * 8) * 4
                        smem.store4(sums_at + buffer * SUMS_BUFFER + at, acc[(t * shape.tiles + n) * 4 + i])
                mbarrier.arrive(shared + _SUMS_FULL + buffer * 8)
                turn = turn + 1
        group = group + 1
        fresh = group == span.groups
        if fresh:
            group, number = Int32(0), number + 1


def _multiply(
    acc: cute.Tensor,
    codes: list[list[list[Uint32]]],
    scales: list[list[Uint32]],
    rows: Uint32,
    live: int,
    masks: fragments.Masks,
    target: Target,
    shape: Shape,
) -> None:
    """Adds the products of a warp's tiles of a slab with the first `live` tiles of columns."""
    for q in range(4):
        b = [smem.load16(rows + (q * shape.tiles + n) * 512) for n in range(live)]
        for t in range(PAIR_TILES):
            x, y = codes[t][q // 2][q % 2 * 2], codes[t][q // 2][q % 2 * 2 + 1]
            a = fragments.decode_pair(x, y, scales[t][q], target, masks)
            for n in range(live):
                at = (t * shape.tiles + n) * 4
                c = [acc[at + i] for i in range(4)]
                c = mma(a[:4], b[n][:2], c)
                c = mma(a[4:], b[n][2:], c)
                for i in range(4):
                    acc[at + i] = c[i]


def _tiles(where: Pass) -> Int32:
    """Tiles of columns that have rows."""
    return (where.rows + (COLUMNS - 1)) // COLUMNS


@cute.jit
def _stage_rows(
    problem: Constexpr[Problem],
    where: Constexpr[Pass],
    units: Int32,
    shared: Uint32,
    thread: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Brings the rows of a pass into shared memory as right operands; zeros for columns and k that do not exist."""
    columns = shape.tiles * COLUMNS
    blocks = problem.k // 16
    for i in cutlass.range(thread, columns * units * (SLAB_K // 32), CONSUMERS * WARP, unroll=2):
        column, pair = i % columns, i // columns
        words = cute.make_rmem_tensor(16, Uint32)
        words.fill(Uint32(0))
        if (column < where.rows) & (2 * pair < blocks):
            row = where.row + column
            if cutlass.const_expr(shape.indexed):
                row = problem.row_index[row]
            both = 2 * pair + 1 < blocks
            loaded = (
                _quantized_pair(problem, row, pair, both, target)
                if shape.quantized
                else _plain_pair(problem, row, pair, both)
            )
            for j in cutlass.range_constexpr(16):
                words[j] = loaded[j]
        at = shared + ROWS + (pair * shape.tiles + column // COLUMNS) * 512 + column % COLUMNS * 64
        for t, operand in enumerate(fragments.operand_order([words[j] for j in range(16)])):
            smem.store16(at + t * 16, operand)


def _plain_pair(problem: Problem, row: Int32, pair: Int32, both: Boolean) -> list[Uint32]:
    """32 bf16; a block that does not exist is zero."""
    at = asm.address(problem.a) + (Int64(row) * problem.k + pair * 32) * 2
    other = at + arith.select(both, Int64(32), Int64(0))
    first = [word for half in range(2) for word in gmem.load16(at + half * 16)]
    second = [word for half in range(2) for word in gmem.load16(other + half * 16)]
    second = [arith.select(both, word, Uint32(0)) for word in second]
    return first + second


def _quantized_pair(problem: Problem, row: Int32, pair: Int32, both: Boolean, target: Target) -> list[Uint32]:
    """32 NVFP4 values, times 2^-7."""
    blocks = problem.k // 16
    at = asm.address(problem.a) + (Int64(row) * problem.k + pair * 32 >> 1)
    other = at + arith.select(both, Int64(8), Int64(0))
    first, second = gmem.load8(at), gmem.load8(other)
    scales = cute.make_tensor(problem.a_scales.iterator, cute.make_layout(cute.size(problem.a_scales)))
    bytes_ = []
    for i in range(2):
        col = 2 * pair + arith.select(both, Int32(i), Int32(0))
        tiled = layout.offset_128x4(row, col, blocks)
        bytes_.append(Uint32(scales[arith.select(problem.a_tiled == 1, tiled, row * blocks + col)]))
    second = [arith.select(both, word, Uint32(0)) for word in second]
    pairs = [fragments.activation_pairs(*block, target) for block in ((first, bytes_[0]), (second, bytes_[1]))]
    return pairs[0] + pairs[1]


@cute.jit
def _finish(
    span: Constexpr[Span],
    base: cute.Pointer,
    shared: Uint32,
    thread: Int32,
    epilogue: Constexpr[Epilogue],
) -> None:
    """Hands the sums of one buffer after the other to the op's epilogue."""
    cta, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    begin, fetch, finish = epilogue  # a call of an attribute would make the DSL carry the tuple through the loops
    begin(cta * (EPILOGUE * WARP) + thread, ctas * (EPILOGUE * WARP))
    turn, group, number = Int32(0), span.group, Int32(0)
    for _item in cutlass.range(span.items, unroll=1):
        where = _pass(base, number)
        for n in cutlass.range(_tiles(where), unroll=1):
            buffer = turn & 1
            address = shared + SUMS + buffer * SUMS_BUFFER + thread // 8 * SUMS_ROW
            sums = Sums(where, thread // 8 + n * COLUMNS, group, thread % 8, address)
            fetched = fetch(sums)
            mbarrier.wait(shared + _SUMS_FULL + buffer * 8, turn >> 1 & 1)
            finish(sums, fetched)
            mbarrier.arrive(shared + _SUMS_EMPTY + buffer * 8)
            turn = turn + 1
        group = group + 1
        if group == span.groups:
            group, number = Int32(0), number + 1


def add_slices(address: Uint32, target: Target) -> list[Float32]:
    """Four neighbouring sums, added up in the order of the slices, in units of the decoded products."""
    total = smem.load_floats(address, 4)
    for piece in range(1, SLICES):
        more = smem.load_floats(address + piece * SUMS_SLICE, 4)
        total = [arith.add(a, b, target) for a, b in zip(total, more, strict=True)]
    return total
