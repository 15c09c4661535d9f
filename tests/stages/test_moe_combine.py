"""The combine against sums in fp64, and what fixes its bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.errors import ArgumentError
from megamoe_stages.moe_combine import launch
from megamoe_stages.moe_combine.fallback import moe_combine as fallback
from megamoe_stages.moe_combine.limits import supports
from megamoe_stages.moe_combine.reference import moe_combine as reference

TOKENS, TOP_K, HIDDEN = 9, 6, 8


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randperm(TOKENS * TOP_K, generator=generator).int().view(TOKENS, TOP_K)
    outputs = torch.randn(TOKENS * TOP_K, HIDDEN, generator=generator).to(dtype)
    return outputs, rows, torch.rand(TOKENS, TOP_K, generator=generator)


@pytest.mark.parametrize("run", [reference, fallback])
def test_sums_in_fp32_and_rounds_once(run: object) -> None:
    outputs, rows, weights = inputs()
    want = torch.einsum("tk,tkh->th", weights.double(), outputs[rows].double())
    wide = run(outputs, rows, weights, dtype="float32")  # type: ignore[operator]
    torch.testing.assert_close(wide.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(outputs, rows, weights), wide.bfloat16())  # type: ignore[operator]


@pytest.mark.parametrize("run", [reference, fallback])
def test_slots_are_added_first_to_last(run: object) -> None:
    """1 is lost beside 2^24 when it is added after it, and kept when the two large ones cancel first."""
    outputs = torch.tensor([[1.0], [2.0**24], [-(2.0**24)]])
    weights = torch.ones(1, 3)
    lost = run(outputs, torch.tensor([[1, 0, 2]], dtype=torch.int32), weights)  # type: ignore[operator]
    kept = run(outputs, torch.tensor([[1, 2, 0]], dtype=torch.int32), weights)  # type: ignore[operator]
    assert (lost.item(), kept.item()) == (0.0, 1.0)


def test_fallback_never_waits_for_the_device() -> None:
    with FakeTensorMode():
        out = fallback(torch.empty(54, 8), torch.empty(9, 6, dtype=torch.int32), torch.empty(9, 6), dtype="bfloat16")
    assert out.shape == (9, 8)
    assert out.dtype == torch.bfloat16


def test_limits() -> None:
    assert not supports({"tokens": 8192, "hidden": 7168})
    assert "37 values" in supports({"tokens": 9, "hidden": 37})[0]
    assert supports({"tokens": 2**24, "hidden": 7168})


def test_wrong_arguments_are_named() -> None:
    outputs, rows, weights = inputs()
    with pytest.raises(ArgumentError, match="dtype"):
        reference(outputs, rows, weights, dtype="int8")
    with pytest.raises(ArgumentError, match="weights"):
        reference(outputs, rows, weights[:, :3].contiguous())
    with pytest.raises(ArgumentError, match="outputs"):
        reference(outputs[:0], rows, weights)
    with pytest.raises(ArgumentError, match="CUDA"):
        launch.moe_combine(outputs, rows, weights)
