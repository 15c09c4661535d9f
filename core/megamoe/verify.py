"""Tries a variant on every case of its stage, in a process of its own, and turns what came out into evidence.

A case passes when the outputs are within their bounds of the reference's, two runs over differently poisoned memory are
equal byte for byte, no guard byte changed, no input was written to and no output shares memory with one. In the PTX
emulator there is a run for each of its policies, all equal, and no run may have a finding.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe import __version__, evidence
from megamoe.errors import UnknownNameError
from megamoe.model import Arch, CaseResult, Evidence, Kind, Machine, Role, Speed, Stage, Variant
from megamoe.plugins import load
from megamoe.runtime import Runtime, runtime

POISONS = (0xFF, 0x3C)  # NaN in every float format; an ordinary value
NOT_RUN = "did not run"
CLEAN = "the process ended with code 0"


@dataclass(frozen=True, slots=True)
class Request:
    """What the child process is asked to do; crosses as JSON."""

    stage: str
    variant: str
    device: str
    cases: tuple[str, ...]
    time: bool
    emulate: str = ""  # architecture to emulate; empty to run on this machine


def case_names(stage: Stage, *, device: str, only: Iterable[str] = ()) -> list[str]:
    """Cases of a stage that suit a device.

    Args:
        stage: The stage.
        device: "cpu" leaves out the cases that are marked gpu_only.
        only: Restrict to these.

    Raises:
        UnknownNameError: A name in `only` is no case of the stage.
    """
    cases = load(stage.cases)
    wanted = set(only)
    for name in sorted(wanted):
        if name not in cases:
            raise UnknownNameError(f"case of {stage.id}", name, cases)
    wanted = wanted or set(cases)
    return [name for name, case in cases.items() if name in wanted and (device != "cpu" or not case.gpu_only)]


def verify(
    stage: Stage,
    variant: Variant,
    machine: Machine,
    *,
    only: Iterable[str] = (),
    timeout: float = 600.0,
    progress: Callable[[str, CaseResult | None, str], None] = lambda case, result, reason: None,
    environ: Mapping[str, str] | None = None,
    emulate: bool = False,
) -> Evidence:
    """Tries one variant on this machine in a child process.

    Args:
        stage: The stage.
        variant: One of its variants; a fused one is also timed beside the fallback where a case is marked `bench`.
        machine: What it runs on: decides the device and goes into the record.
        only: Names of cases; default all that suit the device.
        timeout: Seconds for the whole child.
        progress: Called with each case, its result and the reason, at the end; the result is None for a case that the
            variant's `supports` refuses: it is no part of the evidence.
        environ: Environment of the child.
        emulate: In the PTX emulator of the machine's architecture, cases that are too large for it left out.

    Returns:
        Evidence of kind `verified`, or `emulated`, passed or not. A child that crashed or hung has failed the case it
        was in.
    """
    device = "cpu" if machine.arch is None or emulate else "cuda"
    names = case_names(stage, device=device, only=only)
    emulated = str(machine.arch) if emulate else ""
    request = Request(
        stage.id, variant.name, device, tuple(names), variant.role is Role.FUSED and not emulate, emulated
    )
    results, speeds, skipped, died = _run_child(request, timeout, environ)
    names = [name for name in names if name not in skipped]
    for name, reasons in skipped.items():
        progress(name, None, "; ".join(reasons))
    missing = [name for name in names if name not in results]
    for position, name in enumerate(missing):
        reason = f"{died} in this case" if position == 0 else f"{NOT_RUN}: {died} earlier"
        results[name] = CaseResult(name, False, float("inf"), 0.0, reason)
    if names and not missing and died != CLEAN:  # such as a fault that shows only when memory is freed
        results[names[-1]] = CaseResult(names[-1], False, float("inf"), 0.0, f"{died} after this case")
    cases = tuple(results[name] for name in names)
    for result in cases:
        progress(result.case, result, result.reason)
    return Evidence(
        stage=stage.id,
        variant=variant.name,
        arch=machine.arch,
        kind=Kind.EMULATED if emulate else Kind.VERIFIED,
        fingerprint=evidence.fingerprint(stage, variant),
        cases=cases,
        speeds=tuple(speeds),
        packages=dict(machine.packages),
        device="ptxemu" if emulate else machine.device,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        version=__version__,
    )


def _run_child(
    request: Request, timeout: float, environ: Mapping[str, str] | None
) -> tuple[dict[str, CaseResult], list[Speed], dict[str, list[str]], str]:
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "results.jsonl", Path(folder) / "log"
        out.touch()
        command = [sys.executable, "-m", "megamoe.verify", json.dumps(asdict(request)), str(out)]
        with log.open("wb") as stderr:
            try:
                code = subprocess.run(
                    command, stdout=stderr, stderr=stderr, timeout=timeout, env=environ or os.environ, check=False
                ).returncode
                died = _death(code, log)
            except subprocess.TimeoutExpired:
                died = f"timed out after {timeout:g} s"
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    results = {line["result"]["case"]: CaseResult(**line["result"]) for line in lines if "result" in line}
    speeds = [Speed(**line["speed"]) for line in lines if "speed" in line]
    return results, speeds, {line["skipped"]: line["reasons"] for line in lines if "skipped" in line}, died


def _death(code: int, log: Path) -> str:
    if code == 0:
        return CLEAN
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    last = log.read_text(errors="replace").strip().splitlines()
    return f"the process ended with code {code}" + (f" ({last[-1][:200]})" if last else "")


# --- the child --------------------------------------------------------------------------------------------------------


def refused(stage: Stage, variant: Variant, inputs: Mapping[str, Any]) -> list[str]:
    """Why a variant's `supports` turns these arguments down; empty when it takes them."""
    from megamoe.ops import op

    return list(load(variant.supports)(op(stage.id).facts(**inputs))) if variant.supports else []


def run_case(
    run: Callable[..., Any] | Sequence[Callable[..., Any]],
    stage: Stage,
    name: str,
    device: str,
    contract_bounds: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
) -> CaseResult:
    """Tries a callable on one case; see the module's docstring for what passing means.

    Args:
        run: With the reference's signature; or several such, each run once, that must all agree.
        stage: The stage.
        name: Of the case.
        device: Where to make the inputs.
        contract_bounds: The stage's BOUNDS.
        inputs: The case's inputs, where they are made already.
    """
    from megamoe.testing import compare, guards

    case = load(stage.cases)[name]
    inputs = case.inputs(name, device) if inputs is None else inputs
    bounds = {**contract_bounds, **case.bounds}
    mine = {key: guards.clone(value) for key, value in inputs.items()}
    expected = compare.leaves(load(stage.reference.target)(**mine), mine, stage.mutates)
    runs: list[dict[str, Any]] = []
    trouble: list[str] = []
    calls = run if isinstance(run, Sequence) else (run,) * len(POISONS)
    for attempt, poison in zip(calls, itertools.cycle(POISONS), strict=False):
        guard = guards.Guarded(poison)
        given = guards.guarded_inputs(inputs, guard)
        with guard:
            outputs = compare.leaves(attempt(**given), given, stage.mutates)
        synchronize(device)
        trouble += guard.overruns()
        trouble += [f"wrote to its input {n!r}" for n in guards.changed_inputs(given, inputs, stage.mutates)]
        fresh = {key: value for key, value in outputs.items() if key not in stage.mutates}
        trouble += [f"{n}: shares memory with an input" for n in guards.aliases(fresh, given)]
        runs.append({key: guards.clone(value) for key, value in outputs.items()})
    for other in runs[1:]:
        trouble += [f"{n}: two runs differ" for n in expected if not guards.same_bytes(runs[0].get(n), other.get(n))]
    results = compare.compare(runs[0], expected, bounds)
    worst = compare.worst(results)
    trouble += [r.reason for r in results if not r.passed]
    return CaseResult(name, not trouble, worst.error, worst.bound, "; ".join(dict.fromkeys(trouble)))


def synchronize(device: str) -> None:
    """Waits for the device."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _child(request: Request, out: Path) -> None:
    from megamoe.ops import op

    this = op(request.stage)
    stage = this.stage
    variant = next(v for v in stage.variants if v.name == request.variant)
    target = load(variant.target)
    run: Callable[..., Any] | Sequence[Callable[..., Any]] = target
    if request.emulate:
        from megamoe import emulation

        run = emulation.attempts(emulation.Emulator(Arch.parse(request.emulate)), target)
    with out.open("a") as file:

        def put(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for name in request.cases:
            try:
                inputs = load(stage.cases)[name].inputs(name, request.device)
                reasons = refused(stage, variant, inputs) or (emulation.too_large(inputs) if request.emulate else [])
                if reasons:
                    put(skipped=name, reasons=reasons)
                    continue
                result = run_case(run, stage, name, request.device, this.bounds, inputs)
                put(result=asdict(result))
                if request.time and result.passed and load(stage.cases)[name].bench:
                    put(speed=asdict(_speed(target, stage, name, request.device, inputs)))
            except Exception as error:  # whatever a variant raises is its failure, not ours
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
                put(result=asdict(CaseResult(name, False, float("inf"), 0.0, reason)))


def _speed(run: Callable[..., Any], stage: Stage, name: str, device: str, inputs: Mapping[str, Any]) -> Speed:
    from megamoe import timing
    from megamoe.ops import op

    fallback = load(best_fallback(stage).target)
    times = timing.interleaved(
        {"variant": lambda: run(**inputs), "fallback": lambda: fallback(**inputs)}, device, max_seconds=10
    )
    return Speed(name, op(stage.id).facts(**inputs), round(times["variant"], 2), round(times["fallback"], 2))


def best_fallback(stage: Stage) -> Variant:
    """The fallback that `auto` would take first, of those that can run on this machine."""
    here = [v for v in stage.variants if v.role is Role.FALLBACK and not runtime().hard_refusals(stage, v)]
    return min(here, key=lambda v: (-v.rank, v.name))


def record(found: Evidence, stage: Stage, *, ship: bool, current: Runtime | None = None) -> Path:
    """Writes a record to the local store or, with `ship`, beside the stage's sources; returns its path."""
    folder = evidence.shipped_folder(stage) if ship else evidence.local_folder() / stage.id
    if folder is None:
        raise UnknownNameError("folder to ship evidence to, of stage", stage.id, ())
    path = evidence.write(found, folder)
    (current or runtime()).forget()
    return path


if __name__ == "__main__":
    raw = json.loads(sys.argv[1])
    _child(Request(**{**raw, "cases": tuple(raw["cases"])}), Path(sys.argv[2]))
