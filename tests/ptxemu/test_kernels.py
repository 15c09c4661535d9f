"""Kernels of this project in the emulator: bit for bit what their references say, whatever they are built for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe.plugins import load
from megamoe.runtime import runtime
from megamoe.testing import guards
from megamoe.testing.cases import Case
from ptxemu.report import Report

MOST_ELEMENTS = 20_000  # of a case's largest tensor
EXACT = ("quantize", "inverse_rope_quant")
TARGETS = ("sm90", "sm100")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Report]]:
    """Host code launches into the emulator, and takes tensors in host memory for a GPU's; a report a launch."""
    seen: list[Report] = []

    def emulated(spec: KernelSpec) -> Callable[..., None]:
        artifact = compiler.compile_kernel(spec)

        def launch(*args: Any) -> None:
            seen.append(ptxemu.run(artifact, *args, policy="random", seed=len(seen)))

        return launch

    monkeypatch.setattr(compiler, "load", emulated)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    forget_launchers()
    yield seen
    forget_launchers()


def forget_launchers() -> None:
    for name in EXACT:
        module = importlib.import_module(f"megamoe_stages.{name}.launch")
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def cases(stage: str) -> dict[str, Case]:
    """The small ones that a fused variant takes."""
    found: dict[str, Case] = load(runtime().stages[stage].cases)
    return {name: case for name, case in found.items() if not case.gpu_only and not case.bench}


def too_large(inputs: dict[str, Any]) -> bool:
    return max(t.numel() for value in inputs.values() for t in guards.tensors(value)) > MOST_ELEMENTS


def other_dtype(inputs: dict[str, Any]) -> bool:
    """Every dtype is a kernel of its own to compile: one of them is enough here."""
    return next(v for v in inputs.values() if isinstance(v, torch.Tensor)).dtype is not torch.bfloat16


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "name"), [(s, n) for s in EXACT for n in cases(s)])
def test_fused_kernels_are_exact(reports: list[Report], op: str, name: str, target: str) -> None:
    module = importlib.import_module(f"megamoe_stages.{op}.{target}")
    reference = getattr(importlib.import_module(f"megamoe_stages.{op}.reference"), op)
    inputs = cases(op)[name].inputs(name)
    if too_large(inputs) or other_dtype(inputs):
        pytest.skip("too large, or another kernel")
    try:
        found = getattr(module, op)(**inputs)
    except ValueError as error:
        pytest.skip(f"not for the fused kernel: {error}")
    for report in reports:
        report.raise_for_findings()
    expected = reference(**inputs)
    assert reports or not found.codes.numel()
    assert guards.same_bytes(found, expected)


def test_host_code_checks_its_arguments() -> None:
    module = importlib.import_module("megamoe_stages.quantize.sm90")
    artifact = compiler.compile_kernel(module.kernels()[0])
    with pytest.raises(ptxemu.CaptureError, match="Expects 5 parameters"):
        ptxemu.run(artifact, torch.zeros(4, 16))
    with pytest.raises(ptxemu.ArgumentError, match="args"):
        ptxemu.run(artifact, "x")


@pytest.mark.slow
def test_every_kernel_can_be_loaded() -> None:
    """An instruction that is not implemented would be an error."""
    for stage in runtime().stages.values():
        for variant in stage.variants:
            module = importlib.import_module(variant.target.partition(":")[0])
            for spec in getattr(module, "kernels", list)():
                ptxemu.load(compiler.compile_kernel(spec).ptx)
