"""Running kernels: PTX text with its arguments, or compiled CuTe DSL functions with theirs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptxemu import memory
from ptxemu.capture import Captured, Launcher, tensor
from ptxemu.errors import ArgumentError, CaptureError
from ptxemu.machine import BUDGET, Launch, Machine
from ptxemu.memory import GlobalMemory, Region
from ptxemu.parser import parse
from ptxemu.program import Argument, Program
from ptxemu.report import Report

Trace = Callable[[Machine, Any, int, int], None]
_KEPT = 64  # programs and launchers


@functools.lru_cache(maxsize=_KEPT)
def load(ptx: str, kernel: str | None = None) -> Program:
    """Parses and lowers a kernel, to be launched any number of times.

    Raises:
        PtxSyntaxError: The text cannot be read.
        UnsupportedInstruction: It holds an instruction that is not implemented.
    """
    return Program(parse(ptx).kernel(kernel))


@functools.lru_cache(maxsize=_KEPT)
def _parameter_sizes(ptx: str) -> dict[str, Sequence[int]]:
    return {name: tuple(p.size for p in kernel.parameters) for name, kernel in parse(ptx).kernels.items()}


@functools.lru_cache(maxsize=_KEPT)
def _launcher(object_file: bytes) -> Launcher:
    return Launcher(object_file)


def run(
    compiled: Any,
    *args: Any,
    policy: str = "eager",
    seed: int = 0,
    undefined: Sequence[Any] = (),
    extra: Sequence[Any] = (),
    budget: int = BUDGET,
    trace: Trace | None = None,
) -> Report:
    """Runs a compiled launcher on tensors in host memory: its own host code, then each kernel it launches.

    Args:
        compiled: What `cute.compile` gave with `--enable-tvm-ffi --keep-ptx`; or anything with `object_file` (path or
            bytes of what `export_to_c` wrote with the function name "launch") and `ptx` (text).
        args: Tensors (torch or numpy) and numbers as the launcher takes them, without the stream. Written in place.
        policy: When asynchronous operations complete, one of `POLICIES`.
        seed: Of the random policy.
        undefined: Which of the tensors hold nothing yet, so that reading them before they are written is a finding.
        extra: Tensors that a kernel reaches though no argument is them.
        budget: Warp instructions after which a launch counts as endless.
        trace: See `emulate`.

    Returns:
        What was found, for all launches; a launch that a finding ended is the last.

    Raises:
        CaptureError: The host code refuses the arguments, or the object follows another calling convention.
        BuildError: gcc or the DSL's wheel is missing.
        PtxSyntaxError, UnsupportedInstruction: The PTX.
    """
    object_file, ptx = _parts(compiled)
    launches = _launcher(object_file)(_parameter_sizes(ptx), args)
    report = Report(policy=policy, seed=seed)
    for number, captured in enumerate(launches):
        space = GlobalMemory()
        _add_tensors(space, args, extra, undefined)
        program = load(ptx, captured.kernel)
        program.set_parameters(captured.parameters)
        launch = Launch(captured.grid, captured.block, captured.cluster, captured.shared)
        machine = Machine(program, launch, space, policy=policy, seed=seed, number=number, budget=budget, trace=trace)
        machine.resident_at_once = captured.cooperative
        report.launches.append(machine.run())
        report.findings += machine.findings
        if machine.stopped:
            break
    return report


def captured(compiled: Any, *args: Any) -> list[Captured]:
    """The launches that the host code of a compiled launcher asks for, without running them; see `run`."""
    object_file, ptx = _parts(compiled)
    return _launcher(object_file)(_parameter_sizes(ptx), args)


def _parts(compiled: Any) -> tuple[bytes, str]:
    """Object file and PTX of a compiled launcher."""
    if hasattr(compiled, "object_file") and hasattr(compiled, "ptx"):
        given = compiled.object_file
        return given if isinstance(given, bytes) else Path(given).read_bytes(), compiled.ptx
    if hasattr(compiled, "export_to_c"):
        ptx = getattr(compiled.artifacts, "PTX", None)
        if not ptx:
            raise CaptureError("the compiled function kept no PTX: compile with --keep-ptx")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "launch.o"
            compiled.export_to_c(str(path), function_name="launch")
            return path.read_bytes(), ptx
    raise ArgumentError("compiled", type(compiled).__name__, "a compiled launcher, or its object file and PTX")


def _add_tensors(space: GlobalMemory, args: Sequence[Any], extra: Sequence[Any], undefined: Sequence[Any]) -> None:
    empty = {found.address for value in undefined if (found := tensor(value)) is not None}
    for k, value in enumerate((*args, *extra)):
        if (found := tensor(value)) is not None:
            shape = "x".join(map(str, found.shape))
            space.add(found.region(f"argument {k} ({found.dtype} {shape})", initialised=found.address not in empty))


def emulate(
    ptx: str | Program,
    grid: int | tuple[int, ...],
    args: Sequence[Argument],
    *,
    block: int | tuple[int, ...] | None = None,
    cluster: int | tuple[int, ...] | None = None,
    shared: int = 0,
    policy: str = "eager",
    seed: int = 0,
    undefined: Sequence[np.ndarray] = (),
    extra: Sequence[np.ndarray | Region] = (),
    budget: int = BUDGET,
    trace: Trace | None = None,
) -> Report:
    """Runs a kernel given as PTX.

    Args:
        ptx: Text, or what `load` made of it.
        grid: CTAs, up to three numbers.
        args: One for each parameter: contiguous arrays go in as pointers and are written in place, numbers by the
            parameter's type, bytes as they are.
        block: Threads; what `.reqntid` says by default.
        cluster: CTAs of a cluster; what `.reqnctapercluster` says by default, else 1.
        shared: Bytes of dynamic shared memory.
        policy: When asynchronous operations complete, one of `POLICIES`.
        seed: Of the random policy.
        undefined: Which of the arrays hold nothing yet, so that reading them before they are written is a finding.
        extra: Memory that the kernel reaches though no argument is it (through a tensor map, or a pointer in memory).
        budget: Warp instructions after which a launch counts as endless.
        trace: Called with (machine, warp, instruction number, lane mask) after each instruction.

    Returns:
        What was found; the results are in the arrays.

    Raises:
        PtxSyntaxError, UnsupportedInstruction: The PTX.
        ArgumentError: Arguments that do not fit.
    """
    program = load(ptx) if isinstance(ptx, str) else ptx
    space = GlobalMemory()
    arrays = [a for a in (*args, *extra) if isinstance(a, np.ndarray)]
    empty = {id(a) for a in undefined}
    for k, array in enumerate(arrays):
        if not array.flags.c_contiguous:
            raise ArgumentError("args", "an array with gaps", "contiguous arrays")
        space.add(memory.over(f"argument {k}", array, initialised=id(array) not in empty))
    for region in extra:
        if isinstance(region, Region):
            region.forget_stores()
            space.add(region)
    threads = _dim3(block) if block is not None else program.kernel.block
    if threads is None:
        raise ArgumentError("block", None, "a size, as the kernel has no .reqntid")
    clusters = _dim3(cluster) if cluster is not None else program.kernel.cluster or (1, 1, 1)
    program.set_parameters(args)
    launch = Launch(_dim3(grid), threads, clusters, shared)
    machine = Machine(program, launch, space, policy=policy, seed=seed, budget=budget, trace=trace)
    facts = machine.run()
    return Report(machine.findings, [facts], policy, seed)


def _dim3(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*((size,) if isinstance(size, int) else size), 1, 1)[:3]
    return x, y, z
