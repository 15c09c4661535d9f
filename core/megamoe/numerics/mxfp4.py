"""MXFP4 (E2M1 values, one power of two per 32 of them) as NVFP4, exactly where the exponents lie close enough.

A power of two is an E4M3 number for exponents -9..8, so a block scale 2^k becomes the block scale 2^(k - d) under a
global scale 2^d, and the codes stay as they are. With d = k_max - 8 that holds for k_max - k <= 17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, decode_e2m1, encode_e2m1, pack_nibbles, unpack_nibbles

MX_BLOCK = 32
E8M0_BIAS = 127
E8M0_NAN = 255
MAX_SPREAD = 17
_E4M3_TOP = 8  # 2^8 and 2^-9 are the largest and smallest powers of two in E4M3
_E4M3_BOTTOM = -9
_FP32_MIN_EXPONENT = -126  # a smaller global scale would be subnormal


def dequantize_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """Decodes MXFP4 to fp32.

    Args:
        codes: uint8 or int8 (..., K/2); the low nibble is the even element.
        exponents: E8M0 as uint8 or float8_e8m0fnu (..., K/32); 255 is NaN.

    Returns:
        fp32 (..., K), exact for |value| < 2^128; from there on infinite.

    Raises:
        ArgumentError: A dtype or shape that does not fit.
    """
    codes, exponents = _bytes_of(codes, exponents)
    scale = exponents.view(torch.float8_e8m0fnu).float().repeat_interleave(MX_BLOCK, dim=-1)
    return decode_e2m1(unpack_nibbles(codes)) * scale


def mxfp4_to_nvfp4(codes: Tensor, exponents: Tensor, *, parts: int = 1, lossy: bool = False) -> NVFP4Tensor:
    """Converts MXFP4 to NVFP4 without changing a value. Reads the values, so it waits for a GPU.

    A block without a nonzero code has no say in the exponents' spread, whatever its scale (0 marks it in checkpoints).

    Args:
        codes: uint8 or int8 (..., rows, K/2).
        exponents: E8M0 as uint8 or float8_e8m0fnu (..., rows, K/32).
        parts: Equal parts of the rows that get a global scale each, as for fused gate and up weights.
        lossy: Requantise the blocks that lie more than 17 binades below the largest of their part with the smallest
            scale, instead of raising; each such value moves by at most 2^-11 times the global scale.

    Returns:
        NVFP4Tensor, linear scales, global_scale_dec fp32 (...), or (..., parts) for more than one part. Its codes share
        memory with `codes` unless blocks were requantised.

    Raises:
        ArgumentError: A dtype or shape that does not fit, a NaN scale, or too large a spread without `lossy`.
    """
    codes, exponents = _bytes_of(codes, exponents)
    *batch, rows, blocks = exponents.shape
    if parts < 1 or rows % parts:
        raise ArgumentError("parts", parts, f"a divisor of {rows} rows")
    if (exponents == E8M0_NAN).any():
        raise ArgumentError("exponents", "NaN scales (255)", "E8M0 numbers 0..254")

    live = (codes.reshape(*exponents.shape, MX_BLOCK // 2) & 0x77 != 0).any(-1)  # (..., rows, K/32)
    k = exponents.int() - E8M0_BIAS
    split = (*batch, parts, rows // parts * blocks)
    global_exponent = _global_exponents(k.reshape(split), live.reshape(split))  # (..., parts)
    per_row = global_exponent.repeat_interleave(rows // parts, dim=-1)[..., None]  # (..., rows, 1)
    local = k - per_row

    below = live & (local < _E4M3_BOTTOM)
    if below.any():
        if not lossy:
            spread = int((_E4M3_TOP - local)[below].max())
            got = f"a block {spread} binades below the largest ({int(below.sum())} of {below.numel()} out of range)"
            raise ArgumentError("exponents", got, f"at most {MAX_SPREAD} binades, or lossy=True")
        codes = torch.where(below.repeat_interleave(MX_BLOCK // 2, dim=-1), _requantised(codes, local), codes)
    scale = _power_of_two(local.clamp(_E4M3_BOTTOM, _E4M3_TOP))
    scales = torch.where(live, scale, 0.0).repeat_interleave(MX_BLOCK // BLOCK, dim=-1)
    dec = _power_of_two(global_exponent)
    return NVFP4Tensor(codes, scales.to(torch.float8_e4m3fn), dec if parts > 1 else dec[..., 0])


def _global_exponents(k: Tensor, live: Tensor) -> Tensor:
    """Exponent d of the global scale of each part: (..., parts, blocks) to (..., parts); 0 where nothing is live."""
    if not k.shape[-1]:
        return k.new_zeros(k.shape[:-1])
    k_max = torch.where(live, k, -E8M0_BIAS).amax(-1)
    return torch.where(live.any(-1), (k_max - _E4M3_TOP).clamp(min=_FP32_MIN_EXPONENT), 0)


def _requantised(codes: Tensor, local: Tensor) -> Tensor:
    """Codes of the same values under the smallest block scale, 2^-9 (meant for blocks below it)."""
    shift = (local - _E4M3_BOTTOM).clamp(_FP32_MIN_EXPONENT, 0)  # what lies lower still rounds to zero all the same
    values = decode_e2m1(unpack_nibbles(codes)) * _power_of_two(shift).repeat_interleave(MX_BLOCK, dim=-1)
    return pack_nibbles(encode_e2m1(values))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as fp32, exact: the exponent field itself, for -126..127."""
    return ((exponent + E8M0_BIAS) << 23).view(torch.float32)


def _bytes_of(codes: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Both as uint8, checked against each other."""
    if codes.dtype not in (torch.uint8, torch.int8):
        raise ArgumentError("codes", codes.dtype, "uint8 or int8")
    if exponents.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise ArgumentError("exponents", exponents.dtype, "uint8 or float8_e8m0fnu")
    want = (*codes.shape[:-1], codes.shape[-1] * 2 // MX_BLOCK)
    if codes.ndim < 2 or codes.shape[-1] * 2 % MX_BLOCK:
        raise ArgumentError("codes", f"shape {tuple(codes.shape)}", f"(..., rows, K/2) with K a multiple of {MX_BLOCK}")
    if tuple(exponents.shape) != want:
        raise ArgumentError("exponents", f"shape {tuple(exponents.shape)}", f"{want}")
    return codes.view(torch.uint8), exponents.view(torch.uint8)
