"""A case: inputs for an op that can be made again on any device, and how far a variant may be from the reference."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor


@dataclass(frozen=True, slots=True)
class Bound:
    """How far one output may be from the reference's.

    Attributes:
        rel_l2: Largest ||out - ref|| / ||ref|| of the (dequantised) values; 0 asks for every byte equal.
        reason: Why it is not 0, in a line.
    """

    rel_l2: float = 0.0
    reason: str = ""


EXACT = Bound()


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs.

    Attributes:
        make: `make(generator, **params)` returns the op's arguments by name, on the CPU.
        params: Sizes and switches, shown to people.
        bounds: Output name to Bound; overrides the stage's BOUNDS.
        gpu_only: Too large for a CPU test run.
        bench: Also timed by `megamoe bench`.
    """

    make: Callable[..., dict[str, Any]]
    params: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    gpu_only: bool = False
    bench: bool = False

    def inputs(self, name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The arguments of case `name`: the same values on every device and in every process."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return {key: to_device(value, device) for key, value in self.make(generator, **self.params).items()}


def to_device(value: Any, device: torch.device | str) -> Any:
    """Moves tensors and NVFP4Tensors; anything else stays what it is."""
    return value.to(device) if isinstance(value, Tensor | NVFP4Tensor) else value
