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
FOLD = 32768  # the y dim of a grid ends at 65535, so what is further down goes to z
TILE_STEP = WARP // 16  # rows from a byte of a tile to the one 32 further on
Words = list[Uint32]


class Shape(NamedTuple):
    """How the work is cut; compile-time. All are powers of two.

    Attributes:
        threads: Of a CTA, whole warps.
        blocks: Of 16 values, per thread, up to 16.
        tall: With 128x4 scales, neighbouring slices of a tile that a CTA owns; its other warps own other tiles.
    """

    threads: int
    blocks: int
    tall: int = 1

    @property
    def warps(self) -> int:
        """Of a CTA."""
        return self.threads // WARP

    @property
    def slices(self) -> int:
        """Warps that share a 128x4 tile."""
        return layout.TILE // WARP // self.blocks

    @property
    def wide(self) -> int:
        """Tiles side by side that a CTA owns."""
        return self.warps // self.tall


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
        """Whether there is a block i in an active strip."""
        if isinstance(i, int) and i == 0:
            return Boolean(True)
        return self.row + i * self.step < self.rows

    def block(self, i: int | Int32) -> Int64:
        """Number of block i in the batch; of one in the last row where there is none."""
        return Int64(self.entry * self.rows + self.row_of(i)) * self.cols + self.col


class Output(NamedTuple):
    """Where a kernel writes.

    Attributes:
        codes: uint8, half a byte a value.
        scales: uint8, a byte a block and padding.
        enc: () fp32, the encode scale, which is read.
        dec: () fp32, gets its reciprocal.
        tiled: The scales lie in 128x4 tiles.
        leader: One thread of the launch, with an active strip: it writes `dec`.
    """

    codes: cute.Tensor
    scales: cute.Tensor
    enc: cute.Tensor
    dec: cute.Tensor
    tiled: bool
    leader: Boolean


def linear_strip(entry: Int32, row: Int32, col: Int32, rows: Int32, cols: Int32, active: Boolean) -> Strip:
    """A strip of neighbouring rows with linear scales."""
    scale = (entry * rows + row) * cols + col
    return Strip(entry, row, col, 1, rows, cols, active, scale, cols, active)


def grid(across: Int32, down: Int32) -> list[Int32]:
    """The grid of a launch of `across` times `down` CTAs, or a few more of those at the end; neighbours lie across."""
    return [across, cutlass.min(down, FOLD), cute.ceil_div(down, FOLD)]


def let_next_start() -> None:
    """Programmatic dependent launch: the next kernel of the stream may take its place once all CTAs of this one have.

    One that is not launched so waits for the end of this kernel all the same.
    """
    cute.arch.griddepcontrol_launch_dependents()


def wait_for_previous() -> None:
    """Ends when what the stream did before is done and can be seen: no memory may be read or written before."""
    cute.arch.griddepcontrol_wait()


def place_in_grid() -> tuple[Int32, Int32]:
    """Where a CTA is in `grid`: across, and down."""
    x, y, z = cute.arch.block_idx()
    return x, y + z * FOLD


class Tiles(NamedTuple):
    """What a launch with 128x4 scales covers, made on the host side of the launch.

    Attributes:
        rows: Of one matrix.
        cols: Its scale columns.
        tile_rows: Of all matrices.
        per_entry: Tile rows of one matrix; None where there is only one.
        bits: 2^bits slices of a tile hold its rows; the first one writes the padding of the others.
    """

    rows: Int32
    cols: Int32
    tile_rows: Int32
    per_entry: cute.FastDivmodDivisorV2 | None
    bits: Int32


def slice_bits(rows: Int32, shape: Shape) -> Int32:
    """For `Tiles`: fewer slices than a tile has where a matrix has less than 32 rows.

    Slice p owns of every 32 rows those from 2 * blocks * p on, 2 * blocks of them.
    """
    most, least = (count.bit_length() - 1 for count in (shape.slices, shape.tall))
    bits = Int32(most)
    for fewer in reversed(range(least, most)):
        bits = arith.select(rows <= 2 * shape.blocks << fewer, Int32(fewer), bits)
    return bits


def tiled_grid(tiles: Tiles, shape: Shape) -> list[Int32]:
    """The grid of a launch."""
    down = tiles.tile_rows << (tiles.bits - (shape.tall.bit_length() - 1))
    return grid(cute.ceil_div(layout.tiles(tiles.cols), shape.wide), down)


def tiled_strip(tiles: Tiles, across: Int32, down: Int32, thread: Int32, shape: Shape) -> Strip:
    """A strip with 128x4 scales: a warp owns 4 columns and 8 rows per block, a slice of a tile.

    Args:
        tiles: All there is.
        across: Of the CTA in the grid.
        down: Of the CTA in the grid.
        thread: Within the CTA.
        shape: How the work is cut.
    """
    wide, lane, warp = layout.tiles(tiles.cols), thread % WARP, thread // WARP
    tall = shape.tall.bit_length() - 1
    tile, part = across * shape.wide + (warp >> tall), (down << tall) + (warp & shape.tall - 1)
    tile_row, part = part >> tiles.bits, part & ((Int32(1) << tiles.bits) - 1)
    entry, tile_row_of_entry = (Int32(0), tile_row) if tiles.per_entry is None else divmod(tile_row, tiles.per_entry)
    place = part * (shape.blocks * WARP) + lane
    row, col = layout.place_in_tile(place)
    row, col = row + tile_row_of_entry * layout.TILE_ROWS, col + tile * layout.TILE_COLS
    first = (tile_row * wide + tile) * layout.TILE  # scale byte of the tile
    stored = (tile < wide) & (tile_row < tiles.tile_rows)
    active = stored & (row < tiles.rows) & (col < tiles.cols)
    col = cutlass.min(col, tiles.cols - 1)
    return Strip(entry, row, col, TILE_STEP, tiles.rows, tiles.cols, active, first + place, WARP, stored)


@cute.jit
def write(
    strip: Constexpr[Strip],
    load: Constexpr[Callable[[Int32], Any]],
    values: Constexpr[Callable[[Any, Int32], tuple[Words, type[Numeric]]]],
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
    anew: Constexpr[bool],
) -> None:
    """Encodes the blocks of a strip and writes codes and scales; the whole warp must come here.

    Args:
        strip: The blocks.
        load: From a row to what its block is made of; also called for lanes whose strip is not active.
        values: From that and the row to the block's words, as `recipe.encode_block` takes them, and their dtype.
        out: Where to.
        target: What to compile for.
        blocks: In the strip.
        anew: The rare second pass computes its addresses anew, so that they do not wait in registers for it.
    """
    if arith.any_lane(strip.active, target):
        encode = out.enc[()]
        loaded = [load(strip.row_of(i)) for i in range(blocks)]
        arith.loads_first(target)
        if strip.active:
            _encode(strip, loaded, encode, load, values, out, target, blocks, anew)


@cute.jit
def write_padding(strip: Constexpr[Strip], out: Constexpr[Output], blocks: Constexpr[int]) -> None:
    """Writes the zeros of a strip that is padding of a tile as a whole."""
    if cutlass.const_expr(out.tiled):  # noqa: SIM102, the inner condition is the GPU's
        if strip.stored & (not strip.active):
            for i in cutlass.range_constexpr(blocks):
                flat(out.scales)[strip.scale + i * strip.scale_step] = Uint8(0)


@cute.jit
def write_rest(strip: Constexpr[Strip], out: Constexpr[Output], bits: Int32, shape: Constexpr[Shape]) -> None:
    """Writes the zeros of a tile beyond its 2^bits slices: 16 bytes a lane, by the warp that owns the first slice."""
    rest = (strip.scale % WARP << 4) + (Int32(shape.blocks * WARP) << bits)  # a tile and a slice are whole warps
    first = strip.scale & layout.TILE - 1 < shape.blocks * WARP
    if strip.stored & first & (rest < layout.TILE):
        zeros = cute.make_rmem_tensor(4, Uint32)
        zeros.fill(Uint32(0))
        cute.autovec_copy(zeros, blocks_of(out.scales, 4)[(strip.scale & -layout.TILE) + rest >> 4, None])


@cute.jit
def _encode(
    strip: Constexpr[Strip],
    loaded: Constexpr[list[Any]],
    encode: Float32,
    load: Constexpr[Callable[[Int32], Any]],
    values: Constexpr[Callable[[Any, Int32], tuple[Words, type[Numeric]]]],
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
    anew: Constexpr[bool],
) -> None:
    scale = recipe.regular_global_scale(encode, target)
    regular = scale.regular
    _store_dec(out, scale.dec)
    for i in cutlass.range_constexpr(blocks):
        block = _encoded(recipe.encode_block, values(loaded[i], strip.row_of(i)), scale, target)
        _store(strip, i, block, out)
        regular = regular & block.regular
    if cutlass.const_expr(not target.native_e2m1):  # noqa: SIM102, the inner condition is the GPU's
        if not regular:  # rare: NaN, infinity or saturation; the blocks are still in cache
            exact = recipe.global_scale(encode, target)
            _store_dec(out, exact.dec)
            for i in cutlass.range(blocks, unroll=1):
                row = strip.row_of(i + arith.hidden_zero(target)) if anew else strip.row_of(i)
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
        block_number = strip.block(i) if out.tiled else Int64(at)  # linear: a scale has the number of its block
        cute.autovec_copy(pair, blocks_of(out.codes, 2)[block_number, None])
    if cutlass.const_expr(out.tiled):
        flat(out.scales)[at] = Uint8(arith.select(strip.exists(i), block.scale, Uint32(0)))
    elif strip.exists(i):
        flat(out.scales)[at] = Uint8(block.scale)


@cute.jit
def _store_dec(out: Constexpr[Output], dec: Float32) -> None:
    if out.leader:
        out.dec[()] = dec


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
