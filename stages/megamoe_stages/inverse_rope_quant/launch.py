"""The host side of the fused inverse_rope_quant kernel, the same for every architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.cute.host import check_readable, dtype_name, empty_result
from megamoe.cute.strips import Shape
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe_stages.inverse_rope_quant import contract, kernel, limits


def inverse_rope_quant(
    target: Target,
    o: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    *,
    groups: int,
    scale_layout: str,
) -> NVFP4Tensor:
    """See `reference.inverse_rope_quant`; one launch on the current stream, no synchronisation.

    A position outside of the tables is read as the last one; `contract.check_values` finds it.

    Raises:
        ArgumentError: As the reference, and for more than `limits` allows, and data not aligned to 16 bytes.
    """
    contract.check(o, positions, cos, sin, global_scale_enc, groups=groups, scale_layout=scale_layout)
    tokens, heads, head_dim = o.shape
    blocks = o.numel() // BLOCK
    facts: dict[str, str | int | float | bool] = {
        "rows": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "groups": groups,
        "scale_layout": scale_layout,
    }
    if reasons := limits.supports(facts):
        raise ArgumentError("o", "; ".join(reasons), "what this kernel supports")
    for name, tensor in (("o", o), ("cos", cos), ("sin", sin)):
        check_readable(name, tensor)
    out = empty_result((groups, tokens, heads // groups * head_dim), global_scale_enc, scale_layout)
    if tokens:
        launch = launcher(dtype_name(o), scale_layout, kernel.shape_for(dtype_name(o), scale_layout, blocks), target)
        words = positions.view(torch.int32)  # of int64 the kernel reads the low words: tables are shorter than 2^31
        scales = out.scales.view(torch.uint8)
        launch(o, words, cos, sin, global_scale_enc, out.codes, scales, out.global_scale_dec)
    else:
        torch.reciprocal(global_scale_enc, out=out.global_scale_dec)
    return out


@functools.cache
def launcher(dtype: str, scale_layout: str, shape: Shape, target: Target) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(kernel.spec(dtype, scale_layout, shape, target))
