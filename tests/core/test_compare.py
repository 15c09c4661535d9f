from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor, quantize
from megamoe.testing.cases import EXACT, Bound
from megamoe.testing.compare import LeafResult, Value, compare, leaves, worst

LOOSE = Bound(0.1, "made up")
NAN, INF = float("nan"), float("inf")


def _one(value: Value | None, reference: Value, bound: Bound = EXACT) -> LeafResult:
    (result,) = compare({} if value is None else {"out": value}, {"out": reference}, {"out": bound})
    return result


def _quantized(seed: int = 0) -> NVFP4Tensor:
    return quantize(torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)), torch.tensor(100.0))


def test_equal_is_equal() -> None:
    x = torch.tensor([1.0, NAN, -INF, -0.0])
    for bound in (EXACT, LOOSE):
        assert _one(x.clone(), x, bound) == LeafResult("out", 0.0, bound.rel_l2, True)
    assert _one(_quantized(), _quantized()).passed


@given(st.integers(0, 63), st.integers(0, 7), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_one_flipped_bit_is_seen(byte: int, bit: int, dtype: torch.dtype) -> None:
    reference = torch.arange(64 // dtype.itemsize, dtype=dtype)
    value = reference.clone()
    value.view(torch.uint8)[byte] ^= 1 << bit
    result = _one(value, reference)
    assert not result.passed
    assert result.error == 1 / 64
    assert result.reason == "out: 0.0156 of the bytes differ"


def test_sign_of_zero_and_payload_of_nan_count_when_bytes_must_be_equal() -> None:
    assert not _one(torch.tensor([-0.0]), torch.tensor([0.0])).passed
    assert _one(torch.tensor([-0.0]), torch.tensor([0.0]), LOOSE).passed
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert not _one(other_nan, torch.tensor([NAN])).passed
    assert _one(other_nan, torch.tensor([NAN]), LOOSE).passed


@given(st.floats(0.001, 0.2), st.integers(0, 2**16))
def test_relative_error_is_that_of_the_formula(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(50, generator=generator, dtype=torch.float64)
    value = reference + scale * torch.randn(50, generator=generator, dtype=torch.float64)
    want = ((value - reference).square().sum().sqrt() / reference.square().sum().sqrt()).item()
    result = _one(value, reference, LOOSE)
    assert result.error == pytest.approx(want, rel=1e-12)
    assert result.passed == (want <= 0.1)
    assert result.passed == (not result.reason)


def test_large_values_do_not_overflow_the_norm() -> None:
    huge = torch.full((100,), 3e38)
    assert _one(huge * 0.99, huge, LOOSE).error == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, INF], [1.0, NAN]),
        ([NAN, 1.0], [1.0, NAN]),
        ([1.0, INF], [1.0, 3e38]),
    ],
)
def test_non_finite_values_must_match_in_place(value: list[float], reference: list[float]) -> None:
    result = _one(torch.tensor(value), torch.tensor(reference), Bound(1e9, "anything"))
    assert not result.passed
    assert result.error == INF


def test_finite_values_beside_matching_non_finite_ones_count() -> None:
    reference = torch.tensor([NAN, INF, 3.0, 4.0])
    result = _one(torch.tensor([NAN, INF, 3.0, 4.5]), reference, LOOSE)
    assert result.error == pytest.approx(0.1)


def test_a_reference_of_zeros_wants_zeros() -> None:
    zeros = torch.zeros(3)
    assert _one(zeros.clone(), zeros, LOOSE).passed
    assert _one(torch.tensor([0.0, 1e-30, 0.0]), zeros, LOOSE).error == INF


def test_empty_outputs_are_equal() -> None:
    for bound in (EXACT, LOOSE):
        assert _one(torch.empty(0, 3), torch.empty(0, 3), bound).passed
        assert not _one(torch.empty(0, 3), torch.empty(3, 0), bound).passed


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "got NoneType, not Tensor"),
        (torch.zeros(2, 3, dtype=torch.float64), "dtype torch.float64, not torch.float32"),
        (torch.zeros(3, 2), "shape (3, 2), not (2, 3)"),
        (torch.zeros(6), "shape (6,), not (2, 3)"),
        (torch.zeros(3, 2).t(), "strides (1, 2), not contiguous"),
        (torch.zeros(2, 6)[:, ::2], "strides (6, 2), not contiguous"),
        (torch.zeros(2, 3, device="meta"), "device meta, not cpu"),
        (_quantized(), "got NVFP4Tensor, not Tensor"),
    ],
)
@pytest.mark.parametrize("bound", [EXACT, Bound(INF, "anything")])
def test_the_form_must_be_the_references_whatever_the_bound(value: Value | None, words: str, bound: Bound) -> None:
    result = _one(value, torch.zeros(2, 3), bound)
    assert not result.passed
    assert result.reason == f"out: {words}"
    assert result.error == INF


@pytest.mark.parametrize("field", ["codes", "scales", "global_scale_dec"])
def test_each_part_of_a_quantised_output_counts(field: str) -> None:
    reference = _quantized()
    part: Any = getattr(reference, field).clone()
    part.view(-1).view(torch.uint8)[0] ^= 1
    result = _one(replace(reference, **{field: part}), reference)
    assert not result.passed
    assert 0 < result.error < 0.05
    wrong: Any = {field: getattr(reference, field).view(torch.int8 if field != "global_scale_dec" else torch.int32)}
    assert f"out: {field}: dtype" in _one(replace(reference, **wrong), reference, LOOSE).reason


def test_layouts_of_scales_must_match() -> None:
    reference = _quantized()
    result = _one(reference.with_layout("128x4"), reference, LOOSE)
    assert result.reason == "out: scale layout 128x4, not linear"


def test_a_quantised_output_with_a_bound_is_compared_by_value() -> None:
    reference = _quantized()
    doubled = replace(reference, global_scale_dec=reference.global_scale_dec * 2)
    assert _one(doubled, reference, LOOSE).error == pytest.approx(1.0)
    nearly = replace(reference, global_scale_dec=reference.global_scale_dec * 1.05)
    assert _one(nearly, reference, LOOSE).error == pytest.approx(0.05, rel=1e-3)


def test_outputs_without_a_bound_must_be_equal() -> None:
    (result,) = compare({"lse": torch.tensor([1.0])}, {"lse": torch.tensor([1.0 + 1e-6])}, {"out": LOOSE})
    assert not result.passed


class Pair(NamedTuple):
    out: Tensor
    lse: Tensor


def test_leaves_are_the_outputs_and_then_what_was_written_to() -> None:
    out, lse, codes = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert leaves(out) == {"out": out}
    named = leaves(Pair(out, lse), {"codes": codes, "scales": None}, ("codes", "scales"))
    assert list(named) == ["out", "lse", "codes"]
    assert named["codes"] is codes


def test_worst_is_a_failure_or_else_the_nearest_to_its_bound() -> None:
    near, far = LeafResult("near", 0.09, 0.1, True), LeafResult("far", 0.2, 0.9, True)
    exact = LeafResult("exact", 0.0, 0.0, True)
    assert worst([far, near, exact]) is near
    failed = LeafResult("failed", 0.01, 0.005, False)
    assert worst([far, near, failed]) is failed
