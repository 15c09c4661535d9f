"""Small sm_90a kernels in CuTe DSL for the tests of ptxemu: a TMA copy with each swizzle, a wgmma GEMM."""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as sm90
from cutlass import cute, memory, tensor_utils
from cutlass.cute import nvgpu
from cutlass.cute.nvgpu import cpasync, warp, warpgroup

THREADS = 128
DTYPE = cutlass.Float16


class Copy:
    """Copies a matrix tile by tile through shared memory; swizzle is 0 (none) to 3 (128B)."""

    def __init__(self, swizzle: int) -> None:
        kinds = warpgroup.SmemLayoutAtomKind
        self.kind = (kinds.K_INTER, kinds.K_SW32, kinds.K_SW64, kinds.K_SW128)[swizzle]
        self.columns = (8, 16, 32, 64)[swizzle]

    @cute.jit  # type: ignore[untyped-decorator]
    def __call__(self, source: cute.Tensor, target: cute.Tensor, stream: cuda.CUstream) -> None:
        """Launches a CTA for each tile of 64 rows."""
        tile = (64, self.columns)
        atom = warpgroup.make_smem_layout_atom(self.kind, DTYPE)
        layout = cute.tile_to_shape(atom, tile, order=(0, 1))
        load, t_source = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, tile)
        store, t_target = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), target, layout, tile)
        grid = cute.ceil_div(source.shape, tile)
        self.kernel(load, t_source, store, t_target, layout, tile).launch(
            grid=(*grid, 1), block=(32, 1, 1), stream=stream
        )

    @cute.kernel  # type: ignore[untyped-decorator]
    def kernel(
        self,
        load: cute.CopyAtom,
        source: cute.Tensor,
        store: cute.CopyAtom,
        target: cute.Tensor,
        layout: cute.ComposedLayout,
        tile: cutlass.Constexpr,
    ) -> None:
        """One tile."""
        x, y, _ = cute.arch.block_idx()
        smem = memory.SmemAllocator()
        bar = smem.allocate_array(cutlass.Int64, 1)
        buffer = smem.allocate_tensor(DTYPE, layout.outer, 1024, layout.inner)
        whole = cute.make_layout(1)
        parts = []
        for atom, tensor in ((load, source), (store, target)):
            tiles = cute.local_tile(tensor, tile, (None, None))
            parts.append(
                cpasync.tma_partition(atom, 0, whole, cute.group_modes(buffer, 0, 2), cute.group_modes(tiles, 0, 2))
            )
        with cute.arch.elect_one():
            cute.arch.mbarrier_init(bar, 1)
        cute.arch.mbarrier_init_fence()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, cute.size_in_bytes(DTYPE, layout))
        cute.copy(load, parts[0][1][(None, x, y)], parts[0][0], tma_bar_ptr=bar)
        cute.arch.mbarrier_wait(bar, 0)
        cute.copy(store, parts[1][0], parts[1][1][(None, x, y)])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0)


class Gemm:
    """C (64 x, n) = A (64 x, k) B (n, k)^T with wgmma; A comes from shared memory or from registers."""

    def __init__(self, *, a_registers: bool, n: int) -> None:
        self.source = warpgroup.OperandSource.RMEM if a_registers else warpgroup.OperandSource.SMEM
        self.a_registers, self.tile = a_registers, (64, n, 64)

    @cute.jit  # type: ignore[untyped-decorator]
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream) -> None:
        """Launches a CTA of one warpgroup for each tile of C."""
        m, n, k = self.tile
        major = nvgpu.OperandMajorMode.K
        tiled = sm90.make_trivial_tiled_mma(
            DTYPE, DTYPE, major, major, cutlass.Float32, (1, 1, 1), (64, n), self.source
        )
        row = tensor_utils.LayoutEnum.ROW_MAJOR
        a_layout = sm90.make_smem_layout_a(row, self.tile, DTYPE, 1)
        b_layout = sm90.make_smem_layout_b(row, self.tile, DTYPE, 1)
        load = cpasync.CopyBulkTensorTileG2SOp()
        one = (None, None, 0)
        atom_a, ta = cpasync.make_tiled_tma_atom(load, a, cute.slice_(a_layout, one), (m, k))
        atom_b, tb = cpasync.make_tiled_tma_atom(load, b, cute.slice_(b_layout, one), (n, k))
        steps = a.shape[1] // k
        self.kernel(tiled, atom_a, ta, atom_b, tb, c, a_layout, b_layout, steps).launch(
            grid=(c.shape[0] // m, c.shape[1] // n, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel  # type: ignore[untyped-decorator]
    def kernel(
        self,
        tiled: cute.TiledMma,
        atom_a: cute.CopyAtom,
        ta: cute.Tensor,
        atom_b: cute.CopyAtom,
        tb: cute.Tensor,
        c: cute.Tensor,
        a_layout: cute.ComposedLayout,
        b_layout: cute.ComposedLayout,
        steps: cutlass.Constexpr,
    ) -> None:
        """One tile of C."""
        tid, _, _ = cute.arch.thread_idx()
        x, y, _ = cute.arch.block_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = memory.SmemAllocator()
        bar = smem.allocate_array(cutlass.Int64, 1)
        sa = smem.allocate_tensor(DTYPE, a_layout.outer, 1024, a_layout.inner)
        sb = smem.allocate_tensor(DTYPE, b_layout.outer, 1024, b_layout.inner)
        whole = cute.make_layout(1)
        ga = cute.local_tile(ta, cute.slice_(self.tile, (None, 0, None)), (x, None))
        gb = cute.local_tile(tb, cute.slice_(self.tile, (0, None, None)), (y, None))
        as_, ag = cpasync.tma_partition(atom_a, 0, whole, cute.group_modes(sa, 0, 2), cute.group_modes(ga, 0, 2))
        bs, bg = cpasync.tma_partition(atom_b, 0, whole, cute.group_modes(sb, 0, 2), cute.group_modes(gb, 0, 2))
        if warp_index == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(bar, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.barrier()
        thread = tiled.get_slice(tid)
        rb = tiled.make_fragment_B(thread.partition_B(sb))
        gc = cute.local_tile(c, self.tile[:2], (x, y))
        cc = thread.partition_C(gc)
        acc = cute.make_rmem_tensor(cc.shape, cutlass.Float32)
        size = cute.size_in_bytes(DTYPE, cute.slice_(a_layout, (None, None, 0)))
        size += cute.size_in_bytes(DTYPE, cute.slice_(b_layout, (None, None, 0)))
        tiled.set(warpgroup.Field.ACCUMULATE, False)
        for step in cutlass.range_constexpr(steps):
            if warp_index == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(bar, size)
                cute.copy(atom_a, ag[(None, step)], as_[(None, 0)], tma_bar_ptr=bar)
                cute.copy(atom_b, bg[(None, step)], bs[(None, 0)], tma_bar_ptr=bar)
            cute.arch.mbarrier_wait(bar, step % 2)
            if cutlass.const_expr(self.a_registers):
                ra = self.load_a(tiled, sa, tid)
            else:
                ra = tiled.make_fragment_A(thread.partition_A(sa))[(None, None, None, 0)]
            warpgroup.fence()
            for block in cutlass.range_constexpr(cute.size(rb, mode=[2])):
                cute.gemm(tiled, acc, ra[(None, None, block)], rb[(None, None, block, 0)], acc)
                tiled.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            cute.arch.barrier()
        cute.autovec_copy(acc, cc)

    def load_a(self, tiled: Any, sa: Any, tid: Any) -> Any:
        """A's fragment, through ldmatrix."""
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), DTYPE)
        copy = cute.make_tiled_copy_A(atom, tiled)
        mine = copy.get_slice(tid)
        registers = tiled.make_fragment_A(tiled.partition_shape_A(cute.slice_(self.tile, (None, 0, None))))
        cute.copy(copy, mine.partition_S(sa[(None, None, 0)]), mine.retile(registers))
        return registers
