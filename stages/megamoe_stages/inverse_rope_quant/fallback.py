"""inverse_rope_quant as separate launches: turn into a group-major fp32 buffer, then quantise that."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.inverse_rope_quant import contract
from megamoe_stages.quantize.fallback import quantize


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
    """See `reference.inverse_rope_quant`."""
    contract.check(o, positions, cos, sin, global_scale_enc, groups=groups, scale_layout=scale_layout)
    return quantize(_rotate(o, positions, cos, sin, groups), global_scale_enc, scale_layout=scale_layout)


def _rotate(o: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, groups: int) -> Tensor:
    """The turned heads in fp32, (G, tokens, heads / G * D).

    x cos + swap(x) (sin, -sin): subtracting a product and adding its negative round alike, so the bits are those of the
    reference. Kept off addcmul, which contracts to an fma on a GPU.
    """
    tokens, heads, head_dim = o.shape
    per_group = heads // groups
    split = head_dim - 2 * cos.shape[1]
    by_group = o.view(tokens, groups, per_group, head_dim).transpose(0, 1)  # (G, tokens, heads / G, D)
    out = o.new_empty((groups, tokens, per_group, head_dim), dtype=torch.float32)
    out[..., :split] = by_group[..., :split]
    rope = by_group[..., split:].float()
    swapped = torch.stack((rope[..., 1::2], rope[..., 0::2]), dim=-1).flatten(-2)
    cos_rows = torch.repeat_interleave(cos.index_select(0, positions), 2, dim=-1)[:, None]  # (tokens, 1, R)
    sin_rows = sin.index_select(0, positions)
    signed_sin = torch.stack((sin_rows, -sin_rows), dim=-1).flatten(-2)[:, None]  # (tokens, 1, R)
    torch.add(rope * cos_rows, swapped * signed_sin, out=out[..., split:])
    return out.view(groups, tokens, per_group * head_dim)
