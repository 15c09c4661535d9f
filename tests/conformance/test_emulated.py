"""Every fused variant in the PTX emulator, on its smallest case; `megamoe verify --emulate` runs all of them."""

from __future__ import annotations

import pytest

from megamoe import emulation, verify
from megamoe.model import Arch, Kind, Role, Stage, Variant
from megamoe.plugins import load
from megamoe.runtime import runtime
from megamoe.testing import guards

ARCHS = (Arch(90), Arch(100))
VARIANTS = [
    pytest.param(stage, variant, arch, id=f"{stage.id}-{variant.name}-{arch}")
    for stage in runtime().stages.values()
    for variant in stage.variants
    for arch in ARCHS
    if variant.role is Role.FUSED and arch in variant.archs  # fallbacks run a library's GPU kernels too
]


def smallest_case(stage: Stage, variant: Variant) -> str:
    """The case with the fewest elements, yet some, of those that the variant takes."""
    sizes: dict[str, int] = {}
    for name, case in load(stage.cases).items():
        if not case.gpu_only and not case.bench:
            inputs = case.inputs(name)
            counts = [t.numel() for value in inputs.values() for t in guards.tensors(value)]
            if min(counts) and not emulation.too_large(inputs) and not verify.refused(stage, variant, inputs):
                sizes[name] = sum(counts)
    if not sizes:  # a kernel for large problems only
        pytest.skip("no case is small enough for the emulator; the stage's own tests run it there")
    return min(sizes, key=sizes.__getitem__)


@pytest.mark.parametrize(("owner", "candidate", "arch"), VARIANTS)
def test_smallest_case_in_the_emulator(owner: Stage, candidate: Variant, arch: Arch) -> None:
    machine = runtime().machine(arch)
    found = verify.verify(owner, candidate, machine, only=[smallest_case(owner, candidate)], emulate=True)
    assert found.kind is Kind.EMULATED
    assert found.arch == arch
    assert len(found.cases) == 1
    assert found.ok, found.cases[0].reason
