"""Switches and isolation for the whole test run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["megamoe.testing.plugin"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the exhaustive sweeps")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="an exhaustive sweep; run with --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _own_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither this machine's evidence nor its configuration decides a test."""
    folder: Path = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("MEGAMOE_")]:
            patch.delenv(name)
        patch.setenv("MEGAMOE_EVIDENCE_DIR", str(folder / "evidence"))
        patch.setenv("MEGAMOE_PLUGINS", "0")
        yield
