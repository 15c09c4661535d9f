"""The definition of `moe_route`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megamoe_stages.moe_route import contract
from megamoe_stages.moe_route.contract import Routing

TINY = 1e-20  # what DeepSeek-V4 adds to a sum of scores before dividing by it


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    *,
    top_k: int,
    scaling: float,
) -> Routing:
    """Picks experts of high score, or looks them up by token id, and weighs them: DeepSeek-V4's router.

    The score is sqrt(softplus(logit)). Chosen are the `top_k` largest of score + bias, the largest first, of equal ones
    the expert of lower number; the weights are the scores alone, divided by their sum and times `scaling`
    (transformers' DeepseekV4TopKRouter and DeepseekV4HashRouter).

    Args:
        logits: fp32 (T, E), no NaN.
        bias: fp32 (E,), of the choice, or None.
        token_ids: int32 or int64 (T,), with `table`: experts are looked up, as DeepSeek-V4's first layers do.
        table: int32 or int64 (vocabulary, k), the experts of each token id.
        top_k: k, experts a token, at most E.
        scaling: Routed scaling factor, what the weights of a token sum to.

    Returns:
        Routing.

    Raises:
        ArgumentError: A shape, dtype or device does not fit, `top_k` is not in 1..E, or only one of `token_ids` and
            `table` came, or `bias` with them.
    """
    contract.check(logits, bias, token_ids, table, top_k=top_k, scaling=scaling)
    scores = softplus(logits).sqrt()  # (T, E)
    if token_ids is not None and table is not None:
        indices = table[token_ids].long()
    else:
        choice = scores if bias is None else scores + bias
        indices = choice.sort(dim=-1, descending=True, stable=True).indices.narrow_copy(1, 0, top_k)
    chosen = scores.gather(1, indices)  # (T, k)
    weights = chosen / (chosen.sum(dim=-1, keepdim=True) + TINY) * scaling
    return Routing(indices.to(torch.int32), weights)
