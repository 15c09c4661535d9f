"""Rotary position embedding as DeepSeek-V4 uses it: interleaved pairs (2i, 2i + 1) on the last dims of every head.

All arithmetic is fp32, each product and each sum rounded by itself: a kernel which does the same operations gives
the same bytes. Source: HF modeling_deepseek_v4.py `apply_rotary_pos_emb`; frequencies: YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN scaling of the frequencies; cos and sin are not scaled (DeepSeek-V4 has no mscale).

    Attributes:
        factor: How many times the context grows.
        original_length: Positions seen before scaling.
        beta_fast: Frequencies that turn more often than this over the original length stay as they are.
        beta_slow: Frequencies that turn less often than this are divided by `factor`.
    """

    factor: float = 16.0
    original_length: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def inverse_frequencies(rope_dim: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Radians per position of every pair.

    Args:
        rope_dim: Rotated dims R of a head, even.
        theta: Base of the geometric series: 10000 for V4's window-only layers, 160000 (with YaRN) for the others.
        yarn: Scaling for long contexts.

    Returns:
        fp32 (R/2,), on the CPU.

    Raises:
        ArgumentError: `rope_dim` is odd or not positive.
    """
    if rope_dim <= 0 or rope_dim % 2:
        raise ArgumentError("rope_dim", rope_dim, "a positive even number")
    base = theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)
    frequencies = 1.0 / base
    if yarn is None:
        return frequencies

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns `times` times over the original length."""
        return rope_dim * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), rope_dim - 1)
    pairs = torch.arange(rope_dim // 2, dtype=torch.float32)
    slow = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)  # 1e-3: a step where both ends meet
    return 1.0 / (yarn.factor * base) * slow + frequencies * (1 - slow)


def rope_tables(length: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. length - 1.

    Args:
        length: Number of positions P.
        frequencies: fp32 (R/2,), from `inverse_frequencies`.

    Returns:
        (cos, sin), fp32 (P, R/2) on the frequencies' device.
    """
    positions = torch.arange(length, dtype=torch.float32, device=frequencies.device)
    angles = positions[:, None] * frequencies  # fp32 as in the model's own code, or long contexts would not agree
    return angles.cos(), angles.sin()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair by its angle: (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        x: bf16, fp16 or fp32 (..., R), taken as fp32.
        cos: fp32, broadcastable to (..., R/2).
        sin: fp32, like `cos`; negate it to turn back.

    Returns:
        fp32 (..., R).
    """
    x0, x1 = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).flatten(-2)


def inverse_rope(o: Tensor, cos_rows: Tensor, sin_rows: Tensor) -> Tensor:
    """Takes RoPE out of attention's output: turns the last R dims of every head by minus the angle of its token.

    Args:
        o: bf16, fp16 or fp32 (tokens, heads, D).
        cos_rows: fp32 (tokens, R/2), the table's rows at each token's position, R <= D.
        sin_rows: fp32 (tokens, R/2).

    Returns:
        fp32 (tokens, heads, D), not rounded; the first D - R dims are those of `o`.

    Raises:
        ArgumentError: The rows do not fit `o`.
    """
    for name, rows in (("cos_rows", cos_rows), ("sin_rows", sin_rows)):
        if o.ndim != 3 or rows.ndim != 2 or rows.shape[0] != o.shape[0] or 2 * rows.shape[1] > o.shape[2]:
            expected = f"(tokens, R/2) with R <= D for o of shape {tuple(o.shape)}, (tokens, heads, D)"
            raise ArgumentError(name, f"shape {tuple(rows.shape)}", expected)
    split = o.shape[2] - 2 * cos_rows.shape[1]
    rotated = rotate_interleaved(o[..., split:], cos_rows[:, None], -sin_rows[:, None])
    return torch.cat((o[..., :split].float(), rotated), dim=-1)
