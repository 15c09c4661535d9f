"""The fused activation of swiglu_quant: every thread of a launch on the CPU, and what ptxas makes of it."""

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
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize, quantize
from megamoe_stages.swiglu_quant import cases, fused_act, kernel, limits

DTYPES = {torch.bfloat16: BFloat16, torch.float16: Float16, torch.float32: Float32}
SHAPE = Shape(64, 2)


@cute.jit  # type: ignore[untyped-decorator]
def run_on_host(
    across: Int32,
    down: Int32,
    grid_at: cute.Pointer,
    pointers: tuple[cute.Pointer, ...],
    limit: Float32,
    gate_first: Int32,
    rows: Int32,
    width: Int32,
    scale_rows: Int32,
    scale_cols: Int32,
    tiled: Constexpr,
    weighted: Constexpr,
    packed: Constexpr,
) -> None:
    """What one CTA does, one thread after another, and the size of the grid."""
    values, enc, row_weight, codes, scales, dec = pointers

    def compact(at: cute.Pointer, *sizes: Int32) -> cute.Tensor:
        return cute.make_tensor(at, cute.make_ordered_layout(sizes, order=tuple(reversed(range(len(sizes))))))

    one = cute.make_layout(())
    source = kernel.gate_up(
        compact(values, rows, width), compact(row_weight, rows), limit, gate_first, weighted, packed
    )
    to = (compact(codes, rows, width // 4), compact(scales, scale_rows, scale_cols))
    scalars = (cute.make_tensor(enc, one), cute.make_tensor(dec, one))
    grid = cute.make_tensor(grid_at, cute.make_layout(3))
    if cutlass.const_expr(tiled):
        tile_rows = scale_rows // layout.TILE_ROWS
        bits = strips.slice_bits(source.rows, SHAPE)
        tiles = Tiles(source.rows, source.cols, tile_rows, None, bits)
        grid[0], grid[1], grid[2] = strips.tiled_grid(tiles, SHAPE)
        for thread in range(SHAPE.threads):
            out = Output(*to, *scalars, True, across + down + thread == 0)
            strip = strips.tiled_strip(tiles, across, down, thread, SHAPE)
            kernel.activate(source, strip, out, Target.HOST, SHAPE.blocks)
            strips.write_rest(strip, out, bits, SHAPE)
    else:
        grid[0], grid[1], grid[2] = kernel.linear_grid(source.rows, source.cols, SHAPE), Int32(1), Int32(1)
        by_cols = cute.FastDivmodDivisorV2(source.cols)
        for thread in range(SHAPE.threads):
            out = Output(*to, *scalars, False, across + thread == 0)
            strip = kernel.linear_place(source, across, thread, by_cols, SHAPE)
            kernel.activate(source, strip, out, Target.HOST, SHAPE.blocks)


def pointer(tensor: torch.Tensor, dtype: Any) -> Any:
    return make_ptr(dtype, tensor.data_ptr(), cute.AddressSpace.generic, assumed_align=16)


@functools.cache
def compiled(dtype: torch.dtype, tiled: bool, weighted: bool, packed: bool) -> Any:
    types = (DTYPES[dtype], Float32, Float32, Uint8, Uint8, Float32)
    grid, *pointers = (make_ptr(t, 16, cute.AddressSpace.generic, assumed_align=16) for t in (Int32, *types))
    sizes = [Int32(1)] * 5
    return cute.compile(
        run_on_host, Int32(0), Int32(0), grid, tuple(pointers), Float32(0), *sizes, tiled, weighted, packed
    )


def on_host(
    gate_up: torch.Tensor,
    enc: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    *,
    limit: float | None = 10.0,
    order: str = "gate_up",
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    """Like `fused_act.activate`, into memory that was full of other bytes."""
    rows, width = gate_up.shape
    tail = padded_shape(rows, width // 32) if scale_layout == "128x4" else (rows, width // 32)
    codes = torch.full((rows, width // 4), 0xA5, dtype=torch.uint8)
    scales = torch.full(tail, 0xA5, dtype=torch.uint8)
    dec = torch.full((), -1.0)
    weights = torch.full((rows,), torch.nan) if row_weight is None else row_weight
    types = (DTYPES[gate_up.dtype], Float32, Float32, Uint8, Uint8, Float32)
    tensors = (gate_up, enc, weights, codes, scales, dec)
    pointers = tuple(pointer(t, kind) for t, kind in zip(tensors, types, strict=True))
    bound = math.inf if limit is None else limit
    packed = kernel.packs(str(gate_up.dtype).removeprefix("torch."), bound)
    program = compiled(gate_up.dtype, scale_layout == "128x4", row_weight is not None, packed)
    grid = torch.zeros(3, dtype=torch.int32)
    sizes = [Int32(n) for n in (order == "gate_up", rows, width, *tail)]

    def run(across: int, down: int) -> None:
        program(Int32(across), Int32(down), pointer(grid, Int32), pointers, Float32(bound), *sizes)

    run(0, 0)
    for down in range(int(grid[1] * grid[2])):
        for across in range(int(grid[0])):
            run(across, down)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), dec, scale_layout)


def expected(
    gate_up: torch.Tensor, row_weight: torch.Tensor | None, limit: float | None, order: str, dtype: torch.dtype
) -> torch.Tensor:
    """y (rows, I), the reference's formula in `dtype`."""
    first, second = gate_up.to(dtype).chunk(2, dim=-1)
    gate, up = (first, second) if order == "gate_up" else (second, first)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = gate / (1 + torch.exp(-gate)) * up
    return y if row_weight is None else y * row_weight.to(dtype)[:, None]


def assert_same(got: NVFP4Tensor, want: NVFP4Tensor) -> None:
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales.view(torch.uint8), want.scales.view(torch.uint8))
    assert torch.equal(got.global_scale_dec, want.global_scale_dec)


def saturated(rows: int, half: int, order: str) -> torch.Tensor:
    """Gates where every sigmoid is 0 or 1 in fp32, so that y is exact however `exp` rounds."""
    generator = torch.Generator().manual_seed(2)
    gates = torch.tensor([0.0, 32.0, 48.0, 64.0, 96.0, -128.0])
    gate = gates[torch.randint(len(gates), (rows, half), generator=generator)]
    up = torch.randn(rows, half, generator=generator).bfloat16().float()
    return torch.cat((gate, up) if order == "gate_up" else (up, gate), dim=1)


@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize(
    ("dtype", "scale_layout", "weighted"),
    [
        (torch.bfloat16, "linear", False),
        (torch.bfloat16, "linear", True),
        (torch.bfloat16, "128x4", False),
        (torch.float16, "linear", False),
        (torch.float32, "128x4", True),
    ],
    ids=str,
)
def test_exact_gates_give_the_bytes_of_the_definition(
    dtype: torch.dtype, scale_layout: str, weighted: bool, order: str
) -> None:
    gate_up = saturated(131, 80, order).to(dtype)
    weight = torch.rand(131) if weighted else None
    enc = torch.tensor(20.0)
    y = expected(gate_up, weight, None, order, torch.float32)
    got = on_host(gate_up, enc, weight, limit=None, order=order, scale_layout=scale_layout)
    assert_same(got, quantize(y, enc, scale_layout=scale_layout))


@pytest.mark.parametrize("limit", [None, 10.0, 0.5, 7.3])  # 7.3 is no bf16 number
def test_random_values_are_as_near_the_truth_as_the_formula_in_fp32(limit: float | None) -> None:
    gate_up = (4 * torch.randn(64, 512, generator=torch.Generator().manual_seed(4))).bfloat16()
    enc = torch.tensor(30.0)
    truth = expected(gate_up, None, limit, "gate_up", torch.float64)
    want = dequantize(quantize(truth.float(), enc)).double()
    got = dequantize(on_host(gate_up, enc, limit=limit)).double()
    assert (got - want).norm() / want.norm() < 2e-3  # an ulp moves one value in 10^5 by a step of a quarter
    assert (got - truth).norm() / (want - truth).norm() < 1.01


def test_nan_stays_and_infinity_saturates() -> None:
    gate_up = torch.ones(6, 64)
    gate_up[0, 3] = torch.nan  # gate
    gate_up[1, 35] = torch.nan  # up
    gate_up[2, 3] = torch.inf
    gate_up[3, 3] = -torch.inf
    gate_up[4, 35] = torch.inf
    gate_up[5, 35] = -torch.inf
    enc = torch.tensor(50.0)
    for limit in (10.0, None):
        y = expected(gate_up, None, limit, "gate_up", torch.float32)
        got, want = on_host(gate_up, enc, limit=limit), quantize(y, enc)
        special = got.codes[:, 1] >> 4  # value 3
        assert torch.equal(special, want.codes[:, 1] >> 4)
        assert special[0] == special[1] == special[3] == 7  # -inf * sigmoid(-inf) is NaN, as in the reference
        assert not torch.isin(got.scales.view(torch.uint8), torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).any()


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100], ids=str)
@pytest.mark.parametrize(("scale_layout", "packed"), [("linear", True), ("128x4", True), ("linear", False)])
def test_the_kernel_compiles_without_spills(
    target: Target, scale_layout: str, packed: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    artifact = compiler.compile_kernel(kernel.spec("bfloat16", scale_layout, kernel.SHAPE, True, packed, target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 64  # four CTAs of 256 threads an SM
    kind = "bf16x2" if packed else "f32"
    for word in (f"min.NaN.{kind}", f"max.NaN.{kind}", "ex2.approx.ftz.f32"):
        assert word in artifact.ptx
    assert "div." not in artifact.ptx


def test_kernels_have_names_of_their_own_on_both_architectures() -> None:
    specs = fused_act.kernels()
    assert {spec.arch for spec in specs} == {"sm_90a", "sm_100a"}
    assert len({(spec.name, spec.arch) for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({}, True),
        ({"rows": 65536, "n": 6144}, True),
        ({"rows": 2**20, "n": 2**15}, True),
        ({"rows": 2**20 + 1, "n": 2**15}, False),
        ({"rows": 2**20, "n": 2**15, "scale_layout": "128x4"}, True),
        ({"rows": 1, "n": 2**29, "scale_layout": "128x4"}, False),  # one row takes the room of 128
    ],
)
def test_limits(facts: dict[str, int], fits: bool) -> None:
    assert (limits.supports(facts) == []) == fits


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_act, "launcher", lambda *_: pytest.fail("compiled"))
    good: dict[str, Any] = {"gate_up": torch.ones(3, 64, dtype=torch.bfloat16), "global_scale_enc": torch.tensor(1.0)}
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "cpu": ({}, "gate_up"),
        "columns": ({"gate_up": torch.ones(3, 48, dtype=torch.bfloat16)}, "gate_up"),
        "dtype": ({"gate_up": torch.ones(3, 64, dtype=torch.float64)}, "gate_up"),
        "strides": ({"gate_up": torch.ones(64, 3, dtype=torch.bfloat16).T}, "gate_up"),
        "scale": ({"global_scale_enc": torch.ones(2)}, "global_scale_enc"),
        "weight": ({"row_weight": torch.ones(4)}, "row_weight"),
        "limit": ({"limit": -1.0}, "limit"),
        "order": ({"order": "w1_w3"}, "order"),
        "layout": ({"scale_layout": "8x4"}, "scale_layout"),
    }
    for change, argument in wrong.values():
        with pytest.raises(ArgumentError) as caught:
            fused_act.activate(**{**good, **change})
        assert caught.value.argument == argument
    given = cases.make(torch.Generator().manual_seed(1), rows=(2, 1), intermediate=16, k=32)
    with pytest.raises(ArgumentError, match="CUDA"):
        fused_act.swiglu_quant(**given)
    with pytest.raises(ArgumentError) as caught:
        fused_act.swiglu_quant(**{**given, "offsets": given["offsets"].long()})
    assert caught.value.argument == "offsets"
