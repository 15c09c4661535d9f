"""What `moe_permute` accepts, which of its facts a choice may look at, and what its output looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import INDICES, bucket, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.testing.cases import EXACT, Bound

BOUNDS: Mapping[str, Bound] = {"tokens": EXACT, "rows": EXACT, "offsets": EXACT}


class Permutation(NamedTuple):
    """Rows sorted by expert: row r is one visit of a token to an expert, M = T * k of them.

    Attributes:
        tokens: int32 (M,), the token of each row.
        rows: int32 (T, k), the row of each token's visit.
        offsets: int32 (E + 1), expert e owns the rows offsets[e]:offsets[e + 1].
    """

    tokens: Tensor
    rows: Tensor
    offsets: Tensor


class Problem(NamedTuple):
    """What choosing a variant may depend on."""

    device: torch.device
    dtype: torch.dtype  # of the indices
    visits: int  # bucket of M
    top_k: int
    experts: int


def check(indices: Tensor, experts: int) -> None:
    """Raises ArgumentError unless the arguments fit; see `reference.moe_permute`."""
    check_tensor("indices", indices, ("tokens", "k"), INDICES)
    if not isinstance(experts, int) or experts < 1:
        raise ArgumentError("experts", experts, "a positive number")
    if indices.shape[1] < 1:
        raise ArgumentError("indices", f"shape {tuple(indices.shape)}", "at least one expert a token")


def problem(indices: Tensor, experts: int) -> Problem:
    """The facts of these arguments."""
    return fast_problem(Problem, (indices.device, indices.dtype, bucket(indices.numel()), indices.shape[1], experts))


def fake(indices: Tensor, experts: int) -> Permutation:
    """Outputs of the right shapes and dtypes, contents undefined."""
    tokens, rows, offsets = (
        indices.new_empty(shape, dtype=torch.int32) for shape in (indices.numel(), indices.shape, experts + 1)
    )
    return Permutation(tokens, rows, offsets)
