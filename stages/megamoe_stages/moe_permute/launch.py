"""`moe_permute` as one launch: the host side, and what `megamoe compile` compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import target_of
from megamoe.errors import ArgumentError
from megamoe_stages.moe_permute import contract, kernel, limits
from megamoe_stages.moe_permute.contract import Permutation


def moe_permute(indices: Tensor, experts: int) -> Permutation:
    """See the reference, which defines the op; one launch on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, and for what `limits.supports` names.
    """
    contract.check(indices, experts)
    if reasons := limits.supports({"experts": experts, "visits": indices.numel()}):
        raise ArgumentError("moe_permute", "; ".join(reasons), "what this kernel supports")
    if not indices.is_cuda:
        raise ArgumentError("indices", f"device {indices.device}", "a CUDA device")
    out = contract.fake(indices, experts)
    if not indices.numel():
        out.offsets.zero_()
        return out
    launch = _launcher(kernel.cut(indices.numel()), indices.element_size(), target_of(indices.device))
    # of an int64 the low word is the number
    launch(indices.view(torch.int32).view(-1), out.tokens, out.rows.view(-1), out.offsets, indices.shape[1])
    return out


@functools.cache
def _launcher(shape: kernel.Shape, index_bytes: int, target: Target) -> Callable[..., None]:
    return compiler.load(kernel.spec(shape, index_bytes, target))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    return [
        kernel.spec(shape, index_bytes, target)
        for target in (Target.SM90, Target.SM100)
        for shape in kernel.SHAPES
        for index_bytes in (4, 8)
    ]
