"""Runs fused variants under NVIDIA's compute-sanitizer, one variant and one tool a process: a script for a GPU machine.

    python -m tests.gpu.sanitize quantize mhc_quant --tools memcheck racecheck --json reports.json

Inputs are made on the CPU and copied, torch's caching allocator is off (each tensor is an allocation with bounds of its
own), results are compared with the reference on the CPU. Reports of the host's API are left out: cuda-python asks the
driver for functions that it may not have. Exit code 1 when a tool reports something or a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import typer

from megamoe import verify
from megamoe.model import Role, Stage, Variant
from megamoe.ops import op
from megamoe.plugins import load
from megamoe.runtime import runtime
from megamoe.testing import compare, guards

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
LARGEST = 4 << 20  # bytes of a case's inputs: a tool slows a kernel a hundredfold
SLOWEST = ("initcheck",)  # tools that get the smallest cases
OPTIONS = {"synccheck": ("--num-cuda-barriers", "16384")}  # kernels with many mbarriers overflow the tool's own table
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


class Report(NamedTuple):
    """What one tool said of one variant; `errors` is -1 when it gave no summary."""

    stage: str
    variant: str
    tool: str
    errors: int
    cases: int
    seconds: float
    lines: list[str]


def small_cases(stage: Stage, variant: Variant, most: int, *, smallest: bool) -> dict[str, dict[str, object]]:
    """Inputs, on the CPU, of the first cases, or the smallest ones, that are small enough and that the variant takes.

    The smallest one comes first: a tool that runs out of time has then seen as many as it could.
    """
    made = {name: case.inputs(name, "cpu") for name, case in load(stage.cases).items() if not case.gpu_only}
    sizes: dict[str, int] = {}
    for name, inputs in made.items():
        tensors = [t for value in inputs.values() for t in guards.tensors(value)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size <= LARGEST and all(t.numel() for t in tensors):
            sizes[name] = size
    found: list[str] = []
    for name in sorted(sizes, key=sizes.__getitem__) if smallest else sizes:
        if len(found) == most:
            break
        if not verify.refused(stage, variant, {key: to_gpu(value) for key, value in made[name].items()}):
            found.append(name)
    return {name: made[name] for name in sorted(found, key=sizes.__getitem__)}


def to_gpu(value: object) -> object:
    """Moves what can be moved."""
    return value.to("cuda") if hasattr(value, "to") else value


def child(stage: Stage, variant: Variant, most: int, *, smallest: bool) -> int:
    """Runs under the tool: each case once, compared with the reference on the CPU; returns 1 when one is wrong."""
    run, wrong = load(variant.target), 0
    for name, inputs in small_cases(stage, variant, most, smallest=smallest).items():
        mine = {key: guards.clone(value) for key, value in inputs.items()}
        expected = compare.leaves(load(stage.reference.target)(**mine), mine, stage.mutates)
        given = {key: to_gpu(value) for key, value in inputs.items()}
        outputs = compare.leaves(run(**given), given, stage.mutates)
        torch.cuda.synchronize()
        outputs = {key: value.to("cpu") for key, value in outputs.items()}
        bounds = {**op(stage.id).bounds, **load(stage.cases)[name].bounds}
        bad = [r.reason for r in compare.compare(outputs, expected, bounds) if not r.passed]
        wrong += bool(bad)
        typer.echo(f"case {name}: {'; '.join(bad) or 'right'}")
    return 1 if wrong else 0


def sanitize(stage: Stage, variant: Variant, tool: str, most: int, seconds: float) -> Report:
    """One tool over one variant."""
    start = time.perf_counter()
    sanitizer = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--print-limit", "20"]
    run = [sys.executable, "-m", "tests.gpu.sanitize", stage.id, "--child", variant.name, "--cases", str(most)]
    command = [*sanitizer, *OPTIONS.get(tool, ()), *run, *(["--smallest"] if tool in SLOWEST else [])]
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ, check=False)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        output = "".join(part.decode() for part in (late.stdout, late.stderr) if part) + f"\nno end in {seconds:g} s"
    found = SUMMARY.search(output)
    errors = int(found.group(1)) if found else -1
    cases = re.findall(r"^case (.*)$", output, re.MULTILINE)
    if any(not case.endswith(": right") for case in cases):
        errors = max(errors, 1)
    lines = output.splitlines() if errors else [f"case {case}" for case in cases]
    return Report(stage.id, variant.name, tool, errors, len(cases), round(time.perf_counter() - start, 1), lines)


def subjects(stages: list[str]) -> list[tuple[Stage, Variant]]:
    """The fused variants, of the stages named or of all, that can run here."""
    chosen = [runtime().stage(name) for name in stages] or list(runtime().stages.values())
    return [
        (stage, variant)
        for stage in chosen
        for variant in stage.variants
        if variant.role is Role.FUSED and not runtime().hard_refusals(stage, variant)
    ]


def main() -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", help="stage ids; default: all")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--cases", type=int, default=4, help="at most so many cases of a stage")
    parser.add_argument("--seconds", type=float, default=120, help="limit of one tool on one variant")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--json", type=Path, help="where the reports go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--smallest", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stage = runtime().stage(options.stages[0])
        variant = next(v for v in stage.variants if v.name == options.child)
        return child(stage, variant, options.cases, smallest=options.smallest)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(sanitize, stage, variant, tool, options.cases, options.seconds)
            for stage, variant in subjects(options.stages)
            for tool in options.tools
        ]
        reports = [job.result() for job in waiting]
    for report in reports:
        said = "clean" if report.errors == 0 else f"{report.errors} errors" if report.errors > 0 else "no summary"
        said = said if report.cases else "nothing shown: no case is small enough"
        typer.echo(f"{report.stage:<20} {report.variant:<12} {report.tool:<10} {report.cases} cases  {said}")
    if options.json:
        options.json.write_text(json.dumps([report._asdict() for report in reports], indent=1) + "\n")
    return int(any(report.errors or not report.cases for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
