"""A small tcgen05 GEMM in CuTe DSL for the tests of ptxemu: f16 or block-scaled NVFP4, one CTA or a pair."""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass import cute, memory, pipeline
from cutlass._mlir.dialects import nvvm
from cutlass.cute import nvgpu
from cutlass.cute.nvgpu import cpasync, tcgen05

VECTOR = 16
THREADS = 128


def before_thread_sync() -> None:
    """Orders this thread's tcgen05 accesses before a synchronisation that follows."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def after_thread_sync() -> None:
    """Orders this thread's tcgen05 accesses after a synchronisation that went before."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


def scales(tensor: cute.Tensor) -> Any:
    """The elements of a tensor of bytes as scale factors."""
    return cute.recast_ptr(tensor.iterator, dtype=cutlass.Float8E4M3FN)


class Gemm:
    """C (m, n) = A (m, k) B (n, k)^T, one tile of C for each CTA or pair of CTAs."""

    def __init__(self, *, fp4: bool, ctas: int, tile: tuple[int, int]) -> None:
        self.fp4, self.ctas, self.tile = fp4, ctas, tile
        self.dtype = cutlass.Float4E2M1FN if fp4 else cutlass.Float16
        self.k = 256 if fp4 else 64
        self.group = tcgen05.CtaGroup.TWO if ctas == 2 else tcgen05.CtaGroup.ONE

    def mma(self, shape: tuple[int, int], group: Any) -> Any:
        """The tiled MMA of a shape."""
        if self.fp4:
            op = tcgen05.MmaMXF4NVF4Op(cutlass.Float8E4M3FN, (*shape, 64), group, tcgen05.OperandSource.SMEM)
            return cute.make_tiled_mma(op)
        return cute.make_tiled_mma(
            tcgen05.MmaF16BF16Op(
                self.dtype, cutlass.Float32, (*shape, 16), group, tcgen05.OperandSource.SMEM,
                nvgpu.OperandMajorMode.K, nvgpu.OperandMajorMode.K,
            )
        )  # fmt: skip

    def pointer(self, tensor: cute.Tensor) -> Any:
        """The elements of an operand."""
        return cute.recast_ptr(tensor.iterator, dtype=self.dtype) if self.fp4 else tensor.iterator

    @cute.jit  # type: ignore[untyped-decorator]
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        sfa: cute.Tensor,
        sfb: cute.Tensor,
        c: cute.Tensor,
        k: cutlass.Constexpr,
        stream: cuda.CUstream,
    ) -> None:
        """Makes tensor maps and launches; NVFP4 comes as bytes, scale factors as E4M3 in the order of cuBLAS."""
        m, n = c.shape
        tiled, sf_tiled = (
            self.mma(self.tile, self.group),
            self.mma((self.tile[0] // self.ctas, self.tile[1]), tcgen05.CtaGroup.ONE),
        )
        tiler = (*self.tile, self.k)
        sf_tiler = (self.tile[0] // self.ctas, self.tile[1], self.k)
        cluster = cute.tiled_divide(cute.make_layout((self.ctas, 1, 1)), (tiled.thr_id.shape,))
        sf_cluster = cute.tiled_divide(cute.make_layout((self.ctas, 1, 1)), (sf_tiled.thr_id.shape,))
        ga = cute.make_tensor(self.pointer(a), cute.make_layout((m, k, 1), stride=(k, 1, m * k)))
        gb = cute.make_tensor(self.pointer(b), cute.make_layout((n, k, 1), stride=(k, 1, n * k)))
        gc = cute.make_tensor(c.iterator, cute.make_layout((m, n, 1), stride=(n, 1, m * n)))
        a_layout = sm100.make_smem_layout_a(tiled, tiler, self.dtype, 1)
        b_layout = sm100.make_smem_layout_b(tiled, tiler, self.dtype, 1)
        load = cpasync.CopyBulkTensorTileG2SOp(self.group)
        one = (None, None, None, 0)
        atom_a, ta = cute.nvgpu.make_tiled_tma_atom_A(load, ga, cute.slice_(a_layout, one), tiler, tiled, cluster.shape)
        atom_b, tb = cute.nvgpu.make_tiled_tma_atom_B(load, gb, cute.slice_(b_layout, one), tiler, tiled, cluster.shape)
        size = cute.size_in_bytes(self.dtype, cute.slice_(a_layout, one)) + cute.size_in_bytes(
            self.dtype, cute.slice_(b_layout, one)
        )
        atom_sa, atom_sb, tsa, tsb, sa_layout, sb_layout = atom_a, atom_b, ta, tb, None, None
        if cutlass.const_expr(self.fp4):
            gsa = cute.make_tensor(scales(sfa), blockscaled.tile_atom_to_shape_SF((m, k, 1), VECTOR))
            gsb = cute.make_tensor(scales(sfb), blockscaled.tile_atom_to_shape_SF((n, k, 1), VECTOR))
            sa_layout = blockscaled.make_smem_layout_sfa(tiled, tiler, VECTOR, 1)
            sb_layout = blockscaled.make_smem_layout_sfb(tiled, tiler, VECTOR, 1)
            atom_sa, tsa = cute.nvgpu.make_tiled_tma_atom_A(
                load, gsa, cute.slice_(sa_layout, one), tiler, tiled, cluster.shape, internal_type=cutlass.Int16
            )
            atom_sb, tsb = cute.nvgpu.make_tiled_tma_atom_B(
                load,
                gsb,
                cute.slice_(sb_layout, one),
                sf_tiler,
                sf_tiled,
                sf_cluster.shape,
                internal_type=cutlass.Int16,
            )
            size += cute.size_in_bytes(cutlass.Float8E4M3FN, cute.slice_(sa_layout, one))
            size += cute.size_in_bytes(cutlass.Float8E4M3FN, cute.slice_(sb_layout, one))
        self.kernel(
            tiled,
            sf_tiled,
            atom_a,
            ta,
            atom_b,
            tb,
            atom_sa,
            tsa,
            atom_sb,
            tsb,
            gc,
            a_layout,
            b_layout,
            sa_layout,
            sb_layout,
            size * self.ctas,
            k // self.k,
        ).launch(
            grid=(m // self.tile[0] * self.ctas, n // self.tile[1], 1),
            block=(THREADS, 1, 1),
            cluster=(self.ctas, 1, 1),
            stream=stream,
        )

    @cute.kernel  # type: ignore[untyped-decorator]
    def kernel(
        self,
        tiled: cute.TiledMma,
        sf_tiled: cute.TiledMma,
        atom_a: cute.CopyAtom,
        ta: cute.Tensor,
        atom_b: cute.CopyAtom,
        tb: cute.Tensor,
        atom_sa: cute.CopyAtom,
        tsa: cute.Tensor,
        atom_sb: cute.CopyAtom,
        tsb: cute.Tensor,
        gc: cute.Tensor,
        a_layout: Any,
        b_layout: Any,
        sa_layout: Any,
        sb_layout: Any,
        size: cutlass.Constexpr,
        steps: cutlass.Constexpr,
    ) -> None:
        """One tile of C."""
        tid, _, _ = cute.arch.thread_idx()
        bx, by, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        part = bx % self.ctas
        row = bx // self.ctas

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[cutlass.Int64, 1]
            empty: cute.struct.MemRange[cutlass.Int64, 1]
            ready: cute.struct.MemRange[cutlass.Int64, 1]
            freed: cutlass.Int64
            columns: cutlass.Int32

        smem = memory.SmemAllocator()
        storage = smem.allocate(Storage)
        sa = smem.allocate_tensor(self.dtype, a_layout.outer, 1024, a_layout.inner)
        sb = smem.allocate_tensor(self.dtype, b_layout.outer, 1024, b_layout.inner)
        full, empty, ready = storage.full.data_ptr(), storage.empty.data_ptr(), storage.ready.data_ptr()
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(full, 1)
                cute.arch.mbarrier_init(empty, 1)
                cute.arch.mbarrier_init(ready, 1)
        cute.arch.mbarrier_init_fence()
        barrier = pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS)
        tmem = memory.TmemAllocator(
            storage.columns.ptr,
            barrier_for_retrieve=barrier,
            is_two_cta=self.ctas == 2,
            two_cta_tmem_dealloc_mbar_ptr=storage.freed.ptr,
        )
        tmem.allocate(512)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        tmem.wait_for_alloc()
        pointer = tmem.retrieve_ptr(cutlass.Float32)
        thread = tiled.get_slice(part)
        tiler = (*self.tile, self.k)
        ca = thread.partition_A(cute.local_tile(ta, cute.slice_(tiler, (None, 0, None)), (row, None, 0)))
        cb = thread.partition_B(cute.local_tile(tb, cute.slice_(tiler, (0, None, None)), (by, None, 0)))
        cc = thread.partition_C(cute.local_tile(gc, cute.slice_(tiler, (None, None, 0)), (row, by, 0)))
        as_, ag = cpasync.tma_partition(
            atom_a, 0, cute.make_layout(1), cute.group_modes(sa, 0, 3), cute.group_modes(ca, 0, 3)
        )
        bs, bg = cpasync.tma_partition(
            atom_b, 0, cute.make_layout(1), cute.group_modes(sb, 0, 3), cute.group_modes(cb, 0, 3)
        )
        ra, rb = tiled.make_fragment_A(sa), tiled.make_fragment_B(sb)
        acc = cute.make_tensor(pointer, tiled.make_fragment_C(tiled.partition_shape_C(self.tile)).layout)
        if cutlass.const_expr(self.fp4):
            kind = cutlass.Float8E4M3FN
            ssa = smem.allocate_tensor(kind, sa_layout, 1024)
            ssb = smem.allocate_tensor(kind, sb_layout, 1024)
            csa = thread.partition_A(cute.local_tile(tsa, cute.slice_(tiler, (None, 0, None)), (row, None, 0)))
            csb = sf_tiled.get_slice(part).partition_B(
                cute.local_tile(tsb, cute.slice_(tiler, (0, None, None)), (by, None, 0))
            )
            sas, sag = cpasync.tma_partition(
                atom_sa, 0, cute.make_layout(1), cute.group_modes(ssa, 0, 3), cute.group_modes(csa, 0, 3)
            )
            sbs, sbg = cpasync.tma_partition(
                atom_sb, 0, cute.make_layout(1), cute.group_modes(ssb, 0, 3), cute.group_modes(csb, 0, 3)
            )
            sas, sag, sbs, sbg = (cute.filter_zeros(t) for t in (sas, sag, sbs, sbg))
            first = tcgen05.find_tmem_tensor_col_offset(acc)
            one = (None, None, None, 0)
            ma = blockscaled.make_tmem_layout_sfa(tiled, tiler, VECTOR, cute.slice_(sa_layout, one))
            tma = cute.make_tensor(cute.recast_ptr(pointer + first, dtype=kind), ma)
            second = first + tcgen05.find_tmem_tensor_col_offset(tma)
            mb = blockscaled.make_tmem_layout_sfb(tiled, tiler, VECTOR, cute.slice_(sb_layout, one))
            tmb = cute.make_tensor(cute.recast_ptr(pointer + second, dtype=kind), mb)
            copy = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.group), kind)
            copy_a = tcgen05.make_s2t_copy(copy, cute.filter_zeros(tma))
            copy_b = tcgen05.make_s2t_copy(copy, cute.filter_zeros(tmb))
            from_a = tcgen05.get_s2t_smem_desc_tensor(copy_a, copy_a.get_slice(0).partition_S(cute.filter_zeros(ssa)))
            from_b = tcgen05.get_s2t_smem_desc_tensor(copy_b, copy_b.get_slice(0).partition_S(cute.filter_zeros(ssb)))
            to_a = copy_a.get_slice(0).partition_D(cute.filter_zeros(tma))
            to_b = copy_b.get_slice(0).partition_D(cute.filter_zeros(tmb))
        if warp == 0:
            tiled.set(tcgen05.Field.ACCUMULATE, False)
            for step in cutlass.range_constexpr(steps):
                if cutlass.const_expr(step > 0):
                    cute.arch.mbarrier_wait(empty, (step - 1) % 2)
                if part == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, size)
                cute.copy(atom_a, ag[(None, step)], as_[(None, 0)], tma_bar_ptr=full)
                cute.copy(atom_b, bg[(None, step)], bs[(None, 0)], tma_bar_ptr=full)
                if cutlass.const_expr(self.fp4):
                    cute.copy(atom_sa, sag[(None, step)], sas[(None, 0)], tma_bar_ptr=full)
                    cute.copy(atom_sb, sbg[(None, step)], sbs[(None, 0)], tma_bar_ptr=full)
                if part == 0:
                    cute.arch.mbarrier_wait(full, step % 2)
                    after_thread_sync()
                    if cutlass.const_expr(self.fp4):
                        cute.copy(copy_a, from_a[(None, None, None, None, 0)], to_a)
                        cute.copy(copy_b, from_b[(None, None, None, None, 0)], to_b)
                    for block in cutlass.range_constexpr(cute.size(ra, mode=[2])):
                        if cutlass.const_expr(self.fp4):
                            tiled.set(tcgen05.Field.SFA, tma[(None, None, block)].iterator)
                            tiled.set(tcgen05.Field.SFB, tmb[(None, None, block)].iterator)
                        cute.gemm(tiled, acc, ra[(None, None, block, 0)], rb[(None, None, block, 0)], acc)
                        tiled.set(tcgen05.Field.ACCUMULATE, True)
                    with cute.arch.elect_one():
                        last = ready if cutlass.const_expr(step == steps - 1) else empty
                        if cutlass.const_expr(self.ctas == 2):
                            tcgen05.commit(last, 3, self.group)
                        else:
                            tcgen05.commit(last)
        tmem.relinquish_alloc_permit()
        cute.arch.mbarrier_wait(ready, 0)
        after_thread_sync()
        read = tcgen05.make_tmem_copy(
            cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x32), cutlass.Float32), acc
        )
        mine = read.get_slice(tid)
        source, target = mine.partition_S(acc), mine.partition_D(cc)
        registers = cute.make_rmem_tensor(target.shape, cutlass.Float32)
        cute.copy(read, source, registers)
        cute.arch.fence_view_async_tmem_load()
        result = cute.make_rmem_tensor(target.shape, gc.element_type)
        result.store(registers.load().to(gc.element_type))
        cute.autovec_copy(result, target)
        before_thread_sync()
        cute.arch.barrier()
        tmem.free(pointer)
