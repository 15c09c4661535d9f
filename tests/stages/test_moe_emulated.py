"""The kernels round the experts' GEMMs in the emulator: what their references say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.ops import op
from megamoe.testing import compare, guards
from megamoe_stages.moe_combine import cases as combine_cases
from megamoe_stages.moe_combine import contract as combine_contract
from megamoe_stages.moe_combine import kernel as combine
from megamoe_stages.moe_permute import cases as permute_cases
from megamoe_stages.moe_permute import contract as permute_contract
from megamoe_stages.moe_permute import kernel as permute
from megamoe_stages.moe_route import cases as route_cases
from megamoe_stages.moe_route import contract as route_contract
from megamoe_stages.moe_route import kernel as route


def check(stage: str, spec: compiler.KernelSpec, inputs: dict[str, Any], out: Any, *args: Any) -> None:
    """Runs a kernel twice over outputs filled with other numbers; no finding, and the reference's result."""
    expected = compare.leaves(op(stage).reference(**inputs))
    for fill in (-9, 113):
        for value in compare.leaves(out).values():
            for tensor in guards.tensors(value):
                tensor.fill_(fill)
        report = ptxemu.run(compiler.compile_kernel(spec), *args)
        report.raise_for_findings()
        for result in compare.compare(compare.leaves(out), expected, op(stage).bounds):
            assert result.passed, result.reason


@pytest.mark.parametrize("name", ["fewer-visits-than-experts", "skewed"])
def test_permute(name: str) -> None:
    """One CTA, and a cluster that shares its counts."""
    inputs = permute_cases.CASES[name].inputs(name)
    indices, experts = inputs["indices"], inputs["experts"]
    out = permute_contract.fake(indices, experts)
    spec = permute.spec(permute.cut(indices.numel()), indices.element_size(), Target.SM90)
    words = indices.view(torch.int32).view(-1)
    check("moe_permute", spec, inputs, out, words, out.tokens, out.rows.view(-1), out.offsets, indices.shape[1])


@pytest.mark.parametrize("name", ["eleven-slots", "special-fp32"])
def test_combine(name: str) -> None:
    inputs = combine_cases.CASES[name].inputs(name)
    out = combine_contract.fake(**inputs)
    dtype = str(out.dtype).removeprefix("torch.")
    tensors = (inputs["outputs"], inputs["rows"], inputs["weights"], out)
    check("moe_combine", combine.spec(dtype, dtype, Target.SM90), inputs, out, *tensors)


def test_choose() -> None:
    inputs = route_cases.CASES["odd-experts"].inputs("odd-experts")
    out = route_contract.fake(inputs["logits"], top_k=inputs["top_k"], scaling=inputs["scaling"])
    spec = route.choosing(route.logits_a_lane(inputs["logits"].shape[1]), True, Target.SM90)
    check("moe_route", spec, inputs, out, inputs["logits"], inputs["bias"], *out, inputs["scaling"])


def test_choose_the_lower_number_of_equal_scores() -> None:
    logits = torch.tensor([[1.0, 2.0] * 40, [0.0] * 80])
    inputs = {"logits": logits, "top_k": 5, "scaling": 1.0}
    out = route_contract.fake(logits, top_k=5, scaling=1.0)
    check("moe_route", route.choosing(8, False, Target.SM90), inputs, out, logits, logits[0], *out, 1.0)
    assert out.indices.tolist() == [[1, 3, 5, 7, 9], [0, 1, 2, 3, 4]]


def test_look_up() -> None:
    inputs = route_cases.CASES["hash-mixed"].inputs("hash-mixed")
    ids, table = inputs["token_ids"], inputs["table"]
    out = route_contract.fake(inputs["logits"], top_k=inputs["top_k"], scaling=inputs["scaling"])
    words = (ids.view(torch.int32).view(-1), table.view(torch.int32))
    spec = route.looking_up(ids.element_size(), table.element_size(), Target.SM90)
    check("moe_route", spec, inputs, out, inputs["logits"], *words, *out, inputs["scaling"])
