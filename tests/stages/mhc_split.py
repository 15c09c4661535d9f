"""What the tests of both mhc_quant kernels put in the place of device code that runs on a GPU only."""

from __future__ import annotations

import torch

from megamoe.cute.arith import Target


def split_bf16(low: float, high: float, target: Target) -> list[tuple[float, float]]:
    """`warp.split_bf16` on plain numbers."""
    del target
    terms, rest = [], torch.tensor([low, high])
    for _ in range(3):
        terms.append(rest.bfloat16().float())
        rest = rest - terms[-1]
    return [(float(term[0]), float(term[1])) for term in terms]
