"""pytest plugin: parametrises tests over what the plugins declare, and skips GPU tests where there is no GPU.

A test or benchmark that takes `stage`, `variant` and `case` runs once for each; one that takes only `stage`, or `stage`
and `variant`, runs for those. Use it with `-p megamoe.testing.plugin`, or name it in a conftest's `pytest_plugins`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from megamoe.model import Stage, Variant


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers that this plugin understands."""
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "not_reference: not for the reference variant itself")
    config.addinivalue_line("markers", "bench_cases: only cases that are marked for benchmarks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives `stage`, `variant` and `case` their values."""
    names = [name for name in ("stage", "variant", "case") if name in metafunc.fixturenames]
    if not names or names[0] != "stage":
        return
    not_reference = metafunc.definition.get_closest_marker("not_reference") is not None
    bench_only = metafunc.definition.get_closest_marker("bench_cases") is not None
    rows = [row for row in _rows(names, bench_only) if not (not_reference and "variant" in row and _is_reference(row))]
    marks = [[pytest.mark.gpu] if row.get("gpu") else [] for row in rows]
    metafunc.parametrize(
        names,
        [pytest.param(*(row[n] for n in names), id=row["id"], marks=m) for row, m in zip(rows, marks, strict=True)],
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu`, with the reason, where there is none."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    from megamoe.machine import gpus

    if gpus():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; none is visible here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _is_reference(row: dict[str, Any]) -> bool:
    from megamoe.model import Role

    return bool(row["variant"].role is Role.REFERENCE)


def _rows(names: Sequence[str], bench_only: bool) -> list[dict[str, Any]]:
    from megamoe.plugins import load
    from megamoe.runtime import runtime

    rows: list[dict[str, Any]] = []
    for stage in runtime().stages.values():
        cases = load(stage.cases) if "case" in names else {"": None}
        for variant in stage.variants if "variant" in names else (None,):
            for case, made in cases.items():
                if bench_only and not (made and made.bench):
                    continue
                parts = [stage.id, *([variant.name] if variant else []), *([case] if case else [])]
                gpu = bool(made and made.gpu_only) or bool(variant and variant.archs)
                rows.append({"stage": stage, "variant": variant, "case": case, "id": "-".join(parts), "gpu": gpu})
    return rows


@pytest.fixture
def run(stage: Stage, variant: Variant) -> Any:
    """The variant's function; skips, with the reason, where it cannot run on this machine."""
    from megamoe.plugins import load
    from megamoe.runtime import runtime

    refusals = runtime().hard_refusals(stage, variant)
    if refusals:
        pytest.skip(f"{variant.name}: {refusals[0].reason}")
    return load(variant.target)
