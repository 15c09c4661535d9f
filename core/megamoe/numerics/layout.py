"""Where a block scale lies in memory: `linear`, or the `128x4` tiles that tcgen05 and cuBLASLt read.

Source: CUTLASS include/cutlass/detail/sm100_blockscaled_layout.hpp (atom Shape((32,4),(16,4)), Stride((16,4),(0,1))).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megamoe.errors import ArgumentError

ScaleLayout = Literal["linear", "128x4"]
SCALE_LAYOUTS: tuple[str, ...] = get_args(ScaleLayout)
TILE_ROWS = 128
TILE_COLS = 4


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Rows and scale columns after padding to whole 128x4 tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-cols // TILE_COLS) * TILE_COLS


def offset_128x4(row: Tensor, col: Tensor, cols: int) -> Tensor:
    """Byte offset of the scale of (`row`, `col`) in the 128x4 layout of a matrix with `cols` scale columns.

    Args:
        row: int64, any shape.
        col: int64, broadcastable with `row`.
        cols: Unpadded number of scale columns, K/16.
    """
    tiles = -(-cols // TILE_COLS)
    tile = (row // TILE_ROWS) * tiles + col // TILE_COLS
    return tile * 512 + (row % 32) * 16 + (row % TILE_ROWS) // 32 * 4 + col % TILE_COLS


def to_128x4(scales: Tensor) -> Tensor:
    """Rearranges linear scales into 128x4 tiles; each matrix of a batch is padded by itself, with zero bytes.

    Args:
        scales: float8_e4m3fn or uint8, (..., rows, cols), linear.

    Returns:
        Same dtype, (..., padded rows, padded cols): tile after tile in memory, so an index into it means nothing.
    """
    *batch, rows, cols = scales.shape
    full_rows, full_cols = padded_shape(rows, cols)
    raw = scales.contiguous().view(torch.uint8)
    padded = torch.nn.functional.pad(raw, (0, full_cols - cols, 0, full_rows - rows))
    tiles = padded.reshape(*batch, full_rows // 128, 4, 32, full_cols // 4, 4)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # (row tile, col tile, row % 32, row / 32 % 4, col % 4)
    return tiles.permute(order).reshape(*batch, full_rows, full_cols).view(scales.dtype)


def from_128x4(scales: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `to_128x4`: linear scales (..., rows, cols), padding dropped.

    Raises:
        ArgumentError: `scales` has not the padded shape of (`rows`, `cols`).
    """
    *batch, full_rows, full_cols = scales.shape
    if (full_rows, full_cols) != padded_shape(rows, cols):
        expected = f"(..., {padded_shape(rows, cols)[0]}, {padded_shape(rows, cols)[1]}) for {rows}x{cols} scales"
        raise ArgumentError("scales", f"shape {tuple(scales.shape)}", expected)
    raw = scales.contiguous().view(torch.uint8)
    tiles = raw.reshape(*batch, full_rows // 128, full_cols // 4, 32, 4, 4)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
    linear = tiles.permute(order).reshape(*batch, full_rows, full_cols)[..., :rows, :cols]
    return linear.contiguous().view(scales.dtype)
