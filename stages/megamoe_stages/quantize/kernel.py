"""The quantise kernel in CuTe DSL, one source for sm_90a and sm_100a: reads x once, writes codes and scales once.

A thread owns whole blocks of 16: it loads a block's words, finds the scale and writes 8 bytes of codes, with no
exchange between threads. Neighbouring threads own neighbouring scale bytes, in both layouts, so a warp writes one whole
sector of scales. A thread asks for all its blocks before it computes, which keeps enough bytes in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, layout, recipe
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.recipe import BLOCK, Block

DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}


class Shape(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        threads: Of a CTA.
        blocks: Of 16 values, per thread.
    """

    threads: int
    blocks: int

    @property
    def slots(self) -> int:
        """Scale bytes that a CTA owns."""
        return self.threads * self.blocks


LARGE = {"linear": Shape(128, 4), "128x4": Shape(256, 4)}  # the fastest of the cuts tried on an H200: see NOTES.md
SMALL = {"linear": Shape(128, 1), "128x4": Shape(256, 2)}  # whole tiles, and more CTAs where there is little work


class Slot(NamedTuple):
    """One scale byte and the block that it belongs to.

    Attributes:
        offset: Of the byte.
        block: Number of the block; any other one where there is none.
        valid: There is a block.
        stored: There is a byte: padding of a tile has one, which is 0, and no block.
    """

    offset: Int32
    block: Int32
    valid: Boolean
    stored: Boolean


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
    """Launches one thread for every `shape.blocks` blocks."""
    grid = (cute.size(scales) + shape.slots - 1) // shape.slots
    quantize_linear(x, enc, codes, scales, dec, target, shape).launch(
        grid=[grid, 1, 1], block=[shape.threads, 1, 1], stream=stream
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
    """Launches over the bytes of the 128x4 tiles, padding too; a CTA owns neighbouring tiles of one tile row."""
    tile_rows = cute.size(scales, mode=[0]) // layout.TILE_ROWS
    groups = cute.ceil_div(cute.size(scales, mode=[1]) // layout.TILE_COLS, shape.slots // layout.TILE)
    per_entry = cute.FastDivmodDivisorV2((rows + layout.TILE_ROWS - 1) // layout.TILE_ROWS)
    across = cute.FastDivmodDivisorV2(groups)
    quantize_tiled(x, enc, codes, scales, dec, rows, per_entry, across, target, shape).launch(
        grid=[tile_rows * groups, 1, 1], block=[shape.threads, 1, 1], stream=stream
    )


@cute.kernel
def quantize_linear(
    x: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Linear scales: the scale at an offset belongs to the block of that number."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    count = cute.size(scales)
    first = cta * shape.slots + thread

    def slot(i: int | Int32) -> Slot:
        offset = first + i * shape.threads
        return Slot(offset, cutlass.min(offset, count - 1), offset < count, offset < count)

    _quantize(x, enc, codes, scales, dec, first == 0, slot, target, shape)


@cute.kernel
def quantize_tiled(
    x: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    rows: Int32,
    per_entry: cute.FastDivmodDivisorV2,
    across: cute.FastDivmodDivisorV2,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """128x4 scales."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    cols = cute.size(x, mode=[1]) // BLOCK
    tiles = cute.size(scales, mode=[1]) // layout.TILE_COLS
    tile_row, group = divmod(cta, across)
    entry, tile_row_of_entry = divmod(tile_row, per_entry)

    def slot(i: int | Int32) -> Slot:
        tile = group * (shape.slots // layout.TILE) + i * shape.threads // layout.TILE
        place = i * shape.threads % layout.TILE + thread
        row, col = layout.place_in_tile(place)
        row, col = row + tile_row_of_entry * layout.TILE_ROWS, col + tile * layout.TILE_COLS
        block = (entry * rows + cutlass.min(row, rows - 1)) * cols + cutlass.min(col, cols - 1)
        offset = (tile_row * tiles + tile) * layout.TILE + place
        return Slot(offset, block, (row < rows) & (col < cols), tile < tiles)

    _quantize(x, enc, codes, scales, dec, cta + thread == 0, slot, target, shape)


@cute.jit
def _quantize(
    x: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    leader: Boolean,
    slot_of: Constexpr[Callable[[int | Int32], Slot]],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    dtype = x.element_type
    sources, outs, bytes_ = _words(x, recipe.words_of_block(dtype)), _words(codes, 2), _flat(scales)
    encode = enc[()]
    slots = [slot_of(i) for i in range(shape.blocks)]
    loaded = [_load(sources, slot) for slot in slots]
    scale = recipe.regular_global_scale(encode, target)
    regular = scale.regular
    for i in cutlass.range_constexpr(shape.blocks):
        block = recipe.encode_block(loaded[i], dtype, scale, target)
        _store(outs, bytes_, slots[i], block)
        regular = regular & block.regular
    if leader:
        dec[()] = recipe.global_scale(encode, target).dec
    if cutlass.const_expr(not target.native_e2m1):  # noqa: SIM102, the inner condition is the GPU's
        if not regular:  # rare: NaN, infinity or saturation; the blocks are still in cache
            exact = recipe.global_scale(encode, target)
            for i in cutlass.range(shape.blocks, unroll=1):
                slot = slot_of(i)
                _store(outs, bytes_, slot, recipe.encode_any_block(_load(sources, slot), dtype, exact, target))


@cute.jit
def _store(outs: cute.Tensor, scales: cute.Tensor, slot: Constexpr[Slot], block: Constexpr[Block]) -> None:
    if slot.valid:
        pair = cute.make_rmem_tensor(2, Uint32)
        pair[0], pair[1] = block.low, block.high
        cute.autovec_copy(pair, outs[slot.block, None])
    if slot.stored:
        scales[slot.offset] = Uint8(arith.select(slot.valid, block.scale, Uint32(0)))


def _load(sources: cute.Tensor, slot: Slot) -> list[Uint32]:
    words = cute.make_rmem_tensor(sources.shape[1], Uint32)
    cute.autovec_copy(sources[slot.block, None], words)
    return [words[i] for i in range(sources.shape[1])]


def _words(tensor: cute.Tensor, words: int) -> cute.Tensor:
    """A compact tensor as (blocks, words) of 32 bits."""
    count = cute.size(tensor) // (words * 32 // tensor.element_type.width)
    pointer = cute.recast_ptr(tensor.iterator, dtype=Uint32)
    return cute.make_tensor(pointer, cute.make_layout((count, words), stride=(words, 1)))


def _flat(tensor: cute.Tensor) -> cute.Tensor:
    return cute.make_tensor(tensor.iterator, cute.make_layout(cute.size(tensor)))


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
        scales = make_fake_compact_tensor(Uint8, shape_of_scales, stride_order=(1, 0), assumed_align=1)
        entry = (Int32(0),) if scale_layout == "128x4" else ()
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (x, scalars[0], codes, scales, scalars[1], *entry, stream, target, shape)

    function = launch_tiled if scale_layout == "128x4" else launch_linear
    name = f"{scale_layout}_{dtype}_{shape.threads}x{shape.blocks}"
    return KernelSpec(name, target.value, function, arguments, (dtype, scale_layout, *shape))


def specs(target: Target) -> list[KernelSpec]:
    """Every kernel that `launch.quantize` may ask for."""
    return [
        spec(dtype, scale_layout, shape, target)
        for dtype in DTYPES
        for scale_layout in SMALL
        for shape in (LARGE[scale_layout], SMALL[scale_layout])
    ]
