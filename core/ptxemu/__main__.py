"""The command line: `python -m ptxemu run|trace|disasm`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ptxemu import api
from ptxemu.errors import ArgumentError, PtxemuError
from ptxemu.lowering import TABLE
from ptxemu.parser import parse
from ptxemu.policy import POLICIES
from ptxemu.registry import find
from ptxemu.report import Report

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Runs PTX of sm_90a and sm_100a on the CPU.")

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file of PTX.")]
Values = Annotated[list[str] | None, typer.Argument(help=(
    "One for each parameter: a number; FILE.npy (its array goes in as a pointer); DTYPE:COUNT (zeros); "
    "DTYPE:COUNT:random (numbers between -1 and 1, or integers)."))]  # fmt: skip
Grid = Annotated[str, typer.Option(help="CTAs: X or X,Y,Z.")]
Block = Annotated[str, typer.Option(help="Threads: X or X,Y,Z; what .reqntid says by default.")]
Clusters = Annotated[str, typer.Option(help="CTAs of a cluster: X or X,Y,Z.")]
Shared = Annotated[int, typer.Option(help="Bytes of dynamic shared memory.")]
Entry = Annotated[str, typer.Option(help="Name of the kernel, where the file has several.")]
Policy = Annotated[str, typer.Option(help=f"When asynchronous operations complete: {', '.join(POLICIES)}.")]
Seed = Annotated[int, typer.Option(help="Of the random policy.")]
Save = Annotated[Path | None, typer.Option(help="Write the arrays as they are in the end into this .npz file.")]


@app.command()
def run(
    file: File, values: Values = None, grid: Grid = "1", block: Block = "", cluster: Clusters = "", shared: Shared = 0,
    entry: Entry = "", policy: Policy = "eager", seed: Seed = 0, save: Save = None,
) -> None:  # fmt: skip
    """Run a kernel and say what was found; exit 1 when anything was."""
    args = [_value(text, k) for k, text in enumerate(values or [])]
    options = _options(block, cluster, shared, policy, seed)
    report = api.emulate(api.load(file.read_text(), entry or None), _dim3(grid), args, **options)
    _finish(report, args, save)


@app.command()
def trace(
    file: File, values: Values = None, grid: Grid = "1", block: Block = "", cluster: Clusters = "", shared: Shared = 0,
    entry: Entry = "", policy: Policy = "eager", seed: Seed = 0,
    warp: Annotated[int | None, typer.Option(help="Only this warp of each CTA.")] = None,
    lane: Annotated[int, typer.Option(help="Whose registers are shown.")] = 0,
) -> None:  # fmt: skip
    """Run a kernel and print every instruction, with what it wrote in one lane."""
    args = [_value(text, k) for k, text in enumerate(values or [])]

    def show(machine: Any, of: Any, number: int, mask: int) -> None:
        instructions = machine.program.kernel.instructions
        if number < len(instructions) and warp in {None, of.index}:
            print(_traced(of, instructions[number], mask, lane))

    options = _options(block, cluster, shared, policy, seed)
    report = api.emulate(api.load(file.read_text(), entry or None), _dim3(grid), args, trace=show, **options)
    _finish(report, args, None)


@app.command()
def disasm(file: File, entry: Entry = "") -> None:
    """Print the instructions of a kernel as they were understood, with where the PTX ISA defines each."""
    kernel = parse(file.read_text()).kernel(entry or None)
    for number, instruction in enumerate(kernel.instructions):
        operation = find(instruction)
        row = TABLE.get(instruction.opcode)
        section = operation.section if operation else row.section if row else "NOT SUPPORTED"
        guard = f"@{'!' if instruction.negated else ''}{instruction.guard.name} " if instruction.guard else ""
        target = f" -> {instruction.target}" if instruction.target >= 0 else ""
        print(f"{number:5d}  line {instruction.line:<6d} {guard}{instruction.name}{target}  [{section}]")
        for operand in instruction.operands:
            print(f"{'':20}{operand}")


def _traced(warp: Any, instruction: Any, mask: int, lane: int) -> str:
    first: Any = instruction.operands[0] if instruction.operands else None
    written = ""
    if getattr(first, "width", 0):
        written = f"  {first.name}[{lane}] = {int(warp.registers(first)[lane]):#x}"
    elif getattr(first, "type", "") == "pred":
        written = f"  {first.name} = {sum(1 << k for k in range(32) if warp.predicate(first)[k]):#010x}"
    return f"CTA {warp.cta.index} warp {warp.index} {mask:#010x} line {instruction.line}: {instruction.text}{written}"


def _options(block: str, cluster: str, shared: int, policy: str, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {"shared": shared, "policy": policy, "seed": seed}
    if block:
        options["block"] = _dim3(block)
    if cluster:
        options["cluster"] = _dim3(cluster)
    return options


def _dim3(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError("size", text, "X or X,Y,Z") from None


def _value(text: str, seed: int) -> int | float | np.ndarray:
    """An argument of a kernel from the command line."""
    if text.endswith(".npy"):
        loaded: np.ndarray = np.load(text)
        return np.ascontiguousarray(loaded)
    dtype, _, rest = text.partition(":")
    if rest:
        count, _, how = rest.partition(":")
        kind = np.dtype(dtype)
        if how != "random":
            return np.zeros(int(count), kind)
        rng = np.random.default_rng(seed)
        if kind.kind in "iu":
            return rng.integers(0, 100, int(count)).astype(kind)
        return rng.uniform(-1, 1, int(count)).astype(kind)
    try:
        return int(text, 0)
    except ValueError:
        return float(text)


def _finish(report: Report, args: list[int | float | np.ndarray], save: Path | None) -> None:
    print(report)
    print(f"{report.rate / 1e3:.0f} k warp instructions a second")
    if save is not None:
        arrays: dict[str, Any] = {f"p{k}": a for k, a in enumerate(args) if isinstance(a, np.ndarray)}
        np.savez(save, **arrays)
    if report.findings:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; an error that a user can cause is one line."""
    try:
        app()
    except PtxemuError as error:
        sys.exit(f"ptxemu: {error}")


if __name__ == "__main__":
    main()
