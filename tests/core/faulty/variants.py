"""Variants with one fault each, named after it; the ones that end the process do so in the case of five rows."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

_calls = itertools.count()


def reference(x: Tensor, factor: float | None = None) -> Tensor:
    return x * 2.0


def fallback(x: Tensor, factor: float | None = None) -> Tensor:
    return x + x


def good(x: Tensor, factor: float | None = None) -> Tensor:
    out = torch.empty_like(x)
    return torch.add(x, x, out=out)


def past_the_end(x: Tensor, factor: float | None = None) -> Tensor:
    out = good(x)
    out.as_strided((out.numel() + 2,), (1,))[-2:] = 0
    return out


def before_the_start(x: Tensor, factor: float | None = None) -> Tensor:
    out = good(x)
    out.as_strided((1,), (1,), out.storage_offset() - 1)[:] = 0
    return out


def unwritten(x: Tensor, factor: float | None = None) -> Tensor:
    out = torch.empty_like(x)
    out[:-1] = 2 * x[:-1]
    return out


def nondeterministic(x: Tensor, factor: float | None = None) -> Tensor:
    return good(x) * (1 + 1e-6 * next(_calls))


def mutates(x: Tensor, factor: float | None = None) -> Tensor:
    out = good(x)
    x[0, 0] = 0
    return out


def dtype(x: Tensor, factor: float | None = None) -> Tensor:
    return good(x).double()


def shape(x: Tensor, factor: float | None = None) -> Tensor:
    return good(x).reshape(-1)


def strides(x: Tensor, factor: float | None = None) -> Tensor:
    return good(x.t().contiguous()).t()


def inexact(x: Tensor, factor: float | None = None) -> Tensor:
    return x * 2.1


def nans(x: Tensor, factor: float | None = None) -> Tensor:
    return torch.full_like(x, torch.nan)


def other_type(x: Tensor, factor: float | None = None) -> Any:
    return [good(x)]


def raises(x: Tensor, factor: float | None = None) -> Tensor:
    raise ValueError("no such layout\nand more")


def raises_when_timed(x: Tensor, factor: float | None = None) -> Tensor:
    if x.shape[0] == 5 and next(_calls) >= 2:
        raise MemoryError("the third call")
    return good(x)


def exits(x: Tensor, factor: float | None = None) -> Tensor:
    if x.shape[0] == 5:
        os._exit(0)
    return good(x)


def segfaults(x: Tensor, factor: float | None = None) -> Tensor:
    if x.shape[0] == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    return good(x)


def hangs(x: Tensor, factor: float | None = None) -> Tensor:
    time.sleep(3600)
    return good(x)
