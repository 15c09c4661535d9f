from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.contracts import check_tensor
from megamoe.testing.cases import Bound

BOUNDS = {"out": Bound(0.01, "made up")}


class Problem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rows: int
    factor: float | None


def check(x: Tensor, factor: float | None = None) -> None:
    check_tensor("x", x, ["rows", "K"], [torch.float32])


def problem(x: Tensor, factor: float | None = None) -> Problem:
    return Problem(x.device, x.dtype, x.size(0), factor)


def fake(x: Tensor, factor: float | None = None) -> Tensor:
    return torch.empty_like(x)
