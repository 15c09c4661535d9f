"""What only a GPU can show of a fused variant: any stream, CUDA graphs, many repetitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe import verify
from megamoe.model import Role, Stage, Variant
from megamoe.ops import op
from megamoe.plugins import load
from megamoe.testing import compare, guards

pytestmark = pytest.mark.gpu


def fused_cases(stage: Stage, variant: Variant) -> dict[str, dict[str, Any]]:
    """Inputs of the first three cases with rows that the variant takes; a large one where it takes no others."""
    if variant.role is not Role.FUSED:
        pytest.skip("a fused variant's property")
    found: dict[str, dict[str, Any]] = {}
    for large, most in ((False, 3), (True, 1)):
        for name, case in load(stage.cases).items():
            if case.gpu_only is not large or len(found) >= most:
                continue
            inputs = case.inputs(name, "cuda")
            tensors = [t for v in inputs.values() for t in guards.tensors(v)]
            if all(t.numel() for t in tensors) and not verify.refused(stage, variant, inputs):
                found[name] = inputs
    assert found, "no case shows anything of this variant"
    return found


def outputs(stage: Stage, run: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    mine = {key: guards.clone(value) for key, value in inputs.items()}
    return compare.leaves(run(**mine), mine, stage.mutates)


def test_replays_in_a_graph(stage: Stage, variant: Variant, run: Callable[..., Any]) -> None:
    for inputs in fused_cases(stage, variant).values():
        expected = outputs(stage, run, inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compare.leaves(run(**inputs), inputs)
        for value in captured.values():
            for tensor in guards.tensors(value):
                tensor.view(torch.uint8).fill_(0xA5) if tensor.ndim else tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for name, value in captured.items():
            assert guards.same_bytes(value, expected[name]), name


def test_runs_on_the_current_stream(stage: Stage, variant: Variant, run: Callable[..., Any]) -> None:
    """Its inputs are written late on a side stream: a launch on another one would read what was there before."""
    for inputs in fused_cases(stage, variant).values():
        expected = outputs(stage, run, inputs)
        tensors = [(n, v) for n, v in inputs.items() if isinstance(v, torch.Tensor)]
        name, value = next((pair for pair in tensors if pair[1].is_floating_point()), tensors[0])
        late = torch.zeros_like(value)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
            late.copy_(value)
            got = outputs(stage, run, {**inputs, name: late})
        torch.cuda.synchronize()
        for leaf, tensor in got.items():
            assert guards.same_bytes(tensor, expected[leaf]), leaf


def test_twenty_repetitions_are_equal(stage: Stage, variant: Variant, run: Callable[..., Any]) -> None:
    for inputs in fused_cases(stage, variant).values():
        first = outputs(stage, run, inputs)
        for _ in range(19):
            again = outputs(stage, run, inputs)
            for name, value in first.items():
                assert guards.same_bytes(value, again[name]), name


def test_op_chooses_it_only_when_told(stage: Stage, variant: Variant) -> None:
    """Without evidence on this machine's store, `auto` must come from a shipped record or not choose it."""
    inputs = next(iter(fused_cases(stage, variant).values()))
    decision = op(stage.id).decide(**inputs)
    if decision.variant.role is Role.FUSED:
        assert decision.evidence is not None
        assert decision.evidence.ok
