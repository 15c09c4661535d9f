"""Grouped GEMM as separate launches: decode the weights, a library's GEMM, multiply by alpha."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from megamoe.numerics.fragments import is_fragments
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, decode_e2m1, unpack_nibbles
from megamoe_stages.grouped_gemm import contract

_DECODED_AT_ONCE = 1 << 28  # values; bounds the temporary memory of `decode`


def grouped_gemm(
    a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None
) -> Tensor:
    """Grouped GEMM; arguments and result as the reference says.

    On CUDA, bf16 and NVFP4 activations of several experts take torch's grouped GEMM, which never waits for the device
    but rounds its sums to bf16 before alpha. Everything else keeps fp32 sums, expert by expert; on CUDA with several
    experts (fp16 and fp32 only) that reads `offsets` back once.
    """
    contract.check(a, weights, offsets, row_index)
    rows = decode(a, torch.bfloat16) if isinstance(a, NVFP4Tensor) else a
    rows = rows if row_index is None else rows.index_select(0, row_index)  # (M, K)
    if rows.shape[0] == 0:
        return contract.fake(a, weights, offsets, row_index)
    weights = weights.with_layout("linear") if is_fragments(weights.scale_layout) else weights
    if rows.is_cuda and rows.dtype == torch.bfloat16 and weights.codes.shape[0] > 1:
        sums = gemm_by_library(rows, weights, offsets)  # (M, N) bf16
    else:
        sums = _gemm_by_expert(rows, weights, offsets)  # (M, N) fp32
    alpha = weights.global_scale_dec * a.global_scale_dec if isinstance(a, NVFP4Tensor) else weights.global_scale_dec
    return multiply_by_alpha(sums, alpha, offsets).to(contract.out_dtype(a)).contiguous()


def gemm_by_library(rows: Tensor, weights: NVFP4Tensor, offsets: Tensor) -> Tensor:
    """Torch's grouped GEMM over decoded weights; sums (M, N) rounded to the dtype of `rows`."""
    weights, ends = _live_experts(weights, offsets, rows.shape[0])
    return grouped_mm(rows, decode(weights, rows.dtype).mT, offs=ends)


def decode(tensor: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """E2M1 * E4M3 without the global scale, exact in bf16, fp16 and fp32: (..., rows, K).

    A byte is looked up as a pair of values, some experts at a time, because an index takes more memory than its result.
    """
    out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if out.ndim == 2:
        return _decode_into(out, tensor)
    step = max(1, _DECODED_AT_ONCE // max(1, out[0].numel()))
    for first in range(0, out.shape[0], step):
        some = slice(first, first + step)
        part = NVFP4Tensor(tensor.codes[some], tensor.scales[some], tensor.global_scale_dec, tensor.scale_layout)
        _decode_into(out[some], part)
    return out


def multiply_by_alpha(sums: Tensor, alpha: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies sums (M, N), in place, by alpha fp32 (), (E,) or (E, parts); one fp32 product and one rounding."""
    if alpha.ndim == 0:
        factors = alpha.view(1, 1, 1)  # a 0-dim alpha would be rounded to the dtype of the sums first
    else:
        row = torch.arange(sums.shape[0], dtype=torch.int32, device=sums.device)
        expert = torch.searchsorted(offsets[1:], row, right=True)  # (M,)
        factors = alpha[expert].view(sums.shape[0], -1, 1)  # (M, parts or 1, 1)
    rows, n = sums.shape
    sums.view(rows, factors.shape[1], n // factors.shape[1]).mul_(factors)
    return sums


def _live_experts(weights: NVFP4Tensor, offsets: Tensor, rows: int) -> tuple[NVFP4Tensor, Tensor]:
    """The experts that own rows, and where their rows end.

    M rows have at most M experts: that bounds the result without asking the device how many there are. Experts without
    rows fill it up, at the end.
    """
    ends = offsets[1:]
    if rows >= ends.shape[0]:
        return weights, ends
    idle = offsets.diff() == 0
    first = idle.int().argsort(stable=True)[:rows]  # (M,), those with rows before those without
    scales = weights.scales.view(torch.uint8)[first].view(weights.scales.dtype)
    live = NVFP4Tensor(weights.codes[first], scales, weights.global_scale_dec, weights.scale_layout)
    return live, torch.where(idle[first], offsets[-1:], ends[first])


def _decode_into(out: Tensor, tensor: NVFP4Tensor) -> Tensor:
    byte = torch.arange(256, dtype=torch.uint8, device=out.device)
    pairs = decode_e2m1(unpack_nibbles(byte[:, None])).to(out.dtype)  # (256, 2)
    pair_bits = pairs.view(torch.int64 if out.element_size() == 4 else torch.int32)[:, 0]
    values = pair_bits.index_select(0, tensor.codes.flatten().int()).view(out.dtype)
    scales = tensor.linear_scales().to(out.dtype)[..., None]  # (..., rows, K/16, 1)
    torch.mul(values.view(*scales.shape[:-1], BLOCK), scales, out=out.view(*scales.shape[:-1], BLOCK))
    return out


def _gemm_by_expert(rows: Tensor, weights: NVFP4Tensor, offsets: Tensor) -> Tensor:
    experts, n, _ = weights.shape
    sums = torch.empty(rows.shape[0], n, device=rows.device)
    starts = [0, rows.shape[0]] if experts == 1 else offsets.tolist()
    for e in range(experts):
        mine = slice(starts[e], starts[e + 1])
        if starts[e] < starts[e + 1]:
            tile = NVFP4Tensor(weights.codes[e], weights.scales[e], weights.global_scale_dec, weights.scale_layout)
            sums[mine] = _gemm_fp32(rows[mine], decode(tile, rows.dtype))
    return sums


def _gemm_fp32(rows: Tensor, tile: Tensor) -> Tensor:
    """Multiplies rows by tile^T with fp32 sums and an fp32 result."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, tile.T, out_dtype=torch.float32)
    return rows.float() @ tile.float().T
