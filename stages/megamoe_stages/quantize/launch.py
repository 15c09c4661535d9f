"""The host side of the fused quantise kernel, the same for every architecture."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe.numerics.layout import padded_shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe_stages.quantize import contract, kernel, limits

ALIGNMENT = 16  # bytes that a thread loads at once


def quantize(
    target: Target,
    x: Tensor,
    global_scale_enc: Tensor | None,
    *,
    scale_layout: str,
    fast: bool,
    zero_guard: str,
    four_over_six: str | None,
) -> NVFP4Tensor:
    """See `reference.quantize`; one launch on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and x not aligned to 16 bytes.
    """
    contract.check(
        x, global_scale_enc, scale_layout=scale_layout, fast=fast, zero_guard=zero_guard, four_over_six=four_over_six
    )
    *batch, rows, k = x.shape
    entries = math.prod(batch)
    facts: dict[str, str | int | float | bool | None] = {
        "scale_dims": -1 if global_scale_enc is None else global_scale_enc.ndim,
        "rows": entries * rows,
        "entries": entries,
        "k": k,
        "scale_layout": scale_layout,
        "fast": fast,
        "zero_guard": zero_guard,
        "four_over_six": four_over_six,
    }
    reasons = limits.supports(facts)
    if global_scale_enc is None or reasons:
        raise ArgumentError("quantize", "; ".join(reasons), "what this kernel supports")
    if not x.is_cuda:
        raise ArgumentError("x", f"device {x.device}", "a CUDA device")
    if x.data_ptr() % ALIGNMENT:
        raise ArgumentError("x", f"data at {x.data_ptr():#x}", f"an address that is a multiple of {ALIGNMENT}")
    tail = padded_shape(rows, k // BLOCK) if scale_layout == "128x4" else (rows, k // BLOCK)
    codes = x.new_empty((entries * rows, k // 2), dtype=torch.uint8)
    scales = x.new_empty((entries * tail[0], tail[1]), dtype=torch.uint8)
    dec = torch.empty_like(global_scale_enc)
    if scales.numel():
        launch = _launcher(x.dtype, scale_layout, target)
        entry = (rows,) if scale_layout == "128x4" else ()
        launch(x.view(-1, k), global_scale_enc, codes, scales, dec, *entry)
    else:
        torch.reciprocal(global_scale_enc, out=dec)
    scales = scales.view(torch.float8_e4m3fn)
    return NVFP4Tensor(codes.view(*batch, rows, k // 2), scales.view(*batch, *tail), dec, scale_layout)


@functools.cache
def _launcher(dtype: torch.dtype, scale_layout: str, target: Target) -> Callable[..., None]:
    name, shape = str(dtype).removeprefix("torch."), kernel.SHAPE[scale_layout]
    return compiler.load(kernel.spec(name, scale_layout, shape, target))
