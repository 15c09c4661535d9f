"""Memory that tells on a variant: guard bytes round every buffer, poison in every fresh one, inputs under watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.numerics.nvfp4 import NVFP4Tensor

GUARD_BYTES = 4096  # on either side; keeps the alignment of the buffer between
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.empty_like.default,
}


class Guarded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, every `torch.empty` and its kin comes from a larger buffer that is filled with one byte.

    A kernel that leaves part of its output unwritten, or reads memory that nothing wrote, gives different results under
    two different bytes; one that writes past the end changes the guards.

    Args:
        poison: The byte.
    """

    def __init__(self, poison: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.poison = poison
        self._buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return self.wrap(out, copy=False) if func in _EMPTY and isinstance(out, Tensor) else out

    def wrap(self, tensor: Tensor, *, copy: bool = True) -> Tensor:
        """A tensor like this one between guards; `copy` keeps its values, otherwise it is poisoned."""
        if not tensor.numel():
            return tensor
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = span * tensor.element_size()
        whole = -(-size // 16) * 16
        with torch.utils._python_dispatch._disable_current_modes():
            buffer = torch.full((whole + 2 * GUARD_BYTES,), self.poison, dtype=torch.uint8, device=tensor.device)
            self._buffers.append((buffer, size))
            inner = buffer[GUARD_BYTES : GUARD_BYTES + whole].view(tensor.dtype)
            guarded = inner.as_strided(tensor.shape, tensor.stride(), inner.storage_offset())
            if copy:
                guarded.copy_(tensor)
        return guarded

    def overruns(self) -> list[str]:
        """A line for each buffer whose guard bytes changed."""
        found = []
        for buffer, size in self._buffers:
            before, after = buffer[:GUARD_BYTES], buffer[GUARD_BYTES + size :]
            for side, guard in (("before", before), ("after", after)):
                changed = int((guard != self.poison).sum())
                if changed:
                    found.append(f"{changed} bytes written {side} a buffer of {size} bytes")
        return found


def guarded_inputs(arguments: Mapping[str, Any], guard: Guarded) -> dict[str, Any]:
    """The arguments, each tensor between guards."""
    return {name: _map(value, guard.wrap) for name, value in arguments.items()}


def changed_inputs(
    arguments: Mapping[str, Any], originals: Mapping[str, Any], allowed: tuple[str, ...] = ()
) -> list[str]:
    """Names of arguments that are no longer what they were, but for those that the op may write to."""
    return [
        name
        for name, value in arguments.items()
        if name not in allowed and not _same(tensors(value), tensors(originals[name]))
    ]


def aliases(outputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Names of outputs that lie in the memory of an argument."""
    taken = {t.untyped_storage().data_ptr() for value in arguments.values() for t in tensors(value) if t.numel()}
    return [
        name
        for name, value in outputs.items()
        if any(t.numel() and t.untyped_storage().data_ptr() in taken for t in tensors(value))
    ]


def clone(value: Any) -> Any:
    """A copy of a tensor or NVFP4Tensor; anything else as it is."""
    return _map(value, torch.clone)


def same_bytes(left: Any, right: Any) -> bool:
    """Whether two outputs are equal byte for byte, NaN and all."""
    return _same(tensors(left), tensors(right))


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, NVFP4Tensor):
        parts = (function(t) for t in tensors(value))
        codes, scales, dec = parts
        return NVFP4Tensor(codes, scales, dec, value.scale_layout)
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors that a value is made of: itself, an NVFP4Tensor's three, none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, NVFP4Tensor):
        return [value.codes, value.scales, value.global_scale_dec]
    return []


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_raw(a), _raw(b))
        for a, b in zip(left, right, strict=True)
    )


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
