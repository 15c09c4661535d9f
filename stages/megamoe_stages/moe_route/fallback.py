"""`moe_route` as separate launches, ten of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megamoe_stages.moe_route import contract
from megamoe_stages.moe_route.contract import Routing
from megamoe_stages.moe_route.reference import TINY


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    *,
    top_k: int,
    scaling: float,
) -> Routing:
    """See the reference, which defines the op."""
    contract.check(logits, bias, token_ids, table, top_k=top_k, scaling=scaling)
    scores = softplus(logits).sqrt_()
    if token_ids is not None and table is not None:
        indices = table.index_select(0, token_ids).long()
    else:
        choice = scores if bias is None else scores + bias
        indices = choice.sort(dim=-1, descending=True, stable=True).indices.narrow_copy(
            1, 0, top_k
        )  # topk has no order of ties
    chosen = scores.gather(1, indices)
    weights = chosen.div_(chosen.sum(dim=-1, keepdim=True).add_(TINY)).mul_(scaling)
    return Routing(indices.to(torch.int32), weights)
