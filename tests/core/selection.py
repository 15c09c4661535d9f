"""The rules of selection, written a second time and another way, with a generator of questions to compare on.

The rules are those of the design's section "Selection". Two consequences of "asking loads code": a variant that cannot
run on the machine is not asked about the problem, and one that cannot run at all is not asked for evidence.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megamoe import dispatch
from megamoe.dispatch import NoVariantError, Question
from megamoe.model import Arch, CaseResult, Evidence, Kind, Machine, Refusal, Role, Speed, Variant
from megamoe.registry import Blocker, Item
from tests.core.builders import FAILED, PASSED, SM90, SM100, stage

SM103 = Arch(103)
DSL = "dsl"
PROBLEMS = ({"k": 64}, {"k": 128})
UNFINISHED = ("planned", "building", "closed")


@dataclass(frozen=True)
class Asked:
    """A question, with what the variants and the plugins say when asked."""

    question: Question
    unsupported: Mapping[str, tuple[str, ...]]
    vetoed: Mapping[str, tuple[str, ...]]

    def answer(self) -> Answer:
        """What the dispatcher says."""

        def supports(variant: Variant, facts: object) -> Iterable[str]:
            assert facts == self.question.facts
            return self.unsupported.get(variant.name, ())

        def refuse(stage_id: str, variant: Variant) -> Iterable[str]:
            assert stage_id == self.question.stage.id
            return self.vetoed.get(variant.name, ())

        try:
            decision = dispatch.select(self.question, supports=supports, refuse=refuse)
        except NoVariantError as error:
            return Answer("", _count(error.refusals))
        return Answer(decision.variant.name, _count(decision.refusals))


@dataclass(frozen=True)
class Answer:
    """Name of the variant chosen, empty for none; how often each gate refused each variant."""

    chosen: str
    refusals: Mapping[tuple[str, str], int]


def _count(refusals: Iterable[Refusal]) -> Mapping[tuple[str, str], int]:
    return dict(Counter((r.variant, r.gate.value) for r in refusals))


# --- the rules --------------------------------------------------------------------------------------------------------


def expected(asked: Asked) -> Answer:
    """What the rules say."""
    q = asked.question
    table = {v.name: v for v in q.stage.variants}
    wanted = [n for n, v in table.items() if q.choice in ("auto", n, v.role.value)]
    against: Counter[tuple[str, str]] = Counter()
    for name, v in table.items():
        if name in wanted:
            against.update(_gates(asked, v))
        else:
            against[name, "config"] += 1

    def refused(name: str, *gates: str) -> bool:
        return any(count for (who, gate), count in against.items() if who == name and (not gates or gate in gates))

    clean = [n for n in wanted if not refused(n)]
    if q.choice == "auto":
        candidates = clean
    else:
        candidates = clean or [n for n in wanted if not refused(n, "config", "arch", "dependency", "problem")]
    if candidates:
        return Answer(min(candidates, key=lambda n: _preference(table[n])), dict(against))
    if q.on_refusal == "error" or q.choice in ("auto", "off"):
        return Answer("", dict(against))
    return _instead(asked, against)


def _instead(asked: Asked, against: Counter[tuple[str, str]]) -> Answer:
    """on_refusal = "fallback": the first fallback, or else reference, that nothing speaks against."""
    q = asked.question
    rest = sorted((v for v in q.stage.variants if v.role.value != "fused"), key=_preference)
    for v in rest:
        mine = _gates(asked, v)
        if q.choice not in (v.name, v.role.value):
            against.update(mine)
        if not mine:
            return Answer(v.name, dict(against))
    return Answer("", dict(against))


def _preference(v: Variant) -> tuple[int, int, str]:
    return {"fused": 0, "fallback": 1, "reference": 2}[v.role.value], -v.rank, v.name


def _gates(asked: Asked, v: Variant) -> Counter[tuple[str, str]]:
    """How often each gate speaks against a variant that is wanted."""
    q = asked.question
    found: Counter[tuple[str, str]] = Counter()
    found[v.name, "config"] = len(asked.vetoed.get(v.name, ()))
    found[v.name, "blocker"] = sum(1 for b in _blockers(q) if _holds(b, v, q)) + _all_unfinished(q, v)
    found[v.name, "arch"] = int(bool(v.archs) and q.machine.arch not in v.archs)
    found[v.name, "dependency"] = sum(not _satisfied(need, q.machine.packages) for need in v.needs)
    runs_here = not found[v.name, "arch"] and not found[v.name, "dependency"]
    if runs_here and q.facts is not None:
        found[v.name, "problem"] = len(asked.unsupported.get(v.name, ()))
    if runs_here and not found[v.name, "problem"]:
        found[v.name, "evidence"] = int(not _proven(q, v))
    return +found


def _blockers(q: Question) -> list[Blocker]:
    return [b for item in q.items.values() for b in item.blocker]


def _all_unfinished(q: Question, v: Variant) -> int:
    statuses = {item.status.value for item in q.items.values()}
    return int(v.role.value == "fused" and bool(statuses) and statuses <= set(UNFINISHED))


def _holds(b: Blocker, v: Variant, q: Question) -> bool:
    if b.variants and v.name not in b.variants:
        return False
    if not b.variants and v.role.value != "fused":
        return False
    if b.archs and str(q.machine.arch) not in b.archs:
        return False
    return b.until is None or not _satisfied(b.until, q.machine.packages)


def _satisfied(need: str, packages: Mapping[str, str]) -> bool:
    """Requirements of the generated questions are all "name>=major.minor"."""
    name, _, least = need.partition(">=")
    return name in packages and _numbers(packages[name]) >= _numbers(least)


def _numbers(version: str) -> list[int]:
    return [int(n) for n in version.split(".")]


def _proven(q: Question, v: Variant) -> bool:
    """Whether evidence speaks for a variant: enough of it for a fused one, none against it for the others."""
    needed = [need.partition(">=")[0] for need in v.needs]
    counting = [
        e
        for e in q.records
        if (e.variant, e.arch, e.fingerprint) == (v.name, q.machine.arch, q.fingerprints.get(v.name, "?"))
        and all(e.packages.get(n) == q.machine.packages.get(n) for n in needed)
    ]
    ran = [e for e in counting if e.kind.value != "compiled"]
    if any(not e.cases or not all(c.passed for c in e.cases) for e in ran):
        return False
    if v.role.value != "fused":
        return True
    if q.demand == "verified":
        enough = [e for e in ran if e.kind.value == "verified"]
    elif q.demand == "verified-here":
        enough = [e for e in ran if e.kind.value == "verified" and e.origin == "local"]
    else:
        enough = ran
    if not enough:
        return False
    times = [s for e in enough for s in e.speeds if q.facts is not None and dict(s.problem) == dict(q.facts)]
    return not times or times[0].variant_us <= times[0].fallback_us  # records come in order of trust


# --- questions --------------------------------------------------------------------------------------------------------


def ask(rng: random.Random) -> Asked:
    """A made-up question; each rule decides a good share of them."""
    variants = _variants(rng)
    names = [v.name for v in variants]
    machine = Machine(
        rng.choice([SM90, SM90, SM100, None]), {DSL: rng.choice(["4.8.0", "4.8.1"])} if rng.random() < 0.9 else {}
    )
    question = Question(
        stage=replace(stage(), variants=tuple(variants)),
        machine=machine,
        choice=rng.choice(["auto"] * 8 + ["fused", "fused", "fallback", "reference", "off", *names]),
        origin="a test",
        demand=rng.choice(["verified", "verified", "verified-here", "emulated"]),
        on_refusal=rng.choice(["error", "fallback"]),
        items=_items(rng, names),
        records=[_record(rng, v, machine) for v in variants for _ in range(rng.choice([0, 1, 1, 2, 3]))],
        fingerprints=dict.fromkeys(names, "now"),
        facts=rng.choice([None, *PROBLEMS]),
    )
    return Asked(question, _reasons(rng, names), _reasons(rng, names))


def _variants(rng: random.Random) -> list[Variant]:
    variants = [Variant("reference", Role.REFERENCE, "m:f"), Variant("fallback", Role.FALLBACK, "m:f")]
    if rng.random() < 0.4:
        needs = (f"{DSL}>=4.8",) if rng.random() < 0.5 else ()
        variants.append(Variant("library", Role.FALLBACK, "m:f", needs=needs, rank=rng.choice([-1, 0, 1])))
    for number in range(rng.choice([0, 1, 1, 2, 2])):
        archs = rng.choice([frozenset(), {SM90}, {SM90}, {SM100}, {SM90, SM100}, {SM103}])
        wanted = rng.choice(["", f"{DSL}>=4.8", f"{DSL}>=4.8", f"{DSL}>=4.9", f"{DSL}>=4.8 other>=1.0"]).split()
        variants.append(
            Variant(f"fused{number}", Role.FUSED, "m:f", frozenset(archs), tuple(wanted), rank=rng.choice([0, 0, 1]))
        )
    rng.shuffle(variants)
    return variants


def _items(rng: random.Random, names: list[str]) -> dict[str, Item]:
    made = {}
    for key in rng.choice([[], ["A"], ["A"], ["A", "B"]]):
        blockers = [
            Blocker(
                id=f"b{n}",
                kind="upstream",
                summary="made up",
                variants=(rng.choice(names),) if rng.random() < 0.5 else (),
                archs=rng.choice([(), ("sm_90",), ("sm_100",)]),
                until=rng.choice([None, f"{DSL}>=4.8", f"{DSL}>=4.9", "other>=1.0"]),
            )
            for n in range(rng.choice([0, 0, 0, 1, 2]))
        ]
        status = rng.choice(["experimental", "stable", "done", *UNFINISHED])
        made[key] = Item(title=key, status=status, stage="mul", blocker=tuple(blockers))
    return made


def _record(rng: random.Random, v: Variant, machine: Machine) -> Evidence:
    cases: list[tuple[CaseResult, ...]] = [(PASSED,)] * 8 + [(FAILED,), (PASSED, FAILED), ()]
    times = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]
    return Evidence(
        "mul",
        v.name,
        rng.choice([machine.arch] * 4 + [SM90, SM100, SM103, None]),
        rng.choice([Kind.VERIFIED] * 3 + [Kind.EMULATED, Kind.COMPILED]),
        rng.choice(["now"] * 5 + ["before"]),
        rng.choice(cases),
        tuple(Speed("small", p, *rng.choice(times)) for p in PROBLEMS if rng.random() < 0.4),
        {**machine.packages, **rng.choice([{}, {}, {}, {DSL: "4.7.0"}])},
        origin=rng.choice(["local", "shipped"]),
    )


def _reasons(rng: random.Random, names: list[str]) -> dict[str, tuple[str, ...]]:
    return {n: rng.choice([("one reason",), ("one", "another")]) for n in names if rng.random() < 0.12}


def questions(count: int, seed: int = 2026) -> list[Asked]:
    """The same questions in every run."""
    return [ask(random.Random(f"{seed}.{n}")) for n in range(count)]
