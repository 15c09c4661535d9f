"""megamoe: NVFP4 fused kernels for mixture-of-experts inference, each used only where it has been proven."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Decision, Role, Stage, Variant

if TYPE_CHECKING:
    from megamoe.ops import Op, op, use
    from megamoe.runtime import explain

__all__ = ["Arch", "Decision", "Op", "Role", "Stage", "Variant", "explain", "hookimpl", "op", "use"]
__version__ = "0.1.0"
_LAZY = {"Op": "ops", "op": "ops", "use": "ops", "explain": "runtime"}  # `ops` imports torch


def __getattr__(name: str) -> Any:
    """Imports torch, plugins and registry only once something that needs them is asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"megamoe.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
