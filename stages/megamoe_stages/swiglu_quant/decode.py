"""The host side of swiglu_quant for few rows an expert."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler, decode_limits, gemm_decode_host
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.gemm_decode import Shape
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.swiglu_quant.decode_kernel import spec


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
    """Writes the result of `swiglu_quant` to `out`; `limit` is infinite for none, weights are interleaved, hopper."""
    experts, k = weights.codes.shape[0], weights.shape[-1]
    quantized = isinstance(a, NVFP4Tensor)
    tiles = gemm_decode_host.tiles_for(out.codes.shape[0], experts, k)
    dec = weights.global_scale_dec
    launcher(Shape(tiles, quantized, row_index is not None), Target.SM90)(
        weights.codes,
        weights.scales.view(torch.uint8),
        dec.view(-1),
        *gemm_decode_host.operands(a, offsets, row_index),
        enc.view(1) if row_weight is None else row_weight,
        enc.view(1),
        out.codes,
        out.scales.view(torch.uint8),
        out.global_scale_dec.view(1),
        k,
        int(isinstance(a, NVFP4Tensor) and a.scale_layout == "128x4"),
        decode_limits.ring_stages(weights.codes.shape[2] * 2, tiles),
        dec.numel() // experts if dec.ndim else 0,
        int(dec.ndim == 2),
        int(row_weight is not None),
        int(out.scale_layout == "128x4"),
        limit,
        gemm_decode_host.ctas(offsets.device),
    )


@functools.cache
def launcher(shape: Shape, target: Target) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(spec(shape, target))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [spec(shape, Target.SM90) for shape in gemm_decode_host.SHAPES]
