"""What a micro-kernel is: PTX, arguments, which of them are results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptxemu.tensor.kernels import tensor_map

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n"


@dataclass(frozen=True)
class Map:
    """A tensor map over one of a kernel's arrays; dimension 0 is the contiguous one.

    Attributes:
        argument: Position of the array.
        kind: Data type, a key of `tests.ptxemu.tensor.kernels.TYPE`.
        sizes, box: Elements of each dimension.
        strides: Bytes of dimensions 1 and up.
        swizzle: A key of `tests.ptxemu.tensor.kernels.SWIZZLE`.
        steps: Element strides.
        nan: Elements out of bounds are NaN.
    """

    argument: int
    kind: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: str = "none"
    steps: tuple[int, ...] = ()
    nan: bool = False

    def encode(self, address: int) -> bytes:
        """The 128 bytes for an array at an address."""
        given = {"swizzle": self.swizzle, "steps": self.steps or None, "nan": self.nan}
        out: bytes = tensor_map(address, self.kind, self.sizes, self.strides, self.box, **given)
        return out


@dataclass(frozen=True)
class Micro:
    """A kernel `k` whose parameters are tensor maps and then pointers.

    Attributes:
        name: Unique; the key in the recording.
        ptx: Text for sm_90a.
        arguments: Makes the arrays, the same ones each time; results start as zeros or as what is accumulated to.
        outputs: Which arguments are recorded.
        grid, block, cluster: Numbers of CTAs, threads, and CTAs of a cluster.
        rows: What each row of the result is of, for scalar kernels.
        group: Kind of kernel, which says how results are compared.
        maps: Tensor maps over the arrays.
    """

    name: str
    ptx: str
    arguments: Callable[[], list[NDArray[np.generic]]]
    outputs: tuple[int, ...]
    grid: int = 1
    block: int = 32
    cluster: int = 1
    rows: tuple[str, ...] = ()
    group: str = ""
    maps: tuple[Map, ...] = ()

    def parameters(self, arrays: list[NDArray[np.generic]]) -> list[Any]:
        """What the kernel is called with: the encoded maps, the arrays."""
        return [*(m.encode(arrays[m.argument].ctypes.data) for m in self.maps), *arrays]
