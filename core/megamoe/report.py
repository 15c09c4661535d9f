"""How decisions, evidence and the roadmap look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from megamoe import roadmap
from megamoe.config import Config
from megamoe.model import CaseResult, Decision, Evidence, Machine, Stage

if TYPE_CHECKING:
    from rich.console import Console

    from megamoe.job import OpRow, RunResult

COLOURS = {
    "verified": "green",
    "emulated": "cyan",
    "compiled": "yellow",
    "fallback": "",
    "blocked": "red",
    "done": "green",
    "stable": "green",
    "experimental": "cyan",
    "planned": "dim",
    "closed": "dim",
}


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table that also reads well in a log."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def coloured(word: str) -> Text:
    """A state or status in its colour."""
    return Text(word, style=COLOURS.get(word.partition(" ")[0], ""))


def show_roadmap(console: Console, rows: Sequence[roadmap.Row], machine: Machine) -> None:
    """Prints the status report."""
    columns = roadmap.archs(rows)
    here = f"here: {machine.arch or 'CPU'}"
    made = table("item", "status", *columns, here, "what")
    for row in rows:
        by_arch = {t.arch: roadmap.cell(t) for t in row.targets}
        cells = [coloured(by_arch.get(arch, "")) for arch in columns]
        made.add_row(row.item, coloured(row.status), *cells, row.here, row.title)
    console.print(made)
    for row in rows:
        for note in roadmap.notes(row):
            console.print(Text(f"{row.item}: ").append(note, style="dim"), soft_wrap=True)


def explanation(decision: Decision, machine: Machine, stage: Stage, items: Sequence[str]) -> str:
    """A decision and every reason behind it, as text."""
    where = f"{machine.arch} ({machine.device})" if machine.arch else "the CPU"
    lines = [
        f"{stage.id} [{', '.join(items) or 'no roadmap item'}]: {stage.title}",
        f"on {where}: {decision.variant.name} ({decision.variant.role})",
        f"  because {decision.why}",
    ]
    width = max((len(r.variant) for r in decision.refusals), default=0)
    for refusal in decision.refusals:
        lines.append(f"  refused {refusal.variant:<{width}}  {refusal.gate:<10} {refusal.reason}")
        if refusal.remedy:
            lines.append(f"          {'':<{width}}  {'':<10} -> {refusal.remedy}")
    return "\n".join(lines)


def case_line(case: str, result: CaseResult | None, reason: str) -> str:
    """One case of a verification: "  ok   odd_rows   error 0 (bound 0)"; without a result the variant refuses it."""
    if result is None:
        return f"  skip {case:<34} {reason}"
    word = "ok  " if result.passed else "FAIL"
    return f"  {word} {case:<34} error {result.error:.3g} (bound {result.bound:g}) {reason}".rstrip()


def evidence_line(record: Evidence) -> str:
    """A record in a line."""
    faster = roadmap.speedup(record)
    times = f", {faster:.2f}x the fallback" if faster else ""
    return f"{record.variant} on {record.arch or 'the CPU'}: {record.passed}/{len(record.cases)} cases passed{times}"


def show_config(console: Console, config: Config, stages: Mapping[str, Stage]) -> None:
    """Prints every effective value and where it came from."""
    made = table("key", "value", "from")
    made.add_row("default", config.default.value, config.default.origin)
    made.add_row("evidence", config.evidence.value, config.evidence.origin)
    for stage_id in stages:
        made.add_row(f"stage.{stage_id}.use", config.choice(stage_id), config.origin(stage_id))
        refusal = config.on_refusal.get(stage_id)
        made.add_row(
            f"stage.{stage_id}.on_refusal",
            config.refusal(stage_id),
            refusal.origin if refusal else "built-in",
        )
    console.print(made)


def show_run(console: Console, result: RunResult) -> None:
    """Prints what the main job found: a row an op, then speed and distances."""
    speed = result.speed
    console.print(
        f"{result.model} on {result.device}, {result.dtype}; {speed.prompt_tokens} prompt tokens ({result.codec}), "
        f"{speed.decoded_tokens} decoded; weights quantised in {result.quantise_s:.1f} s",
        soft_wrap=True,
    )
    made = table("op", "item", "variant", "calls", "time", "worst error", "bound", "", "why")
    for row in result.ops:
        made.add_row(
            row.stage,
            ", ".join(row.items),
            ", ".join(row.variant) or "-",
            str(row.calls),
            f"{row.seconds * 1e3:.0f} ms",
            f"{row.error:.2g}" if row.calls else "-",
            _bound(row),
            Text("ok", style="green") if row.ok else Text("OUT OF BOUND", style="red"),
            row.why,
        )
    console.print(made)
    for row in result.ops:
        if not row.ok:
            console.print(f"{row.stage}: {row.reason}", style="red", soft_wrap=True)
    console.print(
        f"prefill {speed.prefill_tokens_per_s:.0f} tokens/s ({speed.prefill_s:.2f} s), "
        f"decode {speed.decode_tokens_per_s:.1f} tokens/s ({speed.decode_s:.2f} s)"
    )
    for distance in result.distances:
        console.print(
            f"logits of {distance.of} from {distance.from_}: relative L2 {distance.relative_l2:.3g}, "
            f"max {distance.max_abs:.3g}, KL {distance.kl:.2g} nats, "
            f"argmax agrees at {distance.argmax_agreement:.1%} of {distance.positions} positions",
            soft_wrap=True,
        )
    own = [name for name, what in result.hook_points.items() if what == "own"]
    if own:
        console.print(f"left to the model's own code: {', '.join(own)}")
    if result.completion:
        console.print(f"decoded: {result.completion!r}", soft_wrap=True, markup=False)


def _bound(row: OpRow) -> str:
    if not row.calls:
        return "-"
    return f"{row.bound:.2g}" if row.bound else "every byte equal"
