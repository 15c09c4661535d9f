"""SwiGLU with quantisation against numpy: codes and scale bytes bit for bit where gate and up are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe_stages.swiglu_quant import cases, contract, fallback, reference
from tests.stages import oracle

VARIANTS = [reference.swiglu_quant, fallback.swiglu_quant]
ROWS = (3, 0, 1, 40, 17)
Variant = Callable[..., NVFP4Tensor]


def inputs(**params: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    return cases.make(generator, **{"rows": ROWS, "intermediate": 48, "k": 64, **params})


def gate_and_up(kw: dict[str, Any]) -> tuple[oracle.F64, oracle.F64]:
    """Float64 (M, I) each, before the clamp."""
    a = kw["a"]
    rows = oracle.decode(a) if isinstance(a, NVFP4Tensor) else oracle.array(a)
    products = oracle.grouped(rows, oracle.decode(kw["weights"]), kw["offsets"])
    products = products * oracle.alphas(a, kw["weights"], kw["offsets"])
    half = products.shape[1] // 2
    first, second = products[:, :half], products[:, half:]
    return (first, second) if kw["order"] == "gate_up" else (second, first)


def activated(kw: dict[str, Any]) -> oracle.F64:
    """y in float64, (M, I)."""
    gate, up = gate_and_up(kw)
    limit = np.inf if kw["limit"] is None else kw["limit"]
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    with np.errstate(over="ignore"):
        y: oracle.F64 = gate / (1 + np.exp(-gate)) * up
    return y if kw["row_weight"] is None else y * oracle.array(kw["row_weight"])[:, None]


def assert_same_bytes(out: NVFP4Tensor, kw: dict[str, Any]) -> None:
    codes, scales = oracle.quantize(activated(kw).astype(np.float32), kw["global_scale_enc"].item())
    assert out.scale_layout == kw["scale_layout"]
    assert np.array_equal(oracle.scale_bytes(out), scales)
    assert np.array_equal(oracle.nibbles(out.codes), codes)
    assert out.global_scale_dec.item() == np.float32(1) / np.float32(kw["global_scale_enc"].item())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("a", ["bf16", "nvfp4"])
def test_saturated_gates_give_the_same_bytes(variant: Variant, a: str, order: str, scale_layout: str) -> None:
    """Where every sigmoid is 0 or 1, y is exact, and so are block maxima, scale bytes and codes."""
    kw = inputs(a=a, order=order, scale_layout=scale_layout, values="saturated", limit=None)
    y = activated(kw)
    assert np.abs(y.astype(np.float32) - y).max() < 1e-30, "y must be an fp32 number, or too small for one"
    scales = oracle.quantize(y.astype(np.float32), kw["global_scale_enc"].item())[1]
    assert 0 < scales.max() < 0x7E, "no block scale may saturate"
    assert_same_bytes(variant(**kw), kw)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alphas", [None, 1, 2])
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
def test_one_hot_rows_give_the_same_bytes(
    variant: Variant, alphas: int | None, order: str, weighted: bool, limit: float | None
) -> None:
    kw = inputs(a="nvfp4", alphas=alphas, order=order, weighted=weighted, limit=limit, values="one_hot")
    assert_same_bytes(variant(**kw), kw)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
def test_clamp_is_asymmetric_and_after_the_global_scales(variant: Variant, order: str) -> None:
    """One block a sign: gate and up of +-64 (raw) times 0.25 and 0.5 meet a limit of 10."""
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])  # of gate and up, one expert each
    gate_dec, up_dec, limit = 0.25, 0.5, 10.0
    codes = np.where(signs > 0, 0x66, 0xEE).astype(np.uint8)  # +-4
    gate_codes = np.broadcast_to(codes[:, :1, None], (4, 16, 8))
    up_codes = np.broadcast_to(codes[:, 1:, None], (4, 16, 8))
    halves = [gate_codes, up_codes] if order == "gate_up" else [up_codes, gate_codes]
    dec = [gate_dec, up_dec] if order == "gate_up" else [up_dec, gate_dec]
    scales = torch.full((4, 32, 1), 16.0).to(torch.float8_e4m3fn)
    weights = NVFP4Tensor(torch.from_numpy(np.concatenate(halves, 1)), scales, torch.tensor([dec] * 4))
    a = torch.zeros(4, 16, dtype=torch.bfloat16)
    a[:, 0] = 1
    enc = torch.tensor(1.0)
    out = variant(a, weights, torch.arange(5, dtype=torch.int32), enc, limit=limit, order=order)
    gate = np.where(signs[:, 0] > 0, limit, -64 * gate_dec)  # -16: below, the gate is free
    up = signs[:, 1] * limit  # +-32 clamped on both sides
    y = (gate / (1 + np.exp(-gate)) * up)[:, None].repeat(16, 1).astype(np.float32)
    want_codes, want_scales = oracle.quantize(y, 1.0)
    assert np.array_equal(oracle.nibbles(out.codes), want_codes)
    assert np.array_equal(oracle.scale_bytes(out), want_scales)


@pytest.mark.parametrize(
    ("variant", "bound"),
    [
        # a step is a quarter of a value, so an error of eps moves the quantised values by sqrt(eps / 4)
        (reference.swiglu_quant, (2.0**-20 / 4) ** 0.5),
        (fallback.swiglu_quant, contract.BOUNDS["out"].rel_l2),
    ],
)
@pytest.mark.parametrize("a", ["bf16", "nvfp4"])
def test_random_values_against_fp64(variant: Variant, bound: float, a: str) -> None:
    kw = inputs(a=a, k=256, intermediate=96, weighted=True)
    gate, up = gate_and_up(kw)
    assert (gate > 10).any()
    assert (gate < -10).any()
    assert (np.abs(up) > 10).any()
    y = activated(kw).astype(np.float32)
    codes, scales = oracle.quantize(y, kw["global_scale_enc"].item())
    out = variant(**kw)
    want = NVFP4Tensor(
        torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4),
        torch.from_numpy(scales).view(torch.float8_e4m3fn),
        out.global_scale_dec,
    )
    assert oracle.relative(oracle.array(dequantize(out)), oracle.array(dequantize(want))) <= bound
    assert oracle.relative(oracle.array(dequantize(out)), y.astype(np.float64)) <= 0.12  # NVFP4 itself: about 0.095


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
@pytest.mark.parametrize("rows", [(0,), (0, 0, 0), (1,), (0, 1, 0), (0, 0, 127), (2, 0, 0)])
def test_experts_without_and_with_few_rows(variant: Variant, rows: tuple[int, ...], scale_layout: str) -> None:
    kw = inputs(rows=rows, values="saturated", limit=None, a="nvfp4", scale_layout=scale_layout, weighted=True)
    out = variant(**kw)
    assert out.shape == (sum(rows), 48)
    if sum(rows):
        assert_same_bytes(out, kw)


@pytest.mark.parametrize("variant", VARIANTS)
def test_halves_have_alphas_of_their_own(variant: Variant) -> None:
    """Swapping halves, alphas and order together changes nothing; swapping the alphas alone does."""
    kw = inputs(a="nvfp4", values="one_hot")
    w = kw["weights"]
    kw["weights"] = NVFP4Tensor(w.codes, w.scales, torch.tensor([[0.25, 1.0]] * len(ROWS)))
    swapped = NVFP4Tensor(
        w.codes.roll(48, dims=1),
        w.scales.view(torch.uint8).roll(48, dims=1).view(w.scales.dtype),
        torch.tensor([[1.0, 0.25]] * len(ROWS)),
    )
    out = variant(**kw)
    same = variant(**{**kw, "weights": swapped, "order": "up_gate"})
    assert torch.equal(out.codes, same.codes)
    assert torch.equal(out.scales.view(torch.uint8), same.scales.view(torch.uint8))
    mixed = NVFP4Tensor(w.codes, w.scales, swapped.global_scale_dec)
    assert not torch.equal(out.codes, variant(**{**kw, "weights": mixed}).codes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_inf_stay_in_their_rows(variant: Variant) -> None:
    kw = inputs(values="nonfinite")
    out = variant(**kw)
    assert not torch.isin(out.scales.view(torch.uint8), torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).any()
    assert np.all(oracle.nibbles(out.codes)[0] == 7), "NaN becomes the largest code"
    assert np.all(oracle.scale_bytes(out)[0] == 0), "a block of NaN alone has no maximum"
    clean = inputs(values="nonfinite")
    clean["a"] = clean["a"].nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    others = [r for r in range(sum(ROWS)) if r not in (0, 2, 4)]
    assert torch.equal(out.codes[others], variant(**clean).codes[others])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "w13"}, "order"),
    "limit of 0": ({"limit": 0.0}, "limit"),
    "limit of nan": ({"limit": float("nan")}, "limit"),
    "layout": ({"scale_layout": "8x4"}, "scale_layout"),
    "enc dtype": ({"global_scale_enc": torch.tensor(1.0, dtype=torch.float64)}, "global_scale_enc"),
    "enc shape": ({"global_scale_enc": torch.ones(5)}, "global_scale_enc"),
    "enc of python": ({"global_scale_enc": 1.0}, "global_scale_enc"),
    "weight dtype": ({"row_weight": torch.ones(61, dtype=torch.bfloat16)}, "row_weight"),
    "weight shape": ({"row_weight": torch.ones(60)}, "row_weight"),
    "offsets": ({"offsets": torch.zeros(6, dtype=torch.int64)}, "offsets"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(variant: Variant, wrong: str) -> None:
    change, argument = WRONG[wrong]
    with pytest.raises(ArgumentError) as caught:
        variant(**{**inputs(), **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("rows", "dec", "argument"),
    [(95, (5,), "weights.codes"), (48, (5,), "weights.codes"), (96, (5, 3), "weights.global_scale_dec")],
)
def test_wrong_weights_are_named(rows: int, dec: tuple[int, ...], argument: str) -> None:
    kw = inputs()
    w = kw["weights"]
    codes, scales = w.codes[:, :rows].contiguous(), w.scales[:, :rows].contiguous()
    with pytest.raises(ArgumentError) as caught:
        contract.check(**{**kw, "weights": NVFP4Tensor(codes, scales, torch.ones(dec))})
    assert caught.value.argument == argument


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
def test_fake_result_is_like_the_real_one(scale_layout: str) -> None:
    kw = inputs(scale_layout=scale_layout)
    real = reference.swiglu_quant(**kw)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = contract.fake(**kw)
    assert fake.scale_layout == real.scale_layout
    for name in ("codes", "scales", "global_scale_dec"):
        f, r = getattr(fake, name), getattr(real, name)
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def test_problem_is_made_of_metadata() -> None:
    kw = inputs(a="nvfp4", order="up_gate", weighted=True)
    problem = contract.problem(**kw)
    assert hash(problem) == hash(contract.problem(**kw))
    assert problem._fields[0] == "device"
    assert (problem.rows, problem.n, problem.k, problem.order) == (64, 96, 64, "up_gate")
    assert problem.weighted
    assert problem.limited
