"""What the host side of quantising kernels shares: room for the result, and what can be read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe.numerics.layout import padded_shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor

ALIGNMENT = 16  # bytes that a thread loads at once
_TARGETS = {9: Target.SM90, 10: Target.SM100}  # by the major number of the compute capability


def check_readable(name: str, tensor: Tensor) -> None:
    """Raises ArgumentError unless a kernel can read the data, 16 bytes at a time."""
    if not tensor.is_cuda:
        raise ArgumentError(name, f"device {tensor.device}", "a CUDA device")
    if tensor.data_ptr() % ALIGNMENT:
        raise ArgumentError(name, f"data at {tensor.data_ptr():#x}", f"an address that is a multiple of {ALIGNMENT}")


def empty_result(shape: tuple[int, ...], global_scale_enc: Tensor, scale_layout: str) -> NVFP4Tensor:
    """Room for an NVFP4 result.

    Args:
        shape: Logical (..., rows, K).
        global_scale_enc: fp32 (), on the device of the result.
        scale_layout: "linear" or "128x4".

    Returns:
        NVFP4Tensor, contents undefined.
    """
    *batch, rows, k = shape
    cols = k // BLOCK
    tail = padded_shape(rows, cols) if scale_layout == "128x4" else (rows, cols)
    codes = global_scale_enc.new_empty((*batch, rows, k // 2), dtype=torch.uint8)
    scales = global_scale_enc.new_empty((*batch, *tail), dtype=torch.float8_e4m3fn)
    return NVFP4Tensor(codes, scales, torch.empty_like(global_scale_enc), scale_layout)


def dtype_name(tensor: Tensor) -> str:
    """Name of a tensor's dtype, "bfloat16" for torch.bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


@functools.cache
def target_of(device: torch.device) -> Target:
    """What to compile for on a GPU, where one function serves all architectures.

    Raises:
        ArgumentError: No kernel is compiled for that device.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _TARGETS:
        raise ArgumentError("device", f"{device} of sm_{major}{minor}", "one of sm_90 or sm_100")
    return _TARGETS[major]
