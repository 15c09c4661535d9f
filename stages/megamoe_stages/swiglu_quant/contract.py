"""What `swiglu_quant` accepts and returns, and how far a variant may be from the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import check_multiple, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics.gate_up import ORDERS
from megamoe.numerics.layout import padded_shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, check_scale_layout
from megamoe.testing.cases import Bound
from megamoe_stages.grouped_gemm.contract import check as check_gemm
from megamoe_stages.grouped_gemm.contract import logical_size, rows_of
from megamoe_stages.grouped_gemm.contract import problem as gemm_problem

BOUNDS: Mapping[str, Bound] = {
    "out": Bound(
        rel_l2=5e-2,
        reason="gate and up pass through bf16 between launches: 2^-8 of a value near a threshold moves it by a step of "
        "1/4, which is sqrt(2^-8 * 1/4) = 3e-2 over all, and as much again from block scales",
    )
}


class Problem(NamedTuple):
    """Facts that choosing a variant may look at."""

    device: torch.device
    dtype: torch.dtype  # of the activations; bf16 when they are NVFP4
    quantized: bool  # the activations are NVFP4
    experts: int
    rows: int  # bucket of M
    n: int  # 2 * intermediate
    k: int
    weights_scale_layout: str  # "hopper" for its padded form too
    a_scale_layout: str  # empty when the activations are plain
    scale_layout: str  # of the result
    alphas: int  # dims of the weights' global scale: 0 shared, 1 an expert, 2 an expert and half
    order: str
    limited: bool
    weighted: bool
    indexed: bool  # rows are gathered by an index


def check(
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
) -> None:
    """Checks the arguments of `swiglu_quant` by their metadata alone.

    Raises:
        ArgumentError: Wrong type, dtype, shape, device, strides, order, limit or scale layout.
    """
    check_gemm(a, weights, offsets, row_index)
    experts, rows, _ = weights.shape
    if rows % 2:
        raise ArgumentError("weights.codes", f"{rows} rows an expert", "as many gate rows as up rows")
    check_multiple("weights.codes", rows // 2, BLOCK, "gate rows an expert")
    if tuple(weights.global_scale_dec.shape) not in ((), (experts,), (experts, 2)):
        got = f"shape {tuple(weights.global_scale_dec.shape)}"
        raise ArgumentError("weights.global_scale_dec", got, f"(), ({experts},) or ({experts}, 2)")
    check_tensor("global_scale_enc", global_scale_enc, (), [torch.float32], like=offsets)
    if row_weight is not None:
        check_tensor("row_weight", row_weight, (rows_of(a, row_index),), [torch.float32], like=offsets)
    check_options(limit, order, scale_layout)


def check_options(limit: float | None, order: str, scale_layout: str) -> None:
    """Raises ArgumentError unless the options of `swiglu_quant` fit."""
    if limit is not None and not limit > 0:
        raise ArgumentError("limit", limit, "None or a positive number")
    if order not in ORDERS:
        raise ArgumentError("order", repr(order), f"one of {', '.join(map(repr, ORDERS))}")
    check_scale_layout(scale_layout)


def problem(
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
) -> Problem:
    """The facts of one call; attribute reads only."""
    gemm = gemm_problem(a, weights, offsets, row_index)
    return fast_problem(
        Problem,
        (
            gemm.device,
            gemm.dtype,
            gemm.quantized,
            gemm.experts,
            gemm.rows,
            gemm.n,
            gemm.k,
            gemm.scale_layout,
            gemm.a_scale_layout,
            scale_layout,
            gemm.alphas,
            order,
            limit is not None,
            row_weight is not None,
            gemm.indexed,
        ),
    )


def fake(
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
    """An empty result (M, I)."""
    rows = rows_of(a, row_index)
    intermediate = logical_size(weights)[0] // 2
    cols = intermediate // BLOCK
    scales = padded_shape(rows, cols) if scale_layout == "128x4" else (rows, cols)
    return NVFP4Tensor(
        weights.codes.new_empty((rows, intermediate // 2)),
        weights.scales.new_empty(scales),
        global_scale_enc.new_empty(()),
        scale_layout,
    )
