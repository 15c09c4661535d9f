"""Every variant of every stage, on every case: generated from what the plugins declare, with nothing written twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe import verify
from megamoe.errors import ArgumentError
from megamoe.model import Stage, Variant
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import op
from megamoe.plugins import load
from megamoe.testing import guards

Run = Callable[..., Any]


def device_of(variant: Variant) -> str:
    return "cuda" if variant.archs or torch.cuda.is_available() else "cpu"


def test_right_deterministic_and_within_its_memory(stage: Stage, variant: Variant, case: str, run: Run) -> None:
    """The same check that `megamoe verify` records: bounds, two poisons, guard bytes, inputs left alone."""
    inputs = load(stage.cases)[case].inputs(case, device_of(variant))
    if reasons := verify.refused(stage, variant, inputs):
        with pytest.raises(ArgumentError):  # what it does not support it refuses by name, not by a wrong answer
            run(**inputs)
        pytest.skip("; ".join(reasons))
    result = verify.run_case(run, stage, case, device_of(variant), op(stage.id).bounds, inputs)
    assert result.passed, result.reason


@pytest.mark.not_reference
def test_signature_is_the_references(stage: Stage, variant: Variant, run: Run) -> None:
    assert inspect.signature(run) == inspect.signature(load(stage.reference.target))


def test_contract_has_the_references_parameters(stage: Stage) -> None:
    reference = inspect.signature(load(stage.reference.target))
    for function in ("check", "problem", "fake"):
        mine = inspect.signature(load(f"{stage.contract}:{function}"))
        assert mine.parameters == reference.parameters, function


def test_docstring_speaks_of_every_parameter(stage: Stage) -> None:
    reference = load(stage.reference.target)
    for name in inspect.signature(reference).parameters:
        assert name in (reference.__doc__ or ""), name


def test_every_bound_belongs_to_an_output_and_has_a_reason(stage: Stage) -> None:
    this = op(stage.id)
    outputs = {name for name, _ in this.signature.outputs} | set(stage.mutates)
    cases = load(stage.cases)
    for bounds in (this.bounds, *(case.bounds for case in cases.values())):
        assert set(bounds) <= outputs
        assert all(bound.reason for bound in bounds.values() if bound.rel_l2 > 0)


def test_fake_output_has_the_real_ones_form(stage: Stage, case: str) -> None:
    if load(stage.cases)[case].gpu_only:
        pytest.skip("too large for the CPU")
    inputs = load(stage.cases)[case].inputs(case)
    signature = op(stage.id).signature
    fakes = _tensors(signature, load(f"{stage.contract}:fake")(**inputs))
    reals = _tensors(signature, load(stage.reference.target)(**inputs))
    for fake, real in zip(fakes, reals, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_wrong_tensors_are_refused_by_name(stage: Stage, variant: Variant, run: Run) -> None:
    """Non-contiguous, wrong dtype, wrong device, wrong dims: an ArgumentError that names the argument."""
    cases = load(stage.cases)
    tried = 0
    for name in _smallest(cases, stage, variant):
        inputs = cases[name].inputs(name, device_of(variant))
        for argument, what, value in _spoilt(inputs):
            with pytest.raises(ArgumentError) as error:
                run(**{**inputs, argument: value})
            assert error.value.argument.split(".")[0] == argument, f"{what}: {error.value}"
            tried += 1
    assert tried >= 3


def test_dispatched_call_is_the_variants(stage: Stage, variant: Variant, run: Run) -> None:
    import megamoe

    cases = load(stage.cases)
    name = _smallest(cases, stage, variant)[0]
    inputs = cases[name].inputs(name, device_of(variant))
    mine = {key: guards.clone(value) for key, value in inputs.items()}
    direct = op(stage.id).signature.flatten_result(run(**inputs))
    with megamoe.use({stage.id: variant.name}):
        planned = op(stage.id).signature.flatten_result(op(stage.id)(**mine))
    for a, b in zip(_list(direct), _list(planned), strict=True):
        assert guards.same_bytes(a, b)


def _smallest(cases: dict[str, Any], stage: Stage, variant: Variant) -> list[str]:
    """The two cases with the fewest elements, at least one row, and nothing that the variant refuses."""

    def size(name: str) -> int:
        inputs = cases[name].inputs(name)
        tensors = [t for v in inputs.values() for t in guards.tensors(v)]
        usable = all(t.numel() for t in tensors) and not verify.refused(stage, variant, inputs)
        return sum(t.numel() for t in tensors) if usable else 1 << 50

    return sorted((name for name in cases if not cases[name].gpu_only), key=size)[:2]


def _spoilt(inputs: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in inputs.items():
        if isinstance(value, NVFP4Tensor):
            yield name, "codes dtype", replace(value, codes=value.codes.to(torch.int32))
            yield name, "scales dtype", replace(value, scales=value.scales.view(torch.uint8))
            yield name, "layout", replace(value, scale_layout="8x4")
            if (strided := _strided(value.codes)) is not None:
                yield name, "codes strides", replace(value, codes=strided)
        elif isinstance(value, Tensor):
            yield name, "dtype", value.to(torch.complex64)
            yield name, "dims", value.reshape(-1) if value.ndim > 1 else value[None, None, None]
            if (strided := _strided(value)) is not None:
                yield name, "strides", strided
            if value.is_cuda:
                yield name, "device", value.cpu()


def _strided(value: Tensor) -> Tensor | None:
    """The same values, not contiguous; None for what has too few elements to be so."""
    wide = torch.stack((value, value), dim=-1)[..., 0]
    return None if wide.is_contiguous() else wide


def _list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _tensors(signature: Any, result: Any) -> list[Tensor]:
    return _list(signature.flatten_result(result))
