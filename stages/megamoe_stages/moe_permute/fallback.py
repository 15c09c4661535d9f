"""`moe_permute` as separate launches: a library's stable sort, its inverse, and where each expert begins."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe_stages.moe_permute import contract
from megamoe_stages.moe_permute.contract import Permutation


def moe_permute(indices: Tensor, experts: int) -> Permutation:
    """See the reference, which defines the op; nothing waits for the device."""
    contract.check(indices, experts)
    expert, visits = indices.flatten().sort(stable=True)  # (M,)
    rows = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    rows.view(-1)[visits] = torch.arange(visits.numel(), dtype=torch.int32, device=visits.device)
    bounds = torch.arange(experts + 1, dtype=indices.dtype, device=indices.device)
    offsets = torch.searchsorted(expert, bounds, out_int32=True)
    return Permutation(torch.div(visits, indices.shape[1], rounding_mode="floor").int(), rows, offsets)
