"""The status report on made-up items, stages and records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamoe import evidence, machine, registry, roadmap
from megamoe.errors import MegamoeError
from megamoe.model import Evidence, Kind, Role, Speed, Stage, Variant
from megamoe.plugins import Plugins
from megamoe.roadmap import BEGIN, END, Row, Target
from megamoe.runtime import Runtime
from tests.core.builders import FAILED, SM90, SM100, Plugin, items, record
from tests.core.conftest import MakePackage

TARGETS = ["sm_90", "sm_100"]
BLOCKER = {"id": "b", "kind": "hardware", "summary": "no GPU"}
Report = Callable[..., Row]


@pytest.fixture
def made(make_package: MakePackage) -> Stage:
    """A stage on disk with a fused variant for each of two architectures."""
    name = make_package(dict.fromkeys(["contract", "cases", "reference", "fallback", "sm90", "sm100"], ""))
    return Stage("mul", "A product", f"{name}.contract", f"{name}.cases:CASES", (
        Variant("reference", Role.REFERENCE, f"{name}.reference:mul"),
        Variant("fallback", Role.FALLBACK, f"{name}.fallback:mul"),
        Variant("sm90", Role.FUSED, f"{name}.sm90:mul", frozenset({SM90})),
        Variant("sm100", Role.FUSED, f"{name}.sm100:mul", frozenset({SM100})),
    ))  # fmt: skip


@pytest.fixture
def report(made: Stage, no_stages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Writes records and reports on one item, A; `others` are further items."""
    monkeypatch.setattr(machine, "gpus", lambda: ())
    monkeypatch.setenv("MEGAMOE_EVIDENCE_DIR", str(tmp_path / "local"))
    monkeypatch.chdir(tmp_path)

    def go(*records: Evidence, item: dict[str, Any] | None = None, shipped_only: bool = False, **others: Any) -> Row:
        for one in records:
            by_name = next(v for v in made.variants if v.name == one.variant)
            if one.fingerprint == "now":
                one = replace(one, fingerprint=evidence.fingerprint(made, by_name))
            shipped = evidence.shipped_folder(made)
            assert shipped is not None
            evidence.write(one, shipped if one.origin == "shipped" else tmp_path / "local" / "mul")
        table = {"A": {"stage": "mul", "targets": TARGETS, **(item or {})}, **others}
        current = Runtime(Plugins(no_stages, extra=[Plugin(made)]), items({"mul": made}, **table))
        return roadmap.report(current, shipped_only=shipped_only)[0]

    return go


def _states(row: Row) -> dict[str, str]:
    return {target.arch: target.state for target in row.targets}


@pytest.mark.parametrize("kind", Kind)
def test_a_cell_is_the_kind_of_the_evidence_on_that_architecture(report: Report, kind: Kind) -> None:
    row = report(record("sm90", kind=kind))
    assert row.targets == (Target("sm_90", kind.value, None, "sm90"), Target("sm_100", "fallback"))


@pytest.mark.parametrize(
    "changed",
    [{"fingerprint": "before"}, {"cases": (FAILED,)}, {"cases": ()}, {"arch": SM100}, {"arch": None}],
)
def test_evidence_that_does_not_count_leaves_the_fallback(report: Report, changed: dict[str, Any]) -> None:
    assert _states(report(replace(record("sm90"), **changed))) == {"sm_90": "fallback", "sm_100": "fallback"}


def test_a_failure_outweighs_a_pass_here_too(report: Report) -> None:
    """The report must not promise what the dispatcher would refuse."""
    row = report(record("sm90", origin="shipped"), record("sm90", cases=(FAILED,)))
    assert _states(row)["sm_90"] == "fallback"


def test_the_strongest_kind_is_shown(report: Report) -> None:
    row = report(record("sm100", SM100, kind=Kind.COMPILED), record("sm100", SM100, kind=Kind.EMULATED))
    assert _states(row)["sm_100"] == "emulated"


@pytest.mark.parametrize(
    ("blocker", "states"),
    [
        ({}, ["blocked", "blocked"]),
        ({"archs": ["sm_100a"]}, ["verified", "blocked"]),
        ({"variants": ["sm100"]}, ["verified", "blocked"]),
        ({"variants": ["fallback"]}, ["verified", "fallback"]),
        ({"until": "pluggy>=1"}, ["verified", "fallback"]),
        ({"until": "pluggy>=99"}, ["blocked", "blocked"]),
    ],
)
def test_blocked_cells(report: Report, blocker: dict[str, Any], states: list[str]) -> None:
    row = report(record("sm90"), item={"blocker": [{**BLOCKER, **blocker}]})
    assert list(_states(row).values()) == states
    assert row.status == ("blocked" if states == ["blocked"] * 2 else "experimental")
    cleared = blocker.get("until") == "pluggy>=1"
    assert row.blockers == (() if cleared else ("b (hardware): no GPU",))


def test_what_a_blocked_variant_proved_does_not_count(report: Report) -> None:
    blocker = {**BLOCKER, "variants": ["sm90"]}
    row = report(record("sm90"), item={"blocker": [blocker]})
    assert row.targets[0] == Target("sm_90", "blocked")


@pytest.mark.parametrize(
    ("blocker", "state"),
    [(None, "-"), ({}, "blocked"), ({"archs": ["sm_90a"]}, "blocked"), ({"archs": ["sm_100"]}, "-")],
)
def test_an_item_without_code(report: Report, blocker: dict[str, Any] | None, state: str) -> None:
    held = [{**BLOCKER, **blocker}] if blocker is not None else []
    row = report(item={"stage": None, "targets": ["sm_90"], "blocker": held})
    assert (_states(row), row.here) == ({"sm_90": state}, "")


def test_a_finished_item_is_never_blocked(report: Report) -> None:
    assert report(item={"status": "closed", "blocker": [BLOCKER]}).status == "closed"


def test_an_item_waits_for_what_is_not_begun_or_not_finished(report: Report) -> None:
    statuses = ["planned", "building", "experimental", "stable", "done", "closed"]
    others: dict[str, Any] = {s: {"status": s} for s in statuses}
    row = report(item={"depends": statuses}, **others)
    assert row.waits_for == ("planned", "building")
    assert "waits for planned, building" in roadmap.notes(row)
    assert report(item={"depends": statuses, "status": "done"}, **others).waits_for == ()


def test_speedup_is_the_geometric_mean(report: Report) -> None:
    times = ((1.0, 2.0), (1.0, 8.0), (4.0, 2.0))
    speeds = tuple(Speed(f"c{n}", {}, *pair) for n, pair in enumerate(times))
    assert roadmap.speedup(record("sm90", speeds=speeds)) == 2.0
    assert roadmap.speedup(record("sm90")) is None
    assert roadmap.speedup(record("sm90", speeds=(Speed("c", {}, 0.0, 2.0),))) is None
    row = report(record("sm90", speeds=speeds))
    assert row.targets[0] == Target("sm_90", "verified", 2.0, "sm90")
    assert roadmap.cell(row.targets[0]) == "verified 2.00x"
    assert roadmap.cell(row.targets[1]) == "fallback"


def test_the_shipped_report_leaves_this_machine_out(report: Report) -> None:
    row = report(record("sm90"), record("sm100", SM100, origin="shipped"), shipped_only=True)
    assert (_states(row), row.here) == ({"sm_90": "fallback", "sm_100": "verified"}, "")


def test_here_is_what_would_run(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report().here == "fallback"
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu("H200", SM90),))
    assert report(record("sm90")).here == "sm90"
    monkeypatch.setenv("MEGAMOE_DEFAULT", "off")
    assert report().here == "off"


# --- forms ------------------------------------------------------------------------------------------------------------


def test_markdown_has_a_column_for_each_architecture(report: Report) -> None:
    row = report(record("sm90"), item={"title": "a | b", "note": "c | d"})
    other = replace(row, item="B", stage=None, targets=(Target("sm_103", "-"),), note="")
    head, rule, first, second = roadmap.as_markdown([row, other]).splitlines()
    assert head == "| item | what | stage | status | sm_90 | sm_100 | sm_103 | blockers and notes |"
    assert first == r"| A | a \| b | `mul` | experimental | verified | fallback |  | c \| d |"
    assert second == r"| B | a \| b |  | experimental |  |  | - |  |"
    assert rule.count("|") == head.count("|")


def test_json_holds_everything(report: Report) -> None:
    (row,) = json.loads(roadmap.as_json([report(record("sm90"))]))
    assert row["targets"][0] == {"arch": "sm_90", "state": "verified", "speedup": None, "variant": "sm90"}


def test_refreshed_replaces_what_is_between_the_markers_and_is_idempotent(report: Report) -> None:
    row = report()
    text = f"# Roadmap\n\n{BEGIN}\nold\n{END}\n\nAfter.\n"
    once = roadmap.refreshed(text, [row])
    assert once == f"# Roadmap\n\n{BEGIN}\n{roadmap.as_markdown([row])}\n{END}\n\nAfter.\n"
    assert roadmap.refreshed(once, [row]) == once
    assert roadmap.refreshed(once, [replace(row, status="done")]) != once


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n", f"{END}\n{BEGIN}\n"])
def test_missing_markers_are_an_error(report: Report, text: str) -> None:
    with pytest.raises(MegamoeError, match="needs the two marker lines"):
        roadmap.refreshed(text, [report()])


def test_the_file_lies_beside_the_registry_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", lambda: tmp_path / "registry.toml")
    with pytest.raises(MegamoeError, match=r"lies only in a checkout"):
        roadmap.path()
    (tmp_path / "ROADMAP.md").touch()
    assert roadmap.path() == tmp_path / "ROADMAP.md"
