"""The host side that the ops on `gemm_decode` share: which kernel, and its operands."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from megamoe.cute.decode_limits import SLICES, ring_stages
from megamoe.cute.gemm_decode import Shape
from megamoe.numerics.nvfp4 import NVFP4Tensor

TILES = (1, 2)  # of 8 columns; three were slower, four want more registers than there are
SHAPES = [Shape(*flags) for flags in itertools.product(TILES, (False, True), (False, True))]


def tiles_for(rows: int, experts: int, k: int) -> int:
    """Columns of a pass, in units of 8: enough for most experts when rows go to them at random."""
    return 2 if rows > 4 * experts and ring_stages(k, 2) >= SLICES else 1


def operands(a: Tensor | NVFP4Tensor, offsets: Tensor, row_index: Tensor | None) -> tuple[Tensor, ...]:
    """Activations, their scales and global scale, offsets, row index; what is not read is some other tensor."""
    index = offsets if row_index is None else row_index
    if isinstance(a, NVFP4Tensor):
        return a.codes, a.scales.view(torch.uint8).view(-1), a.global_scale_dec.view(1), offsets, index
    return a, _no_scales(a.device), _one(a.device), offsets, index


@functools.cache
def ctas(device: torch.device) -> int:
    """As many as SMs: a CTA takes all the shared memory of one."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


@functools.cache
def _no_scales(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device=device)
