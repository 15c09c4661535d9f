"""`quantize` as separate launches: amax, block scales, codes, packing, and the scale layout."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megamoe.numerics.layout import to_128x4
from megamoe.numerics.nvfp4 import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MAX_FOUR_OVER_SIX,
    FLT_MAX,
    NVFP4Tensor,
    encode_e4m3,
    per_row,
)
from megamoe_stages.quantize import contract


def quantize(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> NVFP4Tensor:
    """See `reference.quantize`."""
    contract.check(
        x, global_scale_enc, scale_layout=scale_layout, fast=fast, zero_guard=zero_guard, four_over_six=four_over_six
    )
    v = _block_amax(x)  # (..., rows, K/16)
    e4m3_max = E4M3_MAX if four_over_six is None else E4M3_MAX_FOUR_OVER_SIX
    enc = _encode_scale(v, e4m3_max) if global_scale_enc is None else global_scale_enc
    dec = enc.reciprocal()
    enc_rows, dec_rows = per_row(enc, x.shape), per_row(dec, x.shape)

    wanted = (v * (1 / 6) * enc_rows) if fast else (enc_rows * (1 / 6) * v)
    blocks = x.view(*v.shape, BLOCK).float()
    dead = (v == 0) if zero_guard == "amax" else None
    scales, codes = _encode_blocks(blocks, wanted, dec_rows, dead)
    if four_over_six is not None:
        scales4, codes4 = _encode_blocks(blocks, wanted.mul(1.5), dec_rows, dead)
        better = _error(blocks, codes4, scales4, dec_rows, four_over_six) < _error(
            blocks, codes, scales, dec_rows, four_over_six
        )
        codes = codes4.where(better.unsqueeze(-1), codes)
        scales = scales4.where(better, scales)

    packed = codes.view(*x.shape[:-1], x.shape[-1] // 2, 2)
    packed = packed[..., 1].mul(16).add_(packed[..., 0])
    stored = scales.to(torch.float8_e4m3fn)
    return NVFP4Tensor(packed, to_128x4(stored) if scale_layout == "128x4" else stored, dec, scale_layout)


def _block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block in x's own dtype, NaN left out: fp32 (..., rows, K/16)."""
    magnitude = x.view(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK).abs()
    return torch.where(magnitude.isnan(), 0, magnitude).amax(-1).float()


def _encode_scale(v: Tensor, e4m3_max: float) -> Tensor:
    """The encode scale () of a tensor, from the amax of its blocks."""
    largest = v.max() if v.numel() else v.new_zeros(())
    largest = largest.where(largest.isfinite(), 0)  # infinite counts as unknown, like 0
    enc = torch.div(v.new_full((), E2M1_MAX * e4m3_max), largest).clamp(max=FLT_MAX)
    return enc.where(largest > 0, 1)


def _encode_blocks(blocks: Tensor, wanted: Tensor, dec: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block scales (fp32, E4M3 values) and uint8 codes of fp32 blocks (..., K/16, 16).

    Args:
        blocks: fp32 (..., K/16, 16).
        wanted: fp32 (..., K/16), the scale before rounding.
        dec: fp32, the global decode scale, broadcastable with `wanted`.
        dead: Blocks whose elements count as 0; None: those with scale 0.
    """
    scales = encode_e4m3(wanted.nan_to_num(nan=0.0, posinf=torch.inf).relu()).float()
    multiplier = (scales * dec).reciprocal().clamp(max=FLT_MAX)
    multiplier = multiplier.masked_fill(scales == 0 if dead is None else dead, 0)
    return scales, _e2m1(blocks * multiplier.unsqueeze(-1))


def _e2m1(y: Tensor) -> Tensor:
    """E2M1 codes (uint8) of fp32 values, rounded once.

    With a = |y| the code is the least of rne(2a), rne(a) + 2, rne(a/2) + 4 and 7: each line holds in its own binade
    ([0, 2), [2, 4), [4, ...)) and lies above the others elsewhere.
    """
    y = y.nan_to_num(nan=E2M1_MAX, posinf=torch.inf, neginf=-torch.inf)
    a = y.abs()
    code = (a * 2).round().minimum(a.round() + 2).minimum((a * 0.5).round() + 4).clamp(max=7)
    return code.to(torch.uint8).add_(y.signbit().to(torch.uint8).mul_(8))


def _error(blocks: Tensor, codes: Tensor, scales: Tensor, dec: Tensor, kind: str) -> Tensor:
    """Summed error of each block (..., K/16), elements added first to last."""
    c = codes.bitwise_and(7).float()
    magnitude = (c * 0.5).maximum(c - 2).maximum(c * 2 - 8)  # E2M1 values, by the same three lines turned round
    value = magnitude.where(codes < 8, -magnitude) * scales.unsqueeze(-1) * dec.unsqueeze(-1)
    error = blocks - value
    error = error.abs() if kind == "mae" else error * error
    return functools.reduce(torch.add, error.unbind(-1))
