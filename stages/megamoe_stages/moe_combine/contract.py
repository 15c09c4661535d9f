"""What `moe_combine` accepts, which of its facts a choice may look at, and what its output looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import ACTIVATIONS, bucket, check_tensor, fast_problem
from megamoe.errors import ArgumentError
from megamoe.testing.cases import EXACT, Bound

BOUNDS: Mapping[str, Bound] = {"out": EXACT}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Problem(NamedTuple):
    """What choosing a variant may depend on."""

    device: torch.device
    dtype: torch.dtype  # of the experts' outputs
    tokens: int  # bucket of T
    top_k: int
    hidden: int
    out_dtype: torch.dtype


def check(outputs: Tensor, rows: Tensor, weights: Tensor, *, dtype: str | None = None) -> None:
    """Raises ArgumentError unless the arguments fit; see `reference.moe_combine`."""
    check_tensor("outputs", outputs, ("rows", "H"), ACTIVATIONS)
    check_tensor("rows", rows, ("tokens", "k"), [torch.int32], like=outputs)
    check_tensor("weights", weights, tuple(rows.shape), [torch.float32], like=outputs)
    if not rows.shape[1] or not outputs.shape[1]:
        name, tensor = ("rows", rows) if not rows.shape[1] else ("outputs", outputs)
        raise ArgumentError(name, f"shape {tuple(tensor.shape)}", "at least one column")
    if rows.shape[0] and not outputs.shape[0]:
        raise ArgumentError("outputs", "no rows", f"the rows of {rows.shape[0]} tokens")
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError("dtype", repr(dtype), f"None or one of {', '.join(map(repr, DTYPES))}")


def problem(outputs: Tensor, rows: Tensor, weights: Tensor, *, dtype: str | None = None) -> Problem:
    """The facts of these arguments."""
    tokens, top_k = rows.shape
    out_dtype = outputs.dtype if dtype is None else DTYPES[dtype]
    return fast_problem(Problem, (outputs.device, outputs.dtype, bucket(tokens), top_k, outputs.shape[1], out_dtype))


def fake(outputs: Tensor, rows: Tensor, weights: Tensor, *, dtype: str | None = None) -> Tensor:
    """An empty result (T, H)."""
    out_dtype = outputs.dtype if dtype is None else DTYPES[dtype]
    return outputs.new_empty((rows.shape[0], outputs.shape[1]), dtype=out_dtype)


def bytes_moved(outputs: Tensor, rows: Tensor, weights: Tensor, *, dtype: str | None = None) -> int:
    """Bytes read and written once: a row for each visit, and the result."""
    size = (outputs if dtype is None else torch.empty(0, dtype=DTYPES[dtype])).element_size()
    hidden = outputs.shape[1]
    return rows.numel() * (hidden * outputs.element_size() + 8) + rows.shape[0] * hidden * size
