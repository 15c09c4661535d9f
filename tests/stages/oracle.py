"""NVFP4 in numpy and ml_dtypes, sharing no code with megamoe: what the stages' numbers are compared with."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
U_BF16, U_FP16 = 2.0**-8, 2.0**-11  # half a unit in the last place of 1


def nibbles(codes: Tensor) -> U8:
    """Codes (..., K) of packed bytes (..., K/2), low nibble first."""
    packed = codes.cpu().numpy()
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def scale_bytes(t: NVFP4Tensor) -> U8:
    """Scale bytes (..., rows, K/16), read from where the layout's formula says they are."""
    *batch, rows, k = t.shape
    raw: U8 = t.scales.cpu().view(torch.uint8).numpy()
    if t.scale_layout == "linear":
        return raw
    m, c = np.arange(rows)[:, None], np.arange(k // 16)[None, :]
    tiles = -(-(k // 16) // 4)
    at = ((m // 128) * tiles + c // 4) * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + c % 4
    return raw.reshape(*batch, -1)[..., at]


def decode(t: NVFP4Tensor) -> F64:
    """E2M1 * E4M3 without the global scale, (..., rows, K)."""
    scales = scale_bytes(t).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    values: F64 = E2M1[nibbles(t.codes)] * np.repeat(scales, 16, axis=-1)
    return values


def quantize(y: F32, enc: float) -> tuple[U8, U8]:
    """Codes (rows, K) and scale bytes (rows, K/16) of fp32 `y` by the default recipe; finite values only."""
    f32 = np.float32
    blocks = y.reshape(y.shape[0], y.shape[1] // 16, 16)
    v = np.abs(blocks).max(-1)
    scales = np.minimum(v * (f32(enc) * f32(1 / 6)), f32(448)).astype(ml_dtypes.float8_e4m3fn)
    decoded = scales.astype(f32)
    with np.errstate(divide="ignore"):
        o = np.minimum(f32(1) / (decoded * (f32(1) / f32(enc))), np.finfo(f32).max)
    scaled = np.clip(blocks * np.where(decoded == 0, f32(0), o)[..., None], -6, 6).astype(f32)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes.reshape(y.shape), scales.view(np.uint8)


def array(t: Tensor) -> F64:
    """Any tensor as float64."""
    values: F64 = t.cpu().double().numpy()
    return values


def to_dtype(values: F32, dtype: torch.dtype) -> Tensor:
    """Rounds fp32 once."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def grouped(a: F64, w: F64, offsets: Tensor) -> F64:
    """Sums (M, N) of each expert's rows with its weights (E, N, K)."""
    starts = offsets.tolist()
    parts = [a[s:e] @ w[i].T for i, (s, e) in enumerate(zip(starts[:-1], starts[1:], strict=True))]
    out: F64 = np.concatenate(parts)
    return out


def alphas(a: Any, weights: NVFP4Tensor, offsets: Tensor) -> F32:
    """fp32 alpha of every row and column, (M, N)."""
    experts, n, _ = weights.shape
    dec = weights.global_scale_dec.cpu().numpy()
    dec = dec.reshape(experts, -1) if dec.ndim else np.broadcast_to(dec, (experts, 1))
    alpha: F32 = np.repeat(dec, n // dec.shape[1], axis=1)  # (E, N)
    if isinstance(a, NVFP4Tensor):
        alpha = alpha * np.float32(a.global_scale_dec.item())
    return np.repeat(alpha, np.diff(offsets.numpy()), axis=0)


def relative(got: F64, want: F64) -> float:
    """||got - want|| / ||want||."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
