"""What `grouped_gemm` accepts and returns, and how far a variant may be from the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, bucket, check_multiple, check_nvfp4, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe.testing.cases import Bound

BOUNDS: Mapping[str, Bound] = {
    "out": Bound(
        rel_l2=2**-8,
        reason="a library GEMM that returns bf16 rounds before alpha too: with the reference's own, three roundings of "
        "at most 2^-8 / sqrt(3) rms each",
    )
}


class Problem(NamedTuple):
    """Facts that choosing a variant may look at; see the spec of `problem`."""

    device: torch.device
    dtype: torch.dtype  # of the result
    quantized: bool  # the activations are NVFP4
    experts: int
    rows: int  # bucket of M
    n: int
    k: int
    scale_layout: str  # of the weights
    a_scale_layout: str  # of the activations, empty when they are plain
    alphas: int  # dims of the weights' global scale: 0 shared, 1 an expert, 2 an expert and part


def check(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor) -> None:
    """Checks the arguments of `grouped_gemm` by their metadata alone.

    Raises:
        ArgumentError: Wrong type, dtype, shape, device or strides, or K not a multiple of 16.
    """
    if isinstance(a, NVFP4Tensor):
        check_nvfp4("a", a, ("rows", "K"))
        if a.global_scale_dec.ndim:
            raise ArgumentError("a.global_scale_dec", f"shape {tuple(a.global_scale_dec.shape)}", "()")
        data = a.codes
    else:
        check_tensor("a", a, ("rows", "K"), ACTIVATIONS)
        check_multiple("a", a.shape[1], BLOCK, "values along the last dim")
        data = a
    check_nvfp4("weights", weights, ("experts", "N", a.shape[1]), like=data)
    check_tensor("offsets", offsets, (weights.codes.shape[0] + 1,), [torch.int32], like=data)


def problem(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor) -> Problem:
    """The facts of one call; attribute reads only."""
    experts, n, half = weights.codes.shape
    alphas = weights.global_scale_dec.ndim
    if isinstance(a, NVFP4Tensor):
        rows, dtype, quantized, a_layout = a.codes.shape[0], torch.bfloat16, True, a.scale_layout
    else:
        rows, dtype, quantized, a_layout = a.shape[0], a.dtype, False, ""
    return fast_problem(
        Problem,
        (offsets.device, dtype, quantized, experts, bucket(rows), n, half * 2, weights.scale_layout, a_layout, alphas),
    )


def fake(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor) -> Tensor:
    """An empty result (M, N) of the right dtype."""
    rows = a.codes.shape[0] if isinstance(a, NVFP4Tensor) else a.shape[0]
    return offsets.new_empty((rows, weights.codes.shape[1]), dtype=out_dtype(a))


def out_dtype(a: Tensor | NVFP4Tensor) -> torch.dtype:
    """bf16 for NVFP4 activations, else the activations' own dtype."""
    return torch.bfloat16 if isinstance(a, NVFP4Tensor) else a.dtype
