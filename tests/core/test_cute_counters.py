"""Who shares counters with whom; streams and captures are pretended, tensors lie on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.cute import counters as module
from megamoe.cute.counters import counters

LIKE: Any = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)


class Gpu:
    """What the module asks torch.cuda for."""

    def __init__(self) -> None:
        self.capturing, self.stream, self.waits = False, 1, 0

    def wait(self, _: torch.device) -> None:
        self.waits += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    fake = Gpu()
    monkeypatch.setattr(module, "_of_stream", {})
    monkeypatch.setattr(module, "_reserves", {})
    monkeypatch.setattr(module, "_RESERVE", 72)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=fake.stream))
    monkeypatch.setattr(torch.cuda, "synchronize", fake.wait)
    return fake


def shared(a: Tensor, b: Tensor) -> bool:
    """Whether two ranges of counters overlap."""
    low, high = sorted((a, b), key=lambda t: t.data_ptr())
    return high.data_ptr() < low.data_ptr() + 4 * len(low)


def test_a_stream_and_a_kernel_have_counters_of_their_own(gpu: Gpu) -> None:
    first = counters("a", 8, LIKE)
    assert shared(first, counters("a", 3, LIKE))
    assert not shared(first, counters("b", 8, LIKE))
    gpu.stream = 2
    assert not shared(first, counters("a", 8, LIKE))
    assert gpu.waits == 1


def test_more_counters_than_a_stream_had_are_zeros(gpu: Gpu) -> None:
    counters("a", 8, LIKE).fill_(7)
    more = counters("a", 5000, LIKE)
    assert (len(more), int(more.sum())) == (5000, 0)


def test_captured_calls_never_share(gpu: Gpu) -> None:
    eager = counters("a", 8, LIKE)
    gpu.capturing = True
    captured = [counters("a", 16, LIKE) for _ in range(5)]  # the fifth finds too little left
    for i, one in enumerate(captured):
        assert (len(one), int(one.sum())) == (16, 0)
        assert not shared(one, eager)
        assert not any(shared(one, other) for other in captured[:i])
    assert gpu.waits == 1


def test_a_capture_before_any_call_takes_nothing_from_a_stream(gpu: Gpu) -> None:
    gpu.capturing = True
    captured = counters("a", 8, LIKE)
    gpu.capturing = False
    assert not shared(captured, counters("a", 8, LIKE))
    assert gpu.waits == 1
