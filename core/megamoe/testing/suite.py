"""Runs the benchmark suite that ships with megamoe through pytest-benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).with_name("bench_variants.py")


def bench(stage_id: str | None, *, quick: bool = False, json_file: Path | None = None) -> int:
    """One group per op and case, one row per variant.

    Args:
        stage_id: Only this stage.
        quick: A few rounds only.
        json_file: Where pytest-benchmark writes its JSON.

    Returns:
        pytest's exit code.
    """
    options = [
        str(BENCHMARKS),
        f"--rootdir={BENCHMARKS.parent}",
        "-q",
        "-p",
        "megamoe.testing.plugin",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-o",
        "python_files=bench_*.py",
        "-o",
        "python_functions=bench_*",
        "--import-mode=importlib",
        "--benchmark-only",
        "--benchmark-group-by=group",
        "--benchmark-columns=median,iqr,rounds",
        "--benchmark-sort=min",
    ]
    if stage_id:
        options += ["-k", f"{stage_id}-"]
    if quick:
        options += ["--benchmark-min-rounds=3", "--benchmark-max-time=0.02"]
    if json_file:
        options.append(f"--benchmark-json={json_file}")
    return int(pytest.main(options))
