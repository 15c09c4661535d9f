"""What inverse_rope_quant accepts, what choosing a variant may look at, and how exact a variant must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, INDICES, bucket, check_multiple, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, check_scale_layout
from megamoe.testing.cases import EXACT, Bound
from megamoe_stages.quantize import contract as quantize_contract

BOUNDS: Mapping[str, Bound] = {"out": EXACT}  # fp32 products and sums, each rounded, have one result


class Problem(NamedTuple):
    """Facts that choosing a variant may look at.

    Attributes:
        device: Where the tensors live.
        dtype: Of `o`.
        rows: Tokens, rounded up to a power of two.
        heads: Heads of `o`.
        head_dim: D.
        rope_dim: Rotated dims at the end of each head.
        groups: Groups of heads.
        scale_layout: "linear" or "128x4".
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    heads: int
    head_dim: int
    rope_dim: int
    groups: int
    scale_layout: str


def check(
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str = "linear",
) -> None:
    """Raises ArgumentError for arguments that no variant takes; see `reference.inverse_rope_quant`."""
    check_tensor("o", o, ("tokens", "heads", "D"), ACTIVATIONS)
    tokens, heads, head_dim = o.shape
    check_multiple("o", head_dim, BLOCK, "dims per head")
    check_tensor("positions", positions, (tokens,), INDICES, like=o)
    check_tensor("cos", cos, ("P", "R/2"), (torch.float32,), like=o)
    rope_dim = 2 * cos.shape[1]
    check_multiple("cos", rope_dim, BLOCK, "rotated dims per head")
    if rope_dim > head_dim:
        raise ArgumentError("cos", f"{rope_dim} rotated dims per head", f"at most {head_dim}, the dims of a head of o")
    check_tensor("sin", sin, tuple(cos.shape), (torch.float32,), like=o)
    check_tensor("global_scale_enc", global_scale_enc, (), (torch.float32,), like=o)
    if groups < 1 or heads < 1 or heads % groups:
        raise ArgumentError("groups", groups, f"a positive divisor of the {heads} heads of o")
    check_scale_layout(scale_layout)


def check_values(positions: Tensor, cos: Tensor) -> None:
    """For debugging: checks what `check` cannot without waiting for the device.

    Raises:
        ArgumentError: A position is outside of the tables. On a GPU nothing else says so: a kernel may read any row.
    """
    if positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= cos.shape[0]:
            raise ArgumentError("positions", f"{low} to {high}", f"0 to {cos.shape[0] - 1}, the rows of cos and sin")


def problem(
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str = "linear",
) -> Problem:
    """The facts of one call."""
    tokens, heads, head_dim = o.shape
    return fast_problem(
        Problem, (o.device, o.dtype, bucket(tokens), heads, head_dim, 2 * cos.shape[1], groups, scale_layout)
    )


def fake(
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    """An empty result of the right shape: that of quantising the group-major tensor."""
    tokens, heads, head_dim = o.shape
    rotated = o.new_empty((groups, tokens, heads // groups * head_dim), dtype=torch.float32)
    return quantize_contract.fake(rotated, global_scale_enc, scale_layout=scale_layout)


def bytes_moved(
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str = "linear",
) -> int:
    """Bytes read and written once: o, half a byte a code, a byte a block scale (tables and padding left out)."""
    return o.numel() * o.element_size() + o.numel() // 2 + o.numel() // BLOCK
