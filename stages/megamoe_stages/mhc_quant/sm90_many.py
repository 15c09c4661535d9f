"""`mhc_quant` as one kernel on Hopper (sm_90a), made for many tokens, and the faster one for few tokens too."""

from __future__ import annotations

from torch import Tensor

from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.mhc_quant import launch, prefill_launch
from megamoe_stages.mhc_quant.contract import MhcOutput


def mhc_quant(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale_enc: Tensor,
    *,
    sinkhorn_iters: int = 20,
    hc_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale_layout: str = "linear",
) -> MhcOutput:
    """See `reference.mhc_quant` and `limits.supports_many`."""
    return launch.mhc_quant(
        Target.SM90,
        x,
        f,
        post,
        comb,
        fn,
        base,
        scale,
        norm_weight,
        global_scale_enc,
        sinkhorn_iters=sinkhorn_iters,
        hc_eps=hc_eps,
        norm_eps=norm_eps,
        scale_layout=scale_layout,
        run=prefill_launch.run,
    )


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return prefill_launch.kernels(Target.SM90)
