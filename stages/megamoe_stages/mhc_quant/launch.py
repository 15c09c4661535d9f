"""The host side of the two fused mhc_quant kernels, for every architecture; H decides which one runs."""

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
from megamoe_stages.mhc_quant import contract, limits, narrow_kernel, narrow_places, wide_cut, wide_kernel
from megamoe_stages.mhc_quant.contract import MhcOutput
from megamoe_stages.mhc_quant.narrow_places import Shape
from megamoe_stages.mhc_quant.wide_cut import Cut

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
) -> MhcOutput:
    """See `reference.mhc_quant`; launched on the current stream, no synchronisation.

    Raises:
        ArgumentError: As the reference, for what `limits.supports` names, for a tensor that is not aligned to 16 bytes,
            and where the device has no room for one cluster of CTAs.
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
    if hidden > limits.SMALL and hidden not in (*limits.NARROW, *limits.WIDE):
        _refuse(contract.problem(*tensors, **options))  # type: ignore[arg-type]
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
        shape = cut(hidden)
        clusters = min(-(-tokens // shape.group), clusters_at_once(shape.ctas, x.device))
        numbers = (sinkhorn_iters, hc_eps, norm_eps, int(tiled), clusters)
        _launcher(shape, norm_weight.dtype, target)(*tensors, *outputs, *numbers)
    else:
        torch.reciprocal(global_scale_enc, out=dec)
    quantized = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), dec, scale_layout)
    return MhcOutput(residual, normed, quantized, new_post, new_comb)


@functools.cache
def cut(hidden: int) -> Shape | Cut:
    """How the work is cut for H hidden dims that `limits.supports` lets pass."""
    return wide_cut.cut(hidden) if hidden in limits.WIDE else narrow_places.cut(hidden)


@functools.cache
def clusters_at_once(ctas: int, device: torch.device) -> int:
    """Clusters of CTAs with all the shared memory there is that run at once; more would wait for their whole turn.

    Raises:
        ArgumentError: Not one does, as in a slice of a GPU.
    """
    from cutlass.utils import HardwareInfo

    index = torch.cuda.current_device() if device.index is None else device.index
    found = int(HardwareInfo(index).get_max_active_clusters(ctas))
    if found < 1:
        raise ArgumentError(
            "x", f"{device}, where no cluster of {ctas} CTAs fits", f"a device with room for one of {ctas}"
        )
    return found


@functools.cache
def _launcher(shape: Shape | Cut, norm_dtype: torch.dtype, target: Target) -> Callable[..., None]:
    return compiler.load(_spec(shape, str(norm_dtype).removeprefix("torch."), target))


def _spec(shape: Shape | Cut, norm_dtype: str, target: Target) -> compiler.KernelSpec:
    if isinstance(shape, Cut):
        return wide_kernel.spec(shape, norm_dtype, target)
    return narrow_kernel.spec(shape, norm_dtype, target)


def _refuse(problem: contract.Problem) -> None:
    facts = {key: value for key, value in problem._asdict().items() if key not in ("device", "dtype", "norm_dtype")}
    facts["dtype"] = str(problem.dtype).removeprefix("torch.")
    raise ArgumentError("mhc_quant", "; ".join(limits.supports(facts)), "what this kernel supports")


def kernels(target: Target) -> list[compiler.KernelSpec]:
    """What `megamoe compile` compiles: DeepSeek-V4 Flash and Pro, both dtypes of norm weights, one of each other kind.

    Not the kind of slices that are not whole on sm_100a, where one register does not find room: see NOTES.md.
    """
    sizes = [(hidden, norm_dtype) for hidden in (4096, 7168) for norm_dtype in ("float32", "bfloat16")]
    sizes += [(2048, "float32"), (1024, "bfloat16"), (512, "float32"), (256, "float32"), (256, "bfloat16")]
    if target is Target.SM90:
        sizes.append((208, "float32"))
    return [_spec(cut(hidden), norm_dtype, target) for hidden, norm_dtype in sizes]
