"""Changes to single module instances that can be taken back exactly; classes and other models stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class Patches:
    """Attributes and hooks set on modules, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, module: nn.Module, name: str, value: Callable[..., Any]) -> None:
        """Sets an attribute of the instance, such as its `forward`; `value` must not be a module or a parameter."""
        before = module.__dict__.get(name, _ABSENT)

        def restore() -> None:
            if before is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

        module.__dict__[name] = value
        self._undo.append(restore)

    def hook(self, module: nn.Module, run: Callable[..., Any]) -> None:
        """Adds a forward hook."""
        self._undo.append(module.register_forward_hook(run).remove)

    def pre_hook(self, module: nn.Module, run: Callable[..., Any]) -> None:
        """Adds a forward pre-hook."""
        self._undo.append(module.register_forward_pre_hook(run).remove)

    @property
    def active(self) -> bool:
        """Whether there is anything to take back."""
        return bool(self._undo)

    def undo(self) -> None:
        """Takes everything back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
