"""Bandwidth against size: the variants of an op that is bound by memory, beside a copy of the same bytes.

A stage takes part when its cases hold `SWEEP` (name to Case) and its contract `bytes_moved` (the op's signature; bytes
read and written once), or when it has a module `sweep` whose SUBJECT is a part of the op that is bound by memory. All
figures of a size come from one interleaved run on one GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe import timing, verify
from megamoe.errors import MegamoeError
from megamoe.model import Role, Stage
from megamoe.ops import op
from megamoe.plugins import load
from megamoe.runtime import runtime
from megamoe.testing import compare, guards
from megamoe.testing.cases import Bound, Case

COPY, COMPILED = "copy", "torch.compile"
_BEYOND_L2 = 300e6  # bytes that one round of copies of the inputs should touch


@dataclass(frozen=True, slots=True)
class Point:
    """One size of one op.

    Attributes:
        stage: Id of the op.
        case: Name in SWEEP.
        bytes: Read and written once.
        us: Median microseconds by variant; "copy" moves the same bytes, "torch.compile" is the compiled fallback.
        sm_mhz: SM clock after the run.
    """

    stage: str
    case: str
    bytes: int
    us: dict[str, float]
    sm_mhz: int

    def share(self, name: str) -> float:
        """Time of the copy over time of a variant: 1 is the roof."""
        return self.us[COPY] / self.us[name]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a sweep measures; the functions all take the arguments that the cases make.

    Attributes:
        cases: Sizes by name.
        bytes_moved: Bytes read and written once.
        expected: Gives the right result.
        fallback: What torch.compile compiles.
        variants: The functions to time by name, of those that can take some arguments on this machine.
        bounds: How far a variant may be from `expected`.
    """

    cases: Mapping[str, Case]
    bytes_moved: Callable[..., int]
    expected: Callable[..., Any]
    fallback: Callable[..., Any]
    variants: Callable[[dict[str, Any]], Mapping[str, Callable[..., Any]]]
    bounds: Mapping[str, Bound]


def sweep(stage: Stage, *, compile_seconds: float = 60.0) -> Iterator[Point]:
    """Measures a stage, size by size.

    Args:
        stage: One that takes part.
        compile_seconds: torch.compile of the fallback, compiled anew for each size, is timed at each size until
            its first calls have taken so long together; later sizes have no figure of it.

    Raises:
        MegamoeError: No GPU, or a stage that does not take part, or a variant that is wrong.
    """
    if not torch.cuda.is_available():
        raise MegamoeError("a bandwidth sweep needs a GPU; there is none here")
    subject = subject_of(stage)
    left = compile_seconds
    for name, case in subject.cases.items():
        inputs = case.inputs(name, "cuda")
        total = subject.bytes_moved(**inputs)
        sets = [inputs, *({k: guards.clone(v) for k, v in inputs.items()} for _ in range(_copies(total) - 1))]
        functions = _checked(subject, inputs, name)
        if left > 0:
            start = time.perf_counter()
            torch.compiler.reset()  # else the limit of recompilations sends later sizes back to eager mode
            compiled = torch.compile(subject.fallback)
            compiled(**inputs)
            torch.cuda.synchronize()
            left -= time.perf_counter() - start
            functions[COMPILED] = compiled
        timed = {n: [_call(f, s) for s in sets] for n, f in functions.items()}
        timed[COPY] = [_copy(total) for _ in sets]
        us = timing.queued(timed, calls=10 if total > 2e8 else 50)
        yield Point(stage.id, name, total, {n: round(t, 3) for n, t in us.items()}, torch.cuda.clock_rate())


def subject_of(stage: Stage) -> Subject:
    """What a sweep of a stage measures.

    Raises:
        MegamoeError: The stage does not take part.
    """
    package = stage.contract.rpartition(".")[0]
    if importlib.util.find_spec(f"{package}.sweep"):
        found = importlib.import_module(f"{package}.sweep").SUBJECT
        assert isinstance(found, Subject)
        return found
    cases = getattr(importlib.import_module(stage.cases.partition(":")[0]), "SWEEP", None)
    moved: Callable[..., int] | None = getattr(importlib.import_module(stage.contract), "bytes_moved", None)
    if cases is None or moved is None:
        raise MegamoeError(f"{stage.id} has no SWEEP of sizes: it is not bound by memory")
    this = op(stage.id)

    def variants(inputs: dict[str, Any]) -> dict[str, Callable[..., Any]]:
        able = (v for v in stage.variants if v.role is not Role.REFERENCE and not runtime().hard_refusals(stage, v))
        return {v.name: load(v.target) for v in able if not verify.refused(stage, v, inputs)}

    return Subject(cases, moved, this.reference, load(verify.best_fallback(stage).target), variants, this.bounds)


def _copies(total: int) -> int:
    return int(min(8, max(2, _BEYOND_L2 // max(total, 1))))


def _checked(subject: Subject, inputs: dict[str, Any], case: str) -> dict[str, Callable[..., Any]]:
    """The variants that can run here, each found right on these inputs first."""
    variants = dict(subject.variants(inputs))
    expected = compare.leaves(subject.expected(**inputs))
    for name, run in variants.items():
        results = compare.compare(compare.leaves(run(**inputs)), expected, subject.bounds)
        if wrong := [r.reason for r in results if not r.passed]:
            raise MegamoeError(f"{case}: {name} is wrong, so it is not timed: {'; '.join(wrong)}")
    return variants


def _call(function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(**inputs)


def _copy(total: int) -> Callable[[], Any]:
    source = torch.randint(0, 255, (max(total // 2, 16),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def table(points: Sequence[Point]) -> str:
    """A Markdown table: time, bandwidth and share of the copy for each variant."""
    names = list(dict.fromkeys(n for p in points for n in p.us if n != COPY))
    head = ["size", "MB", "copy us", "TB/s", *(f"{n} us (of the copy)" for n in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in points:
        cells = [p.case, f"{p.bytes / 1e6:.2f}", f"{p.us[COPY]:.2f}", f"{p.bytes / p.us[COPY] / 1e6:.2f}"]
        cells += [f"{p.us[n]:.2f} ({p.share(n):.0%})" if n in p.us else "" for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(points: Sequence[Point], path: Path) -> None:
    """The points as JSON."""
    path.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n")


def read(path: Path) -> list[Point]:
    """Points that `write` wrote."""
    return [Point(**raw) for raw in json.loads(path.read_text())]


def plot(points: Sequence[Point], path: Path) -> None:
    """Draws bandwidth against size, the copy as a line on top; PNG or SVG by the path's ending.

    Raises:
        MegamoeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MegamoeError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(points, key=lambda p: p.bytes)
    roof = [p for p, after in zip(ordered, [*ordered[1:], None], strict=True) if not after or after.bytes != p.bytes]
    axes.plot(*_line(roof, COPY), "k--", label=COPY)
    for place, name in enumerate(dict.fromkeys(n for p in ordered for n in p.us if n != COPY)):
        for kind, style in zip(_layouts(ordered), ("o-", "s:"), strict=False):
            here = [p for p in ordered if name in p.us and p.case.endswith(kind)]
            axes.plot(*_line(here, name), style, color=f"C{place}", label=f"{name} {kind}".rstrip())
    axes.set(xscale="log", xlabel="MB read and written once", ylabel="TB/s", title=ordered[0].stage if ordered else "")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _line(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    """MB and TB/s of a variant."""
    return [p.bytes / 1e6 for p in points], [p.bytes / p.us[name] / 1e6 for p in points]


def _layouts(points: Sequence[Point]) -> list[str]:
    """The scale layouts that the cases end with, which get a line each; else one line for all."""
    found = [kind for kind in ("linear", "128x4") if any(p.case.endswith(f" {kind}") for p in points)]
    return found if all(p.case.endswith(tuple(found)) for p in points) and found else [""]
