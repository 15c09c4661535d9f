"""SwiGLU and NVFP4 in one kernel of CuTe DSL, one source for sm_90a and sm_100a: reads gate and up once.

A thread owns blocks of 16 results of one column: the same 16 gate and 16 up values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Numeric, Uint8, Uint32, cute
from cutlass.cute import math
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, layout, recipe, strips
from megamoe.cute.arith import Target, ptx
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.recipe import BLOCK
from megamoe.cute.strips import DTYPES, Output, Shape, Strip, Tiles, Words

SHAPE = Shape(128, 1)  # the fastest of the cuts tried on an H200: see NOTES.md
_LOG2_E = 1.4426950408889634


class GateUp(NamedTuple):
    """What the kernel reads.

    Attributes:
        values: (rows, 2 * I), gate and up side by side.
        row_weight: (rows,) fp32; not looked at unless `weighted`.
        limit: Of the clamp; infinity clamps nothing.
        gate: Columns of blocks before the first gate.
        up: Columns of blocks before the first up.
        weighted: Compile-time.
        packed: The values and the limit are bf16, so that they are clamped two at a time; compile-time.
    """

    values: cute.Tensor
    row_weight: cute.Tensor
    limit: Float32
    gate: Int32
    up: Int32
    weighted: bool
    packed: bool

    @property
    def rows(self) -> Int32:
        """Rows of the result."""
        return cute.size(self.values, mode=[0])

    @property
    def cols(self) -> Int32:
        """Blocks of a row of the result."""
        return cute.size(self.values, mode=[1]) // (2 * BLOCK)


@cute.jit
def launch_linear(
    values: cute.Tensor,  # (rows, 2 * I) bf16, fp16 or fp32
    enc: cute.Tensor,  # () fp32
    row_weight: cute.Tensor,  # (rows,) fp32
    limit: Float32,
    gate_first: Int32,  # 1: gate, up; 0: up, gate
    codes: cute.Tensor,  # (rows, I/2) uint8
    scales: cute.Tensor,  # (rows, I/16) uint8
    dec: cute.Tensor,  # () fp32
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
    weighted: Constexpr[bool],
    packed: Constexpr[bool],
) -> None:
    """Launches one thread for every strip of `shape.blocks` rows."""
    cols = cute.size(scales, mode=[1])
    grid = linear_grid(cute.size(scales, mode=[0]), cols, shape)
    by_cols = cute.FastDivmodDivisorV2(cols)
    swiglu_linear(
        values, enc, row_weight, limit, gate_first, codes, scales, dec, by_cols, target, shape, weighted, packed
    ).launch(grid=[grid, 1, 1], block=[shape.threads, 1, 1], stream=stream, use_pdl=True)


@cute.jit
def launch_tiled(
    values: cute.Tensor,
    enc: cute.Tensor,
    row_weight: cute.Tensor,
    limit: Float32,
    gate_first: Int32,
    codes: cute.Tensor,
    scales: cute.Tensor,  # (padded rows, padded I/16) uint8
    dec: cute.Tensor,
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
    weighted: Constexpr[bool],
    packed: Constexpr[bool],
) -> None:
    """Launches over the 128x4 tiles."""
    tile_rows = cute.size(scales, mode=[0]) // layout.TILE_ROWS
    cols = cute.size(codes, mode=[1]) // (BLOCK // 2)
    rows = cute.size(values, mode=[0])
    bits = strips.slice_bits(rows, shape)
    grid = strips.tiled_grid(Tiles(rows, cols, tile_rows, None, bits), shape)
    swiglu_tiled(
        values, enc, row_weight, limit, gate_first, codes, scales, dec, bits, target, shape, weighted, packed
    ).launch(grid=grid, block=[shape.threads, 1, 1], stream=stream, use_pdl=True)


@cute.kernel
def swiglu_linear(
    values: cute.Tensor,
    enc: cute.Tensor,
    row_weight: cute.Tensor,
    limit: Float32,
    gate_first: Int32,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    by_cols: cute.FastDivmodDivisorV2,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
    weighted: Constexpr[bool],
    packed: Constexpr[bool],
) -> None:
    """Linear scales."""
    strips.let_next_start()
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    source = gate_up(values, row_weight, limit, gate_first, weighted, packed)
    out = Output(codes, scales, enc, dec, False, cta + thread == 0)
    strip = linear_place(source, cta, thread, by_cols, shape)
    strips.wait_for_previous()
    activate(source, strip, out, target, shape.blocks)


@cute.kernel
def swiglu_tiled(
    values: cute.Tensor,
    enc: cute.Tensor,
    row_weight: cute.Tensor,
    limit: Float32,
    gate_first: Int32,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    bits: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
    weighted: Constexpr[bool],
    packed: Constexpr[bool],
) -> None:
    """128x4 scales."""
    strips.let_next_start()
    thread, _, _ = cute.arch.thread_idx()
    across, down = strips.place_in_grid()
    source = gate_up(values, row_weight, limit, gate_first, weighted, packed)
    out = Output(codes, scales, enc, dec, True, across + down + thread == 0)
    tiles = Tiles(source.rows, source.cols, cute.size(scales, mode=[0]) // layout.TILE_ROWS, None, bits)
    strip = strips.tiled_strip(tiles, across, down, thread, shape)
    strips.wait_for_previous()
    activate(source, strip, out, target, shape.blocks)
    strips.write_rest(strip, out, bits, shape)


def gate_up(
    values: cute.Tensor, row_weight: cute.Tensor, limit: Float32, gate_first: Int32, weighted: bool, packed: bool
) -> GateUp:
    """What the kernel reads, with the halves in order."""
    half = cute.size(values, mode=[1]) // (2 * BLOCK)
    return GateUp(values, row_weight, limit, half * (1 - gate_first), half * gate_first, weighted, packed)


def linear_grid(rows: Int32, cols: Int32, shape: Shape) -> Int32:
    """CTAs of a launch with linear scales."""
    return cute.ceil_div(cute.ceil_div(rows, shape.blocks) * cols, shape.threads)


def linear_place(source: GateUp, cta: Int32, thread: Int32, by_cols: cute.FastDivmodDivisorV2, shape: Shape) -> Strip:
    """A thread's strip: neighbours own neighbouring columns."""
    strip_row, col = divmod(cta * shape.threads + thread, by_cols)
    row = strip_row * shape.blocks
    return strips.linear_strip(Int32(0), row, col, source.rows, source.cols, row < source.rows)


@cute.jit
def activate(
    source: Constexpr[GateUp],
    strip: Constexpr[Strip],
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
) -> None:
    """Applies SwiGLU to one strip, encodes and writes it."""
    dtype = source.values.element_type
    halves = strips.blocks_of(source.values, recipe.words_of_block(dtype))

    def load(row: Int32) -> tuple[Words, Words]:
        of_row = Int64(row) * (2 * source.cols) + strip.col
        return strips.load_words(halves, of_row + source.gate), strips.load_words(halves, of_row + source.up)

    def activated(loaded: tuple[Words, Words], row: Int32) -> tuple[Words, type[Numeric]]:
        gates, ups = clamped(*loaded, source, target)
        y = [swiglu(g, u, target) for g, u in zip(gates, ups, strict=True)]
        if source.weighted:
            weight = source.row_weight[row]
            y = [arith.mul(value, weight, target) for value in y]
        return strips.as_bits(y), Float32

    strips.write(strip, load, activated, out, target, blocks, anew=True)
    strips.write_padding(strip, out, blocks)


def clamped(gates: Words, ups: Words, source: GateUp, target: Target) -> tuple[list[Float32], list[Float32]]:
    """min(gate, limit) and clamp(up, -limit, limit) of a block as fp32; NaN stays NaN."""
    dtype, limit = source.values.element_type, source.limit
    if source.packed:
        top = arith.bits(limit) >> 16
        most, least = top | top << 16, top | top << 16 | Uint32(0x80008000)
        gates = [minimum_or_nan_bf16x2(w, most, target) for w in gates]
        ups = [maximum_or_nan_bf16x2(minimum_or_nan_bf16x2(w, most, target), least, target) for w in ups]
        return recipe.values(gates, dtype), recipe.values(ups, dtype)
    g = [minimum_or_nan(value, limit, target) for value in recipe.values(gates, dtype)]
    bounded = [minimum_or_nan(value, limit, target) for value in recipe.values(ups, dtype)]
    return g, [maximum_or_nan(value, -limit, target) for value in bounded]


def swiglu(g: Float32, u: Float32, target: Target) -> Float32:
    """silu(g) * u.

    exp(-g) = 2^(-g log2 e), and both it and the reciprocal of 1 + exp(-g) by approximate instructions. Their errors,
    2^-22.5 and 2^-23, and the roundings come to 5e-7 of silu, and for a negative gate 7e-8 |g| more from the exponent.
    """
    exponential = power_of_two(arith.mul(g, Float32(-_LOG2_E), target), target)
    sigmoid = fast_reciprocal(arith.add(exponential, Float32(1.0), target), target)
    return arith.mul(arith.mul(g, sigmoid, target), u, target)


def power_of_two(x: Float32, target: Target) -> Float32:
    """2^x within 2^-22.5; on the CPU the one of its library."""
    return Float32(math.exp2(x)) if target.host else ptx(Float32, "ex2.approx.ftz.f32 $0, $1;", x)


def fast_reciprocal(x: Float32, target: Target) -> Float32:
    """1 / x within 2^-23, 0 where that is subnormal."""
    return Float32(1.0) / x if target.host else ptx(Float32, "rcp.approx.ftz.f32 $0, $1;", x)


def minimum_or_nan(a: Float32, b: Float32, target: Target) -> Float32:
    """The smaller one; NaN where a is."""
    return arith.select(a > b, b, a) if target.host else ptx(Float32, "min.NaN.f32 $0, $1, $2;", a, b)


def maximum_or_nan(a: Float32, b: Float32, target: Target) -> Float32:
    """The larger one; NaN where a is."""
    return arith.select(a < b, b, a) if target.host else ptx(Float32, "max.NaN.f32 $0, $1, $2;", a, b)


def minimum_or_nan_bf16x2(a: Uint32, b: Uint32, target: Target) -> Uint32:
    """`minimum_or_nan` of two pairs of bf16."""
    return _by_halves(minimum_or_nan, a, b) if target.host else ptx(Uint32, "min.NaN.bf16x2 $0, $1, $2;", a, b)


def maximum_or_nan_bf16x2(a: Uint32, b: Uint32, target: Target) -> Uint32:
    """`maximum_or_nan` of two pairs of bf16."""
    return _by_halves(maximum_or_nan, a, b) if target.host else ptx(Uint32, "max.NaN.bf16x2 $0, $1, $2;", a, b)


def _by_halves(function: Callable[..., Float32], a: Uint32, b: Uint32) -> Uint32:
    """An exact operation on two pairs of bf16, one by one in fp32, on the CPU."""
    pairs = zip(recipe.values([a], BFloat16), recipe.values([b], BFloat16), strict=True)
    low, high = (arith.bits(function(x, y, Target.HOST)) for x, y in pairs)
    return low >> 16 | high & Uint32(0xFFFF0000)


def spec(dtype: str, scale_layout: str, shape: Shape, weighted: bool, packed: bool, target: Target) -> KernelSpec:
    """The kernel for one dtype and layout, any sizes.

    Args:
        dtype: A key of DTYPES.
        scale_layout: "linear" or "128x4".
        shape: How the work is cut.
        weighted: Rows have a weight.
        packed: bf16 values and a limit that is a bf16 number.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32
        scalars = [make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(2)]
        values = _compact(DTYPES[dtype], (size(), size(divisibility=2 * BLOCK)), 16)
        row_weight = _compact(Float32, (size(),), 4)
        codes = _compact(Uint8, (size(), size(divisibility=BLOCK // 2)), 8)
        scales = _compact(Uint8, (size(), size()), 16 if scale_layout == "128x4" else 1)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        numbers = (Float32(0.0), Int32(0))
        return (
            values, scalars[0], row_weight, *numbers, codes, scales, scalars[1], stream, target, shape, weighted, packed
        )  # fmt: skip

    function = launch_tiled if scale_layout == "128x4" else launch_linear
    marks = "_weighted" * weighted + "_packed" * packed
    name = f"act_{scale_layout}_{dtype}_{shape.threads}x{shape.blocks}x{shape.tall}{marks}"
    return KernelSpec(name, target.value, function, arguments, (dtype, scale_layout, *shape, weighted, packed))


def _compact(dtype: type[Numeric], shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)


def packs(dtype: str, limit: float) -> bool:
    """Whether values and limit are bf16 numbers, or the limit is infinite."""
    (bits,) = struct.unpack("<I", struct.pack("<f", limit))
    return dtype == "bfloat16" and bits & 0xFFFF == 0


def specs(target: Target) -> list[KernelSpec]:
    """Every kernel that `fused_act.activate` may ask for."""
    kinds = [*((dtype, False) for dtype in DTYPES), ("bfloat16", True)]
    return [
        spec(dtype, scale_layout, SHAPE, weighted, packed, target)
        for dtype, packed in kinds
        for scale_layout in ("linear", "128x4")
        for weighted in (False, True)
    ]
