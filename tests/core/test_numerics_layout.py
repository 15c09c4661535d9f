"""The 128x4 layout against its index formula, written out here once more."""

from __future__ import annotations

import pytest
import torch

from megamoe.errors import ArgumentError
from megamoe.numerics.layout import from_128x4, offset_128x4, padded_shape, to_128x4

SHAPES = [
    (1, 1),
    (1, 4),
    (3, 5),
    (31, 2),
    (32, 4),
    (33, 7),
    (127, 9),
    (128, 4),
    (129, 3),
    (200, 37),
    (256, 64),
    (4, 130),
]


def formula(row: int, col: int, cols: int) -> int:
    """Byte of scale (row, col): tiles of 128x4 in row-major order; in a tile row % 32, then row // 32, then col."""
    tiles_a_row = (cols + 3) // 4
    tile = (row // 128) * tiles_a_row + col // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4


def distinct(*shape: int) -> torch.Tensor:
    """Random bytes 1..126, so that zero padding shows and none is an E4M3 NaN."""
    return torch.randint(1, 127, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_scale_lies_where_the_formula_says(rows: int, cols: int) -> None:
    scales = distinct(rows, cols)
    tiled = to_128x4(scales)
    full_rows, full_cols = -(-rows // 128) * 128, -(-cols // 4) * 4
    want = [0] * (full_rows * full_cols)
    for row, line in enumerate(scales.tolist()):
        for col, byte in enumerate(line):
            want[formula(row, col, cols)] = byte
    assert tiled.shape == padded_shape(rows, cols) == (full_rows, full_cols)
    assert tiled.flatten().tolist() == want


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_offset_is_the_formula(rows: int, cols: int) -> None:
    got = offset_128x4(torch.arange(rows)[:, None], torch.arange(cols), cols)
    assert got.tolist() == [[formula(row, col, cols) for col in range(cols)] for row in range(rows)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_tiles_come_back_as_they_were(batch: tuple[int, ...], rows: int, cols: int) -> None:
    scales = distinct(*batch, rows, cols)
    assert torch.equal(from_128x4(to_128x4(scales), rows, cols), scales)


def test_each_matrix_of_a_batch_is_padded_by_itself() -> None:
    scales = distinct(3, 5, 7)
    tiled = to_128x4(scales)
    assert tiled.shape == (3, 128, 8)
    assert all(torch.equal(tiled[i], to_128x4(scales[i])) for i in range(3))


def test_e4m3_scales_keep_dtype_and_bytes() -> None:
    scales = distinct(130, 6)
    tiled = to_128x4(scales.view(torch.float8_e4m3fn))
    assert tiled.dtype == torch.float8_e4m3fn
    assert torch.equal(tiled.view(torch.uint8), to_128x4(scales))
    assert from_128x4(tiled, 130, 6).dtype == torch.float8_e4m3fn


def test_scales_that_are_not_contiguous_are_read_right() -> None:
    scales = distinct(40, 12)
    assert torch.equal(to_128x4(scales.t()), to_128x4(scales.t().contiguous()))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 5, 4)])
def test_empty_scales_have_a_layout_too(shape: tuple[int, ...]) -> None:
    tiled = to_128x4(torch.empty(shape, dtype=torch.uint8))
    assert tiled.shape == (*shape[:-2], *padded_shape(*shape[-2:]))
    assert from_128x4(tiled, *shape[-2:]).shape == shape


@pytest.mark.parametrize("shape", [(128, 5), (100, 4), (256, 4), (128, 8)])
def test_unpadded_tiles_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="scales"):
        from_128x4(torch.zeros(shape, dtype=torch.uint8), 100, 4)
