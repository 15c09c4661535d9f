"""What `grouped_gemm` accepts and returns, and how far a variant may be from the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, bucket, check_multiple, check_nvfp4, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.numerics import fragments
from megamoe.numerics.fragments import HOPPER
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
    scale_layout: str  # of the weights; "hopper" for its padded form too
    a_scale_layout: str  # of the activations, empty when they are plain
    alphas: int  # dims of the weights' global scale: 0 shared, 1 an expert, 2 an expert and part
    part_rows: int  # weight rows that share a global scale of their own, 0 where an expert has one or none
    indexed: bool  # rows are gathered by an index


def check(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None) -> None:
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
    check_nvfp4("weights", weights, ("experts", "N", a.shape[1]), like=data, hopper=True)
    check_tensor("offsets", offsets, (weights.codes.shape[0] + 1,), [torch.int32], like=data)
    if row_index is not None:
        check_tensor("row_index", row_index, ("M",), [torch.int32], like=data)


def problem(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None) -> Problem:
    """The facts of one call; attribute reads only."""
    experts = weights.codes.shape[0]
    n, k = logical_size(weights)
    alphas = weights.global_scale_dec.ndim
    if isinstance(a, NVFP4Tensor):
        dtype, quantized, a_layout = torch.bfloat16, True, a.scale_layout
    else:
        dtype, quantized, a_layout = a.dtype, False, ""
    rows = rows_of(a, row_index)
    return fast_problem(
        Problem,
        (
            offsets.device,
            dtype,
            quantized,
            experts,
            bucket(rows),
            n,
            k,
            layout_kind(weights),
            a_layout,
            alphas,
            part_rows(weights),
            row_index is not None,
        ),
    )


def logical_size(weights: NVFP4Tensor) -> tuple[int, int]:
    """N and K of weights (E, N, K), attribute reads only where their layout hides nothing."""
    _, rows, half = weights.codes.shape
    layout = weights.scale_layout
    return (rows, half * 2) if ":" not in layout else fragments.logical_size(layout, rows, half * 2)


def part_rows(weights: NVFP4Tensor) -> int:
    """Rows that share one of an expert's several global scales; 0 where it has one, or all experts share one."""
    dec = weights.global_scale_dec
    return logical_size(weights)[0] // dec.shape[1] if dec.ndim == 2 else 0


def layout_kind(weights: NVFP4Tensor) -> str:
    """The scale layout, without the size that a padded hopper layout tells."""
    return HOPPER if weights.scale_layout.startswith(HOPPER) else weights.scale_layout


def rows_of(a: Tensor | NVFP4Tensor, row_index: Tensor | None) -> int:
    """M, the rows of the result."""
    if row_index is not None:
        return row_index.shape[0]
    return a.codes.shape[0] if isinstance(a, NVFP4Tensor) else a.shape[0]


def fake(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None = None) -> Tensor:
    """An empty result (M, N) of the right dtype."""
    return offsets.new_empty((rows_of(a, row_index), logical_size(weights)[0]), dtype=out_dtype(a))


def out_dtype(a: Tensor | NVFP4Tensor) -> torch.dtype:
    """bf16 for NVFP4 activations, else the activations' own dtype."""
    return torch.bfloat16 if isinstance(a, NVFP4Tensor) else a.dtype
