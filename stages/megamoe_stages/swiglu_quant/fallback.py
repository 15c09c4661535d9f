"""SwiGLU of a grouped GEMM, quantised, as separate launches: GEMM to memory, activation, quantisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from megamoe.numerics.gate_up import deinterleave
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.grouped_gemm.fallback import grouped_gemm
from megamoe_stages.quantize.fallback import quantize
from megamoe_stages.swiglu_quant import contract


def swiglu_quant(
    a: Tensor | NVFP4Tensor,
    weights: NVFP4Tensor,
    offsets: Tensor,
    global_scale_enc: Tensor,
    row_weight: Tensor | None = None,
    row_index: Tensor | None = None,
    *,
    limit: float | None = 10.0,
    order: str = "gate_up",
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    """SwiGLU and quantisation; arguments and result as the reference says.

    The GEMM stores gate and up in its output dtype, bf16 for NVFP4 activations: the one rounding that the reference has
    not. The activation stays in fp32 until it is quantised.
    """
    contract.check(
        a,
        weights,
        offsets,
        global_scale_enc,
        row_weight,
        row_index,
        limit=limit,
        order=order,
        scale_layout=scale_layout,
    )
    weights, order = in_halves(weights, order)
    gate_up = grouped_gemm(a, weights, offsets, row_index)  # (M, 2I)
    y = activate(gate_up, row_weight, limit, order)
    return quantize(y, global_scale_enc, scale_layout=scale_layout)


def in_halves(weights: NVFP4Tensor, order: str) -> tuple[NVFP4Tensor, str]:
    """The weights with their gate rows together, and their order."""
    return (deinterleave(weights), "gate_up") if order == "interleaved" else (weights, order)


def activate(gate_up: Tensor, row_weight: Tensor | None, limit: float | None, order: str) -> Tensor:
    """SwiGLU of gate and up (M, 2I) in fp32: (M, I)."""
    half = gate_up.shape[1] // 2
    starts = (0, half) if order == "gate_up" else (half, 0)
    gate, up = (gate_up.narrow(1, start, half).float() for start in starts)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    y = silu(gate).mul_(up)
    return y if row_weight is None else y.mul_(row_weight[:, None])
