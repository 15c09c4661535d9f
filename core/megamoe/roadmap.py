"""The status report: every roadmap item, its blockers, and for each promised architecture what was proven there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megamoe import dispatch, registry
from megamoe.dispatch import NoVariantError, Question
from megamoe.errors import MegamoeError
from megamoe.model import Arch, Evidence, Kind, Machine, Role, Status
from megamoe.registry import Item
from megamoe.runtime import Runtime

BEGIN = "<!-- megamoe roadmap: begin (written by `megamoe roadmap --write`) -->"
END = "<!-- megamoe roadmap: end -->"
FILE = "ROADMAP.md"


@dataclass(frozen=True, slots=True)
class Target:
    """An item on one promised architecture.

    Attributes:
        arch: "sm_90".
        state: verified, emulated, compiled, fallback, blocked, or "-" for an item with no code to run.
        speedup: Geometric mean of fallback over variant, as recorded; None where nothing was.
        variant: The variant that the state speaks of.
    """

    arch: str
    state: str
    speedup: float | None = None
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One item of the report."""

    item: str
    title: str
    stage: str | None
    status: str
    targets: tuple[Target, ...]
    blockers: tuple[str, ...]
    waits_for: tuple[str, ...]
    here: str
    effort: str
    note: str


def report(runtime: Runtime, *, shipped_only: bool = False) -> list[Row]:
    """Builds the report.

    Args:
        runtime: Registry, stages and evidence.
        shipped_only: Leave out this machine's own records, so that the result is the same everywhere.
    """
    machine = runtime.machine()
    return [_row(runtime, key, item, machine, shipped_only) for key, item in runtime.registry.item.items()]


def _row(runtime: Runtime, key: str, item: Item, machine: Machine, shipped_only: bool) -> Row:
    targets = tuple(_target(runtime, item, Arch.parse(arch), machine, shipped_only) for arch in item.targets)
    held = [b for b in item.blocker if not b.cleared_by(machine.packages)]
    waits = [d for d in item.depends if runtime.registry.item[d].status in (Status.PLANNED, Status.BUILDING)]
    open_ = item.status not in (Status.DONE, Status.CLOSED)
    blocked = open_ and bool(held) and all(t.state == "blocked" for t in targets)
    return Row(
        item=key,
        title=item.title,
        stage=item.stage,
        status="blocked" if blocked else item.status.value,
        targets=targets,
        blockers=tuple(f"{b.id} ({b.kind}): {b.summary}" for b in held),
        waits_for=tuple(waits) if open_ else (),
        here="" if shipped_only else _here(runtime, item, machine),
        effort=item.effort,
        note=item.note,
    )


def _target(runtime: Runtime, item: Item, arch: Arch, machine: Machine, shipped_only: bool) -> Target:
    on = Machine(arch, machine.packages)
    if item.stage is None:
        held = any(not b.archs or str(arch) in b.archs for b in item.blocker if not b.cleared_by(on.packages))
        return Target(str(arch), "blocked" if held else "-")
    stage = runtime.stages[item.stage]
    question = runtime.question(stage, on)
    if shipped_only:
        question = replace(question, records=[e for e in question.records if e.origin == "shipped"])
    fused = [v for v in stage.variants if v.role is Role.FUSED and (not v.archs or arch in v.archs)]
    free = [v for v in fused if not any(dispatch.blocks(b, v, on) for b in item.blocker)]
    proven = [(v, e) for v in free if (e := dispatch.best(question, v)) is not None]
    if proven:
        variant, record = min(proven, key=lambda pair: list(Kind).index(pair[1].kind))
        return Target(str(arch), record.kind.value, speedup(record), variant.name)
    if _held(question, item, arch):
        return Target(str(arch), "blocked")
    return Target(str(arch), "fallback")


def _held(question: Question, item: Item, arch: Arch) -> bool:
    fused = [v for v in question.stage.variants if v.role is Role.FUSED and (not v.archs or arch in v.archs)]
    if fused:
        return all(any(dispatch.blocks(b, v, question.machine) for b in item.blocker) for v in fused)
    whole = [b for b in item.blocker if not b.variants and not b.cleared_by(question.machine.packages)]
    return any(not b.archs or str(arch) in b.archs for b in whole)


def speedup(record: Evidence) -> float | None:
    """Geometric mean of fallback time over variant time in a record, or None when it holds no times."""
    ratios = [s.fallback_us / s.variant_us for s in record.speeds if s.variant_us > 0]
    return round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 2) if ratios else None


def _here(runtime: Runtime, item: Item, machine: Machine) -> str:
    if item.stage is None:
        return ""
    try:
        return runtime.decide(runtime.stages[item.stage], machine).variant.name
    except NoVariantError as error:
        return "off" if error.choice == "off" else "none"


# --- forms ------------------------------------------------------------------------------------------------------------


def as_json(rows: Sequence[Row]) -> str:
    """The report as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def cell(target: Target) -> str:
    """A target in a word or two: "verified 2.31x"."""
    return target.state + (f" {target.speedup:.2f}x" if target.speedup else "")


def archs(rows: Sequence[Row]) -> list[str]:
    """Every promised architecture, oldest first."""
    return sorted({t.arch for row in rows for t in row.targets}, key=lambda a: Arch.parse(a).cc)


def notes(row: Row) -> list[str]:
    """Blockers, what the item waits for, and its note."""
    waits = [f"waits for {', '.join(row.waits_for)}"] if row.waits_for else []
    return [*row.blockers, *waits, *([row.note] if row.note else [])]


def as_markdown(rows: Sequence[Row]) -> str:
    """The report as a Markdown table."""
    columns = archs(rows)
    lines = [
        "| item | what | stage | status | " + " | ".join(columns) + " | blockers and notes |",
        "|" + "---|" * (len(columns) + 5),
    ]
    for row in rows:
        by_arch = {t.arch: cell(t) for t in row.targets}
        cells = [row.item, row.title, f"`{row.stage}`" if row.stage else "", row.status]
        cells += [by_arch.get(arch, "") for arch in columns]
        cells.append("; ".join(notes(row)))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def path() -> Path:
    """ROADMAP.md beside the checkout's registry.

    Raises:
        MegamoeError: This is an installed package, not a checkout.
    """
    file = registry.find().parent / FILE
    if not file.is_file():
        raise MegamoeError(f"{FILE} lies only in a checkout; there is none at {file}")
    return file


def refreshed(text: str, rows: Sequence[Row]) -> str:
    """`text` with what stands between the markers replaced by the report.

    Raises:
        MegamoeError: A marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MegamoeError(f"{FILE} needs the two marker lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{as_markdown(rows)}\n{END}{after}"
