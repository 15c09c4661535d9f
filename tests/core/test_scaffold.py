"""`megamoe new`: what it writes passes the checks, and the registry keeps its comments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe import registry
from megamoe.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout to `megamoe new`."""
    for name in ("registry.toml", "ROADMAP.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "stages" / "megamoe_stages").mkdir(parents=True)
    monkeypatch.setenv("MEGAMOE_REGISTRY", str(tmp_path / "registry.toml"))
    return tmp_path


def test_a_new_stage_passes_the_checks(checkout: Path) -> None:
    assert main(["new", "row_scale", "--item", "NVFP4-9", "--title", "Scale rows."]) == 0
    folder = checkout / "stages" / "megamoe_stages" / "row_scale"
    written = [*folder.glob("*.py"), checkout / "tests" / "stages" / "test_row_scale.py"]
    assert len(written) == 6
    assert (folder / "NOTES.md").is_file()
    environ = {**os.environ, "MYPYPATH": f"{ROOT / 'core'}:{checkout / 'stages'}"}
    for command in (
        ["ruff", "check", "--config", str(ROOT / "pyproject.toml")],
        ["ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml")],
        ["mypy", "--strict", "--follow-imports=silent", "--explicit-package-bases", "--namespace-packages"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command, *map(str, written)],
            cwd=checkout,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_registry_gets_its_item_and_keeps_its_comments(checkout: Path) -> None:
    before = (checkout / "registry.toml").read_text()
    assert main(["new", "row_scale", "--item", "NVFP4-9"]) == 0
    after = (checkout / "registry.toml").read_text()
    assert after.startswith(before.rstrip("\n").splitlines()[0])
    assert [line for line in before.splitlines() if line.startswith("#")] == [
        line for line in after.splitlines() if line.startswith("#")
    ]
    item = registry.load(checkout / "registry.toml").item["NVFP4-9"]
    assert (item.stage, item.status, item.title) == ("row_scale", "planned", "row scale")


def test_an_existing_item_is_left_as_it_is(checkout: Path) -> None:
    before = (checkout / "registry.toml").read_text()
    assert main(["new", "row_scale", "--item", "NVFP4-3"]) == 0
    assert (checkout / "registry.toml").read_text() == before
