"""The definition of inverse_rope_quant."""

from __future__ import annotations

from torch import Tensor

from megamoe.numerics import nvfp4
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.numerics.rope import inverse_rope
from megamoe_stages.inverse_rope_quant import contract


def inverse_rope_quant(
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    """Takes RoPE out of attention's output and quantises it for the grouped projection `wo_a`.

    For every pair (x0, x1) of dims (2i, 2i + 1) among the last R of a head, with the angle of its token's position:

        x0' = x0 cos + x1 sin,    x1' = x1 cos - x0 sin

    in fp32, each product and each sum rounded by itself (no fma); the other dims stay. Quantised from the fp32 values,
    not from a rounding of them to o's dtype. Head h goes to group h // (heads / groups).

    Args:
        o: bf16, fp16 or fp32 (tokens, heads, D), D a multiple of 16.
        positions: int32 or int64 (tokens,), rows of the tables; each must be in 0 .. P - 1, which only
            `contract.check_values` looks at, for debugging.
        cos: fp32 (P, R/2), R a multiple of 16 and at most D.
        sin: fp32 (P, R/2).
        global_scale_enc: fp32 (), encode scale 2688 / amax.
        groups: Groups G, a divisor of `heads`.
        scale_layout: Layout of the block scales, "linear" or "128x4"; the latter is padded per group.

    Returns:
        NVFP4Tensor of logical shape (G, tokens, heads / G * D).

    Raises:
        ArgumentError: An argument does not fit.

    Source: HF modeling_deepseek_v4.py, end of `DeepseekV4Attention.forward`.
    """
    contract.check(o, positions, cos, sin, global_scale_enc, groups=groups, scale_layout=scale_layout)
    tokens, heads, head_dim = o.shape
    rotated = inverse_rope(o, cos.index_select(0, positions), sin.index_select(0, positions))
    grouped = rotated.view(tokens, groups, heads // groups * head_dim).transpose(0, 1)  # (G, tokens, heads / G * D)
    return nvfp4.quantize(grouped.contiguous(), global_scale_enc, scale_layout=scale_layout)
