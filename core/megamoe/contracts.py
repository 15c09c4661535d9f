"""What the contracts of the stages share: checks of arguments with one wording, and buckets for problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics import fragments
from megamoe.numerics.layout import padded_shape
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, check_scale_layout

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)
Dim = int | str | None
E4M3Tensor = Annotated[Tensor, torch.float8_e4m3fn]  # how an op's signature says that a tensor holds E4M3


# A NamedTuple from a tuple, without the generated __new__: `problem` runs on every call, and this halves its cost.
fast_problem = tuple.__new__


def bucket(count: int) -> int:
    """The next power of two: problems of like size share a plan, so plans stay few while row counts vary."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[Dim],
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
) -> None:
    """Checks one tensor argument.

    Args:
        name: The parameter's name, for the message.
        value: What came.
        shape: One entry a dim: a size, a name for any size ("tokens"), or None. A leading "..." takes any dims.
        dtypes: Accepted dtypes.
        like: Must be on the same device.

    Raises:
        ArgumentError: Not a tensor, or of another dtype, shape, device or not contiguous.
    """
    if not isinstance(value, Tensor):
        raise ArgumentError(name, type(value).__name__, "a torch.Tensor")
    if value.dtype not in dtypes:
        raise ArgumentError(name, _dtype(value.dtype), " or ".join(_dtype(d) for d in dtypes))
    if not _fits(value.shape, shape):
        raise ArgumentError(name, f"shape {tuple(value.shape)}", f"({', '.join(map(str, shape))})")
    if like is not None and value.device != like.device:
        raise ArgumentError(name, f"device {value.device}", str(like.device))
    if not value.is_contiguous():
        raise ArgumentError(name, f"strides {value.stride()}", "a contiguous tensor")


def _fits(have: torch.Size, want: Sequence[Dim]) -> bool:
    """Whether a shape is the wanted one; a loop without copies, since every call of every variant comes here."""
    skip = len(have) - len(want)
    if want and want[0] == "...":
        skip += 1
        want = want[1:]
        if skip < 0:
            return False
    elif skip:
        return False
    for index, size in enumerate(want, skip):  # noqa: SIM110 (a generator costs a microsecond more)
        if isinstance(size, int) and have[index] != size:
            return False
    return True


def check_nvfp4(
    name: str, value: object, shape: Sequence[Dim], *, like: Tensor | None = None, hopper: bool = False
) -> None:
    """Checks one NVFP4Tensor argument against a logical shape of at least two dims; see `check_tensor`.

    The layouts of `numerics.fragments` are accepted where `hopper` says so.
    """
    if not isinstance(value, NVFP4Tensor):
        raise ArgumentError(name, type(value).__name__, "an NVFP4Tensor")
    if hopper and fragments.is_fragments(value.scale_layout):
        tail = _check_hopper(name, value, shape, like)
    else:
        packed = [*shape[:-1], shape[-1] // 2 if isinstance(shape[-1], int) else shape[-1]]
        check_tensor(f"{name}.codes", value.codes, packed, [torch.uint8], like=like)
        check_multiple(f"{name}.codes", value.codes.shape[-1] * 2, BLOCK, "values along the last dim")
        check_scale_layout(value.scale_layout, f"{name}.scale_layout")
        rows, cols = value.shape[-2], value.shape[-1] // BLOCK
        tail = padded_shape(rows, cols) if value.scale_layout == "128x4" else (rows, cols)
    *batch, rows, _ = value.shape
    check_tensor(f"{name}.scales", value.scales, [*batch, *tail], [torch.float8_e4m3fn], like=value.codes)
    dec = value.global_scale_dec
    if not isinstance(dec, Tensor) or dec.dtype != torch.float32:
        raise ArgumentError(f"{name}.global_scale_dec", _kind(dec), "a float32 tensor")
    check_global_scale(f"{name}.global_scale_dec", dec, batch, rows, like=value.codes)


def _check_hopper(name: str, value: NVFP4Tensor, shape: Sequence[Dim], like: Tensor | None) -> tuple[int, int]:
    """Checks the codes of a tensor in a hopper layout; the shape that its scales must end in."""
    check_tensor(f"{name}.codes", value.codes, [None] * len(shape), [torch.uint8], like=like)
    if not _fits(value.shape, shape):
        raise ArgumentError(name, f"shape {tuple(value.shape)}", f"({', '.join(map(str, shape))})")
    rows, k = value.shape[-2:]
    full_rows, full_k = fragments.padded_shape(rows, k)
    expected = (*value.shape[:-2], full_rows, full_k // 2)
    if tuple(value.codes.shape) != expected or value.scale_layout != fragments.layout_name(rows, k):
        got = f"shape {tuple(value.codes.shape)} in layout {value.scale_layout!r}"
        raise ArgumentError(f"{name}.codes", got, f"{expected} in layout {fragments.layout_name(rows, k)!r}")
    return full_rows, full_k // BLOCK


def check_global_scale(
    name: str, value: object, batch: Sequence[int], rows: int, *, like: Tensor | None = None
) -> None:
    """Checks a global scale: fp32 of shape (), `batch`, or `batch` and parts that divide `rows`."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        raise ArgumentError(name, _kind(value), "a float32 tensor")
    shape, b = tuple(value.shape), tuple(batch)
    parts = len(shape) == len(b) + 1 and shape[:-1] == b and shape[-1] > 0 and rows % shape[-1] == 0
    if shape not in ((), b) and not parts:
        raise ArgumentError(name, f"shape {shape}", f"(), {b} or {(*b, 'parts')} with parts dividing {rows} rows")
    if like is not None and value.device != like.device:
        raise ArgumentError(name, f"device {value.device}", str(like.device))
    if not value.is_contiguous():
        raise ArgumentError(name, f"strides {value.stride()}", "a contiguous tensor")


def check_multiple(name: str, size: int, of: int, what: str) -> None:
    """Raises ArgumentError unless `size` is a positive multiple of `of`."""
    if size <= 0 or size % of:
        raise ArgumentError(name, f"{size} {what}", f"a positive multiple of {of}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(value: object) -> str:
    return _dtype(value.dtype) if isinstance(value, Tensor) else type(value).__name__
