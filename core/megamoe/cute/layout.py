"""Where a block scale lies, for kernels: the inverse of `megamoe.numerics.layout.offset_128x4`.

A kernel that lets neighbouring threads own neighbouring scale bytes writes whole sectors in either layout.
"""

from __future__ import annotations

from cutlass import Int32

TILE_ROWS = 128
TILE_COLS = 4
TILE = TILE_ROWS * TILE_COLS  # scale bytes of a tile


def offset_linear(row: Int32, col: Int32, cols: Int32) -> Int32:
    """Offset of the scale of (row, col) in a matrix with `cols` scale columns."""
    return row * cols + col


def offset_128x4(row: Int32, col: Int32, cols: Int32) -> Int32:
    """Offset of the scale of (row, col) in the 128x4 tiles of a matrix with `cols` scale columns before padding."""
    tile = row // TILE_ROWS * tiles(cols) + col // TILE_COLS
    return tile * TILE + row % 32 * 16 + row % TILE_ROWS // 32 * TILE_COLS + col % TILE_COLS


def tiles(cols: Int32) -> Int32:
    """Tiles side by side that hold `cols` scale columns."""
    return (cols + TILE_COLS - 1) // TILE_COLS


def place_in_tile(offset: Int32) -> tuple[Int32, Int32]:
    """Row (0..127) and column (0..3) of the scale at `offset` (0..511) of a 128x4 tile."""
    return (offset >> 4) + (offset >> 2 & 3) * 32, offset & 3  # bits: a signed division is several times as long
