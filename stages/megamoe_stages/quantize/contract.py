"""What `quantize` accepts, which of its facts a choice may look at, and what its output looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, bucket, check_global_scale, check_multiple, check_tensor, fast_problem
from megamoe.numerics.layout import padded_shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, check_four_over_six, check_scale_layout, check_zero_guard
from megamoe.testing.cases import EXACT, Bound

BOUNDS: Mapping[str, Bound] = {"out": EXACT}


class Problem(NamedTuple):
    """What choosing a variant may depend on.

    Attributes:
        device: Where x lives.
        dtype: Of x.
        k: Values along the last dim.
        rows: All rows of all batch entries, as a bucket.
        entries: Batch entries, as a bucket; 1 where there is no batch.
        scale_dims: Dims of the global scale; -1 where it is taken from x.
        scale_layout: As asked.
        fast: As asked.
        zero_guard: As asked.
        four_over_six: As asked.
    """

    device: torch.device
    dtype: torch.dtype
    k: int
    rows: int
    entries: int
    scale_dims: int
    scale_layout: str
    fast: bool
    zero_guard: str
    four_over_six: str | None


def check(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> None:
    """Raises ArgumentError unless the arguments fit; see `reference.quantize`."""
    check_tensor("x", x, ["...", "rows", "K"], ACTIVATIONS)
    check_multiple("x", x.shape[-1], BLOCK, "values along the last dim")
    if global_scale_enc is not None:
        check_global_scale("global_scale_enc", global_scale_enc, x.shape[:-2], x.shape[-2], like=x)
    check_scale_layout(scale_layout)
    check_zero_guard(zero_guard)
    check_four_over_six(four_over_six)


def problem(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> Problem:
    """The facts of these arguments."""
    k = x.size(-1)
    scale_dims = -1 if global_scale_enc is None else global_scale_enc.ndim
    rows, entries = bucket(x.numel() // k), 1 if x.ndim == 2 else bucket(x.shape[:-2].numel())
    return fast_problem(
        Problem, (x.device, x.dtype, k, rows, entries, scale_dims, scale_layout, fast, zero_guard, four_over_six)
    )


def fake(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> NVFP4Tensor:
    """An output of the right shapes and dtypes, contents undefined."""
    *batch, rows, k = x.shape
    tail = padded_shape(rows, k // BLOCK) if scale_layout == "128x4" else (rows, k // BLOCK)
    return NVFP4Tensor(
        x.new_empty((*batch, rows, k // 2), dtype=torch.uint8),
        x.new_empty((*batch, *tail), dtype=torch.float8_e4m3fn),
        x.new_empty(() if global_scale_enc is None else global_scale_enc.shape, dtype=torch.float32),
        scale_layout,
    )


def bytes_moved(
    x: Tensor,
    global_scale_enc: Tensor | None = None,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> int:
    """Bytes read and written once: x, half a byte a code, a byte a block scale (padding left out)."""
    return x.numel() * x.element_size() + x.numel() // 2 + x.numel() // BLOCK
