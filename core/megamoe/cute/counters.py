"""Zeros that every launch of a kernel leaves as it finds them, so that no call has to write them first.

A counter that its last arrival sets back to 0 can serve the next launch that does not overlap with this one. Launches
on a stream do not overlap, so a stream has counters of its own; nor do replays of a graph with themselves, so every
call that is captured takes counters which nobody else ever gets.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_FEWEST = 4096  # counters of a stream
_RESERVE = 1 << 20  # counters of a device for calls that are captured, 4 MB
_lock = threading.Lock()
_of_stream: dict[tuple[str, torch.device, int], Tensor] = {}
_reserves: dict[torch.device, Tensor] = {}  # what is left of them


def counters(user: str, count: int, like: Tensor) -> Tensor:
    """Zeros for one launch on the current stream.

    Args:
        user: Of a stream's counters: a kernel whose launches do not count while another of them does.
        count: How many.
        like: Gives the device.

    Returns:
        int32 (count,), to be left as zeros. While a graph is captured and the reserve is used up, or before any call
        made one, zeros that the graph writes at every replay.
    """
    device = like.device
    if not like.is_cuda:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            left = _reserves.get(device)
            if left is not None and len(left) >= count:
                _reserves[device] = left[count:]
                return left[:count]
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = (user, device, torch.cuda.current_stream(device).cuda_stream)
    own = _of_stream.get(stream)
    if own is None or len(own) < count:
        own = torch.zeros(max(count, _FEWEST), dtype=torch.int32, device=device)
        with _lock:
            _of_stream[stream] = own
            if device not in _reserves:
                _reserves[device] = torch.zeros(_RESERVE, dtype=torch.int32, device=device)
                torch.cuda.synchronize(device)  # once: graphs may be replayed on other streams
    return own[:count]
