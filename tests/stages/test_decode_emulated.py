"""The GEMM kernels for few rows an expert in the emulator, on three CTAs: what the references say, and no finding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ptxemu
from megamoe.cute import compiler, gemm_decode_host
from megamoe.cute.arith import Target
from megamoe.cute.gemm_decode import Shape
from megamoe_stages.grouped_gemm import cases as gemm_cases
from megamoe_stages.grouped_gemm import contract as gemm_contract
from megamoe_stages.grouped_gemm import decode as gemm
from megamoe_stages.grouped_gemm import decode_kernel as gemm_kernel
from megamoe_stages.grouped_gemm.reference import grouped_gemm
from megamoe_stages.swiglu_quant import cases, contract, decode, decode_kernel
from megamoe_stages.swiglu_quant.reference import swiglu_quant

UNEVEN = (3, 0, 1, 40, 0, 17)  # 61 rows over 6 experts: passes of 16, one of them with 8 columns
FEW = (9, 0, 2, 1)  # passes of 8
CTAS = 3
Launcher = Callable[[Shape, Target], Callable[..., None]]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the emulator, with bulk copies that land as late as they may."""

    def launcher(spec: Callable[[Shape, Target], compiler.KernelSpec]) -> Launcher:
        def of(shape: Shape, target: Target) -> Callable[..., None]:
            artifact = compiler.compile_kernel(spec(shape, target))
            return functools.partial(run, artifact)

        return of

    def run(artifact: compiler.Artifact, *args: Any) -> None:
        ptxemu.run(artifact, *args, policy="lazy").raise_for_findings()

    monkeypatch.setattr(gemm, "launcher", launcher(gemm_kernel.spec))
    monkeypatch.setattr(decode, "launcher", launcher(decode_kernel.spec))
    monkeypatch.setattr(gemm_decode_host, "ctas", lambda device: CTAS)


@pytest.mark.parametrize(
    "params",
    [
        {"rows": UNEVEN, "n": 192, "k": 384, "a": "nvfp4", "alphas": 2, "indexed": True, "values": "one_hot"},
        {"rows": FEW, "n": 131, "k": 1200, "values": "integers"},
    ],
)
def test_grouped_gemm(params: dict[str, Any]) -> None:
    """Exact sums, so equal bytes: many slabs through the ring, tails of N and K, experts without rows."""
    kw = gemm_cases.make(torch.Generator().manual_seed(5), layout="hopper", **params)
    out = gemm_contract.fake(**kw).fill_(torch.nan)
    gemm.run(kw["a"], kw["weights"], kw["offsets"], kw.get("row_index"), out)
    assert torch.equal(out, grouped_gemm(**kw))


@pytest.mark.parametrize(
    "params",
    [
        {"rows": UNEVEN, "intermediate": 80, "k": 512, "a": "nvfp4", "scale_layout": "128x4", "indexed": True},
        {"rows": FEW, "intermediate": 48, "k": 64, "weighted": True},
    ],
)
def test_swiglu_quant(params: dict[str, Any]) -> None:
    """Exact gate and up and saturated gates, so equal bytes, and zeros in the padding of tiles."""
    kw = cases.make(
        torch.Generator().manual_seed(6), layout="hopper", order="interleaved", values="saturated", limit=None, **params
    )
    out = contract.fake(**kw)
    out.codes.fill_(0xAA)
    out.scales.view(torch.uint8).fill_(0x55)
    optional = kw.get("row_weight"), kw.get("row_index")
    decode.run(kw["a"], kw["weights"], kw["offsets"], *optional, kw["global_scale_enc"], math.inf, out)
    expected = swiglu_quant(**kw)
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.scales.view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.equal(out.global_scale_dec, expected.global_scale_dec)
