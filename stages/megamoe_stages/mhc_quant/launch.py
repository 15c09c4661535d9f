"""The host side of the fused mhc_quant kernel, the same for every architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megamoe.cute import compiler
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe.numerics.layout import padded_shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe_stages.mhc_quant import contract, kernel, limits, prefill_kernel, prefill_mix
from megamoe_stages.mhc_quant.contract import MhcOutput
from megamoe_stages.mhc_quant.places import GROUP, Shape
from megamoe_stages.mhc_quant.prefill_cut import Cut

ALIGNMENT = 16  # bytes that a thread loads at once


def mhc_quant(
    target: Target,
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale_enc: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    scale_layout: str,
    many: bool = False,
) -> MhcOutput:
    """See `reference.mhc_quant`; one launch on the current stream, no synchronisation; `many` picks the kernel.

    Raises:
        ArgumentError: As the reference, for what `limits.supports` or `limits.supports_many` names, and for a tensor
            that is not aligned to 16 bytes.
    """
    tensors = (x, f, post, comb, fn, base, scale, norm_weight, global_scale_enc)
    options = {
        "sinkhorn_iters": sinkhorn_iters,
        "hc_eps": hc_eps,
        "norm_eps": norm_eps,
        "scale_layout": scale_layout,
    }
    contract.check(*tensors, **options)  # type: ignore[arg-type]
    tokens, streams, hidden = x.shape
    if x.dtype != torch.bfloat16 or streams != limits.STREAMS or tokens * hidden > limits.MAX_VALUES:
        _refuse(contract.problem(*tensors, **options))  # type: ignore[arg-type]
    if hidden > limits.SMALL and hidden not in limits.CTAS:
        _refuse(contract.problem(*tensors, **options))  # type: ignore[arg-type]
    if many and hidden not in limits.MANY_HIDDEN:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"H of {limits.MANY_HIDDEN}")
    for name, tensor in zip(("x", "f", "post", "comb", "fn", "norm_weight"), (*tensors[:5], norm_weight), strict=True):
        if tensor.data_ptr() % ALIGNMENT:
            raise ArgumentError(
                name, f"data at {tensor.data_ptr():#x}", f"an address that is a multiple of {ALIGNMENT}"
            )
    cols = hidden // BLOCK
    residual, normed, new_post, new_comb = (torch.empty_like(tensor) for tensor in (x, f, post, comb))
    codes = x.new_empty((tokens, hidden // 2), dtype=torch.uint8)
    tiled = scale_layout == "128x4"
    scales = x.new_empty(padded_shape(tokens, cols) if tiled else (tokens, cols), dtype=torch.uint8)
    dec = torch.empty_like(global_scale_enc)
    if tokens:
        outputs = (residual, normed, codes, scales, dec, new_post, new_comb)
        numbers = (sinkhorn_iters, hc_eps, norm_eps, int(tiled))
        groups = (tokens + GROUP - 1) // GROUP
        if many:
            parts = cut_for_many(hidden)
            pieces = x.new_empty(prefill_mix.piece_bytes(hidden), dtype=torch.uint8)
            _launcher_of_order(target)(fn, pieces)
            batches = -(-tokens // parts.batch)
            sets = min(batches, _clusters(parts.ctas, x.device))
            _launcher_for_many(parts, norm_weight.dtype, target)(*tensors, *outputs, pieces, *numbers, sets)
        else:
            shape = cut(hidden)
            launch = _launcher(shape, norm_weight.dtype, target)
            launch(*tensors, *outputs, *numbers, min(groups, _clusters(shape.ctas, x.device)))
    else:
        torch.reciprocal(global_scale_enc, out=dec)
    quantized = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), dec, scale_layout)
    return MhcOutput(residual, normed, quantized, new_post, new_comb)


@functools.cache
def cut(hidden: int) -> Shape:
    """The shape for H hidden dims."""
    covered = limits.covered(hidden)
    teams, warps, parts = limits.TEAMS.get(covered, 4), limits.WARPS.get(covered, 4), limits.PARTS.get(covered, 10)
    shape = Shape(limits.CTAS[covered], teams, warps, parts, whole=False)
    return shape._replace(whole=shape.covers == hidden)


@functools.cache
def cut_for_many(hidden: int) -> Cut:
    """The cut of the kernel for many tokens, for H of `limits.MANY_HIDDEN`."""
    return Cut(hidden, 2, 2, 256)


@functools.cache
def _clusters(ctas: int, device: torch.device) -> int:
    """Clusters of CTAs with all the shared memory there is that run at once; more would wait for their whole turn."""
    from cutlass.utils import HardwareInfo

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(HardwareInfo(index).get_max_active_clusters(ctas))


@functools.cache
def _launcher(shape: Shape, norm_dtype: torch.dtype, target: Target) -> Callable[..., None]:
    return compiler.load(kernel.spec(shape, str(norm_dtype).removeprefix("torch."), target))


@functools.cache
def _launcher_for_many(cut: Cut, norm_dtype: torch.dtype, target: Target) -> Callable[..., None]:
    return compiler.load(prefill_kernel.spec(cut, str(norm_dtype).removeprefix("torch."), target))


@functools.cache
def _launcher_of_order(target: Target) -> Callable[..., None]:
    return compiler.load(prefill_mix.spec(target))


def _refuse(problem: contract.Problem) -> None:
    facts = {key: value for key, value in problem._asdict().items() if key not in ("device", "dtype", "norm_dtype")}
    facts["dtype"] = str(problem.dtype).removeprefix("torch.")
    raise ArgumentError("mhc_quant", "; ".join(limits.supports(facts)), "what this kernel supports")


def kernels(target: Target) -> list[compiler.KernelSpec]:
    """What `megamoe compile` compiles: DeepSeek-V4 Flash and Pro, and one of each other kind.

    Not the kind of slices that are not whole on sm_100a, where one register does not find room: see NOTES.md.
    """
    cuts = [(4096, "float32"), (7168, "float32"), (2048, "float32"), (256, "float32"), (256, "bfloat16")]
    if target is Target.SM90:
        cuts.append((208, "float32"))
    return [kernel.spec(cut(hidden), norm_dtype, target) for hidden, norm_dtype in cuts]


def kernels_for_many(target: Target) -> list[compiler.KernelSpec]:
    """The same for many tokens."""
    cuts = [(4096, "float32"), (7168, "float32"), (2048, "float32"), (1024, "bfloat16")]
    return [prefill_kernel.spec(cut_for_many(hidden), norm_dtype, target) for hidden, norm_dtype in cuts]
