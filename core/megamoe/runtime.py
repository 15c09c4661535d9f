"""What is installed, put together once: plugins, registry, evidence; and the decisions that follow. No torch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megamoe import config as configs
from megamoe import dispatch, evidence, machine, registry
from megamoe.config import Config, Names
from megamoe.dispatch import Facts, Question
from megamoe.model import Arch, Decision, Evidence, Machine, Refusal, Stage, Variant
from megamoe.plugins import Plugins, load
from megamoe.registry import Registry


@dataclass(frozen=True, slots=True)
class Records:
    """Evidence about one stage, the fingerprints it is held against, and lines about unusable files."""

    evidence: tuple[Evidence, ...]
    fingerprints: Mapping[str, str]
    problems: tuple[str, ...]


class Runtime:
    """Plugins, registry and evidence of this process.

    Args:
        plugins: Default: everything installed.
        registry_: Default: the file that `registry.find` finds.
    """

    def __init__(self, plugins: Plugins | None = None, registry_: Registry | None = None) -> None:
        self.plugins = plugins or Plugins()
        self.registry = registry_ or registry.load(stages=self.plugins.stages)
        self._records: dict[str, Records] = {}
        self._lock = threading.Lock()

    @property
    def stages(self) -> Mapping[str, Stage]:
        """Stages by id."""
        return self.plugins.stages

    @functools.cached_property
    def names(self) -> Names:
        """What a configuration may speak of."""
        return Names(self.stages, self.registry)

    @functools.cached_property
    def default_config(self) -> Config:
        """The configuration that files and environment give."""
        return configs.load(self.names)

    def stage(self, name: str) -> Stage:
        """The stage of a stage or item id."""
        return self.stages[self.names.stage_id(name)]

    def machine(self, arch: Arch | None | str = "here") -> Machine:
        """This machine's GPU 0 or CPU; with an Arch, one like this but with that GPU; with None, its CPU."""
        here = machine.detect(self.stages.values(), also=self._awaited)
        if isinstance(arch, str):
            return here
        if arch is None:
            return machine.detect(self.stages.values(), None, also=self._awaited)
        return here if here.arch == arch else Machine(arch, here.packages, f"a {arch}")

    @functools.cached_property
    def _awaited(self) -> tuple[str, ...]:
        """Requirements that lift blockers."""
        return tuple(b.until for item in self.registry.item.values() for b in item.blocker if b.until)

    def records(self, stage: Stage) -> Records:
        """Shipped and local evidence of a stage, read once."""
        with self._lock:
            if stage.id not in self._records:
                local, problems = evidence.local(stage)
                prints = {v.name: evidence.fingerprint(stage, v) for v in stage.variants}
                self._records[stage.id] = Records((*local, *evidence.shipped(stage)), prints, tuple(problems))
            return self._records[stage.id]

    def forget(self) -> None:
        """Drops what was read of the evidence, after new records were written."""
        with self._lock:
            self._records.clear()

    def question(self, stage: Stage, on: Machine, config: Config | None = None, facts: Facts | None = None) -> Question:
        """Everything the choice of a variant depends on."""
        config = config or self.default_config
        records = self.records(stage)
        return Question(
            stage=stage,
            machine=on,
            choice=config.choice(stage.id),
            origin=config.origin(stage.id),
            demand=config.evidence.value,
            on_refusal=config.refusal(stage.id),
            items=self.registry.of_stage(stage.id),
            records=records.evidence,
            fingerprints=records.fingerprints,
            facts=facts,
        )

    def hard_refusals(self, stage: Stage, variant: Variant, on: Machine | None = None) -> list[Refusal]:
        """What keeps a variant from running at all on a machine (default: this one): architecture and dependencies."""
        return dispatch.cannot_run(self.question(stage, on or self.machine()), variant)

    def decide(self, stage: Stage, on: Machine, config: Config | None = None, facts: Facts | None = None) -> Decision:
        """Chooses a variant; see dispatch.select."""
        question = self.question(stage, on, config, facts)
        return dispatch.select(question, supports=_supports, refuse=self.plugins.refusals)


def _supports(variant: Variant, facts: Facts) -> Iterable[str]:
    return load(variant.supports)(facts) if variant.supports else ()


_lock = threading.Lock()
_runtime: Runtime | None = None


def runtime() -> Runtime:
    """The process's runtime, made on first use."""
    global _runtime
    if _runtime is None:
        with _lock:
            if _runtime is None:
                _runtime = Runtime()
    return _runtime


def explain(
    stage: str,
    *,
    arch: str | None = None,
    problem: Facts | None = None,
    config: Config | None = None,
) -> Decision:
    """Which variant of an op would run, and every reason against the others.

    Args:
        stage: Stage or item id.
        arch: "sm_90", ... or "cpu"; default: this machine's GPU, or its CPU where there is none.
        problem: Facts of a problem as the stage's contract names them; None asks of no particular one.
        config: Default: what files and environment say.

    Raises:
        UnknownNameError: No such stage or item.
        NoVariantError: Nothing can run; the error holds every reason.
        ValueError: `arch` is not an architecture.
    """
    current = runtime()
    on = current.machine("here" if arch is None else None if arch == evidence.CPU else Arch.parse(arch))
    return current.decide(current.stage(stage), on, config, problem)
