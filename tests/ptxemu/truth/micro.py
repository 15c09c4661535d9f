"""What a micro-kernel is: PTX, arguments, which of them are results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n"


@dataclass(frozen=True)
class Micro:
    """A kernel `k` whose parameters are all pointers.

    Attributes:
        name: Unique; the key in the recording.
        ptx: Text for sm_90a.
        arguments: Makes the arrays, the same ones each time; results start as zeros or as what is accumulated to.
        outputs: Which arguments are recorded.
        grid, block, cluster: Numbers of CTAs, threads, and CTAs of a cluster.
        rows: What each row of the result is of, for scalar kernels.
        group: Kind of kernel, which says how results are compared.
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
