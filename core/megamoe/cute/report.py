"""What `megamoe compile` does: compiles every kernel that the stages declare and says what came out.

A stage declares its kernels in the module of a variant, as `kernels() -> list[KernelSpec]`.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

from megamoe import __version__, evidence
from megamoe.cute import inspect
from megamoe.cute.compiler import Artifact, KernelSpec, compile_kernel
from megamoe.cute.inspect import Kernel
from megamoe.model import Arch, CaseResult, Evidence, Kind, Stage, Variant


@dataclass(frozen=True)
class Row:
    """One compiled kernel of a variant."""

    stage: str
    variant: Variant
    spec: KernelSpec
    artifact: Artifact
    kernel: Kernel


def specs(stages: Iterable[Stage], arch: Arch | None = None) -> Iterator[tuple[Stage, Variant, KernelSpec]]:
    """The kernels that variants declare, of one architecture or of all."""
    for stage in stages:
        for variant in stage.variants:
            if not variant.archs:
                continue
            module = importlib.import_module(variant.target.partition(":")[0])
            for spec in getattr(module, "kernels", list)():
                built_for = Arch.parse(spec.arch)
                if built_for in variant.archs and (arch is None or built_for == arch):
                    yield stage, variant, spec


def compile_all(stages: Iterable[Stage], arch: Arch | None = None, *, fresh: bool = False) -> Iterator[Row]:
    """Compiles the kernels of the stages one after another."""
    for stage, variant, spec in specs(stages, arch):
        artifact = compile_kernel(spec, fresh=fresh)
        for kernel in inspect.kernels(artifact.cubin):
            yield Row(stage.id, variant, spec, artifact, kernel)


def records(rows: Iterable[Row], stages: Mapping[str, Stage], packages: Mapping[str, str]) -> list[Evidence]:
    """Evidence of kind `compiled`, one a variant and architecture; a kernel with `faults` has failed."""
    cases: dict[tuple[str, Variant, str], list[CaseResult]] = {}
    for row in rows:
        reason = "; ".join(row.kernel.faults)
        result = CaseResult(row.spec.name, not reason, float(row.kernel.stack), 0.0, reason)
        cases.setdefault((row.stage, row.variant, row.spec.arch), []).append(result)
    return [
        Evidence(
            stage=stage,
            variant=variant.name,
            arch=Arch.parse(arch),
            kind=Kind.COMPILED,
            fingerprint=evidence.fingerprint(stages[stage], variant),
            cases=tuple(results),
            packages=dict(packages),
            device=f"cross-compiled for {arch}",
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            version=__version__,
        )
        for (stage, variant, arch), results in cases.items()
    ]


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
        "variant": row.variant.name,
        "kernel": row.spec.name,
        "arch": row.spec.arch,
        "seconds": round(row.artifact.seconds, 2),
        "cached": row.artifact.cached,
        "registers": kernel.registers,
        "local_bytes": kernel.stack,
        "shared_bytes": kernel.shared,
        "instructions": None if kernel.instructions is None else dict(kernel.instructions),
    }
