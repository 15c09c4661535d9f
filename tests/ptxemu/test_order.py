"""What must have happened before what: pending loads and asynchronous copies, stores and readers of other CTAs."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu
from ptxemu import POLICIES, FindingKind
from ptxemu.report import Report
from tests.ptxemu.micro import kernel
from tests.ptxemu.tensor.kernels import aligned, tensor_map

SHARED = ".shared .align 128 .b8 buffer[1024];\n.shared .align 8 .b8 bars[32];"
LANE = """mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 31; mov.u32 %r3, buffer; add.u32 %r3, %r3, 128;
    mov.u32 %r4, bars; shl.b32 %r5, %r2, 2;
    add.u32 %r6, %r3, %r5;"""
FULL, EMPTY, OTHER = "[%r4]", "[%r4+8]", "[%r4+16]"
ARRIVE, ARRIVE_OTHER = (f"mbarrier.arrive.shared.b64 _, {bar};" for bar in (EMPTY, OTHER))
LOAD = "ld.shared.b32 %r10, [%r6];"
USE = "add.u32 %r10, %r10, 1;"
BULK = f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d1], 128, {FULL};"


def _wait(bar: str, parity: int, label: str) -> str:
    return f"{label}: mbarrier.try_wait.parity.shared.b64 %p9, {bar}, {parity}; @!%p9 bra {label};"


def ring(consume: str, *, copy: str = BULK, permission: str = "", parameters: tuple[str, ...] = ()) -> str:
    """Warp 1 copies 128 bytes to `buffer` twice; warp 0 consumes the first ones, waits for the second and adds them.

    Args:
        consume: From the buffer at %r6, a word a lane, to %r10; lets warp 1 go on.
        copy: The instruction, from %d1.
        permission: What warp 1 waits for, if not `EMPTY`.
        parameters: Others of the kernel.
    """
    send = f"mbarrier.arrive.expect_tx.shared.b64 _, {FULL}, 128; {copy}"
    body = f"""{LANE} setp.eq.u32 %p1, %r1, 0; ld.param.u64 %d1, [source]; ld.param.u64 %d2, [out];
        @%p1 mbarrier.init.shared.b64 {FULL}, 1; @%p1 mbarrier.init.shared.b64 {EMPTY}, 32;
        @%p1 mbarrier.init.shared.b64 {OTHER}, 32; fence.mbarrier_init.release.cluster; bar.sync 0;
        mov.u32 %r9, 0; setp.lt.u32 %p2, %r1, 32; @%p2 bra CONSUME;
        setp.ne.u32 %p3, %r1, 32; @%p3 bra END;
        {send}
        {permission or _wait(EMPTY, 0, "FREE")}
        add.s64 %d1, %d1, 128;
        {send}
        bra END;
        CONSUME: {_wait(FULL, 0, "FIRST")}
        {consume}
        {_wait(FULL, 1, "SECOND")}
        ld.shared.b32 %r20, [%r6]; add.u32 %r20, %r20, %r10;
        cvt.u64.u32 %d3, %r5; add.s64 %d2, %d2, %d3; st.global.b32 [%d2], %r20;
        END:"""
    return kernel(body, (".u64 source", ".u64 out", *parameters), SHARED, 64)


def emulate(ptx: str, policy: str = "eager", seed: int = 0) -> tuple[Report, np.ndarray]:
    """The report, and what each lane of warp 0 wrote."""
    source, out = aligned(np.arange(64, dtype=np.uint32)), np.zeros(32, np.uint32)
    given = [tensor_map(source.ctypes.data, "u32", (64,), (), (32,))] if ".b8 map" in ptx else []
    report = ptxemu.emulate(ptx, 1, [source, out, *given], policy=policy, seed=seed, extra=[source])
    return report, out


SUMS = 2 * np.arange(32) + 33
RUNS = [(policy, 0) for policy in POLICIES] + [("random", 1), ("random", 2)]


@pytest.mark.parametrize(("policy", "seed"), RUNS)
def test_a_copy_over_a_pending_load_is_found_under_every_policy(policy: str, seed: int) -> None:
    report, out = emulate(ring(f"{USE.replace('%r10, 1', '%r11, 1')} {LOAD}\n{ARRIVE}\n{USE}"), policy, seed)
    assert [f.kind for f in report.findings] == [FindingKind.PENDING_LOAD], report
    (finding,) = report.findings
    assert finding.text == LOAD[:-1]
    assert "cp.async.bulk.shared::cluster" in finding.detail
    assert "mbarrier.arrive" in finding.detail
    assert finding.region == "shared memory of CTA (0, 0, 0)"
    np.testing.assert_array_equal(out, SUMS)  # the emulator's own load is not late


@pytest.mark.parametrize(("policy", "seed"), RUNS)
def test_a_value_that_was_used_first_is_clean(policy: str, seed: int) -> None:
    report, out = emulate(ring(f"{LOAD} {USE} {ARRIVE}"), policy, seed)
    report.raise_for_findings()
    np.testing.assert_array_equal(out, SUMS)


V4 = "and.b32 %r7, %r5, 96; add.u32 %r7, %r3, %r7; ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r7];"
MATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r12}, [%r7];"
ROWS = "and.b32 %r7, %r2, 7; shl.b32 %r7, %r7, 4; add.u32 %r7, %r3, %r7;"
ELSEWHERE = "st.shared.b32 [%r6+512], %r2; ld.shared.b32 %r12, [%r6+512];"
ZEROS = "{%r16, %r16, %r16, %r16}"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r30, %r31, %r32, %r33}, "
MMA += f"{{%r12, %r12, %r12, %r12}}, {{%r12, %r12}}, {ZEROS};"
LATE = {
    "a vector": f"{LOAD} {USE} {V4} {ARRIVE} mov.u32 %r16, %r15;",
    "a vector, part of which is overwritten": f"{LOAD} {USE} {V4} {ARRIVE} mov.u32 %r12, 1; mov.u32 %r16, %r15;",
    "a matrix": f"{LOAD} {USE} {ROWS} {MATRIX} {ARRIVE} mov.u32 %r16, %r12;",
    "used by an operation in Python": f"{LOAD} {USE} {ROWS} {MATRIX} {ARRIVE} mov.u32 %r16, 0; {MMA}",
    "through a generic address": f"cvt.u64.u32 %d8, %r6; cvta.shared.u64 %d9, %d8; ld.u32 %r10, [%d9]; {ARRIVE} {USE}",
    "used as an address": f"{LOAD} {ARRIVE} and.b32 %r11, %r10, 0; add.u32 %r11, %r11, %r3; {USE}",
    "128 bits": f".reg .b128 %q; {LOAD} {USE} and.b32 %r7, %r5, 96; add.u32 %r7, %r3, %r7; ld.shared.b128 %q, [%r7]; "
    f"{ARRIVE} mov.b128 {{%d8, %d9}}, %q;",
    "one lane alone": f"{LOAD} {USE} setp.eq.u32 %p4, %r2, 7; @%p4 ld.shared.b32 %r12, [%r6]; {ARRIVE} "
    "@%p4 mov.u32 %r13, %r12;",
    "a warp whose one lane arrives": f"setp.eq.u32 %p4, %r2, 0; {LOAD} bar.warp.sync -1; "
    f"@%p4 mbarrier.arrive.shared.b64 _, {EMPTY}, 32; {USE}",
    "a signal that is told on after the use": f"{LOAD} {ARRIVE} {USE} {ARRIVE_OTHER}",
    "a release that is relaxed": f"{LOAD} {ARRIVE.replace('arrive', 'arrive.relaxed.cta')} {USE}",
}
USED = {
    "any register of a vector": f"{LOAD} {USE} {V4} mov.u32 %r16, %r14; {ARRIVE} mov.u32 %r16, %r15;",
    "a matrix": f"{LOAD} {USE} {ROWS} {MATRIX} mov.u32 %r16, %r12; {ARRIVE}",
    "by an operation in Python": f"{LOAD} {USE} {ROWS} {MATRIX} mov.u32 %r16, 0; {MMA} {ARRIVE} mov.u32 %r16, %r12;",
    "as an address": f"{LOAD} {USE} ld.shared.b32 %r11, [%r6]; and.b32 %r11, %r11, 0; {ARRIVE} mov.u32 %r12, %r11;",
    "never: overwritten": f"{LOAD} {USE} ld.shared.b32 %r12, [%r6]; {ARRIVE} mov.u32 %r12, 3; mov.u32 %r13, %r12;",
    "never: no lane wants it": f"{LOAD} {USE} setp.gt.u32 %p4, %r2, 40; ld.shared.b32 %r12, [%r6]; {ARRIVE} "
    "@%p4 mov.u32 %r13, %r12;",
    "a vector overwritten": f"{LOAD} {USE} {V4} {ARRIVE} mov.u32 %r12, 1; mov.u32 %r13, 1; mov.u32 %r14, 1; "
    "mov.u32 %r15, 1; mov.u32 %r16, %r12;",
    "after a signal to somebody else": f"{LOAD} {ARRIVE_OTHER} {USE} {ARRIVE}",
    "before an asynchronous arrival": f"{LOAD} {ARRIVE_OTHER} {USE} cp.async.mbarrier.arrive.noinc.shared.b64 {EMPTY};",
    "elsewhere": f"{LOAD} {USE} {ELSEWHERE} {ARRIVE} mov.u32 %r13, %r12;",
    "after a barrier": f"{LOAD} bar.sync 1, 32; {ARRIVE} {USE}",
    "after a fence": f"{LOAD} fence.proxy.async.shared::cta; {ARRIVE} {USE}",
    "after a fence of all memory": f"{LOAD} fence.acq_rel.cta; {ARRIVE} {USE}",
}


@pytest.mark.parametrize("what", LATE)
def test_late_uses(what: str) -> None:
    report, _ = emulate(ring(LATE[what]))
    assert [f.kind for f in report.findings] == [FindingKind.PENDING_LOAD], report


@pytest.mark.parametrize("what", USED)
def test_uses_in_time(what: str) -> None:
    report, out = emulate(ring(USED[what]))
    report.raise_for_findings()
    np.testing.assert_array_equal(out, SUMS)


def test_loads_on_both_sides_of_a_copy() -> None:
    """Lane 0 reads the 4 bytes before what is copied, lane 1 those behind."""
    sides = f"setp.lt.u32 %p4, %r2, 2; mad.lo.u32 %r7, %r2, 132, %r3; @%p4 st.shared.b32 [%r7+{{0}}], %r2; {LOAD} {USE}"
    late = f"{sides} @%p4 ld.shared.b32 %r12, [%r7+{{0}}]; {ARRIVE} @%p4 mov.u32 %r13, %r12;"
    emulate(ring(late.format(-4)))[0].raise_for_findings()
    assert {f.kind for f in emulate(ring(late.format(-8)))[0].findings} == {FindingKind.PENDING_LOAD}


ONE_WARP = """{lane} setp.eq.u32 %p1, %r1, 0; ld.param.u64 %d1, [source]; ld.param.u64 %d2, [out];
    @%p1 mbarrier.init.shared.b64 {full}, 1; fence.mbarrier_init.release.cluster;
    st.shared.b32 [%r6], 5; fence.proxy.async.shared::cta; bar.warp.sync -1; {load}
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, {full}, 128; @%p1 {copy} {use}
    {wait} cvt.u64.u32 %d3, %r5; add.s64 %d2, %d2, %d3; st.global.b32 [%d2], %r10;"""


@pytest.mark.parametrize(("early", "kinds"), [(True, []), (False, [FindingKind.PENDING_LOAD])])
def test_a_warp_that_copies_over_what_it_reads(early: bool, kinds: list[FindingKind]) -> None:
    given = {"lane": LANE, "full": FULL, "copy": BULK, "wait": _wait(FULL, 0, "W")}
    body = ONE_WARP.format(load=LOAD + USE * early, use=USE * (not early), **given)
    report, out = emulate(kernel(body, (".u64 source", ".u64 out"), SHARED))
    assert [f.kind for f in report.findings] == kinds, report
    assert (out == 6).all()


TENSOR = (
    f"cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r3], [%d4, {{%r9}}], {FULL};"
)


@pytest.mark.parametrize(("consume", "kinds"), [(LOAD + ARRIVE + USE, 1), (LOAD + USE + ARRIVE, 0)])
def test_tensor_copies(consume: str, kinds: int) -> None:
    copy = f"mov.b64 %d4, map; cvta.param.u64 %d4, %d4; {TENSOR} add.u32 %r9, %r9, 32;"
    ptx = ring(consume, copy=copy, parameters=(".align 64 .b8 map[128]",))
    report, out = emulate(ptx)
    assert [f.kind for f in report.findings] == [FindingKind.PENDING_LOAD] * kinds, report
    np.testing.assert_array_equal(out, SUMS)


FLAG = "POLL: ld.acquire.cta.shared.b32 %r21, [%r4+24]; setp.eq.u32 %p5, %r21, 0; @%p5 bra POLL;"


TELL = {
    "a store": "bar.warp.sync -1; st.release.cta.shared.b32 [%r4+24], 1;",
    "an atomic": "bar.warp.sync -1; atom.release.cta.shared.exch.b32 %r22, [%r4+24], 1;",
}


@pytest.mark.parametrize("tell", TELL)
@pytest.mark.parametrize(("consume", "kinds"), [("{use} {tell}", 0), ("{other} {use} {tell}", 0), ("{tell} {use}", 1)])
def test_flags_in_memory(consume: str, kinds: int, tell: str) -> None:
    """Warp 1 polls a flag that warp 0 sets."""
    body = f"{LOAD} {consume.format(use=USE, tell=TELL[tell], other=ARRIVE_OTHER)}"
    ptx = ring(body, permission=FLAG).replace("fence.mbarrier_init", "st.shared.b32 [%r4+24], 0; fence.mbarrier_init")
    report, _ = emulate(ptx, "random", 1)
    assert [f.kind for f in report.findings] == [FindingKind.PENDING_LOAD] * kinds, report


# ---- stores of other CTAs


PAIR = f"""{LANE} ld.param.u64 %d2, [out]; mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1;
    setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 {EMPTY}, 32; fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
    mapa.shared::cluster.u32 %r7, %r6, %r11; mapa.shared::cluster.u32 %r8, %r4, %r11;
    mad.lo.u32 %r12, %r10, 100, %r2;
    {{store}} {{tell}}
    {{load}} mad.lo.u32 %r13, %r10, 32, %r2; mul.wide.u32 %d3, %r13, 4; add.s64 %d2, %d2, %d3;
    st.global.b32 [%d2], %r20; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
THERE, HERE = "st.shared::cluster.b32 [%r7], %r12;", "st.shared.b32 [%r6], %r12;"
OWN, PEER = "ld.shared.b32 %r20, [%r6];", "ld.shared::cluster.b32 %r20, [%r7];"
CLUSTER = "barrier.cluster.arrive.{}aligned; barrier.cluster.wait.aligned;"
REMOTE = f"mbarrier.arrive.{{}}.cluster.shared::cluster.b64 _, [%r8+8]; {_wait(EMPTY, 0, 'W')}"
RELAXED_WAIT = REMOTE.format("release").replace("parity.", "parity.relaxed.cluster.")
ORDERED = {
    "the default": CLUSTER.format(""),
    "a release": CLUSTER.format("release."),
    "a fence before": "fence.acq_rel.cluster;" + CLUSTER.format("relaxed."),
    "an mbarrier": REMOTE.format("release"),
    "a fence before an mbarrier": "fence.acq_rel.cluster;" + REMOTE.format("relaxed"),
    "a fence after an mbarrier": RELAXED_WAIT + "fence.acq_rel.cluster;",
}
UNORDERED = {
    "nothing": "",
    "a relaxed arrival": CLUSTER.format("relaxed."),
    "a relaxed arrival at an mbarrier": REMOTE.format("relaxed"),
    "a relaxed wait": RELAXED_WAIT,
    "a fence after": CLUSTER.format("relaxed.") + "fence.acq_rel.cluster;",
    "a fence of another proxy": "fence.proxy.async;" + CLUSTER.format("relaxed."),
}


def exchange(tell: str, store: str, load: str) -> tuple[Report, np.ndarray]:
    out = np.zeros((2, 32), np.uint32)
    ptx = kernel(PAIR.format(store=store, tell=tell, load=load), (".u64 out",), SHARED)
    return ptxemu.emulate(ptx, 2, [out], cluster=2), out


@pytest.mark.parametrize("tell", ORDERED)
@pytest.mark.parametrize(("store", "load"), [(THERE, OWN), (HERE, PEER)])
def test_stores_of_another_cta_in_order(tell: str, store: str, load: str) -> None:
    report, out = exchange(ORDERED[tell], store, load)
    report.raise_for_findings()
    np.testing.assert_array_equal(out, np.arange(32) + [[100], [0]])


@pytest.mark.parametrize("tell", UNORDERED)
@pytest.mark.parametrize(("store", "load"), [(THERE, OWN), (HERE, PEER)])
def test_stores_of_another_cta_out_of_order(tell: str, store: str, load: str) -> None:
    report, _ = exchange(UNORDERED[tell], store, load)
    kinds = {f.kind for f in report.findings if f.text == load[:-1]}
    assert FindingKind.UNORDERED_READ in kinds or (tell == "nothing" and FindingKind.UNINITIALISED in kinds), report


def test_a_store_after_the_fence_is_not_covered() -> None:
    late = f"fence.acq_rel.cluster; add.u32 %r12, %r12, 1; {THERE} {CLUSTER.format('relaxed.')}"
    report, _ = exchange(late, THERE, OWN)
    assert [f.kind for f in report.findings] == [FindingKind.UNORDERED_READ], report


def test_own_stores_over_those_of_another_cta() -> None:
    """What is read is the reader's own, or its CTA's."""
    report, _ = exchange(f"{CLUSTER.format('relaxed.')} {HERE}", THERE, OWN)
    report.raise_for_findings()


def test_a_place_that_a_matrix_overwrites_is_no_longer_the_first_writers() -> None:
    """Warp 0 stores, late in its own time, then warp 1 stores a matrix there, and the other CTA reads that."""
    body = f"""{LANE} ld.param.u64 %d2, [out]; mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1;
        mapa.shared::cluster.u32 %r8, %r6, %r11; add.u32 %r13, %r2, 7; setp.ge.u32 %p2, %r1, 32; @%p2 bra MEET;
        {"bar.sync 1, 32; " * 6} st.shared.b32 [%r6], %r2;
        MEET: bar.sync 0; @!%p2 bra READ;
        {ROWS} stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {{%r13}};
        READ: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        ld.shared::cluster.b32 %r20, [%r8]; mul.wide.u32 %d3, %r2, 4; add.s64 %d2, %d2, %d3; st.global.b32 [%d2], %r20;
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    out = np.zeros(32, np.uint32)
    ptxemu.emulate(kernel(body, (".u64 out",), SHARED, 64), 2, [out], cluster=2).raise_for_findings()
    np.testing.assert_array_equal(out, np.arange(32) + 7)
