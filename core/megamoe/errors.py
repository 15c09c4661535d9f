"""Every error a user can cause, each naming what was wrong, what came and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MegamoeError(Exception):
    """Base of all errors that megamoe raises on purpose; the command line prints them as one line."""


class ArgumentError(MegamoeError, ValueError):
    """An argument of an op or a function does not fit.

    Args:
        argument: Name of the offending argument.
        got: What came, in words ("float64", "shape (3, 5)").
        expected: What would have been accepted.
    """

    def __init__(self, argument: str, got: object, expected: str) -> None:
        super().__init__(f"{argument}: got {got}, expected {expected}")
        self.argument = argument
        self.got = got
        self.expected = expected


class UnknownNameError(MegamoeError, KeyError):
    """A name that nothing carries; the message offers the nearest one that exists."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = nearest(name, names)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"no {kind} {name!r}; {hint}")
        self.kind = kind
        self.name = name
        self.nearest = near

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0])


class ConfigError(MegamoeError, ValueError):
    """The configuration (file, environment or argument) cannot be used."""


class RegistryError(MegamoeError, ValueError):
    """registry.toml, or an evidence record, contradicts itself or the code."""


class PluginError(MegamoeError):
    """A plugin declares something the core cannot accept."""


class CheckpointError(MegamoeError, ValueError):
    """A model folder is missing a piece, or holds one that does not fit."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    names = list(known)
    found = difflib.get_close_matches(name.lower(), [k.lower() for k in names], n=1, cutoff=0.5)
    return next((k for k in names if found and k.lower() == found[0]), None)
