"""The dispatcher against an oracle that states the rules another way, and the oracle against broken dispatchers."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import dispatch
from megamoe.dispatch import NoVariantError, Question
from megamoe.model import HARD_GATES, Evidence, Gate, Kind, Refusal, Role, Variant
from tests.core.selection import Answer, Asked, ask, expected, questions

randoms = st.randoms(use_true_random=False)
QUESTIONS = questions(800)
EXPECTED = [expected(asked) for asked in QUESTIONS]


@given(randoms)
@settings(max_examples=200)
def test_selection_is_what_the_rules_say(rng: random.Random) -> None:
    asked = ask(rng)
    assert asked.answer() == expected(asked)


@given(randoms, randoms)
@settings(max_examples=60)
def test_selection_is_pure(rng: random.Random, other: random.Random) -> None:
    """The same question has the same answer, in whatever order variants are declared, and is left as it was."""
    asked = ask(rng)
    before = copy.deepcopy(asked)
    first = _whole(asked)
    assert _whole(asked) == first
    assert asked == before
    variants = list(asked.question.stage.variants)
    other.shuffle(variants)
    stage = replace(asked.question.stage, variants=tuple(variants))
    assert _whole(replace(asked, question=replace(asked.question, stage=stage))) == first


@given(randoms)
@settings(max_examples=60)
def test_what_is_chosen_was_not_refused_unless_by_name_and_softly(rng: random.Random) -> None:
    asked = ask(rng)
    answer = asked.answer()
    against = {gate for name, gate in answer.refusals if name == answer.chosen}
    if asked.question.choice == "auto":
        assert not against
    elif asked.question.on_refusal == "error":
        assert against <= {"blocker", "evidence"}


def test_each_rule_decides_some_of_the_questions() -> None:
    """Otherwise agreement would say little."""
    gates = Counter(gate for answer in EXPECTED for _, gate in answer.refusals)
    assert all(gates[gate] >= 40 for gate in Gate), gates
    roles = Counter(answer.chosen.rstrip("01") for answer in EXPECTED)
    assert all(roles[role] >= 40 for role in ("fused", "fallback", "library", "reference", "")), roles
    overridden = [a for a in EXPECTED if any(name == a.chosen for name, _ in a.refusals)]
    assert len(overridden) >= 40


def test_the_fixed_questions_are_answered_right() -> None:
    assert _differences() == 0


# --- broken dispatchers -----------------------------------------------------------------------------------------------

Refusals = Iterator[Refusal]
_evidence, _blockers, _gates, _refusals = dispatch._evidence, dispatch._blockers, dispatch._gates, dispatch._refusals
_failures, _blocks = dispatch._failures, dispatch.blocks


def _none(*_: Any) -> Refusals:
    return iter(())


def _seen_as(change: Callable[[Question, Evidence], Evidence | None]) -> Callable[[Question, Variant], Refusals]:
    """The evidence gate on records that are changed, or dropped, before it sees them."""

    def gate(question: Question, variant: Variant) -> Refusals:
        changed = [change(question, record) for record in question.records]
        return _evidence(replace(question, records=[r for r in changed if r is not None]), variant)

    return gate


def _demanding(demand: str) -> Callable[[Question, Variant], Refusals]:
    return lambda question, variant: _evidence(replace(question, demand=demand), variant)


def _choice_is_ignored(question: Question, variant: Variant, *asked: Any) -> Refusals:
    return _gates(question, variant, *asked)


def _vetoes_are_ignored(question: Question, variant: Variant, supports: Any, refuse: Any) -> Refusals:
    return _gates(question, variant, supports, lambda stage, variant: ())


def _problems_are_ignored(question: Question, variant: Variant, supports: Any, refuse: Any) -> Refusals:
    return _gates(question, variant, lambda variant, facts: (), refuse)


def _first_only(question: Question, variant: Variant, *asked: Any) -> Refusals:
    yield from list(_refusals(question, variant, *asked))[:1]


def _same_family(question: Question, variant: Variant) -> Refusals:
    here = question.machine.arch
    if variant.archs and (here is None or here.cc // 10 not in {a.cc // 10 for a in variant.archs}):
        yield Refusal(variant.name, Gate.ARCH, "another family")


def _any_version(question: Question, variant: Variant) -> Refusals:
    for need in variant.needs:
        if need.partition(">=")[0] not in question.machine.packages:
            yield Refusal(variant.name, Gate.DEPENDENCY, f"needs {need}")


def _other_packages(question: Question, variant: Variant, record: Evidence) -> bool:
    return record.fingerprint == question.fingerprints[variant.name]


def _other_sources(question: Question, variant: Variant, record: Evidence) -> bool:
    names = [need.partition(">=")[0] for need in variant.needs]
    return all(record.packages.get(n) == question.machine.packages.get(n) for n in names)


def _with(kind: Kind, instead_of: Kind) -> Callable[[Question, Evidence], Evidence]:
    return lambda question, record: replace(record, kind=kind) if record.kind is instead_of else record


def _passes_outweigh(fresh: Sequence[Evidence]) -> list[Evidence]:
    return [] if any(e.ok for e in fresh) else _failures(fresh)


MUTATIONS: dict[str, dict[str, Any]] = {
    "CONFIG: the choice is ignored": {"_refusals": _choice_is_ignored},
    "CONFIG: only roles can be chosen": {"_asked_for": lambda choice, variant: choice == variant.role},
    "CONFIG: only names can be chosen": {"_asked_for": lambda choice, variant: choice == variant.name},
    "CONFIG: vetoes of plugins are ignored": {"_gates": _vetoes_are_ignored},
    "BLOCKER: none": {"_blockers": _none},
    "BLOCKER: those of the registry only": {"UNFINISHED": frozenset()},
    "BLOCKER: the status only": {"blocks": lambda blocker, variant, machine: False},
    "BLOCKER: on every architecture": {"_ccs": lambda archs: {90, 100, 103}},
    "BLOCKER: for every variant": {"blocks": lambda b, v, m: _blocks(b.model_copy(update={"variants": ()}), v, m)},
    "BLOCKER: until nothing": {"blocks": lambda b, v, m: _blocks(b.model_copy(update={"until": None}), v, m)},
    "ARCH: none": {"_arch": _none},
    "ARCH: the family is enough": {"_arch": _same_family},
    "DEPENDENCY: none": {"_dependencies": _none},
    "DEPENDENCY: any version": {"_dependencies": _any_version},
    "PROBLEM: none": {"_gates": _problems_are_ignored},
    "EVIDENCE: none": {"_evidence": _none},
    "EVIDENCE: of any architecture": {"_evidence": _seen_as(lambda q, e: replace(e, arch=q.machine.arch))},
    "EVIDENCE: of any sources": {"is_fresh": _other_sources},
    "EVIDENCE: of any compiler": {"is_fresh": _other_packages},
    "EVIDENCE: never stale": {"is_fresh": lambda question, variant, record: True},
    "EVIDENCE: a pass outweighs failures": {"_failures": _passes_outweigh},
    "EVIDENCE: failures are ignored": {"_evidence": _seen_as(lambda q, e: e if e.ok else None)},
    "EVIDENCE: failures of the emulator are ignored": {
        "_failures": lambda fresh: [e for e in _failures(fresh) if e.kind is Kind.VERIFIED]
    },
    "EVIDENCE: failed builds count": {"_failures": lambda fresh: [e for e in fresh if not e.ok]},
    "EVIDENCE: no cases is a pass": {"_failures": lambda fresh: [e for e in _failures(fresh) if e.cases]},
    "EVIDENCE: fallbacks need it too": {"_evidence": lambda q, v: _evidence(q, replace(v, role=Role.FUSED))},
    "EVIDENCE: shipped is as good as local": {
        "_evidence": _seen_as(lambda q, e: replace(e, origin="local")),
    },
    "EVIDENCE: local is demanded always": {"_evidence": _demanding("verified-here")},
    "EVIDENCE: emulated is always enough": {"_evidence": _demanding("emulated")},
    "EVIDENCE: emulated is never enough": {"_evidence": _seen_as(lambda q, e: None if e.kind is Kind.EMULATED else e)},
    "EVIDENCE: compiled is verified": {"_evidence": _seen_as(_with(Kind.VERIFIED, Kind.COMPILED))},
    "EVIDENCE: emulated is verified": {"_evidence": _seen_as(_with(Kind.VERIFIED, Kind.EMULATED))},
    "EVIDENCE: speeds are ignored": {"same_problem": lambda recorded, facts: False},
    "EVIDENCE: speeds count for any problem": {"same_problem": lambda recorded, facts: True},
    "hard gates give way to a name": {"HARD_GATES": frozenset()},
    "ARCH gives way to a name": {"HARD_GATES": HARD_GATES - {Gate.ARCH}},
    "DEPENDENCY gives way to a name": {"HARD_GATES": HARD_GATES - {Gate.DEPENDENCY}},
    "PROBLEM gives way to a name": {"HARD_GATES": HARD_GATES - {Gate.PROBLEM}},
    "soft gates stand against a name": {"HARD_GATES": HARD_GATES | {Gate.BLOCKER, Gate.EVIDENCE}},
    "fallback before fused": {"ORDER": (Role.FALLBACK, Role.FUSED, Role.REFERENCE)},
    "reference before fallback": {"ORDER": (Role.FUSED, Role.REFERENCE, Role.FALLBACK)},
    "only the first refusal is reported": {"_refusals": _first_only},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_gate_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wrong in MUTATIONS[mutation].items():
        monkeypatch.setattr(dispatch, name, wrong)
    assert _differences(stop=True) > 0


def _differences(*, stop: bool = False) -> int:
    found = 0
    for asked, right in zip(QUESTIONS, EXPECTED, strict=True):
        found += asked.answer() != right
        if found and stop:
            break
    return found


def _whole(asked: Asked) -> tuple[Answer, str]:
    """The answer with its words."""
    try:
        decision = dispatch.select(
            asked.question,
            supports=lambda variant, facts: asked.unsupported.get(variant.name, ()),
            refuse=lambda stage, variant: asked.vetoed.get(variant.name, ()),
        )
    except NoVariantError as error:
        return asked.answer(), str(error)
    refusals = sorted(repr(r) for r in decision.refusals)
    return asked.answer(), f"{decision.why} {decision.evidence} {refusals}"
