"""What a thread of a quantising kernel owns: a strip of blocks, all in one scale column, and how it writes them.

A block is 16 values with one scale byte. Neighbouring threads own neighbouring scale columns (linear) or neighbouring
bytes of a 128x4 tile, so a warp reads and writes whole sectors. Everything but the row is the same for all blocks of a
strip, so the integer work is done once a thread. A thread asks for all its blocks before it computes.

An op gives two functions: `load` reads what the block of a row is made of, `values` makes its 16 values of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cutlass
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Int64, Numeric, Uint8, Uint32, cute

from megamoe.cute import arith, layout, recipe
from megamoe.cute.arith import Target
from megamoe.cute.recipe import Block, GlobalScale

DTYPES: dict[str, type[Numeric]] = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}
WARP = 32
TILE_STEP = WARP // 16  # rows from a byte of a tile to the one 32 further on
Words = list[Uint32]


class Shape(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        threads: Of a CTA, whole warps.
        blocks: Of 16 values, per thread: a power of two up to 16.
    """

    threads: int
    blocks: int

    @property
    def warps(self) -> int:
        """Of a CTA."""
        return self.threads // WARP

    @property
    def slices(self) -> int:
        """Warps that share a 128x4 tile."""
        return layout.TILE // WARP // self.blocks


class Strip(NamedTuple):
    """Blocks of one column, in rows `row`, `row + step`, ...

    Attributes:
        entry: Number of the matrix in its batch.
        row: Of the first block.
        col: Scale column of all.
        step: Rows from block to block.
        rows: Of the matrix.
        cols: Scale columns of the matrix.
        active: The first block exists.
        scale: Offset of the first block's scale byte.
        scale_step: From scale byte to scale byte.
        stored: There are scale bytes: padding of a tile has them, 0, and no blocks.
    """

    entry: Int32
    row: Int32
    col: Int32
    step: int
    rows: Int32
    cols: Int32
    active: Boolean
    scale: Int32
    scale_step: int | Int32
    stored: Boolean

    def part(self, i: int | Int32) -> Strip:
        """The strip of block i alone."""
        row = self.row + i * self.step
        active = self.active & (row < self.rows)
        return self._replace(row=row, scale=self.scale + i * self.scale_step, active=active)

    def row_of(self, i: int | Int32) -> Int32:
        """Row of block i, the last row where there is none: it can be read."""
        return cutlass.min(self.row + i * self.step, self.rows - 1)

    def exists(self, i: int | Int32) -> Boolean:
        """Whether there is a block i."""
        return self.row + i * self.step < self.rows

    def block(self, i: int | Int32) -> Int64:
        """Number of block i in the batch."""
        return Int64(self.entry * self.rows + self.row_of(i)) * self.cols + self.col


class Output(NamedTuple):
    """Where a kernel writes.

    Attributes:
        codes: uint8, half a byte a value.
        scales: uint8, a byte a block and padding.
        enc: () fp32, the encode scale, which is read.
        dec: () fp32, gets its reciprocal.
        tiled: The scales lie in 128x4 tiles.
    """

    codes: cute.Tensor
    scales: cute.Tensor
    enc: cute.Tensor
    dec: cute.Tensor
    tiled: bool


def linear_strip(entry: Int32, row: Int32, col: Int32, rows: Int32, cols: Int32, active: Boolean) -> Strip:
    """A strip of neighbouring rows with linear scales."""
    scale = (entry * rows + row) * cols + col
    return Strip(entry, row, col, 1, rows, cols, active, scale, cols, active)


def tiled_strip(
    cta: Int32,
    thread: Int32,
    rows: Int32,
    cols: Int32,
    per_entry: cute.FastDivmodDivisorV2,
    across: cute.FastDivmodDivisorV2,
    shape: Shape,
) -> Strip:
    """A strip with 128x4 scales: a warp owns 4 columns and 8 rows per block, a CTA as many tiles as it has warps.

    Args:
        cta: 0 to `tiled_grid` - 1.
        thread: Within the CTA.
        rows: Of one matrix.
        cols: Its scale columns.
        per_entry: Tile rows of one matrix.
        across: CTAs that cover the tiles of a tile row.
        shape: How the work is cut.
    """
    tiles, lane = layout.tiles(cols), thread % WARP
    tile_row, group = divmod(cta, across)
    tile_row, part = tile_row // shape.slices, tile_row % shape.slices
    entry, tile_row_of_entry = divmod(tile_row, per_entry)
    tile = group * shape.warps + thread // WARP
    place = part * (shape.blocks * WARP) + lane
    row, col = layout.place_in_tile(place)
    row, col = row + tile_row_of_entry * layout.TILE_ROWS, col + tile * layout.TILE_COLS
    scale = (tile_row * tiles + tile) * layout.TILE + place
    active = (row < rows) & (col < cols)
    return Strip(entry, row, cutlass.min(col, cols - 1), TILE_STEP, rows, cols, active, scale, WARP, tile < tiles)


def tiled_across(cols: Int32, shape: Shape) -> Int32:
    """CTAs that cover the tiles of one tile row."""
    return cute.ceil_div(layout.tiles(cols), shape.warps)


def tiled_grid(tile_rows: Int32, cols: Int32, shape: Shape) -> Int32:
    """CTAs of a launch over `tile_rows` tile rows of all matrices."""
    return tile_rows * shape.slices * tiled_across(cols, shape)


@cute.jit
def write(
    strip: Constexpr[Strip],
    load: Constexpr[Callable[[Int32], Any]],
    values: Constexpr[Callable[[Any, Int32], tuple[Words, type[Numeric]]]],
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
) -> None:
    """Encodes the blocks of a strip and writes codes and scales; zeros where a tile is padded.

    Args:
        strip: The blocks.
        load: From a row to what its block is made of.
        values: From that and the row to the block's words, as `recipe.encode_block` takes them, and their dtype.
        out: Where to.
        target: What to compile for.
        blocks: In the strip.
    """
    if strip.active:
        _encode(strip, load, values, out, target, blocks)
    if cutlass.const_expr(out.tiled):  # noqa: SIM102, the inner condition is the GPU's
        if strip.stored & (not strip.active):
            for i in cutlass.range_constexpr(blocks):
                flat(out.scales)[strip.scale + i * strip.scale_step] = Uint8(0)


@cute.jit
def _encode(
    strip: Constexpr[Strip],
    load: Constexpr[Callable[[Int32], Any]],
    values: Constexpr[Callable[[Any, Int32], tuple[Words, type[Numeric]]]],
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
) -> None:
    encode = out.enc[()]
    loaded = [load(strip.row_of(i)) for i in range(blocks)]
    scale = recipe.regular_global_scale(encode, target)
    regular = scale.regular
    for i in cutlass.range_constexpr(blocks):
        block = _encoded(recipe.encode_block, values(loaded[i], strip.row_of(i)), scale, target)
        _store(strip, i, block, out)
        regular = regular & block.regular
    if cutlass.const_expr(not target.native_e2m1):  # noqa: SIM102, the inner condition is the GPU's
        if not regular:  # rare: NaN, infinity or saturation; the blocks are still in cache
            exact = recipe.global_scale(encode, target)
            for i in cutlass.range(blocks, unroll=1):
                row = strip.row_of(i)
                _store(strip, i, _encoded(recipe.encode_any_block, values(load(row), row), exact, target), out)


def _encoded(
    encode: Callable[[Words, type[Numeric], GlobalScale, Target], Block],
    values: tuple[Words, type[Numeric]],
    scale: GlobalScale,
    target: Target,
) -> Block:
    words, dtype = values
    return encode(words, dtype, scale, target)


@cute.jit
def _store(strip: Constexpr[Strip], i: Constexpr[int | Int32], block: Constexpr[Block], out: Constexpr[Output]) -> None:
    at = strip.scale + i * strip.scale_step
    if strip.exists(i):
        pair = cute.make_rmem_tensor(2, Uint32)
        pair[0], pair[1] = block.low, block.high
        cute.autovec_copy(pair, blocks_of(out.codes, 2)[strip.block(i), None])
    if cutlass.const_expr(out.tiled):
        flat(out.scales)[at] = Uint8(arith.select(strip.exists(i), block.scale, Uint32(0)))
    elif strip.exists(i):
        flat(out.scales)[at] = Uint8(block.scale)


@cute.jit
def write_dec(out: Constexpr[Output], leader: Boolean, target: Constexpr[Target]) -> None:
    """One thread writes the decode scale."""
    if leader:
        out.dec[()] = recipe.global_scale(out.enc[()], target).dec


def load_words(source: cute.Tensor, block: Int64) -> Words:
    """The words of a block of `source` (blocks, words), in wide loads."""
    count = source.shape[1]
    words = cute.make_rmem_tensor(count, Uint32)
    cute.autovec_copy(source[block, None], words)
    return [words[i] for i in range(count)]


def blocks_of(tensor: cute.Tensor, words: int) -> cute.Tensor:
    """A compact tensor as (blocks, words) of 32 bits."""
    count = cute.size(tensor) // (words * 32 // tensor.element_type.width)
    pointer = cute.recast_ptr(tensor.iterator, dtype=Uint32)
    return cute.make_tensor(pointer, cute.make_layout((count, words), stride=(words, 1)))


def flat(tensor: cute.Tensor) -> cute.Tensor:
    """A compact tensor in one dim."""
    return cute.make_tensor(tensor.iterator, cute.make_layout(cute.size(tensor)))


def as_bits(values: Sequence[Float32]) -> Words:
    """fp32 values as the words that `recipe.encode_block` takes."""
    return [arith.bits(value) for value in values]
