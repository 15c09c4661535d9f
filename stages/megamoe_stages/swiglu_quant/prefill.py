"""The host side of the fused GEMM for many rows an expert: packs the activations, then multiplies and quantises."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.counters import counters
from megamoe.cute.weight_pieces import Shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe_stages.grouped_gemm import prefill as gemm
from megamoe_stages.swiglu_quant import prefill_kernel


def run(
    a: Tensor | NVFP4Tensor,
    weights: NVFP4Tensor,
    offsets: Tensor,
    row_weight: Tensor | None,
    row_index: Tensor | None,
    enc: Tensor,
    limit: float,
    out: NVFP4Tensor,
) -> None:
    """Two launches on the current stream, no synchronisation; see `reference.swiglu_quant`.

    Args:
        a: bf16 or NVFP4 activations.
        weights: Interleaved, in the hopper layout; global scale (), (E,) or (E, 2) for gate and up.
        offsets: int32 (E + 1).
        row_weight: fp32 (M,) or None.
        row_index: int32 (M,) or None.
        enc: fp32 (), the encode scale.
        limit: Of the clamp; infinity clamps nothing.
        out: NVFP4 (M, I), written with its global scale and the padding of its scales; M is not 0.
    """
    experts, rows = weights.codes.shape[0], out.codes.shape[0]
    shape = shape_for(rows, experts)
    packed = gemm.pack_rows(a, offsets, row_index, rows, weights.shape[-1], shape)
    alpha, quantized, tiled = weights.global_scale_dec, isinstance(a, NVFP4Tensor), out.scale_layout == "128x4"
    parts = 0 if alpha.ndim == 0 else alpha.numel() // experts
    alpha = alpha.view(-1)
    dec = a.global_scale_dec if isinstance(a, NVFP4Tensor) else enc  # not read for bf16
    scales = out.scales.view(torch.uint8)
    if scales.numel() != rows * out.codes.shape[1] * 2 // BLOCK:
        scales.zero_()
    launch = _launcher(quantized, row_weight is not None, tiled, shape)
    inputs = (weights.codes, weights.scales.view(torch.uint8), packed, offsets, alpha, dec)
    weight = alpha if row_weight is None else row_weight
    outputs = (out.codes, scales, out.global_scale_dec)
    taken = counters("swiglu_gemm", 1, out.codes)
    numbers = (parts, limit, gemm.processors(out.codes.device))
    launch(*inputs, weight, enc, taken, *outputs, *numbers)


def shape_for(rows: int, experts: int) -> Shape:
    """How the work on so many rows is cut."""
    return prefill_kernel.EXPERTS[gemm.width_class(rows, experts)]


@functools.cache
def _launcher(quantized: bool, weighted: bool, tiled: bool, shape: Shape) -> Callable[..., None]:
    return compiler.load(prefill_kernel.spec(quantized, weighted, tiled, shape))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [
        prefill_kernel.spec(quantized, weighted, tiled, shape)
        for quantized in (False, True)
        for weighted in (False, True)
        for tiled in (False, True)
        for shape in prefill_kernel.EXPERTS
    ]
