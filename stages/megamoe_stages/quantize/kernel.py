"""The quantise kernel in CuTe DSL, one source for sm_90a and sm_100a: reads x once, writes codes and scales once.

A thread owns one block of 16: it loads the block's words, finds the scale and writes 8 bytes of codes, with no exchange
between threads. Neighbouring threads own neighbouring scale bytes in both layouts, so a warp writes one whole sector of
scales. Many small CTAs keep enough bytes in flight.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, Numeric, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import layout, recipe, strips
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.recipe import BLOCK
from megamoe.cute.strips import DTYPES, Output, Shape, Strip, Tiles, Words

SHAPE = {"linear": Shape(128, 1), "128x4": Shape(128, 1)}  # the fastest of the cuts tried on an H200: see NOTES.md


@cute.jit
def launch_linear(
    x: cute.Tensor,  # (rows, K) bf16, fp16 or fp32
    enc: cute.Tensor,  # () fp32
    codes: cute.Tensor,  # (rows, K/2) uint8
    scales: cute.Tensor,  # (rows, K/16) uint8
    dec: cute.Tensor,  # () fp32
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches a thread for every block."""
    quantize_linear(x, enc, codes, scales, dec, target).launch(
        grid=[cute.ceil_div(cute.size(scales), shape.threads), 1, 1],
        block=[shape.threads, 1, 1],
        stream=stream,
        use_pdl=True,
    )


@cute.jit
def launch_tiled(
    x: cute.Tensor,  # (batch * rows, K) bf16, fp16 or fp32
    enc: cute.Tensor,  # () fp32
    codes: cute.Tensor,  # (batch * rows, K/2) uint8
    scales: cute.Tensor,  # (batch * padded rows, padded K/16) uint8
    dec: cute.Tensor,  # () fp32
    rows: Int32,  # of one batch entry
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches a thread for every `shape.blocks` bytes of the 128x4 tiles, padding too."""
    tile_rows = cute.size(scales, mode=[0]) // layout.TILE_ROWS
    cols = cute.size(codes, mode=[1]) // (BLOCK // 2)
    per_entry = cute.FastDivmodDivisorV2(cute.ceil_div(rows, layout.TILE_ROWS))
    bits = strips.slice_bits(rows, shape)
    grid = strips.tiled_grid(Tiles(rows, cols, tile_rows, per_entry, bits), shape)
    quantize_tiled(x, enc, codes, scales, dec, rows, per_entry, bits, target, shape).launch(
        grid=grid, block=[shape.threads, 1, 1], stream=stream, use_pdl=True
    )


@cute.kernel
def quantize_linear(
    x: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    target: Constexpr[Target],
) -> None:
    """Linear scales."""
    strips.let_next_start()
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    threads, _, _ = cute.arch.block_dim()
    block = cta * threads + thread
    strip = linear_strip(block, scales)
    strips.wait_for_previous()
    quantize(x, strip, Output(codes, scales, enc, dec, False, block == 0), target, 1)


@cute.kernel
def quantize_tiled(
    x: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    rows: Int32,
    per_entry: cute.FastDivmodDivisorV2,
    bits: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """128x4 scales."""
    strips.let_next_start()
    thread, _, _ = cute.arch.thread_idx()
    across, down = strips.place_in_grid()
    cols, tile_rows = cute.size(codes, mode=[1]) // (BLOCK // 2), cute.size(scales, mode=[0]) // layout.TILE_ROWS
    strip = strips.tiled_strip(Tiles(rows, cols, tile_rows, per_entry, bits), across, down, thread, shape)
    out = Output(codes, scales, enc, dec, True, across + down + thread == 0)
    strips.wait_for_previous()
    quantize(x, strip, out, target, shape.blocks)
    strips.write_padding(strip, out, shape.blocks)
    strips.write_rest(strip, out, bits, shape)


def linear_strip(block: Int32, scales: cute.Tensor) -> Strip:
    """A block as a strip, in one row of all blocks: with linear scales the rows of x do not matter."""
    count = cute.size(scales)
    return strips.linear_strip(Int32(0), Int32(0), cutlass.min(block, count - 1), Int32(1), count, block < count)


def quantize(x: cute.Tensor, strip: Strip, out: Output, target: Target, blocks: int) -> None:
    """Encodes and writes one strip."""
    dtype = x.element_type
    source = strips.blocks_of(x, recipe.words_of_block(dtype))

    def load(row: Int32) -> Words:
        return strips.load_words(source, Int64(strip.entry * strip.rows + row) * strip.cols + strip.col)

    def as_they_are(words: Words, row: Int32) -> tuple[Words, type[Numeric]]:
        return words, dtype

    strips.write(strip, load, as_they_are, out, target, blocks, anew=False)


def spec(dtype: str, scale_layout: str, shape: Shape, target: Target) -> KernelSpec:
    """The kernel for one dtype and layout, any sizes.

    Args:
        dtype: A key of DTYPES.
        scale_layout: "linear" or "128x4".
        shape: How the work is cut.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        rows, k, half = cute.sym_int32(), cute.sym_int32(divisibility=BLOCK), cute.sym_int32(divisibility=BLOCK // 2)
        scalars = [make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(2)]
        x = make_fake_compact_tensor(DTYPES[dtype], (rows, k), stride_order=(1, 0), assumed_align=16)
        codes = make_fake_compact_tensor(Uint8, (rows, half), stride_order=(1, 0), assumed_align=8)
        shape_of_scales = (cute.sym_int32(), cute.sym_int32())
        align = 16 if scale_layout == "128x4" else 1
        scales = make_fake_compact_tensor(Uint8, shape_of_scales, stride_order=(1, 0), assumed_align=align)
        entry = (Int32(0),) if scale_layout == "128x4" else ()
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (x, scalars[0], codes, scales, scalars[1], *entry, stream, target, shape)

    function = launch_tiled if scale_layout == "128x4" else launch_linear
    name = f"{scale_layout}_{dtype}_{shape.threads}x{shape.blocks}x{shape.tall}"
    return KernelSpec(name, target.value, function, arguments, (dtype, scale_layout, *shape))


def specs(target: Target) -> list[KernelSpec]:
    """Every kernel that `launch.quantize` may ask for."""
    return [spec(dtype, scale_layout, shape, target) for dtype in DTYPES for scale_layout, shape in SHAPE.items()]
