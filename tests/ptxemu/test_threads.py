"""Divergence, exchanges between lanes, memory, atomics, barriers: what comes out, and what is found to be wrong."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu
from ptxemu import FindingKind
from tests.ptxemu.micro import kernel, run

THREAD = "mov.u32 %r1, %tid.x; ld.param.u64 %d1, [p0]; mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d1, %d2;"
STORE = "st.global.b32 [%d3], %r10;"
SHARED = ".shared .align 16 .b8 buffer[1024];"


def words(count: int = 32) -> np.ndarray:
    return np.zeros(count, np.uint32)


def clean(body: str, *args: np.ndarray | int, **options: object) -> None:
    run(body, *args, **options).raise_for_findings()


def found(body: str, *args: np.ndarray | int, **options: object) -> ptxemu.Finding:
    report = run(body, *args, **options)
    assert len(report.findings) == 1, report
    return report.findings[0]


def test_divergent_branches_come_together() -> None:
    """Each lane loops as often as its number says, in the branch of its parity; then all vote together."""
    out = words()
    clean(
        f"""{THREAD} and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; mov.u32 %r10, 0; mov.u32 %r3, 0;
        @%p1 bra EVEN;
        ODD: setp.ge.u32 %p2, %r3, %r1; @%p2 bra JOIN; add.u32 %r10, %r10, 3; add.u32 %r3, %r3, 1; bra ODD;
        EVEN: setp.ge.u32 %p2, %r3, %r1; @%p2 bra JOIN; add.u32 %r10, %r10, 2; add.u32 %r3, %r3, 1; bra EVEN;
        JOIN: vote.sync.ballot.b32 %r4, %p1, 0xffffffff; popc.b32 %r5, %r4; add.u32 %r10, %r10, %r5; {STORE}""",
        out,
    )
    lane = np.arange(32)
    np.testing.assert_array_equal(out, lane * np.where(lane % 2, 3, 2) + 16)


def test_lanes_that_have_left_are_not_waited_for() -> None:
    out = words()
    clean(f"{THREAD} setp.ge.u32 %p1, %r1, 20; @%p1 exit; vote.sync.ballot.b32 %r10, 1, 0xffffffff; {STORE}", out)
    np.testing.assert_array_equal(out, np.where(np.arange(32) < 20, (1 << 20) - 1, 0))


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize(("by", "width"), [(1, 32), (3, 8), (5, 16), (31, 32)])
def test_shuffle(mode: str, by: int, width: int) -> None:
    out, inside = words(), words()
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    clean(
        f"""{THREAD} add.u32 %r2, %r1, 100; shfl.sync.{mode}.b32 %r10|%p1, %r2, {by}, {c}, 0xffffffff; {STORE}
        ld.param.u64 %d4, [p1]; add.s64 %d3, %d4, %d2; selp.b32 %r10, 1, 0, %p1; {STORE}""",
        out,
        inside,
    )
    for lane in range(32):
        first = lane // width * width
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first + by % width}[mode]
        valid = source >= first if mode == "up" else source < first + width
        assert (out[lane], bool(inside[lane])) == ((source if valid else lane) + 100, valid)


def test_reductions_over_lanes() -> None:
    out = np.zeros((8, 32), np.uint32)
    store = "st.global.b32 [%d3], %r10; add.s64 %d3, %d3, 128;"
    values = "xor.b32 %r2, %r1, 21; sub.s32 %r2, %r2, 16;"  # a permutation of -16 … 15
    clean(
        f"""{THREAD} {values}
        redux.sync.add.s32 %r10, %r2, -1; {store} redux.sync.min.s32 %r10, %r2, -1; {store}
        redux.sync.max.u32 %r10, %r2, -1; {store} redux.sync.xor.b32 %r10, %r2, -1; {store}
        elect.sync %r10|%p1, -1; selp.b32 %r10, 77, %r10, %p1; {store}
        shr.u32 %r3, %r1, 3; match.any.sync.b32 %r10, %r3, -1; {store}
        setp.gt.s32 %p2, %r2, 100; vote.sync.any.pred %p3, %p2, -1; selp.b32 %r10, 1, 0, %p3; {store}
        activemask.b32 %r10; {store}""",
        out,
    )
    v = (np.arange(32) ^ 21) - 16
    expected = [v.sum(), v.min(), v.astype(np.uint32).max(), np.bitwise_xor.reduce(v)]
    np.testing.assert_array_equal(out[:4, 0], np.array(expected).astype(np.uint32))
    np.testing.assert_array_equal(out[4], [77] + [0] * 31)
    np.testing.assert_array_equal(out[5], np.repeat(np.array([0xFF << 8 * k for k in range(4)], np.uint32), 8))
    assert not out[6].any() and (out[7] == 0xFFFFFFFF).all()


def test_a_lane_that_its_mask_does_not_name() -> None:
    finding = found("shfl.sync.idx.b32 %r1, 5, 0, 31, 0x0000ffff;")
    assert finding.kind is FindingKind.DIVERGENCE


def test_lanes_that_never_come_are_a_deadlock() -> None:
    body = (
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 3; @%p1 bra OTHER; "
        "bar.warp.sync 0xffffffff; bra END; OTHER: bar.warp.sync 7; END:"
    )
    clean(body.replace("0xffffffff", "0xfffffff8"))
    finding = found(body.replace("bar.warp.sync 7", "add.u32 %r1, %r1, 1; bar.warp.sync 0xffffffff"))
    assert finding.kind is FindingKind.DEADLOCK
    assert "waits for lanes" in finding.detail


def test_vectors_through_all_spaces() -> None:
    source = np.arange(128, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    clean(
        f"""{THREAD} mul.wide.u32 %d2, %r1, 16; add.s64 %d3, %d1, %d2; ld.param.u64 %d4, [p1]; add.s64 %d5, %d4, %d2;
        ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d3];
        mov.u32 %r6, buffer; shl.b32 %r7, %r1, 4; add.u32 %r6, %r6, %r7; st.shared.v4.b32 [%r6], {{%r5, %r4, %r3, %r2}};
        bar.sync 0; ld.shared.v2.b64 {{%d6, %d7}}, [%r6];
        mov.b64 %d8, frame; cvta.local.u64 %d9, %d8; st.v2.b64 [%d9], {{%d6, %d7}};
        ld.local.v4.u32 {{%r2, _, %r4, %r5}}, [frame];
        cvt.u64.u32 %d10, %r6; cvta.shared.u64 %d11, %d10; ld.u8 %r3, [%d11+4];
        st.global.v4.b32 [%d5], {{%r2, %r3, %r4, %r5}};""",
        source,
        out,
        declarations=".shared .align 16 .b8 buffer[512];\n.local .align 16 .b8 frame[16];",
    )
    expected = source.reshape(32, 4)[:, ::-1].copy()
    expected[:, 1] &= 0xFF
    np.testing.assert_array_equal(out.reshape(32, 4), expected)


def test_narrow_loads_extend_by_their_type() -> None:
    data = np.array([0x80, 0x7F, 0xFE, 1], np.uint8)
    out = words(4)
    clean(
        """ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; ld.global.s8 %r1, [%d1]; ld.global.u8 %r2, [%d1];
        ld.global.s16 %r3, [%d1+2]; ld.global.nc.L1::no_allocate.b16 %h1, [%d1+2]; cvt.u32.u16 %r4, %h1;
        st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};""",
        data,
        out,
    )
    np.testing.assert_array_equal(out, [0xFFFFFF80, 0x80, 0x1FE, 0x1FE])


def test_128_bit_registers() -> None:
    source, out = np.arange(4, dtype=np.uint32), np.zeros(4, np.uint32)
    clean(
        """.reg .b128 %q; ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; ld.global.b128 %q, [%d1];
        mov.b128 {%d3, %d4}, %q; add.u64 %d3, %d3, 5; mov.b128 %q, {%d4, %d3}; st.global.b128 [%d2], %q;""",
        source,
        out,
    )
    np.testing.assert_array_equal(out, [2, 3, 5, 1])


def test_out_of_bounds_names_the_line_the_lane_and_the_buffer() -> None:
    finding = found(f"{THREAD}\nmov.u32 %r10, 7;\n{STORE}", words(20))
    assert (finding.kind, finding.line, finding.lanes) == (FindingKind.OUT_OF_BOUNDS, 11, 1 << 20)
    assert "0 bytes after the end of argument 0 (80 bytes)" in finding.detail
    finding = found("mov.u32 %r1, buffer; ld.shared.b32 %r2, [%r1+1024];", declarations=SHARED)
    assert finding.kind is FindingKind.OUT_OF_BOUNDS
    assert finding.region == "shared memory of CTA (0, 0, 0)"
    finding = found("mov.u64 %d1, 0; ld.global.b32 %r1, [%d1];")
    assert finding.kind is FindingKind.OUT_OF_BOUNDS


def test_misaligned() -> None:
    finding = found(f"{THREAD} ld.global.v2.b32 {{%r1, %r2}}, [%d3];", words(64))
    assert (finding.kind, finding.lanes) == (FindingKind.MISALIGNED, 2)


def test_parameters_are_read_only() -> None:
    finding = found("mov.b64 %d1, p0; st.b32 [%d1], 5;", 3)
    assert finding.kind is FindingKind.READ_ONLY


def test_parameters_by_address() -> None:
    out = words()
    body = "mov.b64 %d5, p0; ld.param.u64 %d6, [%d5]; sub.u64 %d6, %d6, %d1; cvt.u32.u64 %r10, %d6;"
    clean(f"{THREAD} {body} add.u32 %r10, %r10, 7; {STORE}", out)
    assert (out == 7).all()


def test_uninitialised_reads() -> None:
    body = (
        "mov.u32 %r1, buffer; mov.u32 %r2, %tid.x; shl.b32 %r2, %r2, 2; "
        "add.u32 %r1, %r1, %r2; {} ld.shared.b32 %r3, [%r1];"
    )
    clean(body.format("st.shared.b32 [%r1], 1;"), declarations=SHARED)
    finding = found(body.format("st.shared.b16 [%r1], 1;"), declarations=SHARED)
    assert (finding.kind, finding.address) == (FindingKind.UNINITIALISED, 0x400)
    out = words()
    report = run(f"{THREAD} ld.global.b32 %r1, [%d3];", out, undefined=[out])
    assert [f.kind for f in report.findings] == [FindingKind.UNINITIALISED]
    run(f"{THREAD} {STORE} ld.global.b32 %r1, [%d3];", out, undefined=[out]).raise_for_findings()


ATOMICS = {
    "add.u32": (0, 31 * 16), "min.s32": (0, 0), "max.u32": (0, 31), "and.b32": (0xFFFFFFFF, 0), "or.b32": (0, 31),
    "xor.b32": (0, 0), "inc.u32": (0, 31), "exch.b32": (0, 31),
}  # fmt: skip


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(name: str, space: str) -> None:
    start, expected = ATOMICS[name]
    out, total = words(), np.array([start], np.uint32)
    place = "%d4" if space == "global" else "%r20"
    prologue = (
        "mov.u32 %r20, buffer; ld.param.u64 %d4, [p1]; ld.global.b32 %r2, [%d4]; st.shared.b32 [%r20], %r2; bar.sync 0;"
    )
    body = f"""{THREAD} {prologue} atom.{space}.{name} %r10, [{place}], %r1; {STORE}
        bar.sync 0; ld.shared.b32 %r3, [%r20]; setp.eq.u32 %p1, 0, {int(space == "shared")};
        @!%p1 st.global.b32 [%d4], %r3;"""
    clean(body.replace("setp.eq.u32 %p1, 0, 1", "setp.ne.u32 %p1, 0, 0"), out, total, declarations=SHARED)
    assert total[0] == expected
    if name == "add.u32":
        np.testing.assert_array_equal(out, np.cumsum([0, *range(31)]))
    if name == "exch.b32":
        np.testing.assert_array_equal(out, [start, *range(31)])


def test_floating_atomics_and_compare_and_swap() -> None:
    total = np.zeros(4, np.float32)
    clean(
        """ld.param.u64 %d1, [p0]; mov.u32 %r1, %tid.x; cvt.rn.f32.u32 %r2, %r1; red.global.add.f32 [%d1], %r2;
        cvt.rn.f16x2.f32 %r3, %r2, %r2; atom.global.add.noftz.f16x2 %r4, [%d1+4], %r3;
        add.u32 %r5, %r1, 1; atom.global.cas.b32 %r6, [%d1+8], %r1, %r5;
        red.global.add.v2.f32 [%d1+8], {0f00000000, %r2};""".replace(
            "[%d1+8], {0f00000000, %r2}", "[%d1+8], {0f80000000, %r2}"
        ),
        total,
    )
    assert total[0] == 496
    np.testing.assert_array_equal(total[1:2].view(np.float16), [496, 496])
    assert total[3] == 496


def test_subnormals_are_flushed_by_global_additions_only() -> None:
    tiny = np.array([1, 1], np.uint32)
    clean(
        """ld.param.u64 %d1, [p0]; mov.u32 %r2, %tid.x; setp.ne.u32 %p1, %r2, 0; @%p1 bra END; mov.u32 %r1, buffer;
        st.shared.b32 [%r1], 1; red.global.add.f32 [%d1], 0f00000001; red.shared.add.f32 [%r1], 0f00000001;
        ld.shared.b32 %r3, [%r1]; st.global.b32 [%d1+4], %r3; END:""",
        tiny,
        declarations=SHARED,
    )
    np.testing.assert_array_equal(tiny, [0, 2])


def test_barriers_order_warps() -> None:
    """Four warps pass numbers on through shared memory, two of them over a named barrier."""
    out = words(128)
    body = f"""{THREAD} mov.u32 %r2, buffer; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3; st.shared.b32 [%r4], %r1;
        bar.sync 0;
        xor.b32 %r5, %r3, 256; add.u32 %r5, %r2, %r5; ld.shared.b32 %r10, [%r5]; {STORE}
        setp.lt.u32 %p1, %r1, 64; @%p1 bra LOW; bar.sync 0; bra END; LOW: bar.arrive 1, 96; bar.sync 0;
        END: setp.lt.u32 %p2, %r1, 96; @%p2 exit; bar.sync 1, 96;"""
    for policy, seed in (("eager", 0), ("random", 1), ("random", 2)):
        clean(body, out, declarations=SHARED, block=128, policy=policy, seed=seed)
        np.testing.assert_array_equal(out, np.arange(128) ^ 64)


def test_reducing_barriers() -> None:
    out = words(64)
    clean(
        f"""{THREAD} setp.gt.u32 %p1, %r1, 40; bar.red.popc.u32 %r2, 0, %p1; bar.red.and.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 0, %p1;
        selp.b32 %r3, 100, 0, %p2; selp.b32 %r4, 200, 0, %p3; add.u32 %r10, %r2, %r3; add.u32 %r10, %r10, %r4;
        {STORE}""",
        out,
        block=64,
    )
    assert (out == 23 + 200).all()


def test_a_missing_warp_is_a_deadlock() -> None:
    finding = found("mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32;\n@%p1 bra END;\nbar.sync 3, 64;\nEND:", block=64)
    assert finding.kind is FindingKind.DEADLOCK
    assert "barrier 3: 32 of 64 threads have come" in finding.detail
    assert "line 11: bar.sync 3, 64" in finding.detail


def test_a_barrier_needs_whole_warps() -> None:
    assert found("bar.sync 1, 40;", block=64).kind is FindingKind.BARRIER
    assert found("mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;").kind is FindingKind.DIVERGENCE


def test_endless_loops_end() -> None:
    finding = found("LOOP: add.u32 %r1, %r1, 1; bra LOOP;", budget=10000)
    assert finding.kind is FindingKind.LIVELOCK


def test_polling_another_cta() -> None:
    """CTA 0 waits for a flag that CTA 1 sets: both must be resident."""
    flag, out = words(1), words(1)
    body = """ld.param.u64 %d1, [p0]; ld.param.u64 %d2, [p1]; mov.u32 %r1, %ctaid.x;
        setp.eq.u32 %p1, %r1, 0; @!%p1 bra SET;
        WAIT: ld.acquire.gpu.global.b32 %r2, [%d1]; setp.eq.u32 %p2, %r2, 0; @%p2 bra WAIT; st.global.b32 [%d2], %r2;
        bra END;
        SET: st.release.gpu.global.b32 [%d1], 9; END:"""
    clean(body, flag, out, grid=2)
    assert out[0] == 9
    report = run(body, words(1), words(1), grid=1)
    assert [f.kind for f in report.findings] == [FindingKind.DEADLOCK]


def test_traps_and_unknown_instructions() -> None:
    assert found("trap;").kind is FindingKind.TRAP
    with pytest.raises(
        ptxemu.UnsupportedInstruction, match=r"PTX line 9: not supported: opcode frobnicate, in frobnicate.u32 %r1, 5"
    ):
        run("frobnicate.u32 %r1, 5;")
    with pytest.raises(ptxemu.UnsupportedInstruction, match=r"\.odd"):
        run("add.odd.u32 %r1, 5, 6;")
    with pytest.raises(ptxemu.UnsupportedInstruction, match="b64 for 32 bits"):
        run("add.u32 %r1, %d1, 6;")


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ptxemu.ArgumentError, match="args: got 0 arguments, expected 1"):
        ptxemu.emulate(kernel("", [".u32 a"]), 1, [])
    with pytest.raises(ptxemu.ArgumentError, match="policy"):
        run("", policy="hasty")
    with pytest.raises(ptxemu.ArgumentError, match="block"):
        ptxemu.emulate(kernel("", []), 1, [], block=64)


def test_turns_that_end_where_groups_meet() -> None:
    """Under the random policy a turn ends anywhere, also just before the instruction where lanes come together."""
    out = words(64)
    body = f"""{THREAD} mov.u32 %r10, 0; mov.u32 %r2, 0;
        LOOP: and.b32 %r3, %r1, 3; setp.gt.u32 %p1, %r3, %r2; @%p1 bra MORE; add.u32 %r10, %r10, 1;
        MORE: bar.warp.sync -1; bar.sync 0; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 20; @%p2 bra LOOP; {STORE}"""
    for seed in range(20):
        clean(body, out, block=64, policy="random", seed=seed)
        np.testing.assert_array_equal(out, 20 - np.arange(64) % 4)


def test_findings_name_the_cta_that_caused_them() -> None:
    """CTAs follow each other in the same places of the interpreter."""
    body = """mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 2; @%p1 bra END;
        mov.u32 %r2, buffer; ld.shared.b32 %r3, [%r2]; END:"""
    report = run(body, declarations=SHARED, grid=4)
    assert [(f.kind, f.cta) for f in report.findings] == [(FindingKind.UNINITIALISED, (2, 0, 0))]
