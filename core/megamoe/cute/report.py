"""What `megamoe compile` does: compiles every kernel that the stages declare and says what came out.

A stage declares its kernels in the module of a variant, as `kernels() -> list[KernelSpec]`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.table import Table

from megamoe.cute import inspect
from megamoe.cute.compiler import Artifact, KernelSpec, compile_kernel
from megamoe.cute.inspect import Kernel
from megamoe.model import Arch, Stage


@dataclass(frozen=True)
class Row:
    """One compiled kernel of a stage."""

    stage: str
    spec: KernelSpec
    artifact: Artifact
    kernel: Kernel


def specs(stages: Iterable[Stage], arch: Arch | None = None) -> Iterator[tuple[Stage, KernelSpec]]:
    """The kernels that variants declare, of one architecture or of all."""
    for stage in stages:
        modules = dict.fromkeys(v.target.partition(":")[0] for v in stage.variants if v.archs)
        for module in modules:
            for spec in getattr(importlib.import_module(module), "kernels", list)():
                if arch is None or Arch.parse(spec.arch) == arch:
                    yield stage, spec


def compile_all(stages: Iterable[Stage], arch: Arch | None = None, *, fresh: bool = False) -> Iterator[Row]:
    """Compiles the kernels of the stages one after another."""
    for stage, spec in specs(stages, arch):
        artifact = compile_kernel(spec, fresh=fresh)
        for kernel in inspect.kernels(artifact.cubin):
            yield Row(stage.id, spec, artifact, kernel)


def table(rows: Iterable[Row]) -> Table:
    """The rows for people; a dash where nvdisasm is missing."""
    out = Table(box=None, pad_edge=False)
    for name in ("stage", "kernel", "arch"):
        out.add_column(name)
    for name in ("seconds", "registers", "spill bytes", "shared bytes", "instructions", *inspect.GROUPS):
        out.add_column(name, justify="right")
    for row in rows:
        kernel = row.kernel
        seconds = f"{row.artifact.seconds:.1f}{' (cached)' if row.artifact.cached else ''}"
        counts = [kernel.total, *(kernel.count(group) for group in inspect.GROUPS)]
        numbers = [str(n) for n in (kernel.registers, kernel.stack, kernel.shared)]
        shown = ["-" if n is None else str(n) for n in counts]
        out.add_row(row.stage, row.spec.name, row.spec.arch, seconds, *numbers, *shown)
    return out


def as_dict(row: Row) -> dict[str, object]:
    """A row as plain values."""
    kernel = row.kernel
    return {
        "stage": row.stage,
        "kernel": row.spec.name,
        "arch": row.spec.arch,
        "seconds": round(row.artifact.seconds, 2),
        "cached": row.artifact.cached,
        "registers": kernel.registers,
        "local_bytes": kernel.stack,
        "shared_bytes": kernel.shared,
        "instructions": None if kernel.instructions is None else dict(kernel.instructions),
    }
