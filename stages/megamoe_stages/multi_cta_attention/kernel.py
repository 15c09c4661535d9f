"""The attention kernel for sm_90a and head_dim up to 256: one launch of persistent CTAs.

A warpgroup produces: one warp finds the CTA's tiles of rows, one loads keys and values by tensor maps, two bring the
queries. The others attend, to 64 rows each.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import asm, copies, mbarrier, smem, softmax, tma, varlen
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.multicast import Boxes
from megamoe.cute.varlen import Sequences
from megamoe.cute.warp import WARP
from megamoe_stages.multi_cta_attention import attend
from megamoe_stages.multi_cta_attention.attend import Result
from megamoe_stages.multi_cta_attention.shape import COLUMNS, GROUP, QUERY_WARPS, ROWS, Shape

_TYPES = {"bfloat16": BFloat16, "float16": Float16}


@cute.jit
def launch(
    q: cute.Tensor,  # (queries, heads, D)
    k: cute.Tensor,  # (keys, kv_heads, D)
    v: cute.Tensor,  # (keys, kv_heads, Dv)
    cu_q: cute.Tensor,  # (sequences + 1,) int32
    cu_k: cute.Tensor,  # (sequences + 1,) int32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    mask: cute.Tensor,  # (queries, columns) uint8; not read unless the shape is masked
    out: cute.Tensor,  # (queries, heads, Dv)
    lse: cute.Tensor,  # (queries, heads) fp32
    softmax_scale: Float32,  # positive
    causal: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    ctas: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    """Launches persistent CTAs; they find their work in the offsets."""
    kernel(
        rows_of(q),
        tma.row_boxes(k, shape.keys),
        tma.row_boxes(v, shape.keys),
        cu_q,
        cu_k,
        sink,
        mask,
        rows_of(out),
        cute.make_tensor(lse.iterator, cute.make_layout(cute.size(lse))),
        softmax_scale * Float32(softmax.LOG2E),
        cute.size(q, mode=[1]),
        cute.size(k, mode=[1]),
        causal,
        window,
        has_sink,
        shape,
    ).launch(
        grid=[ctas, 1, 1],
        block=[shape.threads, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        stream=stream,
    )


def rows_of(x: cute.Tensor) -> cute.Tensor:
    """(queries, heads, D) as (queries * heads, D)."""
    queries, heads, width = x.shape
    return cute.make_tensor(x.iterator, cute.make_layout((queries * heads, width), stride=(width, 1)))


@cute.kernel
def kernel(
    q: cute.Tensor,  # (queries * heads, D)
    keys: Boxes,
    values: Boxes,
    cu_q: cute.Tensor,
    cu_k: cute.Tensor,
    sink: cute.Tensor,
    mask: cute.Tensor,
    out: cute.Tensor,
    lse: cute.Tensor,
    factor: Float32,
    heads: Int32,
    kv_heads: Int32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    base = asm.address(cute.arch.get_dyn_smem(Uint8, alignment=1024))
    columns = cute.size(mask, mode=[1]) if cutlass.const_expr(shape.masked) else None
    sequences = Sequences(cu_q, cu_k, heads, kv_heads, causal, window, columns)
    tiles = attend.tile_ring(base, shape)
    warps = shape.consumers * GROUP // WARP
    if thread == 0:
        tiles.init()
        for stage in cutlass.range_constexpr(shape.query_stages):
            barrier = attend.queries_barrier(base, Int32(stage), shape)
            mbarrier.init(barrier, QUERY_WARPS * WARP)
            mbarrier.init(barrier + 8, warps)
        for stage in cutlass.range_constexpr(shape.stages):
            barrier = attend.keys_barrier(base, Int32(stage), shape)
            for i in cutlass.range_constexpr(2):
                mbarrier.init(barrier + 16 * i, 1)
                mbarrier.init(barrier + 16 * i + 8, warps)
        mbarrier.init_fence()
    cute.arch.sync_threads()
    producer, consumer = shape.registers
    if thread < GROUP:
        cute.arch.setmaxregister_decrease(producer)
        warp = cute.arch.warp_idx()
        if warp == 0:
            load_tiles(keys, values, base, shape)
        elif warp <= QUERY_WARPS:
            load_queries(q, base, sequences, shape)
        else:
            varlen.publish_tiles(tiles, sequences, shape.rows)
    else:
        cute.arch.setmaxregister_increase(consumer)
        attend.attend(base, sequences, Result(out, lse, sink, has_sink, factor, mask), shape)


@cute.jit
def load_tiles(keys: Boxes, values: Boxes, base: Int32, shape: Constexpr[Shape]) -> None:
    """Loads the keys and values of all tiles of rows, one tile of keys ahead of the values; one warp."""
    tiles = attend.tile_ring(base, shape)
    number, turn, going = Int32(0), Int32(0), Int32(1)
    while going != 0:
        tile = varlen.take(tiles, number)
        if tile.rows == 0:
            going = Int32(0)
        else:
            steps = tile.steps(shape.keys)
            for step in cutlass.range(steps + 1, unroll=1):
                if (step < steps) & (steps > 0):
                    load_tile(keys, tile, step, turn + step, base, shape.head_dim, shape)
                if step > 0:
                    load_tile(values, tile, step - 1, turn + step - 1, base, 0, shape)
            turn = turn + steps
        number = number + 1


@cute.jit
def load_tile(
    boxes: Boxes,
    tile: Constexpr[varlen.Tile],
    step: Int32,
    turn: Int32,
    base: Int32,
    of_keys: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Starts the copies of a tile of keys, or of values, once there is room."""
    stage, parity = attend.stage_of(turn, shape.stages)
    full = attend.keys_barrier(base, stage, shape) + (0 if of_keys else 16)
    size = shape.keys_bytes if of_keys else shape.values_bytes
    slot = base + (shape.keys_at if of_keys else shape.values_at) + stage * size
    mbarrier.wait(full + 8, parity ^ 1)
    if cute.arch.lane_idx() == 0:
        mbarrier.expect(full, Int32(size))
    cute.arch.sync_warp()
    first = tile.begin + step * shape.keys
    for block in cutlass.range_constexpr(size // shape.block_bytes):
        at = slot + block * shape.block_bytes
        tma.load_box(boxes, tile.key + first, tile.end - first, tile.kv_head, block * COLUMNS, at, full)


@cute.jit
def load_queries(q: cute.Tensor, base: Int32, sequences: Constexpr[Sequences], shape: Constexpr[Shape]) -> None:
    """Brings the queries of all tiles that see something; QUERY_WARPS warps, from the second of the CTA on."""
    thread, _, _ = cute.arch.thread_idx()
    tiles = attend.tile_ring(base, shape)
    number, loads, going = Int32(0), Int32(0), Int32(1)
    while going != 0:
        tile = varlen.take(tiles, number)
        if tile.rows == 0:
            going = Int32(0)
        elif tile.steps(shape.keys) > 0:
            stage, parity = attend.stage_of(loads, shape.query_stages)
            full = attend.queries_barrier(base, stage, shape)
            mbarrier.wait(full + 8, parity ^ 1)
            for part in cutlass.range_constexpr(shape.consumers):
                at = base + stage * shape.queries_bytes + part * shape.part_bytes
                varlen.load_rows(q, at, tile, part * ROWS, ROWS, sequences, thread - WARP, QUERY_WARPS * WARP)
            copies.commit()
            copies.wait(0)
            smem.proxy_fence()
            mbarrier.arrive_if(full, Int32(1))
            loads = loads + 1
        number = number + 1


def spec(shape: Shape, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32
        dtype = _TYPES[shape.dtype]

        def tensor(kind: type, sizes: tuple[object, ...], align: int) -> object:
            order = tuple(reversed(range(len(sizes))))
            return make_fake_compact_tensor(kind, sizes, stride_order=order, assumed_align=align)

        tokens, kv_heads = size(), size()
        return (
            tensor(dtype, (size(), size(), shape.head_dim), 16),
            tensor(dtype, (tokens, kv_heads, shape.head_dim), 16),
            tensor(dtype, (tokens, kv_heads, shape.v_dim), 16),
            tensor(Int32, (size(),), 4),
            tensor(Int32, (size(),), 4),
            tensor(Float32, (size(),), 4),
            tensor(Uint8, (size(), size()), 1),
            tensor(dtype, (size(), size(), shape.v_dim), 16),
            tensor(Float32, (size(), size()), 4),
            Float32(0),
            *(Int32(0) for _ in range(4)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            shape,
        )

    name = f"attend_d{shape.head_dim}_v{shape.v_dim}_{shape.dtype}{'_masked' if shape.masked else ''}"
    return KernelSpec(name, target.value, launch, arguments, tuple(shape))
