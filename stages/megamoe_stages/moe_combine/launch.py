"""`moe_combine` as one launch: the host side, and what `megamoe compile` compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import check_readable, dtype_name, target_of
from megamoe.errors import ArgumentError
from megamoe_stages.moe_combine import contract, kernel, limits


def moe_combine(outputs: Tensor, rows: Tensor, weights: Tensor, *, dtype: str | None = None) -> Tensor:
    """See the reference, which defines the op; one launch on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names, and outputs not aligned to 16 bytes.
    """
    contract.check(outputs, rows, weights, dtype=dtype)
    if reasons := limits.supports({"tokens": rows.shape[0], "hidden": outputs.shape[1]}):
        raise ArgumentError("outputs", "; ".join(reasons), "what this kernel supports")
    check_readable("outputs", outputs)
    out = contract.fake(outputs, rows, weights, dtype=dtype)
    if rows.numel():
        _launcher(dtype_name(outputs), dtype_name(out), target_of(outputs.device))(outputs, rows, weights, out)
    return out


@functools.cache
def _launcher(dtype: str, out_dtype: str, target: Target) -> Callable[..., None]:
    return compiler.load(kernel.spec(dtype, out_dtype, target))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [
        kernel.spec(dtype, out_dtype, target)
        for target in (Target.SM90, Target.SM100)
        for dtype in kernel.DTYPES
        for out_dtype in kernel.DTYPES
    ]
