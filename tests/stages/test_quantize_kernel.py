"""The fused quantise kernel: every thread of a launch on the CPU, and its offsets where they are largest."""

from __future__ import annotations

import functools
import math
from typing import Any

import cutlass
import pytest
import torch
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_ptr

from megamoe.cute import layout, strips
from megamoe.cute.arith import Target
from megamoe.cute.strips import Output, Shape, Tiles
from megamoe.numerics.layout import padded_shape
from megamoe_stages.quantize import contract, kernel, limits
from megamoe_stages.quantize.cases import CASES
from megamoe_stages.quantize.reference import quantize as reference

DTYPES = {torch.bfloat16: BFloat16, torch.float16: Float16, torch.float32: Float32}
ON_HOST = ("one_row", "127_rows", "fp16", "fp32", "wide", "special", "special_fp32", "tiles", "tiles_whole")
ONE, FOUR, TALL = Shape(64, 1), Shape(64, 4), Shape(128, 1, 2)
EDGE = limits.MAX_SCALES


@cute.jit  # type: ignore[untyped-decorator]
def run_on_host(
    across: Int32,
    down: Int32,
    grid_at: cute.Pointer,
    pointers: tuple[cute.Pointer, ...],
    entries: Int32,
    rows: Int32,
    k: Int32,
    scale_rows: Int32,
    scale_cols: Int32,
    shape: Constexpr,
    tiled: Constexpr,
) -> None:
    """What one CTA does, one thread after another, and the size of the grid."""
    x_at, enc, codes_at, scales_at, dec = pointers

    def compact(at: cute.Pointer, *sizes: Int32) -> cute.Tensor:
        return cute.make_tensor(at, cute.make_ordered_layout(sizes, order=(1, 0)))

    x, codes = compact(x_at, entries * rows, k), compact(codes_at, entries * rows, k // 2)
    scales, one = compact(scales_at, entries * scale_rows, scale_cols), cute.make_layout(())
    scalars = (cute.make_tensor(enc, one), cute.make_tensor(dec, one))
    grid = cute.make_tensor(grid_at, cute.make_layout(3))
    if cutlass.const_expr(tiled):
        tile_rows, cols = entries * scale_rows // layout.TILE_ROWS, k // 16
        bits, per_entry = strips.slice_bits(rows, shape), cute.FastDivmodDivisorV2(scale_rows // layout.TILE_ROWS)
        tiles = Tiles(rows, cols, tile_rows, per_entry, bits)
        grid[0], grid[1], grid[2] = strips.tiled_grid(tiles, shape)
        for thread in range(shape.threads):
            strip = strips.tiled_strip(tiles, across, down, thread, shape)
            out = Output(codes, scales, *scalars, True, across + down + thread == 0)
            kernel.quantize(x, strip, out, Target.HOST, shape.blocks)
            strips.write_padding(strip, out, shape.blocks)
            strips.write_rest(strip, out, bits, shape)
    else:
        grid[0], grid[1], grid[2] = cute.ceil_div(cute.size(scales), shape.threads), Int32(1), Int32(1)
        for thread in range(shape.threads):
            block = across * shape.threads + thread
            out = Output(codes, scales, *scalars, False, block == 0)
            kernel.quantize(x, kernel.linear_strip(block, scales), out, Target.HOST, 1)


def pointer(tensor: torch.Tensor, dtype: Any) -> Any:
    return make_ptr(dtype, tensor.data_ptr(), cute.AddressSpace.generic, assumed_align=16)


@functools.cache
def compiled(dtype: torch.dtype, shape: Shape, tiled: bool) -> Any:
    types = (DTYPES[dtype], Float32, Uint8, Uint8, Float32)
    grid, *pointers = (make_ptr(t, 16, cute.AddressSpace.generic, assumed_align=16) for t in (Int32, *types))
    sizes = [Int32(1)] * 5
    return cute.compile(run_on_host, Int32(0), Int32(0), grid, tuple(pointers), *sizes, shape, tiled)


def same_as_the_reference(inputs: dict[str, Any], shape: Shape) -> bool:
    """Runs every thread into memory that was full of other bytes."""
    x, enc, tiled = inputs["x"], inputs["global_scale_enc"], inputs.get("scale_layout") == "128x4"
    *batch, rows, k = x.shape
    entries, tail = math.prod(batch), padded_shape(rows, k // 16) if tiled else (rows, k // 16)
    codes = torch.full((*batch, rows, k // 2), 0xA5, dtype=torch.uint8)
    scales = torch.full((*batch, *tail), 0xA5, dtype=torch.uint8)
    dec = torch.full((), -1.0)
    types = (DTYPES[x.dtype], Float32, Uint8, Uint8, Float32)
    pointers = tuple(pointer(t, kind) for t, kind in zip((x, enc, codes, scales, dec), types, strict=True))
    program, grid = compiled(x.dtype, shape, tiled), torch.zeros(3, dtype=torch.int32)

    def run(across: int, down: int) -> None:
        program(*map(Int32, (across, down)), pointer(grid, Int32), pointers, *map(Int32, (entries, rows, k, *tail)))

    run(0, 0)
    for down in range(int(grid[1] * grid[2]) + tiled):  # one too many does nothing: the last z may hold such ones
        for across in range(int(grid[0])):
            run(across, down)
    want = reference(**inputs)
    same = torch.equal(codes, want.codes) and torch.equal(scales, want.scales.view(torch.uint8))
    return same and torch.equal(dec, want.global_scale_dec)


@pytest.mark.parametrize("name", ON_HOST)
def test_every_thread_together_gives_the_bytes_of_the_reference(name: str) -> None:
    assert same_as_the_reference(CASES[name].inputs(name), ONE)


@pytest.mark.parametrize("shape", [ONE, FOUR, TALL])
@pytest.mark.parametrize("size", [(3, 130, 48), (2, 2, 5, 144), (1, 16), (16, 80), (33, 16)])
def test_entries_are_padded_each_by_itself(size: tuple[int, ...], shape: Shape) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert same_as_the_reference({"x": x, "global_scale_enc": torch.tensor(700.0), "scale_layout": "128x4"}, shape)


@cute.jit  # type: ignore[untyped-decorator]
def last_places(grid_at: cute.Pointer, places_at: cute.Pointer, rows: Int32, cols: Int32, shape: Constexpr) -> None:
    """The grid of one matrix with 128x4 scales, and where the last thread of the last CTA reads and writes."""
    grid, places = (cute.make_tensor(at, cute.make_layout(3)) for at in (grid_at, places_at))
    tile_rows = cute.ceil_div(rows, layout.TILE_ROWS)
    tiles = Tiles(rows, cols, tile_rows, cute.FastDivmodDivisorV2(tile_rows), strips.slice_bits(rows, shape))
    grid[0], grid[1], grid[2] = strips.tiled_grid(tiles, shape)
    last = (grid[0] - 1, tile_rows * (shape.slices // shape.tall) - 1, Int32(shape.threads - 1))
    strip = strips.tiled_strip(tiles, *last, shape)
    places[0], places[1] = Int64(strip.scale), strip.block(0)
    places[2] = Int64(strip.active)


@pytest.mark.parametrize("cols", [4, 256, 448, 2**19])
def test_offsets_are_right_at_the_limit(cols: int) -> None:
    shape, rows = kernel.SHAPE["128x4"], EDGE // cols // 128 * 128
    grid, places = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    pointers = pointer(grid, Int32), pointer(places, Int64)
    cute.compile(last_places, *pointers, Int32(1), Int32(1), shape)(*pointers, Int32(rows), Int32(cols))
    tiles = math.ceil(cols / 4 / shape.wide) * shape.wide * rows // 128  # the last CTA of a tile row may be too wide
    assert int(grid[0]) * int(grid[1]) * int(grid[2]) * shape.threads >= tiles * 512
    assert max(grid[1:].tolist()) <= 65535  # CUDA's limit; x may have 2^31 - 1
    active = cols % (4 * shape.wide) == 0
    assert places[2] == active
    if active:
        assert places[:2].tolist() == [rows * cols - 1, rows * cols - 1]


def test_linear_blocks_stay_below_31_bits_at_the_limit() -> None:
    threads = kernel.SHAPE["linear"].threads
    assert math.ceil(EDGE / threads) * threads < 2**31


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({"rows": 2**20, "k": 2**14}, True),
        ({"rows": 2**20 + 1, "k": 2**14}, False),
        ({"rows": 2**30, "k": 16}, True),
        ({"rows": 2**20, "k": 2**14, "scale_layout": "128x4"}, True),
        ({"rows": 2**20 + 1, "k": 2**14, "scale_layout": "128x4"}, False),
        ({"rows": 2**28, "k": 16, "scale_layout": "128x4"}, True),  # one scale a row takes the room of four
        ({"rows": 2**28 + 1, "k": 16, "scale_layout": "128x4"}, False),
        ({"rows": 2**20, "entries": 256, "k": 7168, "scale_layout": "128x4"}, True),
        ({"rows": 2**21, "entries": 2**21, "k": 64, "scale_layout": "128x4"}, True),  # 2^30 bytes
        ({"rows": 2**22, "entries": 2**22, "k": 64, "scale_layout": "128x4"}, False),  # a row takes the room of 128
    ],
)
def test_what_is_refused(facts: dict[str, Any], fits: bool) -> None:
    assert (limits.supports(facts) == []) == fits


@pytest.mark.parametrize("size", [(1, 4096), (8192, 7168), (256, 129, 64), (3, 2, 1, 16)])
def test_the_chooser_counts_no_fewer_scales_than_there_are(size: tuple[int, ...]) -> None:
    x = torch.empty(size, device="meta", dtype=torch.bfloat16)
    for scale_layout in ("linear", "128x4"):
        out = contract.fake(x, torch.empty((), device="meta"), scale_layout=scale_layout)
        facts = contract.problem(x, torch.empty((), device="meta"), scale_layout=scale_layout)._asdict()
        assert limits.most_scales(facts) >= out.scales.numel()
