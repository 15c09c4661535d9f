"""mbarriers, clusters and shared memory of other CTAs, and how their misuse is reported."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu
from ptxemu import FindingKind
from tests.ptxemu.micro import run

BAR = ".shared .align 8 .b8 bar[16];\n.shared .align 16 .b8 data[256];"
SETUP = "mov.u32 %r1, %tid.x; mov.u32 %r2, bar; mov.u32 %r3, data; setp.eq.u32 %p1, %r1, 0;"


def found(body: str, **options: object) -> ptxemu.Finding:
    report = run(body, declarations=BAR, **options)
    assert len(report.findings) == 1, report
    return report.findings[0]


def test_producer_and_consumer() -> None:
    """Warp 0 fills a buffer eight times, warp 1 empties it: full and empty barriers, their parities flipping."""
    out = np.zeros((8, 32), np.uint32)
    body = f"""{SETUP} ld.param.u64 %d1, [p0]; @%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
        @%p1 mbarrier.init.shared::cta.b64 [%r2+8], 32;
        bar.sync 0; and.b32 %r4, %r1, 31; shl.b32 %r5, %r4, 2; add.u32 %r6, %r3, %r5; mov.u32 %r7, 0;
        setp.ge.u32 %p2, %r1, 32; @%p2 bra CONSUME;
        PRODUCE: and.b32 %r8, %r7, 1; xor.b32 %r9, %r8, 1;
        FREE: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2+8], %r9; @!%p3 bra FREE;
        mad.lo.u32 %r10, %r7, 100, %r4; st.shared.b32 [%r6], %r10; mbarrier.arrive.shared::cta.b64 _, [%r2];
        add.u32 %r7, %r7, 1; setp.lt.u32 %p4, %r7, 8; @%p4 bra PRODUCE; bra END;
        CONSUME: and.b32 %r8, %r7, 1;
        FULL: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], %r8, 0x989680; @!%p3 bra FULL;
        xor.b32 %r11, %r5, 4; add.u32 %r11, %r3, %r11; ld.shared.b32 %r12, [%r11];
        mbarrier.arrive.shared::cta.b64 %d9, [%r2+8];
        mad.lo.u32 %r13, %r7, 32, %r4; mul.wide.u32 %d2, %r13, 4; add.s64 %d3, %d1, %d2; st.global.b32 [%d3], %r12;
        add.u32 %r7, %r7, 1; setp.lt.u32 %p4, %r7, 8; @%p4 bra CONSUME;
        END:"""
    expected = np.arange(8)[:, None] * 100 + (np.arange(32) ^ 1)
    for seed in range(4):
        run(body, out, declarations=BAR, block=64, policy="random" if seed else "eager", seed=seed).raise_for_findings()
        np.testing.assert_array_equal(out, expected)
        out[:] = 0
    wrong = run(body.replace("xor.b32 %r9, %r8, 1", "mov.b32 %r9, %r8"), out, declarations=BAR, block=64)
    assert [f.kind for f in wrong.findings] == [FindingKind.DEADLOCK]
    assert "parity 0: phase 0, 32 of 32 arrivals and 0 bytes outstanding" in wrong.findings[0].detail


def test_states_counts_and_dropping() -> None:
    out = np.zeros(6, np.uint32)
    body = f"""{SETUP} ld.param.u64 %d1, [p0]; @!%p1 exit; mbarrier.init.shared.b64 [%r2], 3;
        mbarrier.arrive.shared.b64 %d2, [%r2]; mbarrier.pending_count.b64 %r4, %d2; st.global.b32 [%d1], %r4;
        mbarrier.arrive.shared.b64 %d3, [%r2], 1; mbarrier.pending_count.b64 %r4, %d3; st.global.b32 [%d1+4], %r4;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %d2; selp.b32 %r4, 1, 0, %p2; st.global.b32 [%d1+8], %r4;
        mbarrier.arrive_drop.shared.b64 %d4, [%r2]; mbarrier.test_wait.shared.b64 %p2, [%r2], %d2;
        selp.b32 %r4, 1, 0, %p2;
        st.global.b32 [%d1+12], %r4; mbarrier.arrive.shared.b64 _, [%r2], 2;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 1; selp.b32 %r4, 1, 0, %p2; st.global.b32 [%d1+16], %r4;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 64; mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [%r2], 64;
        mbarrier.arrive.shared.b64 %d5, [%r2]; mbarrier.test_wait.shared.b64 %p2, [%r2], %d5; selp.b32 %r4, 1, 0, %p2;
        st.global.b32 [%d1+20], %r4; mbarrier.inval.shared.b64 [%r2];"""
    run(body, out, declarations=BAR).raise_for_findings()
    np.testing.assert_array_equal(out, [3, 2, 0, 1, 1, 1])


MISUSES = {
    "it is not initialised": "mbarrier.arrive.shared.b64 _, [%r2];",
    "more arrivals than are pending": "mbarrier.init.shared.b64 [%r2], 2; mbarrier.arrive.shared.b64 _, [%r2], 3;",
    "a count that is 0": "mbarrier.init.shared.b64 [%r2], 0;",
    "it is not an aligned address": "mbarrier.init.shared.b64 [%r2+4], 1;",
    "it is initialised already": "mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [%r2], 1;",
    "a transaction count beyond": "mbarrier.init.shared.b64 [%r2], 1; mbarrier.expect_tx.shared.b64 [%r2], 1048576;",
    "touched as data": "mbarrier.init.shared.b64 [%r2], 1; st.shared.b32 [%r2], 1;",
}


@pytest.mark.parametrize("what", MISUSES)
def test_misuse(what: str) -> None:
    finding = found(f"{SETUP} @!%p1 exit; {MISUSES[what]}")
    assert finding.kind is FindingKind.MBARRIER
    assert what in finding.detail


def test_a_deadlock_says_which_bytes_are_missing() -> None:
    finding = found(
        f"""{SETUP} @!%p1 exit; mbarrier.init.shared.b64 [%r2], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 512;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;"""
    )
    assert finding.kind is FindingKind.DEADLOCK
    assert "line 12" in finding.detail
    assert "mbarrier 0x400 parity 0: phase 0, 1 of 1 arrivals and 512 bytes" not in finding.detail
    assert "mbarrier 0x400 parity 0: phase 0, 0 of 1 arrivals and 512 bytes outstanding" in finding.detail


def test_spinning_on_test_wait_is_a_deadlock_too() -> None:
    finding = found(
        f"""{SETUP} @!%p1 exit; mbarrier.init.shared.b64 [%r2], 1;
        WAIT: mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;"""
    )
    assert finding.kind is FindingKind.DEADLOCK


CLUSTER = (
    "mov.u32 %r20, %cluster_ctarank; mov.u32 %r21, %cluster_nctarank; add.u32 %r22, %r20, 1; rem.u32 %r22, %r22, %r21;"
)
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def test_shared_memory_of_another_cta() -> None:
    """Each CTA of a cluster of four writes into the next one's memory and arrives at its barrier."""
    out = np.zeros((8, 32), np.uint32)
    body = f"""{SETUP} {CLUSTER} ld.param.u64 %d1, [p0]; @%p1 mbarrier.init.shared.b64 [%r2], 32;
        fence.mbarrier_init.release.cluster; {SYNC}
        mapa.shared::cluster.u32 %r4, %r3, %r22; mapa.shared::cluster.u32 %r5, %r2, %r22; shl.b32 %r6, %r1, 2;
        add.u32 %r7, %r4, %r6;
        mad.lo.u32 %r8, %r20, 1000, %r1; st.shared::cluster.b32 [%r7], %r8;
        mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];
        WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra WAIT;
        add.u32 %r9, %r3, %r6; ld.shared.b32 %r10, [%r9]; mov.u32 %r11, %ctaid.x; mad.lo.u32 %r12, %r11, 32, %r1;
        mul.wide.u32 %d2, %r12, 4; add.s64 %d3, %d1, %d2; st.global.b32 [%d3], %r10; {SYNC}"""
    for seed in range(3):
        run(body, out, declarations=BAR, grid=8, cluster=4, policy="random", seed=seed).raise_for_findings()
        rank = (np.arange(8) % 4 + 3) % 4
        np.testing.assert_array_equal(out, rank[:, None] * 1000 + np.arange(32))
        out[:] = 0


def test_a_cta_that_has_exited_has_no_memory() -> None:
    body = f"""{SETUP} {CLUSTER} setp.eq.u32 %p2, %r20, 1; @%p2 exit; mov.u32 %r5, 0;
        LOOP: add.u32 %r5, %r5, 1; nanosleep.u32 100; setp.lt.u32 %p3, %r5, 50; @%p3 bra LOOP;
        mapa.shared::cluster.u32 %r4, %r3, 1; st.shared::cluster.b32 [%r4], %r1;"""
    finding = found(body, grid=2, cluster=2)
    assert finding.kind is FindingKind.OUT_OF_BOUNDS
    assert "none once it has exited" in finding.detail


def test_cluster_barriers_used_wrongly() -> None:
    assert found("barrier.cluster.wait.aligned;", grid=2, cluster=2).kind is FindingKind.BARRIER
    assert (
        found("barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;", grid=2, cluster=2).kind
        is FindingKind.BARRIER
    )
    missing = found(f"{CLUSTER} setp.eq.u32 %p1, %r20, 0; @%p1 bra END; bar.sync 5, 64; END: {SYNC}", grid=2, cluster=2)
    assert missing.kind is FindingKind.DEADLOCK
    assert "barrier of the cluster: phase 0, 32 threads missing" in missing.detail


def test_a_copy_in_flight_keeps_its_barrier_while_others_are_made() -> None:
    """Warp 1 initialises 200 mbarriers while the copy of warp 0 is under way."""
    source, out = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    bars = ".shared .align 8 .b8 bar[2048];\n.shared .align 16 .b8 data[256];"
    body = f"""{SETUP} ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1];
        @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; @%p1 fence.mbarrier_init.release.cluster;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d1], 256, [%r2];
        bar.sync 0; setp.ne.u32 %p2, %r1, 32; @%p2 bra WAIT;
        mov.u32 %r4, 1;
        MORE: shl.b32 %r5, %r4, 3; add.u32 %r5, %r2, %r5; mbarrier.init.shared::cta.b64 [%r5], 1;
        add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 201; @%p3 bra MORE;
        WAIT: bar.sync 0; setp.ge.u32 %p4, %r1, 32; @%p4 bra END;
        TRY: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r2], 0; @!%p5 bra TRY;
        shl.b32 %r6, %r1, 2; add.u32 %r7, %r3, %r6; ld.shared.b32 %r8, [%r7];
        cvt.u64.u32 %d3, %r6; add.s64 %d3, %d2, %d3; st.global.b32 [%d3], %r8;
        END:"""
    run(body, source, out, declarations=bars, block=64, policy="lazy").raise_for_findings()
    assert (out == source[:32]).all()
