"""SwiGLU of a grouped GEMM, quantised: plain torch, fp32 from the sums to the codes."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.numerics.gate_up import deinterleave
from megamoe.numerics.nvfp4 import NVFP4Tensor, quantize
from megamoe_stages.grouped_gemm.reference import scaled_products
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
    """Quantises silu(min(g, limit)) * clamp(u, -limit, limit), g and u from one grouped GEMM.

    The clamp is DeepSeek-V4's: the gate from above only, up on both sides, after the global scales. Nothing is rounded
    to 16 bits in between.

    Args:
        a: bf16, fp16 or fp32 (M, K), or NVFP4 with a global scale (), rows sorted by expert.
        weights: NVFP4 (E, 2I, K), hopper layout too; global scale (), (E,), or (E, 2) for the two halves in the order
            of the rows, (gate, up) where they are interleaved.
        offsets: int32 (E + 1), with offsets[0] = 0 and offsets[E] = M; expert e owns the rows offsets[e]:offsets[e+1].
        global_scale_enc: fp32 (), the encode scale of the result.
        row_weight: fp32 (M,), the routing weight of each row, multiplied before quantising.
        row_index: int32 (M,), the row of `a` that each row is made of, as in `grouped_gemm`; None is 0..M - 1.
        limit: Of the clamp; None clamps nothing.
        order: "gate_up" when the gate rows come first, "up_gate" when the up rows do, "interleaved" for 8 gate rows and
            the matching 8 up rows in turn (`numerics.gate_up`).
        scale_layout: Of the result, "linear" or "128x4".

    Returns:
        NVFP4Tensor (M, I).

    Raises:
        ArgumentError: An argument's type, dtype, shape, device, strides or choice does not fit.
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
    halves = deinterleave(weights) if order == "interleaved" else weights
    first, second = scaled_products(a, halves, offsets, row_index).chunk(2, dim=-1)  # fp32 (M, I) each
    gate, up = (second, first) if order == "up_gate" else (first, second)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = gate / (1 + torch.exp(-gate)) * up
    if row_weight is not None:
        y = y * row_weight[:, None]
    return quantize(y, global_scale_enc, scale_layout=scale_layout)
