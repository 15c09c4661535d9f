"""The host side of the grouped GEMM for many rows an expert: packs the activations, then multiplies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megamoe.cute import compiler, pack, weight_gemm
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.weight_gemm import STAGE_K, Shape
from megamoe.numerics.fragments import padded_shape
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.grouped_gemm import prefill_kernel

CLUSTERS = (2, 4, 8)
STAGE_CLOCKS, TOKEN_CLOCKS = 850, 13  # of a stage, and of each of its tokens; measured at 16 to 104
EXCHANGE_CLOCKS = 5000  # supposed
MOST_ROWS = (30, 56)  # of an expert on average, for the two narrower shapes


def run(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None, out: Tensor) -> None:
    """Two launches on the current stream, no synchronisation; see `reference.grouped_gemm`.

    Args:
        a: bf16 or NVFP4 activations.
        weights: In the hopper layout.
        offsets: int32 (E + 1).
        row_index: int32 (M,) or None.
        out: bf16 (M, N), written; M is not 0.
    """
    experts = weights.codes.shape[0]
    shape, ctas, cluster = cut(out.shape[0], weights, processors(out.device), clusters(out.device))
    packed = pack_rows(a, offsets, row_index, out.shape[0], weights.shape[-1], shape)
    alpha = weights.global_scale_dec
    parts = 0 if alpha.ndim == 0 else alpha.numel() // experts
    dec = a.global_scale_dec if isinstance(a, NVFP4Tensor) else alpha.view(-1)[0]
    launch = _launcher(isinstance(a, NVFP4Tensor), out.shape[1] % 8 == 0, shape)
    codes, scales = weights.codes, weights.scales.view(torch.uint8)
    launch(codes, scales, packed, offsets, alpha.view(-1), dec, out, parts, ctas, cluster)


def pack_rows(
    a: Tensor | NVFP4Tensor, offsets: Tensor, row_index: Tensor | None, rows: int, k: int, shape: Shape
) -> Tensor:
    """Activations as `cute.pack` lays them out: bf16 (padded K / 64, capacity, 64)."""
    capacity = weight_gemm.packed_capacity(rows, offsets.shape[0] - 1, shape.tokens)
    packed = torch.empty((padded_shape(1, k)[1] // 64, capacity, 64), dtype=torch.bfloat16, device=offsets.device)
    index = offsets if row_index is None else row_index
    if isinstance(a, NVFP4Tensor):
        kind, values, scales = a.scale_layout, a.codes, a.scales.view(torch.uint8)
    else:
        kind, values, scales = "bfloat16", a, a.view(torch.uint8)
    parts = pack.parts_of(rows, k)
    _packer(kind, row_index is not None)(values, scales, index, offsets, packed, rows, parts)
    return packed


def cut(rows: int, weights: NVFP4Tensor, sms: int, most_clusters: Mapping[int, int]) -> tuple[Shape, int, int]:
    """How the work is cut, over how many CTAs, and how many of these share a piece.

    One expert may have fewer pieces than there are SMs: then a cluster of up to 8 CTAs divides the k of each, if all
    clusters can run at the same time.

    Args:
        rows: Of the result.
        weights: In the hopper layout.
        sms: Of the device.
        most_clusters: How many clusters of each size can run at the same time.
    """
    experts, n, stages = weights.codes.shape[0], weights.codes.shape[1], weights.codes.shape[2] * 2 // STAGE_K
    shape = shape_for(rows, experts)
    if experts > 1:
        return shape, sms, 1
    best = (shape, sms, 1)
    least = math.inf
    for dense in prefill_kernel.DENSE:
        tiles = -(-rows // dense.tokens)
        pieces = -(-n // weight_gemm.ROWS) * tiles
        width = next(w for w in dense.widths if w * tiles >= rows)
        for cluster in (1, *(c for c, most in most_clusters.items() if c <= stages and pieces <= most)):
            turns = -(-pieces * cluster // sms) * -(-stages // cluster)
            cost = turns * (STAGE_CLOCKS + TOKEN_CLOCKS * width) + EXCHANGE_CLOCKS * (cluster > 1)
            if cost < least:
                chosen = dense if cluster > 1 else prefill_kernel.NARROW if dense.tokens == 64 else prefill_kernel.WIDE
                least, best = cost, (chosen, pieces * cluster if cluster > 1 else sms, cluster)
    return best


def shape_for(rows: int, experts: int) -> Shape:
    """How the work on so many rows is cut."""
    shapes = prefill_kernel.SPARSE, prefill_kernel.NARROW, prefill_kernel.WIDE
    return shapes[narrowness(rows, experts)]


def narrowness(rows: int, experts: int) -> int:
    """0 where few rows go to an expert on average, 1 for some, 2 for many."""
    return sum(rows > most * experts for most in MOST_ROWS)


@functools.cache
def processors(device: torch.device) -> int:
    """SMs of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def clusters(device: torch.device) -> dict[int, int]:
    """How many of each size can run at the same time, a CTA an SM: the chip's parts make it fewer than SMs / size."""
    from cutlass.utils import HardwareInfo  # knows the device once torch has made its context

    info = HardwareInfo(device.index or 0)
    return {size: int(info.get_max_active_clusters(size)) for size in CLUSTERS}


@functools.cache
def _launcher(quantized: bool, aligned: bool, shape: Shape) -> Callable[..., None]:
    return compiler.load(prefill_kernel.spec(quantized, aligned, shape))


@functools.cache
def _packer(kind: str, indexed: bool) -> Callable[..., None]:
    return compiler.load(pack.spec(kind, indexed))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    packers = [pack.spec(kind, indexed) for kind in pack.KINDS for indexed in (False, True)]
    return [
        *packers,
        *(
            prefill_kernel.spec(quantized, aligned, shape)
            for quantized in (False, True)
            for aligned in (False, True)
            for shape in (prefill_kernel.SPARSE, prefill_kernel.NARROW, prefill_kernel.WIDE, *prefill_kernel.DENSE)
        ),
    ]
