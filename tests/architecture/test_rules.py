"""Rules of the tree that a reader relies on, checked so that they stay true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamoe import evidence
from megamoe.runtime import runtime

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])
STAGE_FILES = {"__init__.py", "contract.py", "reference.py", "fallback.py", "cases.py", "NOTES.md"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("folder", sorted(p.parent for p in (ROOT / "stages").rglob("contract.py")), ids=name)
def test_a_stage_folder_is_whole(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} >= STAGE_FILES


def test_every_stage_has_a_roadmap_item() -> None:
    current = runtime()
    assert [s for s in current.stages if not current.registry.of_stage(s)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("__init__.py")), ids=name)
def test_declaring_a_stage_imports_nothing_heavy(path: Path) -> None:
    assert {i.split(".")[0] for i in imports(path)} <= {"__future__", "megamoe"}


@pytest.mark.parametrize("path", [p for p in SOURCES if "ptxemu" in p.parts], ids=name)
def test_the_emulator_knows_nothing_of_megamoe(path: Path) -> None:
    assert not [i for i in imports(path) if i.split(".")[0].startswith("megamoe")]


@pytest.mark.parametrize("path", [p for p in SOURCES if "core" in p.relative_to(ROOT).parts], ids=name)
def test_the_core_names_no_stage(path: Path) -> None:
    """Stages are found, not imported: only the plugin loader knows the package's name."""
    assert not [i for i in imports(path) if i.startswith("megamoe_stages")]


def test_variants_do_not_depend_on_the_dispatcher() -> None:
    """Otherwise every change of the core would make all evidence stale."""
    banned = {"megamoe", "megamoe.ops", "megamoe.dispatch", "megamoe.runtime", "megamoe.config", "megamoe.cli"}
    for stage in runtime().stages.values():
        for variant in stage.variants:
            assert not banned & set(evidence.closure(stage, variant)), (stage.id, variant.name)


def test_no_path_of_a_machine_is_committed() -> None:
    for path in (p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".toml", ".txt"} and ".venv" not in p.parts):
        text = path.read_text()
        for bad in ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"):
            assert bad not in text, name(path)
