"""Grouped GEMM in plain torch: a loop over the experts, all in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize, per_row
from megamoe_stages.grouped_gemm import contract


def grouped_gemm(
    a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None
) -> Tensor:
    """Multiplies each expert's rows by that expert's weights: out[rows of e] = alpha_e * (a[rows of e] @ w_e^T).

    E2M1 * E4M3 is exact, so both operands enter the product without their global scales; alpha, the product of the two
    decode scales, meets the fp32 sum once, before the only rounding.

    Args:
        a: bf16, fp16 or fp32 (M, K), or NVFP4 with a global scale (), rows sorted by expert.
        weights: NVFP4 (E, N, K), hopper layout too; global scale (), (E,), or (E, parts) for equal parts of the N rows.
        offsets: int32 (E + 1), with offsets[0] = 0 and offsets[E] = M; expert e owns the rows offsets[e]:offsets[e+1].
        row_index: int32 (M,), each below the rows of `a`: row r of the product is row row_index[r] of `a`, which then
            has any number of rows in any order. None is 0..M - 1.

    Returns:
        (M, N): bf16 for NVFP4 activations, else the dtype of `a`.

    Raises:
        ArgumentError: An argument's type, dtype, shape, device or strides do not fit; values are not looked at.
    """
    contract.check(a, weights, offsets, row_index)
    return scaled_products(a, weights, offsets, row_index).to(contract.out_dtype(a))


def scaled_products(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None) -> Tensor:
    """The result of `grouped_gemm` before its rounding, fp32 (M, N)."""
    experts, n, _ = weights.shape
    rows = dequantize(a, apply_global=False) if isinstance(a, NVFP4Tensor) else a.float()
    rows = rows if row_index is None else rows[row_index]  # (M, K)
    alpha = per_row(weights.global_scale_dec, weights.shape).expand(experts, n, 1)[..., 0]  # (E, N)
    if isinstance(a, NVFP4Tensor):
        alpha = a.global_scale_dec * alpha
    out = torch.zeros(rows.shape[0], n, device=rows.device)
    starts = offsets.tolist()
    for e in range(experts):
        mine = slice(starts[e], starts[e + 1])
        if starts[e] < starts[e + 1]:
            w = NVFP4Tensor(weights.codes[e], weights.scales[e], weights.global_scale_dec, weights.scale_layout)
            out[mine] = alpha[e] * (rows[mine] @ dequantize(w, apply_global=False).T)
    return out
