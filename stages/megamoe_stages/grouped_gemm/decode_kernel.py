"""grouped_gemm for few rows an expert on Hopper: the main loop of `cute.gemm_decode`, alpha and bf16 rows behind it."""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, asm, bf16, convert, decode_limits, gemm_decode, gmem
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.gemm_decode import Epilogue, Problem, Shape, Sums

_PART = 8  # sums of a thread


@cute.jit
def launch(
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    a: cute.Tensor,
    a_scales: cute.Tensor,
    a_dec: cute.Tensor,
    offsets: cute.Tensor,
    row_index: cute.Tensor,
    out: cute.Tensor,
    k: Int32,
    a_tiled: Int32,
    stages: Int32,
    alpha_step: Int32,
    parts: Int32,
    part_rows: Int32,
    ctas: Int32,
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches `ctas` CTAs.

    Args:
        codes: See `gemm_decode.Problem`.
        scales: See `gemm_decode.Problem`.
        dec: fp32, the weights' global scales, flat.
        a: See `gemm_decode.Problem`.
        a_scales: See `gemm_decode.Problem`.
        a_dec: fp32 (1,), the activations' global scale; 1 for bf16.
        offsets: See `gemm_decode.Problem`.
        row_index: See `gemm_decode.Problem`.
        out: bf16 (M, N).
        k: See `gemm_decode.Problem`.
        a_tiled: See `gemm_decode.Problem`.
        stages: See `gemm_decode.Problem`.
        alpha_step: Entries of `dec` from expert to expert.
        parts: Global scales of an expert.
        part_rows: Weight rows that share one, a multiple of 8 where there are several.
        ctas: As many as SMs.
        stream: Where to.
        target: A GPU.
        shape: Compile-time facts.
    """
    kernel(
        codes, scales, dec, a, a_scales, a_dec, offsets, row_index, out,
        k, a_tiled, stages, alpha_step, parts, part_rows, target, shape,
    ).launch(
        grid=[ctas, 1, 1],
        block=[decode_limits.THREADS, 1, 1],
        smem=decode_limits.SHARED_BYTES,
        min_blocks_per_mp=1,
        use_pdl=True,
        stream=stream,
    )  # fmt: skip


@cute.kernel
def kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    a: cute.Tensor,
    a_scales: cute.Tensor,
    a_dec: cute.Tensor,
    offsets: cute.Tensor,
    row_index: cute.Tensor,
    out: cute.Tensor,
    k: Int32,
    a_tiled: Int32,
    stages: Int32,
    alpha_step: Int32,
    parts: Int32,
    part_rows: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see `launch`."""
    problem = Problem(codes, scales, a, a_scales, offsets, row_index, k, a_tiled, stages)

    def fetch(sums: Sums) -> Float32:
        part = (sums.group * decode_limits.GROUP_ROWS + sums.part * _PART) // part_rows
        entry = sums.where.expert * alpha_step + arith.select(part < parts, part, Int32(0))
        return arith.mul(a_dec[0], dec[entry], target)

    def finish(sums: Sums, alpha: Float32) -> None:
        _store(sums, alpha, out, target, shape)

    gemm_decode.run(problem, Epilogue(_nothing, fetch, finish), target, shape)


def _nothing(thread: Int32, threads: Int32) -> None:
    """The op has nothing to do beside its sums."""


@cute.jit
def _store(
    sums: Constexpr[Sums],
    alpha: Float32,
    out: cute.Tensor,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Eight results of a row, alpha applied."""
    n = cute.size(out, mode=[1])
    col = sums.group * decode_limits.GROUP_ROWS + sums.part * _PART
    unit = Float32(convert.DECODED_UNIT ** (1 + shape.quantized))
    quads = [gemm_decode.add_slices(sums.address + sums.part * (_PART * 4) + i * 16, target) for i in range(2)]
    values = [arith.mul(alpha, arith.mul(value, unit, target), target) for quad in quads for value in quad]
    if (sums.column < sums.where.rows) & (col < n):
        at = Int64(sums.where.row + sums.column) * n + col
        if n % _PART == 0:
            words = [bf16.pack(values[i], values[i + 1], target) for i in range(0, _PART, 2)]
            gmem.store16(asm.address(out) + at * 2, words)
        else:
            flat = cute.make_tensor(out.iterator, cute.make_layout(cute.size(out)))
            for i in cutlass.range_constexpr(_PART):
                if col + i < n:
                    flat[at + i] = BFloat16(values[i])


def spec(shape: Shape, target: Target) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def compact(dtype: type, *dims: object, align: int = 16) -> object:
            order = tuple(reversed(range(len(dims))))
            return make_fake_compact_tensor(dtype, dims, stride_order=order, assumed_align=align)

        experts, rows = size(), size(divisibility=64)
        a = (
            compact(Uint8, size(), size(divisibility=8))
            if shape.quantized
            else compact(BFloat16, size(), size(divisibility=16))
        )
        tensors = (
            compact(Uint8, experts, rows, size(divisibility=64)),
            compact(Uint8, experts, rows, size(divisibility=8)),
            compact(Float32, size(), align=4),
            a,
            compact(Uint8, size(), align=1),
            compact(Float32, size(), align=4),
            compact(Int32, size(), align=4),
            compact(Int32, size(), align=4),
            compact(BFloat16, size(), size()),
        )
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (*tensors, *(Int32(1) for _ in range(7)), stream, target, shape)

    name = f"grouped_gemm_decode_{8 * shape.tiles}{'_nvfp4' * shape.quantized}{'_indexed' * shape.indexed}"
    return KernelSpec(name, target.value, launch, arguments, tuple(shape))
