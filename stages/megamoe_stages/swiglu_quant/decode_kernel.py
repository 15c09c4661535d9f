"""swiglu_quant for few rows an expert on Hopper: the main loop of `cute.gemm_decode`, SwiGLU and NVFP4 behind it.

Weights are interleaved, so four gates and their ups are eight sums of one thread, and four threads have a block.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint16, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, convert, decode_limits, gemm_decode, layout, recipe
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.decode_limits import GROUP_ROWS
from megamoe.cute.gemm_decode import Epilogue, Problem, Shape, Sums
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import from_lane
from megamoe.numerics.gate_up import RUN
from megamoe_stages.swiglu_quant.kernel import maximum_or_nan, minimum_or_nan, swiglu

_PART = 4  # results of a thread
_GROUP = GROUP_ROWS // 2  # results of an item


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
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    out_dec: cute.Tensor,
    k: Int32,
    a_tiled: Int32,
    stages: Int32,
    alpha_step: Int32,
    up_step: Int32,
    weighted: Int32,
    tiled: Int32,
    limit: Float32,
    ctas: Int32,
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches `ctas` CTAs.

    Args:
        codes: See `gemm_decode.Problem`; rows interleaved.
        scales: See `gemm_decode.Problem`.
        dec: fp32, the weights' global scales, flat.
        a: See `gemm_decode.Problem`.
        a_scales: See `gemm_decode.Problem`.
        a_dec: fp32 (1,), the activations' global scale; 1 for bf16.
        offsets: See `gemm_decode.Problem`.
        row_index: See `gemm_decode.Problem`.
        row_weight: fp32 (M,), read where `weighted` is 1.
        enc: fp32 (1,), encode scale of the result.
        out_codes: uint8 (M, I/2).
        out_scales: uint8, linear or in tiles.
        out_dec: fp32 (1,).
        k: See `gemm_decode.Problem`.
        a_tiled: See `gemm_decode.Problem`.
        stages: See `gemm_decode.Problem`.
        alpha_step: Entries of `dec` from expert to expert.
        up_step: From the gate's entry to the up's.
        weighted: 1 to multiply by `row_weight`.
        tiled: 1 for 128x4 scales of the result.
        limit: Of the clamp; infinity clamps nothing.
        ctas: As many as SMs.
        stream: Where to.
        target: A GPU.
        shape: Compile-time facts.
    """
    kernel(
        codes, scales, dec, a, a_scales, a_dec, offsets, row_index, row_weight, enc, out_codes, out_scales, out_dec,
        k, a_tiled, stages, alpha_step, up_step, weighted, tiled, limit, target, shape,
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
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    out_dec: cute.Tensor,
    k: Int32,
    a_tiled: Int32,
    stages: Int32,
    alpha_step: Int32,
    up_step: Int32,
    weighted: Int32,
    tiled: Int32,
    limit: Float32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see `launch`."""
    problem = Problem(codes, scales, a, a_scales, offsets, row_index, k, a_tiled, stages)

    def begin(thread: Int32, threads: Int32) -> None:
        _begin(thread, threads, enc, out_codes, out_scales, out_dec, tiled, target)

    def fetch(sums: Sums) -> Factors:
        return _factors(sums, a_dec, dec, row_weight, enc, alpha_step, up_step, weighted, target)

    def finish(sums: Sums, factors: Factors) -> None:
        y = _activated(sums, factors, limit, target, shape)
        _store(sums, y, factors.scale, out_codes, out_scales, tiled, target)

    gemm_decode.run(problem, Epilogue(begin, fetch, finish), target, shape)


class Factors(NamedTuple):
    """What sums are multiplied by: alpha of gate and up, the row's weight, and the result's global scale."""

    gate: Float32
    up: Float32
    weight: Float32
    scale: recipe.GlobalScale


def _factors(
    sums: Sums,
    a_dec: cute.Tensor,
    dec: cute.Tensor,
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    alpha_step: Int32,
    up_step: Int32,
    weighted: Int32,
    target: Target,
) -> Factors:
    entry = sums.where.expert * alpha_step
    gate, up = (arith.mul(a_dec[0], dec[entry + step], target) for step in (0, up_step))
    valid = (sums.column < sums.where.rows) & (weighted == 1)
    given = row_weight[arith.select(valid, sums.where.row + sums.column, Int32(0))]
    return Factors(gate, up, arith.select(valid, given, Float32(1.0)), recipe.global_scale(enc[0], target))


def _activated(sums: Sums, factors: Factors, limit: Float32, target: Target, shape: Shape) -> list[Float32]:
    """Four results of a row."""
    unit = Float32(convert.DECODED_UNIT ** (1 + shape.quantized))
    first = sums.address + sums.part // 2 * (4 * 2 * RUN) + sums.part % 2 * (4 * _PART)
    gates = gemm_decode.add_slices(first, target)
    ups = gemm_decode.add_slices(first + 4 * RUN, target)
    y = []
    for gate, up in zip(gates, ups, strict=True):
        g = minimum_or_nan(arith.mul(factors.gate, arith.mul(gate, unit, target), target), limit, target)
        u = minimum_or_nan(arith.mul(factors.up, arith.mul(up, unit, target), target), limit, target)
        value = swiglu(g, maximum_or_nan(u, -limit, target), target)
        y.append(arith.mul(value, factors.weight, target))
    return y


@cute.jit
def _store(
    sums: Constexpr[Sums],
    y: Constexpr[list[Float32]],
    global_scale: Constexpr[recipe.GlobalScale],
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    tiled: Int32,
    target: Constexpr[Target],
) -> None:
    """Quantises four results with those of three neighbours, and writes them."""
    intermediate = cute.size(out_codes, mode=[1]) * 2
    result = sums.group * _GROUP + sums.part * _PART
    valid = (sums.column < sums.where.rows) & (result < intermediate)
    row = sums.where.row + sums.column
    largest = Float32(0.0)
    for value in y:
        largest = arith.maximum(largest, arith.number(arith.bits(value) & 0x7FFFFFFF), target)
    for step in (1, 2):
        largest = arith.maximum(largest, from_lane(largest, step), target)
    scale, o = recipe.block_scale(largest, global_scale, target)
    nibbles = recipe.pack_codes([convert.encode_e2m1(arith.mul(value, o, target), target) for value in y])
    if valid:
        pairs = cute.make_tensor(
            cute.recast_ptr(out_codes.iterator, dtype=Uint16), cute.make_layout(cute.size(out_codes) // 2)
        )
        pairs[(Int64(row) * intermediate + result) // 4] = Uint16(nibbles)
        if sums.part % 4 == 0:
            block, cols = result // BLOCK, intermediate // BLOCK
            at = arith.select(tiled == 1, layout.offset_128x4(row, block, cols), row * cols + block)
            flat = cute.make_tensor(out_scales.iterator, cute.make_layout(cute.size(out_scales)))
            flat[at] = Uint8(scale)


@cute.jit
def _begin(
    thread: Int32,
    threads: Int32,
    enc: cute.Tensor,
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    out_dec: cute.Tensor,
    tiled: Int32,
    target: Constexpr[Target],
) -> None:
    """Writes the decode scale, and zeros for the scales of rows and columns that only fill up 128x4 tiles."""
    if thread == 0:
        out_dec[0] = recipe.global_scale(enc[0], target).dec
    if tiled == 1:
        rows, cols = cute.size(out_codes, mode=[0]), cute.size(out_codes, mode=[1]) * 2 // BLOCK
        tiles = layout.tiles(cols)
        flat = cute.make_tensor(out_scales.iterator, cute.make_layout(cute.size(out_scales)))
        for i in cutlass.range(thread, cute.size(out_scales), threads, unroll=1):
            tile, (row, col) = i // layout.TILE, layout.place_in_tile(i % layout.TILE)
            row, col = row + tile // tiles * layout.TILE_ROWS, col + tile % tiles * layout.TILE_COLS
            if (row >= rows) | (col >= cols):
                flat[i] = Uint8(0)


def spec(shape: Shape, target: Target) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def compact(dtype: type, *dims: object, align: int = 16) -> object:
            order = tuple(reversed(range(len(dims))))
            return make_fake_compact_tensor(dtype, dims, stride_order=order, assumed_align=align)

        experts, rows = size(), size(divisibility=GROUP_ROWS)
        plain = compact(BFloat16, size(), size(divisibility=BLOCK))
        codes = compact(Uint8, size(), size(divisibility=BLOCK // 2))
        tensors = (
            compact(Uint8, experts, rows, size(divisibility=64)),
            compact(Uint8, experts, rows, size(divisibility=8)),
            compact(Float32, size(), align=4),
            codes if shape.quantized else plain,
            compact(Uint8, size(), align=1),
            compact(Float32, size(), align=4),
            compact(Int32, size(), align=4),
            compact(Int32, size(), align=4),
            compact(Float32, size(), align=4),
            compact(Float32, size(), align=4),
            compact(Uint8, size(), size(divisibility=BLOCK // 2), align=8),
            compact(Uint8, size(), size(), align=1),
            compact(Float32, size(), align=4),
        )
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        numbers = (*(Int32(1) for _ in range(7)), Float32(0.0), Int32(1))
        return (*tensors, *numbers, stream, target, shape)

    name = f"swiglu_quant_decode_{8 * shape.tiles}{'_nvfp4' * shape.quantized}{'_indexed' * shape.indexed}"
    return KernelSpec(name, target.value, launch, arguments, tuple(shape))
