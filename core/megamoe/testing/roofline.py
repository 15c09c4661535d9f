"""Time against size: the variants of an op beside its roof, a copy of the same bytes or a matmul of as many flops.

A stage takes part when its cases hold `SWEEP` (name to Case) and its contract `bytes_moved` (the op's signature; bytes
read and written once), or when it has a module `sweep` whose SUBJECT says what is measured; PARTS there may hold more
subjects by name. All figures of a size come from one interleaved run on one GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from megamoe import timing, verify
from megamoe.errors import MegamoeError, UnknownNameError
from megamoe.model import Role, Stage
from megamoe.ops import op
from megamoe.plugins import load
from megamoe.runtime import runtime
from megamoe.testing import compare
from megamoe.testing.cases import Bound, Case, to_device

COPY, MATMUL, COMPILED = "copy", "matmul", "torch.compile"
_ROOFS = (COPY, MATMUL)
_MATMUL_SIZE = 8192
_BEYOND_L2 = 300e6  # bytes that one round over the sets of inputs should touch
_STYLES = ("o-", "s:", "^--", "D-.")  # of families
LEAD = 300_000  # clocks that the host may take for a call: some check their arguments for 100 us
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One size of one op.

    Attributes:
        stage: Id of the op.
        case: Name of the size.
        bytes: Read and written once.
        us: Median microseconds by variant; "copy" moves the same bytes, "matmul" is what a bf16 one of 8192 x 8192 x
            8192 takes for as many flops, "torch.compile" is the compiled fallback.
        sm_mhz: SM clock after the run.
        flops: Of the op's products; 0 where memory alone is its roof.
        device: The GPU's name.
    """

    stage: str
    case: str
    bytes: int
    us: dict[str, float]
    sm_mhz: int
    flops: int = 0
    device: str = ""

    @property
    def roof(self) -> str:
        """Which roof is the nearer one, the slower of the two."""
        return max((name for name in _ROOFS if name in self.us), key=lambda name: self.us[name])

    def share(self, name: str) -> float:
        """Time of the roof over time of a variant: 1 is the roof."""
        return self.us[self.roof] / self.us[name]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a sweep measures; the functions all take the arguments that the cases make.

    Attributes:
        cases: Sizes by name; with flops the last word is the size, the one before it what that counts, and the others
            name a family; without flops the second word is the size, the others name a family (model, scale layout).
        bytes_moved: Bytes read and written once.
        expected: Gives the right result.
        calls: What is timed by name, given some arguments by keyword: callables for just these. A result is compared
            with what is expected by its outputs' names; it need not have all of them.
        compiled: What torch.compile compiles; None for an op that it is not tried on.
        flops: Of the products; None where memory alone is the roof.
        bounds: How far a result may be from `expected`.
    """

    cases: Mapping[str, Case]
    bytes_moved: Callable[..., int]
    expected: Callable[..., Any]
    calls: Callable[..., Mapping[str, Call]]
    compiled: Callable[..., Any] | None = None
    flops: Callable[..., int] | None = None
    bounds: Mapping[str, Bound] = field(default_factory=dict)


def sweep(
    stage: Stage,
    part: str | None = None,
    *,
    only: str = "",
    seconds: float = float("inf"),
    compile_seconds: float = 60.0,
) -> Iterator[Point]:
    """Measures a stage, size by size.

    Args:
        stage: One that takes part.
        part: Name of another subject of the stage's.
        only: Sizes whose names hold all of these words.
        seconds: No size is begun later than this.
        compile_seconds: torch.compile of the fallback, compiled anew for each size, is timed at each size until
            its first calls have taken so long together; later sizes have no figure of it.

    Raises:
        MegamoeError: No GPU, a part or words that no size has, or a variant that is wrong.
    """
    if not torch.cuda.is_available():
        raise MegamoeError("a sweep needs a GPU; there is none here")
    subject = subject_of(stage, part)
    begin = time.perf_counter()
    left = compile_seconds if subject.compiled else 0.0
    for name, case in sizes(subject, only).items():
        if time.perf_counter() - begin > seconds:
            break
        inputs = _inputs(case, name)
        total, flops = subject.bytes_moved(**inputs), subject.flops(**inputs) if subject.flops else 0
        sets = [inputs, *(_inputs(case, f"{name} {n}") for n in range(1, _copies(total)))]
        timed = checked(subject, name, sets)
        if left > 0 and subject.compiled:
            start = time.perf_counter()
            torch.compiler.reset()  # else the limit of recompilations sends later sizes back to eager mode
            compiled = torch.compile(subject.compiled)
            compiled(**inputs)
            torch.cuda.synchronize()
            left -= time.perf_counter() - start
            timed[COMPILED] = [partial(compiled, **s) for s in sets]
        timed[COPY] = [_copy(total) for _ in sets]
        if flops:
            timed[MATMUL] = [_matmul()]
        calls = 10 if total > 2e8 else 20
        us = timing.queued(timed, calls=calls, rounds=5, most_us=8_000, fewest=1, lead=LEAD)
        if flops:
            us[MATMUL] *= flops / (2 * _MATMUL_SIZE**3)
        times = {n: round(t, 3) for n, t in us.items()}
        yield Point(stage.id, name, total, times, torch.cuda.clock_rate(), flops, torch.cuda.get_device_name())


def sizes(subject: Subject, only: str) -> dict[str, Case]:
    """The sizes whose names hold all words of `only`.

    Raises:
        MegamoeError: There are none.
    """
    found = {name: case for name, case in subject.cases.items() if all(word in name for word in only.split())}
    if not found:
        raise MegamoeError(f"no size's name holds all of {only!r}; there are: {', '.join(subject.cases)}")
    return found


def subject_of(stage: Stage, part: str | None = None) -> Subject:
    """What a sweep of a stage measures.

    Raises:
        MegamoeError: The stage does not take part, has no such part, or a module `sweep` without a SUBJECT.
    """
    package = stage.contract.rpartition(".")[0]
    module = importlib.import_module(f"{package}.sweep") if importlib.util.find_spec(f"{package}.sweep") else None
    parts: Mapping[str, Subject] = getattr(module, "PARTS", {})
    if part is not None:
        if part not in parts:
            raise UnknownNameError(f"part of {stage.id}'s sweep", part, parts)
        return parts[part]
    if module is not None:
        found = getattr(module, "SUBJECT", None)
        if not isinstance(found, Subject):
            raise MegamoeError(f"{module.__name__}: SUBJECT is {type(found).__name__}, expected a Subject")
        return found
    return bound_by_memory(stage)


def bound_by_memory(stage: Stage) -> Subject:
    """A whole op by the sizes of its cases and the bytes of its contract.

    Raises:
        MegamoeError: The stage has not both.
    """
    cases = getattr(importlib.import_module(stage.cases.partition(":")[0]), "SWEEP", None)
    moved: Callable[..., int] | None = getattr(importlib.import_module(stage.contract), "bytes_moved", None)
    if cases is None or moved is None:
        raise MegamoeError(f"{stage.id} has no SWEEP of sizes")
    this = op(stage.id)
    fallback = load(verify.best_fallback(stage).target)
    return Subject(cases, moved, this.reference, partial(variants, stage), fallback, bounds=this.bounds)


def variants(stage: Stage, roles: Sequence[Role] = (Role.FUSED, Role.FALLBACK), /, **inputs: Any) -> dict[str, Call]:
    """Calls of a stage's variants, of some roles, that take some arguments on this machine."""
    able = (v for v in stage.variants if v.role in roles and not runtime().hard_refusals(stage, v))
    return {v.name: partial(load(v.target), **inputs) for v in able if not verify.refused(stage, v, inputs)}


def _inputs(case: Case, seed: str) -> dict[str, Any]:
    """Arguments of a case, made on the GPU: not the values that the case has elsewhere."""
    with torch.device("cuda"):
        made = case.make(torch.Generator("cuda").manual_seed(zlib.crc32(seed.encode())), **case.params)
    return {key: to_device(value, "cuda") for key, value in made.items()}


def _copies(total: int) -> int:
    return int(min(8, max(2, _BEYOND_L2 // max(total, 1))))


def checked(subject: Subject, case: str, sets: Sequence[dict[str, Any]]) -> dict[str, list[Call]]:
    """What is timed, a call for each set of inputs, each found right on the first of them."""
    calls = [dict(subject.calls(**inputs)) for inputs in sets]
    expected = compare.leaves(subject.expected(**sets[0]))
    for name, call in calls[0].items():
        got = {key: v.contiguous() if isinstance(v, torch.Tensor) else v for key, v in compare.leaves(call()).items()}
        results = compare.compare(got, {key: expected[key] for key in got}, subject.bounds)
        if wrong := [r.reason for r in results if not r.passed]:
            raise MegamoeError(f"{case}: {name} is wrong, so it is not timed: {'; '.join(wrong)}")
    return {name: [some[name] for some in calls] for name in calls[0]}


def _copy(total: int) -> Call:
    source = torch.randint(0, 255, (max(total // 2, 16),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul() -> Call:
    a, b = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
    return lambda: a @ b.mT


def _timed_names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(n for p in points for n in p.us if n not in _ROOFS))


def table(points: Sequence[Point]) -> str:
    """A Markdown table: times, rates and shares of the roof for each variant; TFLOP/s where there are flops."""
    names, by_flops = _timed_names(points), any(p.flops for p in points)
    if by_flops:
        head = ["size", "GFLOP", "MB", "roof us", *(f"{n} us (TFLOP/s, of the roof)" for n in names)]
    else:
        head = ["size", "MB", "copy us", "TB/s", *(f"{n} us (of the copy)" for n in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in points:
        megabytes, roof = f"{p.bytes / 1e6:.2f}", p.us[p.roof]
        if by_flops:
            cells = [p.case, f"{p.flops / 1e9:.2f}", megabytes, f"{roof:.2f} ({p.roof})"]
            cells += [
                f"{p.us[n]:.2f} ({p.flops / p.us[n] / 1e6:.0f}, {p.share(n):.0%})" if n in p.us else "" for n in names
            ]
        else:
            cells = [p.case, megabytes, f"{roof:.2f}", f"{p.bytes / roof / 1e6:.2f}"]
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
    """Draws bandwidth, or TFLOP/s a panel for each family, against size with the roof; PNG or SVG by the path's ending.

    Bandwidth has a line for each variant and family.

    Raises:
        MegamoeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MegamoeError("--plot needs matplotlib: pip install matplotlib") from error
    if any(p.flops for p in points):
        figure = _panels(Figure, points)
    else:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _bandwidth(figure.subplots(), sorted(points, key=lambda p: p.bytes))
    figure.savefig(path)


def _bandwidth(axes: Any, ordered: Sequence[Point]) -> None:
    roof = [p for p, after in zip(ordered, [*ordered[1:], None], strict=True) if not after or after.bytes != p.bytes]
    axes.plot(*_line(roof, COPY), "k--", label=COPY)
    for place, name in enumerate(_timed_names(ordered)):
        for (family, members), style in zip(_families(ordered).items(), cycle(_STYLES), strict=False):
            if here := [p for p in members if name in p.us]:
                axes.plot(*_line(here, name), style, color=f"C{place}", label=f"{name} {family}".rstrip(), markersize=4)
    axes.set(xscale="log", xlabel="MB read and written once", ylabel="TB/s", title=_title(ordered))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _panels(figure_class: Any, points: Sequence[Point]) -> Any:
    families: dict[str, list[Point]] = {}
    for p in points:
        families.setdefault(p.case.rpartition(" ")[0], []).append(p)
    columns = min(3, len(families))
    rows = -(-len(families) // columns)
    figure = figure_class(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    names = _timed_names(points)
    for (family, members), axes in zip(families.items(), panels, strict=False):
        ordered = sorted(members, key=lambda p: p.flops)
        axes.plot(*_rates(ordered, [p.us[p.roof] for p in ordered]), "kx--", label="roof")
        for place, name in enumerate(names):
            if here := [p for p in ordered if name in p.us]:
                rates = _rates(here, [p.us[name] for p in here])
                axes.plot(*rates, "o-", color=f"C{place}", label=name, markersize=4)
        title, _, quantity = family.rpartition(" ")
        axes.set(yscale="log", xlabel=quantity, ylabel="TFLOP/s", title=title.rstrip(","))
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
    for axes in panels:
        axes.remove()
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(_title(points))
    return figure


def _title(points: Sequence[Point]) -> str:
    return ", ".join(filter(None, (points[0].stage, points[0].device))) if points else ""


def _line(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    """MB and TB/s of a variant."""
    return [p.bytes / 1e6 for p in points], [p.bytes / p.us[name] / 1e6 for p in points]


def _rates(points: Sequence[Point], us: Sequence[float]) -> tuple[list[str], list[float]]:
    """Sizes and TFLOP/s at some times."""
    return [p.case.split()[-1] for p in points], [p.flops / t / 1e6 for p, t in zip(points, us, strict=True)]


def _families(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by the words of their names besides the size, "pro 128x4" of "pro 64x7168 128x4"."""
    found: dict[str, list[Point]] = {}
    for p in points:
        words = p.case.split()
        found.setdefault(" ".join(words[:1] + words[2:]) if len(words) > 1 else "", []).append(p)
    return found
