"""What `moe_route` accepts, which of its facts a choice may look at, and what its output looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import INDICES, bucket, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.testing.cases import EXACT, Bound

BOUNDS: Mapping[str, Bound] = {
    "indices": EXACT,
    "weights": Bound(1e-6, "exp, log and the sum over the slots round differently in every library: some 2^-23 each"),
}


class Routing(NamedTuple):
    """The experts of every token.

    Attributes:
        indices: int32 (T, k), experts.
        weights: fp32 (T, k), what each expert's output is multiplied by; a row sums to the routed scaling factor.
    """

    indices: Tensor
    weights: Tensor


class Problem(NamedTuple):
    """What choosing a variant may depend on."""

    device: torch.device
    tokens: int  # bucket of T
    experts: int
    top_k: int
    biased: bool
    looked_up: bool  # by token id
    id_dtype: torch.dtype | None  # of the token ids
    table_dtype: torch.dtype | None


def check(
    logits: Tensor,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    *,
    top_k: int,
    scaling: float,
) -> None:
    """Raises ArgumentError unless the arguments fit; see `reference.moe_route`."""
    check_tensor("logits", logits, ("tokens", "experts"), [torch.float32])
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ArgumentError("top_k", top_k, f"1 to {experts}, the number of experts")
    if bias is not None:
        check_tensor("bias", bias, (experts,), [torch.float32], like=logits)
    if (token_ids is None) != (table is None):
        missing = "token_ids" if token_ids is None else "table"
        raise ArgumentError(missing, "None", "token_ids and table together, or neither")
    if token_ids is not None and table is not None:
        check_tensor("token_ids", token_ids, (tokens,), INDICES, like=logits)
        check_tensor("table", table, ("vocabulary", top_k), INDICES, like=logits)
        if bias is not None:
            raise ArgumentError("bias", "a tensor", "None where the experts are looked up: nothing is chosen")


def problem(
    logits: Tensor,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    *,
    top_k: int,
    scaling: float,
) -> Problem:
    """The facts of these arguments."""
    tokens, experts = logits.shape
    return fast_problem(
        Problem,
        (
            logits.device,
            bucket(tokens),
            experts,
            top_k,
            bias is not None,
            table is not None,
            None if token_ids is None else token_ids.dtype,
            None if table is None else table.dtype,
        ),
    )


def fake(
    logits: Tensor,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    *,
    top_k: int,
    scaling: float,
) -> Routing:
    """Outputs of the right shapes and dtypes, contents undefined."""
    shape = (logits.shape[0], top_k)
    return Routing(logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape))
