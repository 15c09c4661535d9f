"""The host side of the grouped GEMM for many rows an expert: packs the activations where it must, then multiplies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.cute import compiler, pack, split_sums, weight_pieces
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.counters import counters
from megamoe.cute.weight_pieces import BLOCK_K, STAGE_K, Shape
from megamoe.numerics.fragments import padded_shape
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe_stages.grouped_gemm import prefill_kernel

FEW_TOKENS = 64  # of a piece for one expert, up to which the tensor cores are not what takes longest
STAGE_CLOCKS, TOKEN_CLOCKS = (475, 100), (6.5, 8)  # of a stage, and of each of its tokens; the same beyond FEW_TOKENS
SPLIT_CLOCKS = 20  # more for a stage of those that may be shared
SHARE_CLOCKS, PART_CLOCKS, SUMS_CLOCKS = 3000, 150, 10  # of a piece that is shared, its parts, their tokens
CLUSTER_TURNS, CLUSTER_TILES = 3, 8  # of all CTAs, and of tokens, from either of which on clusters gain,
CLUSTER_GAIN = 0.01  # and how much; before they lose as much
GROUPS_IN_FLIGHT = 3  # of a tile whose tokens do not come in halves
MOST_ROWS = (30, 56)  # of an expert on average, for the two narrower shapes


def run(a: Tensor | NVFP4Tensor, weights: NVFP4Tensor, offsets: Tensor, row_index: Tensor | None, out: Tensor) -> None:
    """One launch or two on the current stream, no synchronisation; see `reference.grouped_gemm`.

    Args:
        a: bf16 or NVFP4 activations.
        weights: In the hopper layout.
        offsets: int32 (E + 1).
        row_index: int32 (M,) or None.
        out: bf16 (M, N), written; M is not 0.
    """
    experts = weights.codes.shape[0]
    plain = isinstance(a, Tensor) and row_index is None and a.shape[1] % BLOCK_K == 0
    dense = experts == 1 and (plain or isinstance(a, NVFP4Tensor))
    shape, ctas, sharing, tiles = cut(out.shape[0], weights, processors(out.device), dense=dense)
    split = sharing > 1
    sums = torch.empty(split * ctas * split_sums.sums_bytes(shape) // 4, dtype=torch.float32, device=out.device)
    arrived = counters("weight_gemm", ctas // sharing * weight_pieces.CONSUMER_WARPS if split else 1, out)
    shape = _reading(shape, direct=shape.dense and isinstance(a, Tensor))
    tokens = a if shape.direct else pack_rows(a, offsets, row_index, out.shape[0], weights.shape[-1], shape)
    alpha = weights.global_scale_dec
    parts = 0 if alpha.ndim == 0 else alpha.numel() // experts
    dec = a.global_scale_dec if isinstance(a, NVFP4Tensor) else alpha.view(-1)[0]
    launch = _launcher(isinstance(a, NVFP4Tensor), out.shape[1] % 8 == 0, shape)
    codes, scales = weights.codes, weights.scales.view(torch.uint8)
    launch(codes, scales, tokens, offsets, alpha.view(-1), dec, out, sums, arrived, parts, ctas, sharing, tiles)


def pack_rows(
    a: Tensor | NVFP4Tensor,
    offsets: Tensor,
    row_index: Tensor | None,
    rows: int,
    k: int,
    shape: Shape,
) -> Tensor:
    """Activations as `cute.pack` lays them out, bf16 (padded K / 64, capacity, 64)."""
    capacity = weight_pieces.packed_capacity(rows, offsets.shape[0] - 1, shape.tokens)
    packed = torch.empty((padded_shape(1, k)[1] // 64, capacity, 64), dtype=torch.bfloat16, device=offsets.device)
    index = offsets if row_index is None else row_index
    if isinstance(a, NVFP4Tensor):
        kind, values, scales = a.scale_layout, a.codes, a.scales.view(torch.uint8)
    else:
        kind, values, scales = "bfloat16", a, a.view(torch.uint8)
    parts = pack.parts_of(rows, k)
    _packer(kind, row_index is not None)(values, scales, index, offsets, packed, rows, parts)
    return packed


class Cut(NamedTuple):
    """How the work is cut.

    Attributes:
        shape: Of the kernel.
        ctas: How many.
        sharing: How many of them share the k of a piece; then no CTA has more than one piece.
        tiles: Of the tokens of one expert.
    """

    shape: Shape
    ctas: int
    sharing: int = 1
    tiles: int = 1


def cut(rows: int, weights: NVFP4Tensor, sms: int, *, dense: bool) -> Cut:
    """How the work is cut; one expert may have fewer pieces than there are SMs, then several CTAs share the k of each.

    Args:
        rows: Of the result.
        weights: In the hopper layout.
        sms: Of the device.
        dense: There is one expert, and its activations are NVFP4 or come by a tensor map.
    """
    experts, n, stages = weights.codes.shape[0], weights.codes.shape[1], weights.codes.shape[2] * 2 // STAGE_K
    if not dense:
        return Cut(shape_for(rows, experts), sms)
    return _dense_cut(rows, n, stages, sms)


@functools.lru_cache(maxsize=4096)
def _dense_cut(rows: int, n: int, stages: int, sms: int) -> Cut:
    """The cheapest way for one expert of n padded rows, by what its parts cost where they were measured."""
    found = []
    for shape, most in ((dense, width) for dense in prefill_kernel.DENSE for width in dense.widths):
        tiles = -(-rows // most)
        pieces = -(-n // (shape.rows * shape.cluster)) * shape.cluster * tiles
        width = next(w for w in shape.widths if w * tiles >= rows)
        for sharing in range(1, max(1, min(sms // pieces, stages) * shape.split) + 1):
            ctas = min(sms // shape.cluster * shape.cluster, pieces * sharing)
            turns = -(-pieces * sharing // ctas)
            clocks = turns * -(-stages // sharing) * _stage_clocks(shape, width)
            if sharing > 1:
                clocks += SHARE_CLOCKS + (PART_CLOCKS + SUMS_CLOCKS * width) * sharing
            if shape.cluster > 1:
                gains = turns >= CLUSTER_TURNS or tiles >= CLUSTER_TILES
                clocks *= 1 - CLUSTER_GAIN if gains else 1 + CLUSTER_GAIN
            found.append((clocks, Cut(shape, ctas, sharing, tiles)))
    return min(found, key=lambda pair: pair[0])[1]


def _stage_clocks(shape: Shape, width: int) -> float:
    """What 128 of k of a piece cost."""
    few, many = (
        clocks + of_token * width * shape.tiles for clocks, of_token in zip(STAGE_CLOCKS, TOKEN_CLOCKS, strict=True)
    )
    return few if width <= FEW_TOKENS else many + SPLIT_CLOCKS * shape.split


def shape_for(rows: int, experts: int) -> Shape:
    """How the work on so many rows is cut."""
    return prefill_kernel.EXPERTS[width_class(rows, experts)]


def width_class(rows: int, experts: int) -> int:
    """Which of the shapes for experts suits so many rows."""
    return sum(rows > most * experts for most in MOST_ROWS)


def _reading(shape: Shape, *, direct: bool) -> Shape:
    """A shape whose activations come as they are, or packed; those no cluster shares, nor do they come in halves."""
    if direct:
        return shape._replace(direct=True)
    in_flight = GROUPS_IN_FLIGHT if shape.halves else shape.in_flight
    return shape._replace(cluster=1, halves=False, ahead=False, in_flight=in_flight)


@functools.cache
def processors(device: torch.device) -> int:
    """SMs of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _launcher(quantized: bool, aligned: bool, shape: Shape) -> Callable[..., None]:
    return compiler.load(prefill_kernel.spec(quantized, aligned, shape))


@functools.cache
def _packer(kind: str, indexed: bool) -> Callable[..., None]:
    return compiler.load(pack.spec(kind, indexed))


def kernels() -> list[KernelSpec]:
    """What `megamoe compile` compiles."""
    packers = [pack.spec(kind, indexed) for kind in pack.KINDS for indexed in (False, True)]
    shapes = *prefill_kernel.EXPERTS, *prefill_kernel.DENSE
    flags = itertools.product((False, True), (False, True))
    gemms = [
        prefill_kernel.spec(quantized, aligned, shape)
        for quantized, aligned in flags
        for shape in dict.fromkeys(_reading(shape, direct=shape.dense and not quantized) for shape in shapes)
    ]
    return [*packers, *gemms]
