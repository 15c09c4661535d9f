"""Chooses a variant. A pure function: no torch, no clock, no environment, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from packaging.requirements import Requirement

from megamoe.errors import MegamoeError
from megamoe.model import (
    HARD_GATES,
    Decision,
    Evidence,
    Gate,
    Kind,
    Machine,
    Refusal,
    Role,
    Stage,
    Status,
    Variant,
)
from megamoe.registry import Blocker, Item

ORDER = (Role.FUSED, Role.FALLBACK, Role.REFERENCE)
UNFINISHED = frozenset({Status.PLANNED, Status.BUILDING, Status.CLOSED})
Facts = Mapping[str, str | int | float | bool | None]


class NoVariantError(MegamoeError, RuntimeError):
    """Nothing can run an op as it was asked for; carries every reason.

    Args:
        stage: Id of the stage.
        choice: What the configuration asked for.
        refusals: Why each variant was turned down.
    """

    def __init__(self, stage: str, choice: str, refusals: Sequence[Refusal]) -> None:
        lines = [f"  {r.variant}: {r.gate}: {r.reason}" for r in refusals]
        super().__init__("\n".join([f"no variant of {stage!r} can run here (asked for: {choice})", *lines]))
        self.stage = stage
        self.choice = choice
        self.refusals = tuple(refusals)


@dataclass(frozen=True, slots=True)
class Question:
    """Everything a choice depends on.

    Attributes:
        stage: The op and its variants.
        machine: Where it would run.
        choice: auto, fused, fallback, reference, off or a variant's name.
        origin: Where the choice came from, for the words.
        demand: Evidence that `auto` asks of a fused variant: verified, verified-here or emulated.
        on_refusal: "error" or "fallback", for a choice other than auto that cannot run.
        items: Roadmap items that the stage implements.
        records: Evidence about the stage.
        fingerprints: Current fingerprint of each variant.
        facts: The problem; None when no particular one is meant.
    """

    stage: Stage
    machine: Machine
    choice: str = "auto"
    origin: str = ""
    demand: str = "verified"
    on_refusal: str = "error"
    items: Mapping[str, Item] = field(default_factory=dict)
    records: Sequence[Evidence] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    facts: Facts | None = None


def select(
    question: Question,
    *,
    supports: Callable[[Variant, Facts], Iterable[str]] = lambda variant, facts: (),
    refuse: Callable[[str, Variant], Iterable[str]] = lambda stage, variant: (),
) -> Decision:
    """Picks the first variant, fused before fallback before reference, that no gate refuses.

    A choice by name or role overrides the soft gates (BLOCKER, EVIDENCE) and says so; the hard ones stand.

    Args:
        question: What the choice depends on.
        supports: Reasons why a variant cannot do a problem.
        refuse: Reasons that plugins hold against a variant.

    Raises:
        NoVariantError: Nothing is left; the error holds every refusal.
    """
    ordered = sorted(question.stage.variants, key=lambda v: (ORDER.index(v.role), -v.rank, v.name))
    refusals: list[Refusal] = []
    eligible: list[Variant] = []
    for variant in ordered:
        found = list(_refusals(question, variant, supports, refuse))
        refusals += found
        gates = {r.gate for r in found}
        overridden = _asked_for(question.choice, variant) and not gates & {*HARD_GATES, Gate.CONFIG}
        if not found or overridden:
            eligible.append(variant)
    if eligible:
        refused = {r.variant for r in refusals}
        chosen = next((v for v in eligible if v.name not in refused), eligible[0])  # a role may name several
        return Decision(
            question.stage.id, chosen, _why(question, chosen, refusals), tuple(refusals), best(question, chosen)
        )
    if question.on_refusal == "fallback" and question.choice not in ("auto", "off"):
        return _fall_back(question, refusals, supports, refuse)
    raise NoVariantError(question.stage.id, question.choice, refusals)


def _fall_back(
    question: Question,
    refusals: list[Refusal],
    supports: Callable[[Variant, Facts], Iterable[str]],
    refuse: Callable[[str, Variant], Iterable[str]],
) -> Decision:
    for role in (Role.FALLBACK, Role.REFERENCE):
        for variant in sorted(question.stage.variants, key=lambda v: (-v.rank, v.name)):
            if variant.role is not role:
                continue
            found = list(_gates(question, variant, supports, refuse))
            refusals += [r for r in found if r not in refusals]
            if not found:
                why = f"{question.choice!r} ({question.origin}) cannot run here and on_refusal is 'fallback'"
                return Decision(question.stage.id, variant, why, tuple(refusals), best(question, variant))
    raise NoVariantError(question.stage.id, question.choice, refusals)


def _asked_for(choice: str, variant: Variant) -> bool:
    return choice in (variant.name, variant.role)


def _refusals(
    question: Question,
    variant: Variant,
    supports: Callable[[Variant, Facts], Iterable[str]],
    refuse: Callable[[str, Variant], Iterable[str]],
) -> Iterator[Refusal]:
    if question.choice != "auto" and not _asked_for(question.choice, variant):
        yield Refusal(variant.name, Gate.CONFIG, f"{question.origin or 'config'} asks for {question.choice!r}")
        return
    yield from _gates(question, variant, supports, refuse)


def _gates(
    question: Question,
    variant: Variant,
    supports: Callable[[Variant, Facts], Iterable[str]],
    refuse: Callable[[str, Variant], Iterable[str]],
) -> Iterator[Refusal]:
    for reason in refuse(question.stage.id, variant):
        yield Refusal(variant.name, Gate.CONFIG, reason)
    yield from _blockers(question, variant)
    hard = cannot_run(question, variant)
    if question.facts is not None and not hard:  # asking loads the variant's module, which may need what is missing
        hard += [Refusal(variant.name, Gate.PROBLEM, reason) for reason in supports(variant, question.facts)]
    yield from hard
    if not hard:  # no point in asking for proof of what cannot run
        yield from _evidence(question, variant)


def cannot_run(question: Question, variant: Variant) -> list[Refusal]:
    """What keeps a variant from running at all on the machine: its architecture, a missing package."""
    return [*_arch(question, variant), *_dependencies(question, variant)]


def _blockers(question: Question, variant: Variant) -> Iterator[Refusal]:
    statuses = {key: item.status for key, item in question.items.items()}
    if variant.role is Role.FUSED and statuses and UNFINISHED.issuperset(statuses.values()):
        words = ", ".join(f"{key} is {status}" for key, status in statuses.items())
        yield Refusal(variant.name, Gate.BLOCKER, f"{words} in the registry")
    for key, item in question.items.items():
        for blocker in item.blocker:
            if blocks(blocker, variant, question.machine):
                remedy = f"clears with {blocker.until}" if blocker.until else ""
                yield Refusal(variant.name, Gate.BLOCKER, f"{key}, {blocker.id}: {blocker.summary}", remedy)


def blocks(blocker: Blocker, variant: Variant, machine: Machine) -> bool:
    """Whether a blocker holds a variant back on a machine."""
    named = variant.name in blocker.variants or (not blocker.variants and variant.role is Role.FUSED)
    here = not blocker.archs or (machine.arch is not None and machine.arch.cc in _ccs(blocker.archs))
    return named and here and not blocker.cleared_by(machine.packages)


def _ccs(archs: Iterable[str]) -> set[int]:
    return {int(a.removeprefix("sm_").rstrip("af")) for a in archs}


def _arch(question: Question, variant: Variant) -> Iterator[Refusal]:
    if variant.archs and question.machine.arch not in variant.archs:
        built = ", ".join(map(str, sorted(variant.archs)))
        here = question.machine.arch or "the CPU"
        yield Refusal(variant.name, Gate.ARCH, f"written for {built}; this is {here}")


def _dependencies(question: Question, variant: Variant) -> Iterator[Refusal]:
    for need in map(Requirement, variant.needs):
        have = question.machine.packages.get(need.name)
        if have is None or not need.specifier.contains(have, prereleases=True):
            yield Refusal(
                variant.name, Gate.DEPENDENCY, f"needs {need}; installed: {have or 'none'}", f"pip install '{need}'"
            )


def _evidence(question: Question, variant: Variant) -> Iterator[Refusal]:
    """Evidence counts for the exact architecture, sources and compilers; a fresh failure outweighs any pass."""
    arch = question.machine.arch
    remedy = f"megamoe verify {question.stage.id} --variant {variant.name}"
    here = [e for e in question.records if e.variant == variant.name and e.arch == arch]
    fresh = [e for e in here if is_fresh(question, variant, e)]
    if failed := _failures(fresh):
        first = next((c for c in failed[0].cases if not c.passed), None)
        detail = f": {first.case}: {first.reason}" if first else ""
        total = len(failed[0].cases)
        reason = f"failed on {arch or 'the CPU'}, {failed[0].passed}/{total} cases passed{detail}"
        yield Refusal(variant.name, Gate.EVIDENCE, reason, remedy)
        return
    if variant.role is not Role.FUSED:  # fallback and reference need no proof beyond CI
        return
    wanted = {Kind.VERIFIED, Kind.EMULATED} if question.demand == "emulated" else {Kind.VERIFIED}
    good = [e for e in fresh if e.kind in wanted and (question.demand != "verified-here" or e.origin == "local")]
    if not good:
        yield Refusal(variant.name, Gate.EVIDENCE, _lacking(question, variant, here, fresh), remedy)
        return
    for record in good:
        for speed in record.speeds:
            if question.facts is not None and same_problem(speed.problem, question.facts):
                if speed.variant_us > speed.fallback_us:
                    times = f"{speed.variant_us:.1f} us against {speed.fallback_us:.1f} us"
                    yield Refusal(
                        variant.name, Gate.EVIDENCE, f"slower than the fallback at this problem: {times} ({speed.case})"
                    )
                return


def _failures(fresh: Iterable[Evidence]) -> list[Evidence]:
    """Records of runs that went wrong; any of them outweighs every pass."""
    return [e for e in fresh if not e.ok and e.kind is not Kind.COMPILED]


def is_fresh(question: Question, variant: Variant, record: Evidence) -> bool:
    """Whether a record still speaks of what is installed: same sources, same version of every package it needs."""
    current = question.fingerprints.get(variant.name)
    needs = {Requirement(need).name for need in variant.needs}
    same = all(record.packages.get(n) == question.machine.packages.get(n) for n in needs)
    return record.fingerprint == current and same


def same_problem(recorded: Facts, facts: Facts) -> bool:
    """Whether a recorded speed was taken at this problem."""
    return dict(recorded) == dict(facts)


def _lacking(question: Question, variant: Variant, here: Sequence[Evidence], fresh: Sequence[Evidence]) -> str:
    arch = question.machine.arch or "the CPU"
    if fresh:
        best_kind = "/".join(sorted({f"{e.kind}, {e.origin}" for e in fresh}))
        return f"on {arch} only {best_kind}; config demands {question.demand}"
    if here:
        return f"{here[0].kind} on {arch}, but its sources or compiler changed since"
    elsewhere = sorted({str(e.arch or "the CPU") for e in question.records if e.variant == variant.name})
    return f"never {question.demand.partition('-')[0]} on {arch}" + (
        f" (only on {', '.join(elsewhere)})" if elsewhere else ""
    )


def best(question: Question, variant: Variant) -> Evidence | None:
    """The strongest fresh passing record for a variant on the machine; None too where a fresh one failed."""
    order = list(Kind)
    here = [e for e in question.records if e.variant == variant.name and e.arch == question.machine.arch]
    fresh = [e for e in here if is_fresh(question, variant, e)]
    if _failures(fresh):
        return None
    passed = [e for e in fresh if e.ok]
    return min(passed, key=lambda e: (order.index(e.kind), e.origin != "local"), default=None)


def _why(question: Question, chosen: Variant, refusals: Sequence[Refusal]) -> str:
    if question.choice != "auto":
        why = f"{question.origin or 'config'} asks for {question.choice!r}"
        lifted = [r.reason for r in refusals if r.variant == chosen.name]
        return why + (f", overriding: {'; '.join(lifted)}" if lifted else "")
    record = best(question, chosen)
    if chosen.role is Role.FUSED and record is not None:
        return (
            f"{record.kind} on {record.arch or 'the CPU'} ({record.passed}/{len(record.cases)} cases, {record.origin})"
        )
    fused = [v for v in question.stage.variants if v.role is Role.FUSED]
    if not fused:
        return f"the stage has no fused variant yet; this is the {chosen.role}"
    return f"no fused variant is eligible; this is the {chosen.role}"
