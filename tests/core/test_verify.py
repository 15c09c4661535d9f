"""Whether verification finds faults: every variant of the stage `faulty` has one. Few are tried in a child process."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamoe import evidence, ops, runtime, verify
from megamoe.dispatch import Question, select
from megamoe.errors import UnknownNameError
from megamoe.model import CaseResult, Evidence, Kind, Machine, Role, Variant
from megamoe.plugins import Plugins, load
from megamoe.runtime import Runtime
from tests.core import faulty
from tests.core.builders import SM90, Plugin, items, stage, variant, write_distribution

STAGE = faulty.STAGE
CPU = Machine(None, {}, "a CPU")
ROOT = Path(__file__).parents[2]
BOUNDS: Mapping[str, Any] = load(f"{STAGE.contract}:BOUNDS")


def _named(name: str) -> Variant:
    return next(v for v in STAGE.variants if v.name == name)


def _try(name: str, case: str = "first") -> CaseResult:
    return verify.run_case(load(_named(name).target), STAGE, case, "cpu", BOUNDS)


@pytest.mark.parametrize("name", ["reference", "fallback", "good"])
def test_what_is_right_passes(name: str) -> None:
    assert _try(name) == CaseResult("first", True, 0.0, 0.01)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("past_the_end", r"8 bytes written after a buffer of 96 bytes"),
        ("before_the_start", r"4 bytes written before a buffer of 96 bytes"),
        ("unwritten", r"out: two runs differ; out: relative L2 inf > 0\.01"),
        ("nondeterministic", r"out: two runs differ"),
        ("mutates", r"wrote to its input 'x'"),
        ("dtype", r"out: dtype torch\.float64, not torch\.float32"),
        ("shape", r"out: shape \(24,\), not \(3, 8\)"),
        ("strides", r"out: strides \(1, 3\), not contiguous"),
        ("inexact", r"out: relative L2 0\.05 > 0\.01"),
        ("nans", r"out: relative L2 inf > 0\.01"),
        ("other_type", r"out: got list, not Tensor"),
    ],
)
def test_each_fault_is_found_and_named_and_nothing_else(name: str, reason: str) -> None:
    result = _try(name)
    assert not result.passed
    assert re.fullmatch(reason, result.reason), result.reason


def test_what_the_stage_says_it_mutates_may_be_written() -> None:
    mutating = replace(STAGE, mutates=("x",))
    result = verify.run_case(load(_named("mutates").target), mutating, "first", "cpu", BOUNDS)
    assert re.match(r"x: .* of the bytes differ", result.reason), "it is compared with the reference's instead"
    assert verify.run_case(load(_named("good").target), mutating, "first", "cpu", BOUNDS).passed


def test_bounds_of_a_case_override_the_stages() -> None:
    exact: dict[str, Any] = {}
    result = verify.run_case(lambda x: x * 2 * (1 + 1e-6), STAGE, "first", "cpu", exact)
    assert "of the bytes differ" in result.reason
    assert verify.run_case(lambda x: x * 2 * (1 + 1e-6), STAGE, "first", "cpu", BOUNDS).passed


# --- what the child does, in this process -----------------------------------------------------------------------------


@pytest.fixture
def installed(no_stages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty stage as the only one."""
    current = Runtime(Plugins(no_stages, extra=[faulty]), items())
    monkeypatch.setattr(runtime, "_runtime", current)
    monkeypatch.setattr(ops, "_ops", {})


def _child(path: Path, name: str, *cases: str) -> list[dict[str, Any]]:
    path.touch()
    verify._child(verify.Request(STAGE.id, name, "cpu", cases, True), path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_exception_fails_its_case_with_the_first_line(installed: None, tmp_path: Path) -> None:
    lines = _child(tmp_path / "out", "raises", "first", "last")
    assert [line["result"]["case"] for line in lines] == ["first", "last"]
    assert {line["result"]["reason"] for line in lines} == {"ValueError: no such layout"}
    assert not any(line["result"]["passed"] for line in lines)


def test_an_exception_while_timed_fails_the_case_that_was_timed(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{faulty.__name__}.variants._calls", itertools.count())
    lines = _child(tmp_path / "out", "raises_when_timed", "first", "timed", "last")
    final = {line["result"]["case"]: line["result"] for line in lines if "result" in line}
    assert [final[c]["passed"] for c in ("first", "timed", "last")] == [True, False, True]
    assert final["timed"]["reason"] == "MemoryError: the third call"


def test_cases_marked_for_benchmarks_are_timed_beside_the_fallback(installed: None, tmp_path: Path) -> None:
    (speed,) = [line["speed"] for line in _child(tmp_path / "out", "good", "first", "timed") if "speed" in line]
    assert speed["case"] == "timed"
    assert speed["problem"] == {"dtype": "float32", "rows": 5, "factor": None}
    assert 0 < speed["variant_us"] < 1e5
    assert 0 < speed["fallback_us"] < 1e5


def test_the_best_fallback_is_the_one_that_auto_would_take() -> None:
    for ranks in ([0, 0], [0, 1], [1, 0]):
        more = [variant(n, Role.FALLBACK, rank=r) for n, r in zip(("b", "a"), ranks, strict=True)]
        made = stage(*more)
        assert verify.best_fallback(made) == select(Question(made, CPU)).variant


# --- in a child process -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a child that has the faulty stage installed as a third party's."""
    folder = tmp_path_factory.mktemp("site")
    write_distribution(folder, "faulty-stage", {"faulty": faulty.__name__})
    kept = {k: v for k, v in os.environ.items() if k != "MEGAMOE_PLUGINS"}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "OMP_NUM_THREADS": "1"}


def _verify(name: str, environ: dict[str, str], **more: Any) -> Evidence:
    return verify.verify(STAGE, _named(name), CPU, environ=environ, **more)


def _reasons(found: Evidence) -> dict[str, str]:
    return {case.case: case.reason for case in found.cases}


def test_a_good_variant_gives_evidence_that_reads_back(environ: dict[str, str], tmp_path: Path) -> None:
    seen: dict[str, CaseResult | None] = {}
    reasons: dict[str, str] = {}

    def progress(name: str, result: CaseResult | None, reason: str) -> None:
        seen[name], reasons[name] = result, reason

    found = _verify("good", environ, progress=progress)
    assert found.ok, _reasons(found)
    assert [case.case for case in found.cases] == ["first", "timed", "last"]
    assert seen == {"unsupported": None, **{case.case: case for case in found.cases}}
    assert reasons["unsupported"] == "9 rows are too many"
    assert (found.kind, found.arch, found.device, found.origin) == (Kind.VERIFIED, None, "a CPU", "local")
    assert [speed.case for speed in found.speeds] == ["timed"]
    assert found.fingerprint == evidence.fingerprint(STAGE, _named("good"))
    assert evidence.read(evidence.write(found, tmp_path), "local") == found


@pytest.mark.parametrize(
    ("name", "died"),
    [("exits", "the process ended with code 0"), ("segfaults", "the process died of SIGSEGV")],
)
def test_a_crash_fails_the_case_it_happened_in_and_those_after_it(
    environ: dict[str, str], name: str, died: str
) -> None:
    found = _verify(name, environ)
    assert _reasons(found) == {"first": "", "timed": f"{died} in this case", "last": f"did not run: {died} earlier"}
    assert [case.passed for case in found.cases] == [True, False, False]
    assert not found.ok


def test_a_crash_after_the_last_case_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a corrupted heap that shows only when it is freed; `_run_child` is faked to save a process."""
    passed = {name: CaseResult(name, True, 0.0, 0.01) for name in ("first", "last")}

    def crashed(
        request: verify.Request, *_: object
    ) -> tuple[dict[str, CaseResult], list[Any], dict[str, list[str]], str]:
        assert request.cases == ("first", "last")
        return dict(passed), [], {}, verify._death(-signal.SIGABRT, Path("unused"))

    monkeypatch.setattr(verify, "_run_child", crashed)
    found = _verify("good", {}, only=(name for name in ["first", "last"]))
    assert _reasons(found) == {"first": "", "last": "the process died of SIGABRT after this case"}
    assert not found.ok


def test_how_a_child_ended_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\nOSError: no such library\n")
    assert verify._death(3, log) == "the process ended with code 3 (OSError: no such library)"
    assert verify._death(0, log) == verify.CLEAN


def test_a_hang_is_cut_off(environ: dict[str, str]) -> None:
    found = _verify("hangs", environ, only=["first", "last"], timeout=0.5)
    died = "timed out after 0.5 s"
    assert _reasons(found) == {"first": f"{died} in this case", "last": f"did not run: {died} earlier"}


# --- names and places -------------------------------------------------------------------------------------------------


def test_names_of_cases() -> None:
    assert verify.case_names(STAGE, device="cpu") == ["unsupported", "first", "timed", "last"]
    assert verify.case_names(STAGE, device="cuda") == ["unsupported", "first", "timed", "last", "huge"]
    assert verify.case_names(STAGE, device="cpu", only=iter(["last", "huge"])) == ["last"]
    with pytest.raises(UnknownNameError, match="no case of faulty_double 'lats'; did you mean 'last'"):
        verify.case_names(STAGE, device="cpu", only=iter(["lats"]))


def test_where_records_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_stages: str) -> None:
    monkeypatch.setenv("MEGAMOE_EVIDENCE_DIR", str(tmp_path))
    current = Runtime(Plugins(no_stages, extra=[Plugin(STAGE)]), items())
    assert current.records(STAGE).evidence == ()
    print_ = evidence.fingerprint(STAGE, _named("good"))
    found = Evidence(STAGE.id, "good", SM90, Kind.VERIFIED, print_, (CaseResult("first", True, 0, 0),))
    path = verify.record(found, STAGE, ship=False, current=current)
    assert path == tmp_path / STAGE.id / "good-sm_90-verified.json"
    assert current.records(STAGE).evidence == (found,)
    decision = current.decide(STAGE, Machine(SM90))
    assert (decision.variant.name, decision.evidence) == ("good", found)
    shipped = evidence.shipped_folder(STAGE)
    assert shipped == Path(faulty.__file__).parent / "evidence"
