"""The wheel: holds what the package reads at run time, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def call(unpacked: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command line of the wheel, run in its own folder, which comes before the checkout on the path."""
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "megamoe", *argv]
    return subprocess.run(command, cwd=unpacked, env=environ, capture_output=True, text=True, check=False)


def test_holds_its_data(unpacked: Path) -> None:
    for name in (
        "megamoe/registry.toml",
        "megamoe/py.typed",
        "megamoe/job/default_prompt.txt",
        "megamoe/templates/stage/reference.py.txt",
        "megamoe/testing/bench_variants.py",
        "megamoe_stages/py.typed",
        "ptxemu/native/machine.c",
        "ptxemu/native/ptxemu.h",
        "megamoe_stages/quantize/evidence/fused_sm100-sm_100-compiled.json",
    ):
        assert (unpacked / name).is_file(), name
    assert not (unpacked / "tests").exists()


def test_works_away_from_the_checkout(unpacked: Path) -> None:
    where = "import megamoe.registry, sys; sys.stdout.write(str(megamoe.registry.find()))"
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    found = subprocess.run([sys.executable, "-c", where], cwd=unpacked, env=environ, capture_output=True, text=True)
    assert Path(found.stdout) == unpacked / "megamoe" / "registry.toml"
    assert call(unpacked, "roadmap").returncode == 0
    assert "quantize" in call(unpacked, "explain", "quantize").stdout
    assert call(unpacked, "verify", "inverse_rope_quant", "--variant", "fallback", "--cpu", "-q").returncode == 0
    assert "only in a checkout" in call(unpacked, "roadmap", "--check").stderr
