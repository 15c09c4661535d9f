"""Fixtures of the core's tests: temporary packages that can be imported, and an empty set of built-in stages."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

from tests.core.builders import write_package

MakePackage = Callable[[Mapping[str, str]], str]
_numbers = itertools.count()

hypothesis.settings.register_profile("core", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("core")


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePackage]:
    """Writes a package from module names and sources, makes it importable, and returns its name."""
    made: list[str] = []

    def make(files: Mapping[str, str]) -> str:
        name = f"made_up_{next(_numbers)}"
        write_package(tmp_path / "packages", name, files)
        made.append(name)
        importlib.invalidate_caches()
        return name

    (tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield make
    for module in [m for m in sys.modules if m.partition(".")[0] in made]:
        del sys.modules[module]


@pytest.fixture
def no_stages(make_package: MakePackage) -> str:
    """Name of a package without stages, to stand for the built-in ones."""
    return make_package({})
