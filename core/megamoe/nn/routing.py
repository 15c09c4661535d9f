"""Which experts a token visits, and the order of rows in which the experts see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megamoe.contracts import INDICES, check_tensor
from megamoe.errors import ArgumentError

_TINY = 1e-20  # what DeepSeek-V4 adds to a sum of scores before dividing by it


class Routing(NamedTuple):
    """The experts of every token.

    Attributes:
        indices: int64 (T, k), experts.
        weights: fp32 (T, k), what each expert's output is multiplied by; a row sums to the routed scaling factor.
    """

    indices: Tensor
    weights: Tensor


class Permutation(NamedTuple):
    """Rows sorted by expert: row r is one visit of a token to an expert, M = T * k of them.

    Attributes:
        tokens: int64 (M,), the token of each row.
        rows: int64 (T, k), the row of each token's visit.
        offsets: int32 (E + 1), expert e owns the rows offsets[e]:offsets[e + 1].
    """

    tokens: Tensor
    rows: Tensor
    offsets: Tensor


def route_topk(logits: Tensor, bias: Tensor | None, top_k: int, scaling: float) -> Routing:
    """Picks the `top_k` experts of highest score: DeepSeek-V4's sqrtsoftplus router.

    The score is sqrt(softplus(logit)); the bias takes part in the choice alone, not in the weight.

    Args:
        logits: fp32 (T, E).
        bias: fp32 (E,), or None.
        top_k: Experts a token, at most E.
        scaling: Routed scaling factor, what the weights of a token sum to.

    Raises:
        ArgumentError: A shape or dtype does not fit, or `top_k` is not in 1..E.
    """
    check_tensor("logits", logits, ("tokens", "experts"), [torch.float32])
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ArgumentError("top_k", top_k, f"1 to {experts}, the number of experts")
    scores = _scores(logits)
    chosen_by = scores
    if bias is not None:
        check_tensor("bias", bias, (experts,), [torch.float32], like=logits)
        chosen_by = scores + bias
    return _weigh(scores, chosen_by.topk(top_k, dim=-1).indices, scaling)


def route_hash(logits: Tensor, token_ids: Tensor, tid2eid: Tensor, scaling: float) -> Routing:
    """Looks the experts up by token id, as DeepSeek-V4's first layers do; the logits only weigh them.

    Args:
        logits: fp32 (T, E).
        token_ids: int32 or int64 (T,).
        tid2eid: int32 or int64 (vocabulary, k), the experts of each token id.
        scaling: Routed scaling factor, what the weights of a token sum to.

    Raises:
        ArgumentError: A shape, dtype or device does not fit.
    """
    check_tensor("logits", logits, ("tokens", "experts"), [torch.float32])
    check_tensor("token_ids", token_ids, (logits.shape[0],), INDICES, like=logits)
    check_tensor("tid2eid", tid2eid, ("vocabulary", "k"), INDICES, like=logits)
    return _weigh(_scores(logits), tid2eid[token_ids].long(), scaling)


def permute(indices: Tensor, experts: int) -> Permutation:
    """Sorts the visits by expert, those of one expert by token, on the device and without waiting for it.

    Args:
        indices: int32 or int64 (T, k), each in 0..experts - 1.
        experts: E.

    Raises:
        ArgumentError: `indices` is not of that shape and dtype.
    """
    check_tensor("indices", indices, ("tokens", "k"), INDICES)
    top_k = indices.shape[1]
    sorted_experts, visits = indices.flatten().sort(stable=True)  # (M,)
    rows = torch.empty_like(visits)
    rows[visits] = torch.arange(visits.numel(), device=visits.device)
    bounds = torch.arange(experts + 1, dtype=indices.dtype, device=indices.device)
    offsets = torch.searchsorted(sorted_experts, bounds, out_int32=True)
    return Permutation(visits // top_k, rows.view(indices.shape), offsets)


def combine(outputs: Tensor, permutation: Permutation, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums each token's expert outputs, weighted, in fp32 and in the order of its slots: the same bits every time.

    Args:
        outputs: (M, H), rows as in `permutation`.
        permutation: Of these rows.
        weights: (T, k), taken as fp32.
        dtype: Of the result.

    Returns:
        (T, H).
    """
    total = torch.zeros(weights.shape[0], outputs.shape[1], device=outputs.device)
    for rows, weight in zip(permutation.rows.unbind(1), weights.float().unbind(1), strict=True):
        total += outputs[rows].float() * weight[:, None]
    return total.to(dtype)


def _scores(logits: Tensor) -> Tensor:
    return softplus(logits).sqrt()


def _weigh(scores: Tensor, indices: Tensor, scaling: float) -> Routing:
    chosen = scores.gather(1, indices)  # (T, k)
    return Routing(indices, chosen / (chosen.sum(dim=-1, keepdim=True) + _TINY) * scaling)
