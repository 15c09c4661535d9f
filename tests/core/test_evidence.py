from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import evidence
from megamoe.errors import RegistryError
from megamoe.model import Arch, CaseResult, Evidence, Kind, Role, Speed, Stage, Variant
from megamoe.plugins import Plugins
from tests.core.builders import FAILED, SM90, record, stage
from tests.core.conftest import MakePackage

# --- fingerprint ------------------------------------------------------------------------------------------------------

SOURCES = {
    "contract": "from .shared import sizes",
    "cases": "import {name}.making\nCASES = {{}}",
    "reference": "def mul(): ...",
    "fallback": "def mul():\n    from . import late",
    "kernel": "from . import parts\nfrom .parts.deep import tile\nimport json, torch",
    "other_kernel": "x = 1",
    "shared": "import {name}.shared_further as s\nsizes = 1",
    "shared_further": "",
    "making": "",
    "late": "from ..{name} import later",
    "later": "from {name}.reference import mul",
    "parts/__init__": "",
    "parts/deep": "from ..beside import width\nfrom .. import above",
    "parts/unused": "",
    "beside": "from .starred import *",
    "starred": "width = 1",
    "above": "",
    "unused": "",
}
COMMON = {"contract", "cases", "reference", "shared", "shared_further", "making"}
CLOSURES = {
    "fallback": COMMON | {"fallback", "late", "later"},
    "kernel": COMMON | {"kernel", "parts/__init__", "parts/deep", "beside", "starred", "above"},
    "other_kernel": COMMON | {"other_kernel"},
}


def _made(name: str) -> Stage:
    variants = tuple(
        Variant(v, Role(v) if v in list(Role) else Role.FUSED, f"{name}.{v}:mul") for v in ("reference", *CLOSURES)
    )
    return Stage("mul", "", f"{name}.contract", f"{name}.cases:CASES", variants)


@pytest.fixture
def package(make_package: MakePackage, tmp_path: Path) -> Path:
    """A stage's package on disk."""
    name = make_package({})
    for module, text in SOURCES.items():
        path = tmp_path / "packages" / name / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        text = text.replace("from ..{name} import later", "from .later import mul")
        path.write_text(text.format(name=name))
    return tmp_path / "packages" / name


def _prints(package: Path) -> dict[str, str]:
    made = _made(package.name)
    return {v.name: evidence.fingerprint(made, v) for v in made.variants if v.name in CLOSURES}


@pytest.mark.parametrize("module", SOURCES)
def test_fingerprint_changes_with_the_import_closure_and_with_nothing_else(package: Path, module: str) -> None:
    before = _prints(package)
    path = package / f"{module}.py"
    path.write_text(path.read_text() + "\n# changed\n")
    changed = {name for name, value in _prints(package).items() if value != before[name]}
    assert changed == {name for name, closure in CLOSURES.items() if module in closure}


def test_fingerprints_differ_and_repeat(package: Path) -> None:
    prints = _prints(package)
    assert len(set(prints.values())) == len(prints)
    assert _prints(package) == prints
    assert all(len(value) == 16 for value in prints.values())


def test_closure_names_the_modules(package: Path) -> None:
    made = _made(package.name)
    names = {m.replace("/__init__", "").replace("/", ".") for m in CLOSURES["kernel"]}
    kernel = next(v for v in made.variants if v.name == "kernel")
    assert evidence.closure(made, kernel) == sorted(f"{package.name}.{m}" for m in names)


def test_taking_the_closure_imports_nothing(package: Path) -> None:
    (package / "kernel.py").write_text("1 / 0")
    (package / "__init__.py").write_text("1 / 0")
    assert _prints(package)


def test_fingerprint_covers_the_numerics_that_define_an_op() -> None:
    """A change of the definition of NVFP4 makes all evidence stale."""
    quantize = Plugins(external=False).stage("quantize")
    for variant in quantize.variants:
        closure = evidence.closure(quantize, variant)
        assert {"megamoe.numerics.nvfp4", "megamoe.numerics.layout", quantize.contract} <= set(closure)
        assert not {"megamoe.ops", "megamoe.dispatch", "megamoe.cli"} & set(closure)


# --- round trip -------------------------------------------------------------------------------------------------------

text = st.text(max_size=8)
floats = st.floats(min_value=0, allow_nan=False)
facts = st.dictionaries(text, st.none() | st.booleans() | st.integers() | floats | text, max_size=3)
records = st.builds(
    Evidence,
    stage=text,
    variant=st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
    arch=st.none() | st.sampled_from([SM90, Arch(103)]),
    kind=st.sampled_from(Kind),
    fingerprint=text,
    cases=st.lists(st.builds(CaseResult, text, st.booleans(), floats, floats, text), max_size=3).map(tuple),
    speeds=st.lists(st.builds(Speed, text, facts, floats, floats), max_size=3).map(tuple),
    packages=st.dictionaries(text, text, max_size=2),
    device=text,
    date=text,
    version=text,
    origin=st.just("local"),
)


@settings(max_examples=50)
@given(records)
def test_a_record_reads_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, made: Evidence) -> None:
    """Infinite errors (a crash) and facts of None and of every type included."""
    path = evidence.write(made, tmp_path_factory.getbasetemp() / "round")
    back = evidence.read(path, "local")
    assert back == made
    assert [[type(v) for v in s.problem.values()] for s in back.speeds] == [
        [type(v) for v in s.problem.values()] for s in made.speeds
    ]


def test_a_newer_record_replaces_that_of_the_same_variant_architecture_and_kind(tmp_path: Path) -> None:
    kept = [record("a", None), record("a", kind=Kind.EMULATED), record("b")]
    for made in (*kept, record("a", cases=(FAILED,)), record("a")):
        evidence.write(made, tmp_path / "mul")
    found, problems = evidence.local(stage(), tmp_path)
    assert problems == []
    assert len(found) == 4
    assert all(made in found for made in (*kept, record("a")))


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["json.dumps", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_a_crash_while_writing_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    evidence.write(record("a"), tmp_path / "mul")

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, crash)
        with pytest.raises(KeyboardInterrupt):
            evidence.write(record("a", cases=(FAILED,)), tmp_path / "mul")
    assert evidence.local(stage(), tmp_path) == ([record("a")], [])


def test_concurrent_writers_and_readers_see_whole_records(tmp_path: Path) -> None:
    versions = [record("a", cases=tuple(CaseResult(f"c{n}", True, 0, 0) for n in range(10 * k + 1))) for k in range(4)]
    evidence.write(versions[0], tmp_path / "mul")
    wrong: list[object] = []

    def write(made: Evidence) -> None:
        for _ in range(25):
            evidence.write(made, tmp_path / "mul")

    def read() -> None:
        for _ in range(40):
            found, problems = evidence.local(stage(), tmp_path)
            if problems or len(found) != 1 or found[0] not in versions:
                wrong.append((found, problems))

    threads = [threading.Thread(target=write, args=(made,)) for made in versions] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [p.name for p in (tmp_path / "mul").iterdir()] == ["a-sm_90-verified.json"]


# --- corrupt records --------------------------------------------------------------------------------------------------


def _spoilt(change: Mapping[str, Any]) -> bytes:
    raw = {
        "schema": 1,
        "stage": "mul",
        "variant": "a",
        "arch": "sm_90",
        "kind": "verified",
        "fingerprint": "f",
        "cases": [],
    }
    return json.dumps({k: v for k, v in {**raw, **change}.items() if v is not ...}).encode()


SPOILT = {
    "half a file": (_spoilt({})[:40], "Invalid JSON"),
    "no text": (b"\xff\xfe\x00", "Invalid JSON"),
    "empty": (b"", "Invalid JSON"),
    "no table": (b"[1]", "should be an object"),
    "unknown key": (_spoilt({"devize": "x"}), "devize: unknown key, did you mean 'device'?"),
    "missing key": (_spoilt({"cases": ...}), "cases: missing"),
    "another schema": (_spoilt({"schema": 2}), "schema"),
    "unknown kind": (_spoilt({"kind": "proven"}), "kind"),
    "no architecture": (_spoilt({"arch": "hopper"}), "arch: not an architecture: 'hopper'"),
    "another stage": (_spoilt({"stage": "add"}), "speaks of stage 'add' but lies with 'mul'"),
    "case without result": (_spoilt({"cases": [{"case": "c"}]}), "cases.0.passed: missing"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_corrupt_local_record_is_ignored_with_a_line(tmp_path: Path, name: str) -> None:
    content, words = SPOILT[name]
    evidence.write(record("good"), tmp_path / "mul")
    (tmp_path / "mul" / "bad.json").write_bytes(content)
    found, problems = evidence.local(stage(), tmp_path)
    assert found == [record("good")]
    (line,) = problems
    assert line.startswith("bad.json: ")
    assert words in line
    assert len(line) < 160


@pytest.mark.parametrize("name", SPOILT)
def test_a_corrupt_shipped_record_is_an_error(package: Path, name: str) -> None:
    content, words = SPOILT[name]
    made = _made(package.name)
    folder = evidence.shipped_folder(made)
    assert folder == package / "evidence"
    assert evidence.shipped(made) == []
    evidence.write(record("good"), folder)
    assert evidence.shipped(made) == [record("good", origin="shipped")]
    (folder / "bad.json").write_bytes(content)
    with pytest.raises(RegistryError, match=r"bad\.json: ") as error:
        evidence.shipped(made)
    assert words in str(error.value)


def test_a_stage_that_is_not_on_disk_ships_nothing() -> None:
    assert evidence.shipped_folder(stage(package="nowhere_at_all")) is None
    assert evidence.shipped(stage(package="nowhere_at_all")) == []


def test_where_local_records_lie(tmp_path: Path) -> None:
    assert evidence.local_folder({"MEGAMOE_EVIDENCE_DIR": str(tmp_path)}) == tmp_path
    assert evidence.local_folder({}).parts[-2:] == ("megamoe", "evidence")
    assert evidence.local(stage(), tmp_path / "absent") == ([], [])
