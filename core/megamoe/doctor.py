"""Examines the installation: what is there, what is missing, what cannot be used."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megamoe import __version__, evidence, machine, registry
from megamoe.errors import MegamoeError
from megamoe.runtime import Runtime, runtime


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `state` is "ok", "note" (works, but worth knowing) or "bad"."""

    state: str
    what: str
    detail: str


def examine() -> list[Finding]:
    """Every finding, in a fixed order; never raises for what it examines."""
    findings = [Finding("ok", "megamoe", f"{__version__}, Python {platform.python_version()}")]
    for check in (_torch, _gpu, _dsl):
        findings += check()
    try:
        current = runtime()
    except MegamoeError as error:
        return [*findings, Finding("bad", "plugins", str(error))]
    checks: tuple[Callable[[Runtime], Iterator[Finding]], ...] = (_plugins, _registry, _config, _evidence, _ops)
    for examine_runtime in checks:
        findings += examine_runtime(current)
    return findings


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("bad", "torch", f"cannot be imported: {error}")
        return
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    yield Finding("ok", "torch", f"{torch.__version__}, {cuda}")
    if machine.gpus() and not torch.cuda.is_available():
        yield Finding("bad", "torch", "the driver shows a GPU, but this torch cannot use it")


def _gpu() -> Iterator[Finding]:
    found = machine.gpus()
    if not found:
        yield Finding("note", "gpu", "none: fallback and reference variants run on the CPU")
    for index, gpu in enumerate(found):
        yield Finding("ok", "gpu", f"{index}: {gpu.name}, {gpu.arch}")


def _dsl() -> Iterator[Finding]:
    version = machine.installed("nvidia-cutlass-dsl")
    if version is None:
        yield Finding("note", "cutlass-dsl", "nvidia-cutlass-dsl is not installed: fused variants cannot be built")
        return
    try:
        importlib.import_module("cutlass")
    except Exception as error:  # it loads native libraries, which fail in ways of their own
        yield Finding("bad", "cutlass-dsl", f"{version} cannot be imported: {error}")
        return
    yield Finding("ok", "cutlass-dsl", version)


def _plugins(current: Runtime) -> Iterator[Finding]:
    yield Finding("ok", "plugins", f"{len(current.stages)} stages: {', '.join(current.stages)}")
    for broken in current.plugins.broken:
        yield Finding("bad", "plugins", f"{broken.name} of {broken.distribution}: {broken.error}")


def _registry(current: Runtime) -> Iterator[Finding]:
    yield Finding("ok", "registry", f"{len(current.registry.item)} items in {registry.find()}")
    without = [s for s in current.stages if not current.registry.of_stage(s)]
    if without:
        yield Finding("note", "registry", f"stages without an item: {', '.join(without)}")


def _config(current: Runtime) -> Iterator[Finding]:
    try:
        settings = current.default_config
    except MegamoeError as error:
        yield Finding("bad", "config", str(error))
        return
    yield Finding("ok", "config", f"default {settings.default.value} ({settings.default.origin})")


def _evidence(current: Runtime) -> Iterator[Finding]:
    folder = evidence.local_folder()
    total = stale = 0
    for stage in current.stages.values():
        try:
            records = current.records(stage)
        except MegamoeError as error:
            yield Finding("bad", "evidence", str(error))
            continue
        total += len(records.evidence)
        stale += sum(e.fingerprint != records.fingerprints.get(e.variant) for e in records.evidence)
        for problem in records.problems:
            yield Finding("note", "evidence", f"ignored: {problem}")
    yield Finding("ok", "evidence", f"{total} records, {stale} of them out of date; local ones in {folder}")


def _ops(current: Runtime) -> Iterator[Finding]:
    from megamoe.ops import op

    for stage_id in current.stages:
        try:
            op(stage_id)
        except Exception as error:  # a third-party stage may raise anything
            yield Finding("bad", "ops", f"{stage_id}: {type(error).__name__}: {error}")
            return
    yield Finding("ok", "ops", f"{len(current.stages)} torch.library operators in torch.ops.megamoe")
