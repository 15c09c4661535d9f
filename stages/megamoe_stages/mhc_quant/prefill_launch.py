"""The host side of the mhc_quant kernel for many tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe_stages.mhc_quant import launch, limits, prefill_kernel, prefill_mix
from megamoe_stages.mhc_quant.prefill_cut import Cut


def run(
    target: Target, tensors: tuple[Tensor, ...], outputs: tuple[Tensor, ...], numbers: tuple[int | float, ...]
) -> None:
    """Launches the kernel that brings fn in order, and behind it the kernel for many tokens; see `launch.mhc_quant`.

    Raises:
        ArgumentError: For hidden dims that are not of `limits.MANY_HIDDEN`.
    """
    x, fn, norm_weight = tensors[0], tensors[4], tensors[7]
    tokens, _, hidden = x.shape
    if hidden not in limits.MANY_HIDDEN:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"H of {limits.MANY_HIDDEN}")
    parts = cut(hidden)
    pieces = x.new_empty(prefill_mix.piece_bytes(hidden), dtype=torch.uint8)
    _order(target)(fn, pieces)
    sets = min(-(-tokens // parts.batch), launch.clusters_at_once(parts.ctas, x.device))
    _launcher(parts, norm_weight.dtype, target)(*tensors, *outputs, pieces, *numbers, sets)


@functools.cache
def cut(hidden: int) -> Cut:
    """The cut for H of `limits.MANY_HIDDEN`: rows of 512 bytes, or 256 where y takes the room of a tile's fn."""
    return Cut(hidden, 2, 2, 256, 1) if hidden <= 4096 else Cut(hidden, 2, 4, 128, 1)


@functools.cache
def _order(target: Target) -> Callable[..., None]:
    return compiler.load(prefill_mix.spec(target))


@functools.cache
def _launcher(parts: Cut, norm_dtype: torch.dtype, target: Target) -> Callable[..., None]:
    return compiler.load(prefill_kernel.spec(parts, str(norm_dtype).removeprefix("torch."), target))


def kernels(target: Target) -> list[compiler.KernelSpec]:
    """What `megamoe compile` compiles: DeepSeek-V4 Flash and Pro, and one of each other kind."""
    cuts = [(4096, "float32"), (7168, "float32"), (2048, "float32"), (1024, "bfloat16")]
    found = [prefill_kernel.spec(cut(hidden), norm_dtype, target) for hidden, norm_dtype in cuts]
    return [prefill_mix.spec(target), *found]
