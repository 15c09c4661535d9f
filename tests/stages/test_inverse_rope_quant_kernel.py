"""The fused inverse_rope_quant kernel: every thread of a launch on the CPU, and what ptxas makes of it."""

from __future__ import annotations

import functools
import math
from typing import Any

import cutlass
import pytest
import torch
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_ptr

from megamoe.cute import compiler, inspect, layout, strips
from megamoe.cute.arith import Target
from megamoe.cute.strips import Output, Shape, Tiles
from megamoe.errors import ArgumentError
from megamoe.numerics.layout import padded_shape
from megamoe_stages.inverse_rope_quant import contract, kernel, launch, limits, sm90, sm100
from megamoe_stages.inverse_rope_quant.cases import CASES, make
from megamoe_stages.inverse_rope_quant.reference import inverse_rope_quant as reference

DTYPES = {torch.bfloat16: BFloat16, torch.float16: Float16, torch.float32: Float32}
ONE, FOUR = Shape(128, 1, 2), kernel.LARGE["128x4"]  # blocks a thread
ON_HOST = [
    name
    for name, case in CASES.items()
    if not case.gpu_only and not case.bench and case.params["tokens"] and name != "many_tokens"
]


@cute.jit  # type: ignore[untyped-decorator]
def run_on_host(
    across: Int32,
    down: Int32,
    grid_at: cute.Pointer,
    pointers: tuple[cute.Pointer, ...],
    tokens: Int32,
    count: Int32,
    head_dim: Int32,
    rows: Int32,
    half: Int32,
    step: Int32,
    groups: Int32,
    scale_cols: Int32,
    scale_rows: Int32,
    shape: Constexpr,
    tiled: Constexpr,
) -> None:
    """What one CTA does, one thread after another, and the size of the grid."""
    o, positions, cos, sin, enc, codes, scales, dec = pointers

    def compact(at: cute.Pointer, *sizes: Int32) -> cute.Tensor:
        return cute.make_tensor(at, cute.make_ordered_layout(sizes, order=tuple(reversed(range(len(sizes))))))

    table = (compact(cos, rows, half), compact(sin, rows, half))
    values_of_row = count // groups * head_dim
    to = compact(codes, groups, tokens, values_of_row // 2)
    heads = kernel.heads_of(compact(o, tokens, count, head_dim), compact(positions, tokens * step), *table, to)
    bytes_ = compact(scales, groups, scale_rows, scale_cols)
    one = cute.make_layout(())
    scalars = (cute.make_tensor(enc, one), cute.make_tensor(dec, one))
    divisor = cute.FastDivmodDivisorV2
    grid = cute.make_tensor(grid_at, cute.make_layout(3))
    if cutlass.const_expr(tiled):
        tile_rows = scale_rows // layout.TILE_ROWS
        bits = strips.slice_bits(tokens, shape)
        tiles = Tiles(tokens, heads.cols, groups * tile_rows, divisor(tile_rows), bits)
        grid[0], grid[1], grid[2] = strips.tiled_grid(tiles, shape)
        for thread in range(shape.threads):
            out = Output(to, bytes_, *scalars, True, across + down + thread == 0)
            strip = strips.tiled_strip(tiles, across, down, thread, shape)
            kernel.turn_tiled(heads, strip, divisor(heads.blocks), out, Target.HOST, shape)
            strips.write_rest(strip, out, bits, shape)
    else:
        grid[0], grid[1], grid[2] = kernel.linear_grid(heads, shape)
        divisors = kernel.linear_divisors(heads)
        for thread in range(shape.threads):
            out = Output(to, bytes_, *scalars, False, across + down + thread == 0)
            kernel.turn_linear(heads, across, down, thread, divisors, out, Target.HOST, shape)


def pointer(tensor: torch.Tensor, dtype: Any) -> Any:
    return make_ptr(dtype, tensor.data_ptr(), cute.AddressSpace.generic, assumed_align=16)


@functools.cache
def compiled(dtype: torch.dtype, shape: Shape, tiled: bool) -> Any:
    types = (DTYPES[dtype], Int32, Float32, Float32, Float32, Uint8, Uint8, Float32)
    pointers = tuple(make_ptr(t, 16, cute.AddressSpace.generic, assumed_align=16) for t in types)
    grid = make_ptr(Int32, 16, cute.AddressSpace.generic, assumed_align=16)
    return cute.compile(run_on_host, Int32(0), Int32(0), grid, pointers, *[Int32(1)] * 9, shape, tiled)


def on_host(inputs: dict[str, Any], shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale bytes and decode scale, in memory that was full of other bytes."""
    o, cos, groups, tiled = inputs["o"], inputs["cos"], inputs["groups"], inputs["scale_layout"] == "128x4"
    tokens, heads, head_dim = o.shape
    k = heads // groups * head_dim
    tail = padded_shape(tokens, k // 16) if tiled else (tokens, k // 16)
    codes = torch.full((groups, tokens, k // 2), 0xA5, dtype=torch.uint8)
    scales = torch.full((groups, *tail), 0xA5, dtype=torch.uint8)
    dec = torch.full((), -1.0)
    words = inputs["positions"].view(torch.int32)
    tensors = (o, words, cos, inputs["sin"], inputs["global_scale_enc"], codes, scales, dec)
    types = (DTYPES[o.dtype], Int32, Float32, Float32, Float32, Uint8, Uint8, Float32)
    sizes = (tokens, heads, head_dim, *cos.shape, len(words) // tokens, groups, tail[1], tail[0])
    pointers = tuple(pointer(t, kind) for t, kind in zip(tensors, types, strict=True))
    program, grid = compiled(o.dtype, shape, tiled), torch.zeros(3, dtype=torch.int32)

    def run(across: int, down: int) -> None:
        program(Int32(across), Int32(down), pointer(grid, Int32), pointers, *map(Int32, sizes))

    run(0, 0)
    for down in range(int(grid[1] * grid[2]) + 1):  # one too many does nothing: the last z may hold such ones
        for across in range(int(grid[0])):
            run(across, down)
    return codes, scales, dec


@pytest.mark.parametrize("name", ON_HOST)
def test_every_thread_together_gives_the_bytes_of_the_reference(name: str) -> None:
    inputs = CASES[name].inputs(name)
    want = reference(**inputs)
    codes, scales, dec = on_host(inputs, FOUR)
    assert torch.equal(codes, want.codes)
    assert torch.equal(scales, want.scales.view(torch.uint8))
    assert torch.equal(dec, want.global_scale_dec)


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("shape", [ONE, FOUR])
def test_the_cut_does_not_matter(shape: Shape, scale_layout: str) -> None:
    inputs = make(
        torch.Generator().manual_seed(5), tokens=131, heads=6, head_dim=96, rope_dim=32, scale_layout=scale_layout
    )
    want = reference(**inputs)
    codes, scales, _ = on_host(inputs, shape)
    assert torch.equal(codes, want.codes)
    assert torch.equal(scales, want.scales.view(torch.uint8))


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("enc", [math.nan, math.inf, 0.0, 1e-40, 3e38])
def test_odd_global_scales(enc: float, scale_layout: str) -> None:
    inputs = make(torch.Generator().manual_seed(5), tokens=9, special=True, scale_layout=scale_layout)
    inputs["global_scale_enc"] = torch.tensor(enc)
    want = reference(**inputs)
    codes, scales, _ = on_host(inputs, FOUR)
    assert torch.equal(codes, want.codes)
    assert torch.equal(scales, want.scales.view(torch.uint8))


def test_positions_outside_of_the_tables_read_the_last_row() -> None:
    inputs = make(torch.Generator().manual_seed(5), tokens=4)
    last = inputs["cos"].shape[0] - 1
    inside = {**inputs, "positions": torch.tensor([0, last, last, last])}
    outside = {**inputs, "positions": torch.tensor([0, last, last + 1, -1])}
    assert torch.equal(on_host(outside, FOUR)[0], on_host(inside, FOUR)[0])


def test_check_values_names_positions() -> None:
    inputs = make(torch.Generator().manual_seed(5), tokens=4)
    contract.check_values(inputs["positions"], inputs["cos"])
    contract.check_values(inputs["positions"][:0], inputs["cos"])
    for bad in (-1, inputs["cos"].shape[0]):
        with pytest.raises(ArgumentError) as caught:
            contract.check_values(inputs["positions"].clamp(bad, bad), inputs["cos"])
        assert caught.value.argument == "positions"


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100], ids=str)
@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
def test_the_kernel_compiles_without_spills(
    target: Target, scale_layout: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    artifact = compiler.compile_kernel(kernel.spec("bfloat16", scale_layout, kernel.LARGE[scale_layout], target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 72  # three CTAs of 256 threads an SM
    assert ".ftz" not in artifact.ptx.replace("rcp.approx.ftz", "")
    assert "fma.rn.f32" not in artifact.ptx or target is Target.SM90  # there the recipe's own; the turn has none
    assert "sub.rn.f32" in artifact.ptx


def test_kernels_have_names_of_their_own() -> None:
    for module, arch in ((sm90, "sm_90a"), (sm100, "sm_100a")):
        specs = module.kernels()
        assert {spec.arch for spec in specs} == {arch}
        assert len({spec.name for spec in specs}) == len(specs)
        for scale_layout, large in kernel.LARGE.items():
            shapes = {kernel.shape_for(d, scale_layout, n) for d in strips.DTYPES for n in (1, 1 << 21)}
            assert shapes == {kernel.SMALL, large}


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({}, True),
        ({"rows": 65536, "heads": 128, "head_dim": 512}, True),
        ({"rows": 2**18, "heads": 128, "head_dim": 512, "groups": 16}, True),
        ({"rows": 2**18 + 1, "heads": 128, "head_dim": 512, "groups": 16}, False),
        ({"rows": 2**18, "heads": 128, "head_dim": 512, "groups": 16, "scale_layout": "128x4"}, True),
        ({"rows": 2**28, "heads": 1, "head_dim": 16, "scale_layout": "128x4"}, True),
        ({"rows": 2**28 + 1, "heads": 1, "head_dim": 16, "scale_layout": "128x4"}, False),
        ({"rows": 1, "heads": 2**23, "head_dim": 64, "groups": 2**23, "scale_layout": "128x4"}, False),
    ],
)
def test_limits(facts: dict[str, int], fits: bool) -> None:
    assert (limits.supports(facts) == []) == fits


@pytest.mark.parametrize("module", [sm90, sm100])
def test_wrong_arguments_are_named_before_anything_is_compiled(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launcher", lambda *_: pytest.fail("compiled"))
    inputs = make(torch.Generator().manual_seed(5), tokens=4)
    with pytest.raises(ArgumentError, match="CUDA"):
        module.inverse_rope_quant(**inputs)
    with pytest.raises(ArgumentError) as caught:
        module.inverse_rope_quant(**{**inputs, "groups": 3})
    assert caught.value.argument == "groups"
    wide = torch.empty(1, dtype=torch.bfloat16).expand(2**29, 4, 16)
    monkeypatch.setattr(contract, "check", lambda *_, **__: None)
    with pytest.raises(ArgumentError, match="counts up to"):
        module.inverse_rope_quant(**{**inputs, "o": wide})
