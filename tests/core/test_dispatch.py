"""Selection by example: who is chosen, and in what words. The rules as a whole are in test_selection_properties.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megamoe import dispatch
from megamoe.dispatch import NoVariantError, Question, select
from megamoe.model import Decision, Gate, Kind, Machine, Role, Speed, Variant
from tests.core.builders import FAILED, PASSED, SM90, SM100, items, record, stage, variant

HOPPER = Machine(SM90, {"dsl": "4.8.1"}, "an H200")
FUSED = variant("sm90", Role.FUSED, archs=frozenset({SM90}), needs=("dsl>=4.8,<4.9",))
PROOF = record("sm90", packages={"dsl": "4.8.1"})
STAGE = stage(FUSED)
NOW = {v.name: "now" for v in STAGE.variants}


def _ask(**more: Any) -> Question:
    return Question(**{"stage": STAGE, "machine": HOPPER, "records": [PROOF], "fingerprints": NOW, **more})


def _reasons(decision: Decision, name: str) -> dict[Gate, str]:
    return {r.gate: r.reason for r in decision.refusals if r.variant == name}


def test_proven_fused_variant_is_chosen_and_the_record_is_named() -> None:
    decision = select(_ask())
    assert decision.variant is FUSED
    assert decision.evidence is PROOF
    assert decision.why == "verified on sm_90 (1/1 cases, local)"
    assert decision.refusals == ()


def test_without_evidence_the_fallback_runs_and_the_remedy_is_a_command() -> None:
    decision = select(_ask(records=[]))
    assert decision.variant.role is Role.FALLBACK
    (refusal,) = decision.refusals
    assert (refusal.variant, refusal.gate) == ("sm90", Gate.EVIDENCE)
    assert refusal.reason == "never verified on sm_90"
    assert refusal.remedy == "megamoe verify mul --variant sm90"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arch": SM100}, "never verified on sm_90 (only on sm_100)"),
        ({"arch": None}, "never verified on sm_90 (only on the CPU)"),
        ({"fingerprint": "before"}, "verified on sm_90, but its sources or compiler changed since"),
        ({"packages": {"dsl": "4.8.0"}}, "verified on sm_90, but its sources or compiler changed since"),
        ({"packages": {}}, "verified on sm_90, but its sources or compiler changed since"),
        ({"kind": Kind.EMULATED}, "on sm_90 only emulated, local; config demands verified"),
        ({"kind": Kind.COMPILED}, "on sm_90 only compiled, local; config demands verified"),
        ({"cases": (PASSED, FAILED)}, "failed on sm_90, 1/2 cases passed: small: out: half of the bytes differ"),
        ({"cases": ()}, "failed on sm_90, 0/0 cases passed"),
    ],
)
def test_evidence_that_does_not_count_is_named(changed: dict[str, Any], words: str) -> None:
    decision = select(_ask(records=[replace(PROOF, **changed)]))
    assert decision.variant.name == "fallback"
    assert _reasons(decision, "sm90") == {Gate.EVIDENCE: words}


def test_one_fresh_failure_outweighs_any_pass() -> None:
    failed = replace(PROOF, cases=(FAILED,), origin="shipped")
    for records in ([PROOF, failed], [failed, PROOF]):
        question = _ask(records=records)
        assert select(question).variant.name == "fallback"
        assert dispatch.best(question, FUSED) is None
    stale = replace(failed, fingerprint="before")
    assert select(_ask(records=[PROOF, stale])).variant is FUSED


@pytest.mark.parametrize(
    ("demand", "kind", "origin", "enough"),
    [
        ("verified", Kind.VERIFIED, "shipped", True),
        ("verified", Kind.EMULATED, "local", False),
        ("verified-here", Kind.VERIFIED, "local", True),
        ("verified-here", Kind.VERIFIED, "shipped", False),
        ("verified-here", Kind.EMULATED, "local", False),
        ("emulated", Kind.VERIFIED, "shipped", True),
        ("emulated", Kind.EMULATED, "shipped", True),
        ("emulated", Kind.COMPILED, "local", False),
    ],
)
def test_what_each_demand_accepts(demand: str, kind: Kind, origin: str, enough: bool) -> None:
    decision = select(_ask(demand=demand, records=[replace(PROOF, kind=kind, origin=origin)]))
    assert (decision.variant is FUSED) is enough


@pytest.mark.parametrize(("times", "facts", "chosen"), [
    ((9.0, 8.0), {"k": 64}, "fallback"),
    ((9.0, 8.0), {"k": 65}, "sm90"),
    ((9.0, 8.0), None, "sm90"),
    ((8.0, 8.0), {"k": 64}, "sm90"),
    ((7.0, 8.0), {"k": 64}, "sm90"),
])  # fmt: skip
def test_slower_than_the_fallback_at_this_problem(
    times: tuple[float, float], facts: dict[str, int] | None, chosen: str
) -> None:
    slow = replace(PROOF, speeds=(Speed("large", {"k": 64}, *times),))
    decision = select(_ask(records=[slow], facts=facts))
    assert decision.variant.name == chosen
    if chosen == "fallback":
        reason = _reasons(decision, "sm90")[Gate.EVIDENCE]
        assert reason == "slower than the fallback at this problem: 9.0 us against 8.0 us (large)"


def test_a_choice_by_name_overrides_soft_gates_and_says_so() -> None:
    blocked = items(A={"blocker": [{"id": "b", "kind": "numerics", "summary": "wrong for NaN"}]}).item
    for choice in ("sm90", "fused"):
        decision = select(_ask(choice=choice, origin="argument", records=[], items=blocked))
        assert decision.variant is FUSED
        assert decision.why == (
            f"argument asks for '{choice}', overriding: A, b: wrong for NaN; never verified on sm_90"
        )
        assert decision.evidence is None


@pytest.mark.parametrize(
    ("machine", "gate", "words"),
    [
        (Machine(SM100, {"dsl": "4.8.1"}), Gate.ARCH, "written for sm_90; this is sm_100"),
        (Machine(None, {"dsl": "4.8.1"}), Gate.ARCH, "written for sm_90; this is the CPU"),
        (Machine(SM90, {}), Gate.DEPENDENCY, "needs dsl<4.9,>=4.8; installed: none"),
        (Machine(SM90, {"dsl": "4.9.0"}), Gate.DEPENDENCY, "needs dsl<4.9,>=4.8; installed: 4.9.0"),
    ],
)
def test_hard_gates_stand_against_a_name(machine: Machine, gate: Gate, words: str) -> None:
    with pytest.raises(NoVariantError) as error:
        select(_ask(choice="sm90", origin="argument", machine=machine))
    assert (gate, words) in {(r.gate, r.reason) for r in error.value.refusals if r.variant == "sm90"}
    assert "no variant of 'mul' can run here (asked for: sm90)" in str(error.value)
    for refusal in error.value.refusals:
        assert refusal.reason in str(error.value)
    assert {r.variant for r in error.value.refusals} == {"sm90", "fallback", "reference"}


def test_unsupported_problem_is_hard_and_each_reason_is_kept() -> None:
    def supports(variant: Variant, facts: dispatch.Facts) -> list[str]:
        return ["k must be even", "k must be small"] if variant is FUSED and facts["k"] == 65 else []

    decision = select(_ask(facts={"k": 65}), supports=supports)
    assert [(r.gate, r.reason) for r in decision.refusals] == [
        (Gate.PROBLEM, "k must be even"),
        (Gate.PROBLEM, "k must be small"),
    ]
    with pytest.raises(NoVariantError, match="k must be even"):
        select(_ask(facts={"k": 65}, choice="sm90"), supports=supports)
    assert select(_ask(facts={"k": 64}, choice="sm90"), supports=supports).variant is FUSED


def test_a_variant_that_cannot_run_here_is_not_loaded_to_be_asked() -> None:
    asked: list[str] = []

    def supports(variant: Variant, facts: dispatch.Facts) -> list[str]:
        asked.append(variant.name)
        return []

    select(_ask(facts={"k": 1}, machine=Machine(SM100)), supports=supports)
    assert asked == ["fallback", "reference"]


def test_every_refusal_is_reported_in_gate_order() -> None:
    held = items(A={"status": "planned", "blocker": [{"id": "b", "kind": "design", "summary": "s"}]}).item
    decision = select(_ask(machine=Machine(SM100), items=held), refuse=lambda s, v: ["vetoed"] if v is FUSED else [])
    gates = [r.gate for r in decision.refusals]
    assert gates == [Gate.CONFIG, Gate.BLOCKER, Gate.BLOCKER, Gate.ARCH, Gate.DEPENDENCY]
    assert [r.reason for r in decision.refusals][:3] == ["vetoed", "A is planned in the registry", "A, b: s"]


def test_a_veto_stands_against_a_name() -> None:
    with pytest.raises(NoVariantError, match="vetoed"):
        select(_ask(choice="sm90"), refuse=lambda s, v: ["vetoed"] if v is FUSED else [])


def test_rank_decides_within_a_role_and_the_name_after_it() -> None:
    def named(*ranks: tuple[str, int]) -> Question:
        fused = [variant(name, Role.FUSED, rank=rank) for name, rank in ranks]
        made = stage(*fused)
        return _ask(stage=made, records=[record(v.name) for v in fused], fingerprints=dict.fromkeys("abc", "now"))

    assert select(named(("a", 0), ("b", 2), ("c", 1))).variant.name == "b"
    assert select(named(("c", 1), ("b", 1), ("a", 0))).variant.name == "b"


def test_a_role_takes_a_variant_without_refusals_before_one_that_it_would_override() -> None:
    wrong, right = variant("wrong", Role.FUSED, rank=9), variant("right", Role.FUSED)
    question = _ask(
        stage=stage(wrong, right),
        records=[record("wrong", cases=(FAILED,)), record("right")],
        fingerprints={"wrong": "now", "right": "now"},
    )
    assert select(replace(question, choice="fused")).variant is right
    assert select(replace(question, choice="wrong")).variant is wrong


def test_off_leaves_nothing() -> None:
    for on_refusal in ("error", "fallback"):
        with pytest.raises(NoVariantError) as error:
            select(_ask(choice="off", origin="megamoe.toml", on_refusal=on_refusal))
        assert {r.reason for r in error.value.refusals} == {"megamoe.toml asks for 'off'"}


def test_on_refusal_fallback_takes_the_fallback_and_keeps_the_reasons() -> None:
    question = _ask(choice="sm90", origin="argument", machine=Machine(SM100), on_refusal="fallback")
    decision = select(question)
    assert decision.variant.name == "fallback"
    assert decision.why == "'sm90' (argument) cannot run here and on_refusal is 'fallback'"
    assert set(_reasons(decision, "sm90")) == {Gate.ARCH, Gate.DEPENDENCY}


@pytest.mark.parametrize("spoilt", ["veto", "failure", "blocker"])
def test_on_refusal_fallback_does_not_fall_back_to_what_is_refused(spoilt: str) -> None:
    """What falls back was not asked for by name, so nothing of it is overridden."""
    blocker = {"id": "b", "kind": "numerics", "summary": "wrong", "variants": ["fallback"]}
    decision = select(
        _ask(
            choice="sm90",
            machine=Machine(SM100),
            on_refusal="fallback",
            records=[record("fallback", SM100, cases=(FAILED,))] if spoilt == "failure" else [],
            items=items(A={"blocker": [blocker]}).item if spoilt == "blocker" else {},
        ),
        refuse=lambda s, v: ["vetoed"] if spoilt == "veto" and v.name == "fallback" else [],
    )
    assert decision.variant.name == "reference"
    wanted = {"veto": Gate.CONFIG, "failure": Gate.EVIDENCE, "blocker": Gate.BLOCKER}[spoilt]
    assert wanted in {r.gate for r in decision.refusals if r.variant == "fallback"}


@pytest.mark.parametrize(
    ("blocker", "held"),
    [
        ({}, True),
        ({"variants": ["sm90"]}, True),
        ({"variants": ["fallback"]}, False),
        ({"archs": ["sm_90a"]}, True),
        ({"archs": ["sm_100"]}, False),
        ({"until": "dsl>=4.9"}, True),
        ({"until": "dsl>=4.8"}, False),
        ({"until": "absent>=1"}, True),
    ],
)
def test_whom_a_blocker_holds_back(blocker: dict[str, Any], held: bool) -> None:
    made = items(A={"blocker": [{"id": "b", "kind": "upstream", "summary": "s", **blocker}]})
    decision = select(_ask(items=made.item))
    assert (Gate.BLOCKER in _reasons(decision, "sm90")) is held
    if "dsl>=4.9" in blocker.values():
        assert decision.refusals[0].remedy == "clears with dsl>=4.9"


@pytest.mark.parametrize(
    ("statuses", "held"),
    [
        (["planned"], True),
        (["building", "closed"], True),
        (["planned", "experimental"], False),
        (["stable"], False),
        ([], False),
    ],
)
def test_an_unfinished_item_holds_fused_variants_back(statuses: list[str], held: bool) -> None:
    made = items(**{f"I{n}": {"status": status} for n, status in enumerate(statuses)}).item
    decision = select(_ask(items=made))
    assert (decision.variant.name == "fallback") is held
    assert not _reasons(decision, "fallback")


def test_best_prefers_the_stronger_kind_and_then_the_local_record() -> None:
    emulated = replace(PROOF, kind=Kind.EMULATED)
    shipped = replace(PROOF, origin="shipped")
    assert dispatch.best(_ask(records=[emulated, shipped, PROOF]), FUSED) is PROOF
    assert dispatch.best(_ask(records=[emulated, shipped]), FUSED) is shipped
    assert dispatch.best(_ask(records=[emulated]), FUSED) is emulated


def test_why_without_a_fused_variant() -> None:
    assert select(_ask(stage=stage())).why == "the stage has no fused variant yet; this is the fallback"
    assert select(_ask(records=[])).why == "no fused variant is eligible; this is the fallback"
