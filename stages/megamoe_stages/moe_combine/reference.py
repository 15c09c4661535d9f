"""The definition of `moe_combine`."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe_stages.moe_combine import contract


def moe_combine(outputs: Tensor, rows: Tensor, weights: Tensor, *, dtype: str | None = None) -> Tensor:
    """Sums each token's rows, weighted: out[t] = sum over slots s of weights[t, s] * outputs[rows[t, s]].

    fp32 from the rows to the sum, each product and each sum rounded, slots first to last, the result rounded once: the
    same bits every time. The weight is applied after the second GEMM, as Hugging Face's DeepseekV4Experts does.

    Args:
        outputs: bf16, fp16 or fp32 (M, H), what the experts made of each visit.
        rows: int32 (T, k), the row of each token's visit, each in 0..M - 1; other numbers give an undefined result.
        weights: fp32 (T, k).
        dtype: Of the result: "bfloat16", "float16" or "float32"; None for the outputs' own.

    Returns:
        (T, H).

    Raises:
        ArgumentError: An argument's type, dtype, shape, device or strides does not fit.
    """
    contract.check(outputs, rows, weights, dtype=dtype)
    total = torch.zeros(rows.shape[0], outputs.shape[1], device=outputs.device)
    for slot in range(rows.shape[1]):
        total = total + outputs[rows[:, slot]].float() * weights[:, slot, None]
    return total.to(outputs.dtype if dtype is None else contract.DTYPES[dtype])
