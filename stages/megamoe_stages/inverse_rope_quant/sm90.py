"""`inverse_rope_quant` as one kernel on Hopper (sm_90a)."""

from __future__ import annotations

from torch import Tensor

from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.inverse_rope_quant import kernel, launch


def inverse_rope_quant(
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    """See `reference.inverse_rope_quant` and `limits.supports`."""
    return launch.inverse_rope_quant(
        Target.SM90, o, positions, cos, sin, global_scale_enc, groups=groups, scale_layout=scale_layout
    )


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return kernel.specs(Target.SM90)
