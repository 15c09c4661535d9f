"""SwiGLU of a grouped GEMM, quantised, as two steps: GEMM to memory, then activation and quantisation in one launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, check_multiple, check_tensor
from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import check_readable, dtype_name, empty_result, target_of
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe_stages.grouped_gemm.fallback import grouped_gemm
from megamoe_stages.swiglu_quant import contract, kernel, limits
from megamoe_stages.swiglu_quant.fallback import in_halves


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

    The GEMM stores gate and up in its output dtype, as in the plain fallback.
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
    return activate(gate_up, global_scale_enc, row_weight, limit=limit, order=order, scale_layout=scale_layout)


def activate(
    gate_up: Tensor,
    global_scale_enc: Tensor,
    row_weight: Tensor | None = None,
    *,
    limit: float | None = 10.0,
    order: str = "gate_up",
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    """Quantises silu(min(g, limit)) * clamp(u, -limit, limit) * weight; one launch on the current stream.

    Args:
        gate_up: bf16, fp16 or fp32 (M, 2I) on a GPU, I a multiple of 16, aligned to 16 bytes.
        global_scale_enc: fp32 (), the encode scale.
        row_weight: fp32 (M,), or None for 1.
        limit: Of the clamp; None clamps nothing.
        order: "gate_up" when the gate columns come first, "up_gate" when the up columns do.
        scale_layout: Of the result, "linear" or "128x4".

    Returns:
        NVFP4Tensor (M, I).

    Raises:
        ArgumentError: An argument does not fit.
    """
    check_tensor("gate_up", gate_up, ("rows", "2I"), ACTIVATIONS)
    rows, width = gate_up.shape
    check_multiple("gate_up", width, 2 * BLOCK, "columns")
    check_tensor("global_scale_enc", global_scale_enc, (), [torch.float32], like=gate_up)
    if row_weight is not None:
        check_tensor("row_weight", row_weight, (rows,), [torch.float32], like=gate_up)
    contract.check_options(limit, order, scale_layout)
    if order == "interleaved":
        raise ArgumentError("order", repr(order), "'gate_up' or 'up_gate'")
    if reasons := limits.supports({"rows": rows, "n": width, "scale_layout": scale_layout}):
        raise ArgumentError("gate_up", "; ".join(reasons), "what this kernel supports")
    check_readable("gate_up", gate_up)
    out = empty_result((rows, width // 2), global_scale_enc, scale_layout)
    if rows:
        dtype = dtype_name(gate_up)
        bound = math.inf if limit is None else float(limit)
        packed = kernel.packs(dtype, bound)
        launch = launcher(dtype, scale_layout, row_weight is not None, packed, target_of(gate_up.device))
        factors = global_scale_enc.view(1) if row_weight is None else row_weight  # not read unless they are weights
        scales = out.scales.view(torch.uint8)
        gate_first = int(order == "gate_up")
        launch(gate_up, global_scale_enc, factors, bound, gate_first, out.codes, scales, out.global_scale_dec)
    else:
        torch.reciprocal(global_scale_enc, out=out.global_scale_dec)
    return out


@functools.cache
def launcher(dtype: str, scale_layout: str, weighted: bool, packed: bool, target: Target) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel.spec(dtype, scale_layout, kernel.SHAPE, weighted, packed, target))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [spec for target in (Target.SM90, Target.SM100) for spec in kernel.specs(target)]
