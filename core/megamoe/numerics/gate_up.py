"""Orders of the gate and up rows of the experts' first weights, and the way from one to another.

gate_up      all gate rows, then all up rows; a checkpoint's w1 is the gate, w3 is up
up_gate      the other way round
interleaved  8 gate rows, the matching 8 up rows, and so on: of a tile of 16 rows one thread of a tensor core's warp
             has rows r and r + 8, a gate and its up
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor

Order = Literal["gate_up", "up_gate", "interleaved"]
ORDERS: tuple[str, ...] = get_args(Order)
RUN = 8  # neighbouring rows of one kind


def interleave(weights: NVFP4Tensor, order: str) -> NVFP4Tensor:
    """Weights in interleaved order; a global scale of two parts comes out as (gate, up).

    Args:
        weights: NVFP4 (..., 2I, K), I a multiple of 16, linear or 128x4.
        order: Of `weights`: "gate_up" or "up_gate".

    Returns:
        NVFP4Tensor of the same shape and scale layout.

    Raises:
        ArgumentError: An unknown order, or rows that have none.
    """
    if order not in ("gate_up", "up_gate"):
        raise ArgumentError("order", repr(order), "'gate_up' or 'up_gate'")
    rows = weights.shape[-2]
    if rows % (2 * BLOCK):
        raise ArgumentError("weights", f"{rows} rows", f"as many gate rows as up rows, a multiple of {BLOCK} each")
    halves = torch.arange(rows, device=weights.device).view(2, -1, RUN)
    if order == "up_gate":
        halves = halves.flip(0)
    dec = weights.global_scale_dec
    if order == "up_gate" and dec.ndim == weights.codes.ndim - 1 and dec.shape[-1] == 2:
        dec = dec.flip(-1)
    return _take_rows(weights, halves.transpose(0, 1).reshape(-1), dec)


def deinterleave(weights: NVFP4Tensor) -> NVFP4Tensor:
    """The inverse of `interleave`: the order gate_up, in the scale layout of `weights` but linear for hopper."""
    rows = weights.shape[-2]
    source = torch.arange(rows, device=weights.device).view(-1, 2, RUN).transpose(0, 1).reshape(-1)
    return _take_rows(weights, source, weights.global_scale_dec)


def _take_rows(weights: NVFP4Tensor, source: Tensor, dec: Tensor) -> NVFP4Tensor:
    linear = weights.with_layout("linear")
    scales = linear.scales.view(torch.uint8).index_select(-2, source).view(linear.scales.dtype)
    taken = NVFP4Tensor(linear.codes.index_select(-2, source), scales, dec)
    return taken.with_layout("128x4") if weights.scale_layout == "128x4" else taken
