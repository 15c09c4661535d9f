"""`swiglu_quant` on Hopper (sm_90a): one kernel for few rows an expert, another for many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamoe.cute import decode_limits
from megamoe.cute.compiler import KernelSpec
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.grouped_gemm.contract import layout_kind, logical_size, rows_of
from megamoe_stages.grouped_gemm.sm90 import check_operands, facts
from megamoe_stages.swiglu_quant import contract, decode, gemm_limits, prefill


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
    """See `reference.swiglu_quant` and `gemm_limits.supports`; on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `gemm_limits.supports` names, and data not aligned to 16 bytes.
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
    rows = rows_of(a, row_index)
    layout = layout_kind(weights)
    if reasons := gemm_limits.supports({**facts(a, weights, rows), "weights_scale_layout": layout, "order": order}):
        raise ArgumentError("swiglu_quant", "; ".join(reasons), "what this kernel supports")
    check_operands(a, weights)
    out = contract.fake(
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
    if rows:
        few = decode_limits.takes(rows, weights.codes.shape[0], *logical_size(weights))
        bound = math.inf if limit is None else float(limit)
        run = (decode if few else prefill).run
        run(a, weights, offsets, row_weight, row_index, global_scale_enc, bound, out)
    else:
        torch.reciprocal(global_scale_enc, out=out.global_scale_dec)
    return out


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [*decode.kernels(), *prefill.kernels()]
