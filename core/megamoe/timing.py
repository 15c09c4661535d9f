"""Times callables beside each other, interleaved so that clocks and caches treat them alike; medians, microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

L2_FLUSH_BYTES = 256 << 20  # several times the L2 of an H200 (60 MB), so that inputs come from memory


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    *,
    rounds: int = 21,
    warmup: int = 3,
    max_seconds: float = 5.0,
) -> dict[str, float]:
    """Median time of each function over `rounds` turns, one call of each a turn.

    Args:
        functions: Name to callable; each must do its work on `device`.
        device: On CUDA each call is timed by events after the L2 was overwritten; elsewhere by the clock.
        rounds: Turns; at least three are made, fewer than asked when `max_seconds` is over.
        warmup: Untimed turns before (compilation, allocation).
        max_seconds: Budget for the timed turns.

    Returns:
        Name to median microseconds.
    """
    timer = _cuda_timer(torch.device(device)) if torch.device(device).type == "cuda" else _clock
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + max_seconds
    for turn in range(rounds):
        for name, function in functions.items():
            times[name].append(timer(function))
        if turn >= 2 and time.perf_counter() > deadline:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def queued(
    functions: Mapping[str, Sequence[Callable[[], Any]]],
    *,
    calls: int = 20,
    rounds: int = 7,
    most_us: float = 20_000.0,
    fewest: int = 3,
    lead: int = 100_000,
) -> dict[str, float]:
    """Time per call of work that is launched back to back, as in a running model: launch gaps stay out of it.

    A sleep on the device lets the host run ahead; then `calls` calls go out between two events, taking turns over the
    copies of a function (one a set of inputs, so that together they do not fit the L2). Rounds are interleaved.

    Args:
        functions: Name to copies of one function.
        calls: Calls between two events; at most about 1000 fit the launch queue.
        rounds: Turns.
        most_us: Of work between two events: slow functions make fewer calls.
        fewest: Calls that they make at least.
        lead: Clocks that the device sleeps for each call: what the host may take for it.

    Returns:
        Name to median microseconds a call.
    """
    counts: dict[str, int] = {}
    for name, copies in functions.items():
        for function in copies:
            function()
        counts[name] = max(fewest, min(calls, int(most_us / _queued_once(copies, 1, lead))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, copies in functions.items():
            times[name].append(_queued_once(copies, counts[name], lead))
    return {name: statistics.median(values) for name, values in times.items()}


def _queued_once(copies: Sequence[Callable[[], Any]], calls: int, lead: int) -> float:
    """Microseconds a call, of so many calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(2_000_000 + lead * calls)  # type: ignore[no-untyped-call]
    start.record()
    for i in range(calls):
        copies[i % len(copies)]()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / calls


def _clock(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def timer(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]  # the host runs ahead: launch gaps stay out
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    return timer
