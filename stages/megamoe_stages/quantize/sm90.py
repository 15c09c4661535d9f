"""`quantize` as one kernel on Hopper (sm_90a)."""

from __future__ import annotations

from torch import Tensor

from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.quantize import kernel, launch


def quantize(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> NVFP4Tensor:
    """See `reference.quantize` and `limits.supports`."""
    return launch.quantize(
        Target.SM90,
        x,
        global_scale_enc,
        scale_layout=scale_layout,
        fast=fast,
        zero_guard=zero_guard,
        four_over_six=four_over_six,
    )


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return kernel.specs(Target.SM90)
