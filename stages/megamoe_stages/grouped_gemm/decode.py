"""The host side of grouped_gemm for few rows an expert."""

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
from megamoe_stages.grouped_gemm.decode_kernel import spec


def run(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None, out: Tensor) -> None:
    """Writes the result of `grouped_gemm` to `out`; arguments as `decode_limits.refuses` and the contract want them."""
    n, k = weights.shape[-2:]
    experts = weights.codes.shape[0]
    quantized = isinstance(a, NVFP4Tensor)
    rows = out.shape[0]
    tiles = gemm_decode_host.tiles_for(rows, experts, k)
    dec = weights.global_scale_dec
    operands = gemm_decode_host.operands(a, offsets, row_index)
    parts = dec.shape[1] if dec.ndim == 2 else 1
    launcher(Shape(tiles, quantized, row_index is not None), Target.SM90)(
        weights.codes,
        weights.scales.view(torch.uint8),
        dec.view(-1),
        *operands,
        out,
        k,
        int(isinstance(a, NVFP4Tensor) and a.scale_layout == "128x4"),
        decode_limits.ring_stages(weights.codes.shape[2] * 2, tiles),
        dec.numel() // experts if dec.ndim else 0,
        parts,
        n // parts,
        gemm_decode_host.ctas(out.device),
    )


@functools.cache
def launcher(shape: Shape, target: Target) -> Callable[..., None]:
    """The compiled kernel."""
    return compiler.load(spec(shape, target))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [spec(shape, Target.SM90) for shape in gemm_decode_host.SHAPES]
