"""The host side of the mhc_quant kernel for many tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe_stages.mhc_quant import launch, limits, prefill_kernel
from megamoe_stages.mhc_quant.prefill_cut import Cut


def run(
    target: Target, tensors: tuple[Tensor, ...], outputs: tuple[Tensor, ...], numbers: tuple[int | float, ...]
) -> None:
    """Launches the kernel for many tokens; see `launch.mhc_quant`.

    Raises:
        ArgumentError: For hidden dims that are not of `limits.MANY_HIDDEN`.
    """
    x, norm_weight = tensors[0], tensors[7]
    tokens, _, hidden = x.shape
    if hidden not in limits.MANY_HIDDEN:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"H of {limits.MANY_HIDDEN}")
    parts = cut(hidden)
    sets = min(-(-tokens // parts.group), launch.clusters_at_once(parts.ctas, x.device))
    _launcher(parts, norm_weight.dtype, target)(*tensors, *outputs, *numbers, sets)


@functools.cache
def cut(hidden: int) -> Cut:
    """The cut for H of `limits.MANY_HIDDEN`: fn of 448 hidden dims leaves room for fewer tokens."""
    return Cut(16, 7, 8, 4, 25) if hidden > 4096 else Cut(hidden // 256, 4, 16, 4, 21)


@functools.cache
def _launcher(parts: Cut, norm_dtype: torch.dtype, target: Target) -> Callable[..., None]:
    return compiler.load(prefill_kernel.spec(parts, str(norm_dtype).removeprefix("torch."), target))


def kernels(target: Target) -> list[compiler.KernelSpec]:
    """What `megamoe compile` compiles: DeepSeek-V4 Flash and Pro, and one of each other kind."""
    cuts = [(4096, "float32"), (7168, "float32"), (2048, "float32"), (1024, "bfloat16")]
    return [prefill_kernel.spec(cut(hidden), norm_dtype, target) for hidden, norm_dtype in cuts]
