"""The benchmark suite behind `megamoe bench`: every variant of every op, on the cases marked for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe import verify
from megamoe.model import Stage, Variant
from megamoe.ops import op
from megamoe.plugins import load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_clock() -> float:
    """Seconds once the device is idle, so that a round holds the work it launched."""
    verify.synchronize(DEVICE)
    return time.perf_counter()


@pytest.mark.bench_cases
@pytest.mark.benchmark(timer=device_clock, warmup=True)
def bench_variant(stage: Stage, variant: Variant, case: str, run: Callable[..., Any], benchmark: Any) -> None:
    """Checks the variant on the case, then times it."""
    inputs = load(stage.cases)[case].inputs(case, DEVICE)
    if reasons := verify.refused(stage, variant, inputs):
        pytest.skip(f"{variant.name}: {'; '.join(reasons)}")
    checked = verify.run_case(run, stage, case, DEVICE, op(stage.id).bounds, inputs)
    if not checked.passed:
        pytest.fail(f"{variant.name} is wrong, so it is not timed: {checked.reason}")
    benchmark.group = f"{stage.id}[{case}]"
    benchmark.name = variant.name
    benchmark.extra_info.update(stage=stage.id, variant=variant.name, role=str(variant.role), case=case, device=DEVICE)
    benchmark(run, **inputs)
