"""The definition of `moe_permute`."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe_stages.moe_permute import contract
from megamoe_stages.moe_permute.contract import Permutation


def moe_permute(indices: Tensor, experts: int) -> Permutation:
    """Sorts the visits by expert, those of one expert by token and then by slot.

    Args:
        indices: int32 or int64 (T, k), the experts of each token, each in 0..experts - 1. The numbers themselves are
            not checked, which would make the host wait; with others the result is undefined.
        experts: E.

    Returns:
        Permutation: of the M = T * k visits.

    Raises:
        ArgumentError: `indices` is not of that shape and dtype, or `experts` is not positive.
    """
    contract.check(indices, experts)
    expert = indices.flatten()  # (M,)
    visits = expert.argsort(stable=True)  # (M,), the visit of each row
    rows = visits.argsort()  # (M,), its inverse
    below = expert[None, :] < torch.arange(experts + 1, device=indices.device)[:, None]  # (E + 1, M)
    tokens = visits // indices.shape[1]
    return Permutation(tokens.int(), rows.view(indices.shape).int(), below.sum(1).int())
