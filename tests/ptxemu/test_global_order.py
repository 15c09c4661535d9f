"""What must have happened before what in global memory: what one CTA stores and another reads."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu
from ptxemu import POLICIES, FindingKind
from ptxemu.report import Report
from tests.ptxemu.micro import kernel

RUNS = [(policy, 0) for policy in POLICIES] + [("random", 1), ("random", 2)]
LOAD = "ld.global.b32 %r10, [%d6];"
# Threads of CTA c leave 100 + their number, c * 64 + thread, at %d5, and tell; who may (%p2) reads what CTA c - 1 left.
BODY = """ld.param.u64 %d1, [sums]; ld.param.u64 %d2, [flag]; ld.param.u64 %d3, [out]; mov.u32 %r20, told;
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; setp.eq.u32 %p1, %r1, 0;
    mad.lo.u32 %r4, %r2, 64, %r1; mul.wide.u32 %d4, %r4, 4; add.s64 %d5, %d1, %d4; add.u32 %r5, %r4, 100;
    add.u32 %r6, %r2, %r3; sub.u32 %r6, %r6, 1; rem.u32 %r6, %r6, %r3;
    mad.lo.u32 %r6, %r6, 64, %r1; mul.wide.u32 %d6, %r6, 4; add.s64 %d6, %d1, %d6;
    mul.wide.u32 %d7, %r1, 4; add.s64 %d7, %d3, %d7;
    {store}
    {tell}
    @!%p2 bra END;
    {load} st.global.b32 [%d7], %r10;
    END:"""
STORE = "st.global.b32 [%d5], %r5;"
SHARE = "@%p1 st.shared.b32 [%r20], %r11; bar.sync 0; ld.shared.b32 %r11, [%r20]; setp.eq.u32 %p2, %r11, 1;"
COUNT = "@%p1 atom.{}.global.inc.u32 %r11, [%d2], 1;"  # thread 0's; the last of two finds 1
FENCE = "@%p1 fence.acq_rel.gpu;"
SET = "@%p1 {}.global.{}b32 [%d2], 1;"
CONSUMER = "setp.eq.u32 %p3, %r2, 1; setp.eq.u32 %p2, %r2, 1;"
POLL = "W{0}: ld.{1}.global.b32 %r11, [%d2+{2}]; setp.lt.u32 %p4, %r11, {3}; @%p4 bra W{0};"


def produce(told: str, heard: str, enough: int = 1) -> str:
    """CTA 0 tells, CTA 1 waits until it hears it, by all its threads."""
    return until(told, POLL.format(0, heard, 0, enough))


def until(told: str, poll: str) -> str:
    """The same, with what CTA 1 waits by."""
    return f"{CONSUMER} @%p3 bra HEAR; {told} bra MEET; HEAR: {poll} MEET:"


BY_WARP = """bar.warp.sync -1; and.b32 %r7, %r1, 31; setp.eq.u32 %p5, %r7, 0; shr.u32 %r8, %r1, 5;
    mul.wide.u32 %d8, %r8, 4; add.s64 %d8, %d2, %d8; mov.u32 %r11, 0; @%p5 atom.{}.gpu.global.inc.u32 %r11, [%d8], 1;
    shfl.sync.idx.b32 %r11, %r11, 0, 31, -1; setp.eq.u32 %p2, %r11, 1;"""
# A vector is accesses of its elements (PTX ISA 8.2.2). Nothing here reads half of a scalar: to synchronize, two would
# have to overlap completely (8.7), which the emulator does not look at.
VECTOR = "bar.sync 0; {} @%p1 st.{}.gpu.global.v{}.b{} [%d2], {{{}}};"
LAST = POLL.format(0, "acquire.gpu", "{}", 1)
LAST_B64 = LAST.replace("b32 %r11", "b64 %d9").replace("u32 %p4, %r11", "u64 %p4, %d9")
# A vector of each thread, of 32 bytes.
EACH_ITS_OWN = "mul.wide.u32 %d8, %r1, 32; add.s64 %d8, %d2, %d8; add.s64 %d8, %d8, 31; and.b64 %d8, %d8, -32;"
FLAGGED = """bar.sync 0; {count} @%p1 st.{told}.cta.shared.b32 [%r20], %r11;
    W: ld.{heard}.cta.shared.b32 %r11, [%r20]; setp.gt.u32 %p4, %r11, 1; @%p4 bra W; setp.eq.u32 %p2, %r11, 1;"""
ACQ_REL, RELAXED = COUNT.format("acq_rel.gpu"), COUNT.format("relaxed.gpu")
ORDERED = {
    "an atomic": f"bar.sync 0; {ACQ_REL} {SHARE}",
    "an atomic of the system": f"bar.sync 0; {COUNT.format('acq_rel.sys')} {SHARE}",
    "an atomic a warp": BY_WARP.format("acq_rel"),
    "fences of one thread": f"bar.sync 0; {FENCE} {RELAXED} {FENCE} {SHARE}",
    "fences of all threads, as CUDA has them": f"membar.gl; bar.sync 0; {COUNT.format('gpu')} {SHARE} membar.gl;",
    "sequentially consistent fences": f"fence.sc.sys; bar.sync 0; {RELAXED} {SHARE} fence.sc.sys;",
    "a release, and a fence behind it": f"bar.sync 0; {COUNT.format('release.gpu')} {FENCE} {SHARE}",
    "a fence, and an acquire behind it": f"bar.sync 0; {FENCE} {COUNT.format('acquire.gpu')} {SHARE}",
    "a flag of shared memory": FLAGGED.format(count=ACQ_REL, told="release", heard="acquire"),
    "red and ld": produce("bar.sync 0; @%p1 red.release.gpu.global.add.u32 [%d2], 1;", "acquire.gpu"),
    "red of every thread": produce("red.release.gpu.global.add.u32 [%d2], 1;", "acquire.gpu", 64),
    "st and ld": produce(f"bar.sync 0; {SET.format('st.release.gpu', '')}", "acquire.gpu"),
    "st and ld with fences": produce(
        f"bar.sync 0; {FENCE} {SET.format('st.relaxed.gpu', '')}", "relaxed.gpu"
    ) + "fence.acq_rel.gpu;",
    "volatile, with fences": produce(f"bar.sync 0; {FENCE} {SET.format('st.volatile', '')}", "volatile") + "membar.gl;",
    "element 1 of v2.b32": until(VECTOR.format("", "release", 2, 32, "0, 1"), LAST.format(4)),
    "element 3 of v4.b32": until(VECTOR.format("", "release", 4, 32, "0, 0, 0, 1"), LAST.format(12)),
    "element 1 of v2.b64": until(VECTOR.format("", "release", 2, 64, "0, 1"), LAST_B64.format(8)),
    "element 1 of v2.b32, with fences": until(
        VECTOR.format(FENCE, "relaxed", 2, 32, "0, 1"), POLL.format(0, "relaxed.gpu", 4, 1)
    ) + "fence.acq_rel.gpu;",
    "element 1 of red.v2": until(
        "bar.sync 0; @%p1 red.release.gpu.global.add.v2.f32 [%d2], {0f3f800000, 0f3f800000};", LAST.format(4)
    ),
    "st, and element 1 of ld.v2": until(
        "bar.sync 0; @%p1 st.release.gpu.global.b32 [%d2+4], 1;",
        LAST.replace("b32 %r11", "v2.b32 {{%r12, %r11}}").format(0),
    ),
    "element 7 of v8.b32, one a thread": EACH_ITS_OWN + until(
        "st.release.gpu.global.v8.b32 [%d8], {0, 0, 0, 0, 0, 0, 0, 1};", LAST.replace("%d2", "%d8").format(28)
    ),
    "b64, and b64": until(
        "bar.sync 0; @%p1 red.release.gpu.global.add.u64 [%d2], 4294967296;", LAST_B64.format(0)
    ),
}  # fmt: skip
UNORDERED = {
    "nothing": "mov.pred %p2, 1;",
    "barriers of each CTA": "bar.sync 0; setp.eq.u32 %p2, %r2, 1; bar.sync 0;",
    "a relaxed atomic": f"bar.sync 0; {RELAXED} {SHARE}",
    "an atomic without a word": f"bar.sync 0; @%p1 atom.global.inc.u32 %r11, [%d2], 1; {SHARE}",
    "a relaxed atomic a warp": BY_WARP.format("relaxed"),
    "a release alone": f"bar.sync 0; {COUNT.format('release.gpu')} {SHARE}",
    "an acquire alone": f"bar.sync 0; {COUNT.format('acquire.gpu')} {SHARE}",
    "a fence before alone": f"bar.sync 0; {FENCE} {RELAXED} {SHARE}",
    "a fence behind alone": f"bar.sync 0; {RELAXED} {FENCE} {SHARE}",
    "fences of the CTA": f"bar.sync 0; {FENCE} {RELAXED} {FENCE} {SHARE}".replace("rel.gpu", "rel.cta"),
    "fences of the cluster": f"bar.sync 0; {FENCE} {RELAXED} {FENCE} {SHARE}".replace("rel.gpu", "rel.cluster"),
    "fences of other threads": f"fence.acq_rel.gpu; bar.sync 0; {RELAXED} {SHARE} fence.acq_rel.gpu;",
    "sequentially consistent fences of the CTA": f"membar.cta; bar.sync 0; {RELAXED} {SHARE} membar.cta;",
    "fences of another proxy": f"bar.sync 0; {FENCE} {RELAXED} {FENCE} {SHARE}".replace("acq_rel.gpu", "proxy.async"),
    "an atomic of the CTA": f"bar.sync 0; {COUNT.format('acq_rel.cta')} {SHARE}",
    "no barrier before it": f"{ACQ_REL} {SHARE}",
    "a relaxed flag of shared memory": FLAGGED.format(count=ACQ_REL, told="relaxed", heard="relaxed"),
    "a store behind it": f"bar.sync 0; {ACQ_REL} {SHARE} {STORE}",
    "another word": produce(f"bar.sync 0; {SET.format('st.release.gpu', '')}", "relaxed.gpu")
    + POLL.format(1, "acquire.gpu", 4, 0),
    "a word behind a vector": until(VECTOR.format("", "release", 2, 32, "1, 1"), POLL.format(0, "relaxed.gpu", 4, 1))
    + POLL.format(1, "acquire.gpu", 8, 0),
    "red and ld, relaxed": produce("bar.sync 0; @%p1 red.relaxed.gpu.global.add.u32 [%d2], 1;", "acquire.gpu"),
    "st and ld, relaxed": produce(f"bar.sync 0; {SET.format('st.release.gpu', '')}", "relaxed.gpu"),
    "volatile": produce(f"bar.sync 0; {SET.format('st.volatile', '')}", "volatile"),
}


def exchange(
    tell: str,
    policy: str = "eager",
    seed: int = 0,
    *,
    ctas: int = 2,
    store: str = STORE,
    load: str = LOAD,
    cluster: int = 1,
) -> tuple[Report, np.ndarray]:
    """The report, and what the one who may read got."""
    parameters = (".u64 sums", ".u64 flag", ".u64 out")
    ptx = kernel(BODY.format(store=store, tell=tell, load=load), parameters, ".shared .b32 told;", 64)
    first = f"mov.u32 %r11, 2; st.shared.b32 [%r20], %r11; bar.sync 0; {store[:2]}"
    ptx = ptx.replace(store[:2], first, 1) if "cta.shared" in tell else ptx  # a flag that no CTA sets
    sums, flag, out = np.zeros((ctas, 64), np.uint32), np.zeros(520, np.uint32), np.zeros(64, np.uint32)
    return ptxemu.emulate(ptx, ctas, [sums, flag, out], policy=policy, seed=seed, cluster=cluster), out


def kinds(report: Report, load: str = LOAD) -> list[FindingKind]:
    """Of the findings, which are all at the load."""
    assert {f.text for f in report.findings} <= {load[:-1]}, report
    return [f.kind for f in report.findings]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tell", ORDERED)
def test_in_order(tell: str, cluster: int) -> None:
    for policy, seed in RUNS:
        report, out = exchange(ORDERED[tell], policy, seed, cluster=cluster)
        assert kinds(report) == [], report
        assert {tuple(half - np.arange(32)) for half in (out[:32], out[32:] - 32)} <= {(100,) * 32, (164,) * 32}


@pytest.mark.parametrize("tell", UNORDERED)
def test_out_of_order(tell: str) -> None:
    report, _ = exchange(UNORDERED[tell])
    assert kinds(report) == [FindingKind.UNORDERED_READ]
    (finding,) = report.findings
    assert finding.region == "argument 0" and "of CTA (0, 0, 0), which has not released it" in finding.detail


@pytest.mark.parametrize(("policy", "seed"), RUNS)
def test_a_relaxed_atomic_is_found_under_every_policy(policy: str, seed: int) -> None:
    report, _ = exchange(UNORDERED["a relaxed atomic a warp"], policy, seed)
    assert kinds(report) == [FindingKind.UNORDERED_READ]


@pytest.mark.parametrize("tell", ["a relaxed atomic", "a fence before alone", "no barrier before it"])
def test_ctas_of_a_cluster_meet_in_global_memory_too(tell: str) -> None:
    assert kinds(exchange(UNORDERED[tell], cluster=2)[0]) == [FindingKind.UNORDERED_READ]


def test_only_what_was_not_released_is_named() -> None:
    """Warp 0 counts without a barrier before it: what warp 1 stored is not covered."""
    (finding,) = exchange(UNORDERED["no barrier before it"])[0].findings
    assert finding.warp == 1 and finding.detail.startswith("stored by warp 1 of CTA (0, 0, 0)")


CHAIN = """setp.eq.u32 %p2, %r2, 2; setp.eq.u32 %p3, %r2, 1; bar.sync 0; @%p2 bra LAST; @%p3 bra SECOND;
    @%p1 st.release.gpu.global.b32 [%d2], 1; bra MEET;
    SECOND: {second} bra MEET;
    LAST: W2: ld.acquire.gpu.global.b32 %r11, [%d2+{at}]; setp.lt.u32 %p4, %r11, {enough}; @%p4 bra W2;
    sub.s64 %d6, %d6, 256; MEET:"""
HEAR = "W1: ld.{}.global.b32 %r11, [%d2]; setp.lt.u32 %p4, %r11, 1; @%p4 bra W1;"
WAIT_AND_ADD = HEAR.format("relaxed.gpu") + "@%p1 red.relaxed.gpu.global.add.u32 [%d2], 1;"
ANOTHER = "bar.sync 0; @%p1 st.{}.gpu.global.b32 [%d2+4], 1;"
CHAINS = {
    "through a third CTA": (HEAR.format("acquire.gpu") + ANOTHER.format("release"), 4, 1, []),
    "a third that has not acquired": (HEAR.format("relaxed.gpu") + ANOTHER.format("release"), 4, 1, [0]),
    "a third that does not release": (HEAR.format("acquire.gpu") + ANOTHER.format("relaxed"), 4, 1, [0]),
    "a relaxed atomic goes on with a release": (WAIT_AND_ADD, 0, 2, []),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_what_ctas_tell_on(chain: str) -> None:
    """CTA 2 reads what CTA 0 stored: order is transitive, and atomics do not end a release (PTX ISA 8.9.2, 8.9.5)."""
    second, at, enough, missing = CHAINS[chain]
    for policy, seed in RUNS:
        report, out = exchange(CHAIN.format(second=second, at=at, enough=enough), policy, seed, ctas=3)
        assert kinds(report) == [FindingKind.UNORDERED_READ for _ in missing], report
        np.testing.assert_array_equal(out, np.arange(64) + 100)


@pytest.mark.parametrize(
    ("stored", "loaded", "found"),
    [
        ("relaxed.gpu.", "relaxed.gpu.", 0),
        ("volatile.", "volatile.", 0),
        ("relaxed.gpu.", "", 1),
        ("", "relaxed.gpu.", 1),
    ],
)
def test_strong_accesses_race_with_weak_ones_alone(stored: str, loaded: str, found: int) -> None:
    store, load = STORE.replace("st.", f"st.{stored}"), LOAD.replace("ld.", f"ld.{loaded}")
    report, _ = exchange(UNORDERED["a relaxed atomic"], store=store, load=load)
    assert kinds(report, load) == [FindingKind.UNORDERED_READ] * found


def test_what_the_reader_wrote_itself_since_is_its_own() -> None:
    report, _ = exchange(f"{UNORDERED['a relaxed atomic']} st.global.b32 [%d6], %r5;")
    assert kinds(report) == []


def test_halves_of_a_word_that_ctas_share_are_not_judged() -> None:
    """Each CTA reads the half that it wrote, of words whose other half is another CTA's."""
    body = """ld.param.u64 %d1, [x]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; cvt.u16.u32 %h1, %r2;
        mad.lo.u32 %r3, %r1, 2, %r2; mul.wide.u32 %d2, %r3, 2; add.s64 %d1, %d1, %d2; mov.u32 %r4, 0;
        AGAIN: st.global.b16 [%d1], %h1; nanosleep.u32 10; ld.global.b16 %h2, [%d1];
        add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 9; @%p1 bra AGAIN;"""
    for policy, seed in RUNS:
        x = np.zeros((32, 2), np.uint16)
        ptxemu.emulate(kernel(body, (".u64 x",)), 2, [x], policy=policy, seed=seed).raise_for_findings()
        np.testing.assert_array_equal(x, [[0, 1]] * 32)


def test_a_launch_is_over_when_the_next_begins() -> None:
    """The second launch reads what other CTAs left in a variable of the module, behind a store of its own there."""
    body = """ld.param.u64 %d1, [out]; ld.param.u32 %r5, [late]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
        mov.u64 %d3, left; mul.wide.u32 %d4, %r2, 128; add.s64 %d4, %d3, %d4;
        mul.wide.u32 %d5, %r1, 4; add.s64 %d4, %d4, %d5;
        setp.ne.u32 %p1, %r5, 0; @%p1 bra LATE; st.global.b32 [%d4], %r2; bra END;
        LATE: st.global.b32 [%d3+384], %r2; xor.b32 %r3, %r2, 1; mul.wide.u32 %d4, %r3, 128; add.s64 %d4, %d3, %d4;
        ld.global.b32 %r6, [%d4]; st.global.b32 [%d1], %r6; END:"""
    program = ptxemu.load(kernel(body, (".u64 out", ".u32 late"), ".global .align 16 .b32 left[128];"))
    out = np.zeros(1, np.uint32)
    for late in (0, 1):
        ptxemu.emulate(program, 3, [out, late]).raise_for_findings()
