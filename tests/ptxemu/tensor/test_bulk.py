"""cp.async, bulk copies, reductions, st.async, red.async, and launch control, against what NumPy does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptxemu import POLICIES, emulate
from ptxemu.tensor import launch_control, reduce, tensormap
from tests.ptxemu.tensor.kernels import BARRIER, copy_in, copy_out, kernel, tensor_map, wait

SHARED = ".shared .align 128 .b8 buf[1024]; .shared .align 8 .b8 bar[8];"


def _kinds(report: Any) -> set[str]:
    return {str(kind) for kind in report.kinds()}


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_cp_async(size: int, policy: str) -> None:
    """Lane i copies `size` bytes, of which only i % (size + 1) come from memory; the rest is zero."""
    level = "cg" if size == 16 else "ca"
    body = f"""
  mov.u32 %r1, buf; mul.lo.u32 %r2, %r0, {size}; add.u32 %r1, %r1, %r2;
  ld.param.u64 %rd1, [src]; cvt.u64.u32 %rd2, %r2; add.u64 %rd1, %rd1, %rd2; rem.u32 %r3, %r0, {size + 1};
  cp.async.{level}.shared.global [%r1], [%rd1], {size}, %r3;
  cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; {copy_out("buf", 32 * size)}"""
    source = np.random.default_rng(size).integers(1, 256, (32, size), np.uint8)
    out = np.zeros_like(source)
    ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=SHARED)
    emulate(ptx, 1, [source, out], policy=policy).raise_for_findings()
    for lane in range(32):
        count = lane % (size + 1)
        np.testing.assert_array_equal(out[lane, :count], source[lane, :count])
        assert not out[lane, count:].any()
    unwaited = ptx.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;")
    found = _kinds(emulate(unwaited, 1, [source, out], policy="lazy"))
    assert found & {"async_race", "uninitialised"}


@pytest.mark.parametrize("noinc", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_cp_async_arrives_on_a_barrier(noinc: bool, policy: str) -> None:
    arrive = "" if noinc else "mbarrier.arrive.shared.b64 _, [%r280];"
    body = f"""
  mov.u32 %r280, bar; setp.eq.u32 %p14, %r0, 0;
  @%p14 mbarrier.init.shared.b64 [%r280], 32; bar.sync 0;
  mov.u32 %r1, buf; shl.b32 %r2, %r0, 2; add.u32 %r1, %r1, %r2;
  ld.param.u64 %rd1, [src]; cvt.u64.u32 %rd2, %r2; add.u64 %rd1, %rd1, %rd2;
  cp.async.ca.shared.global [%r1], [%rd1], 4;
  cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared.b64 [%r280];
  {arrive} {wait()} {copy_out("buf", 128)}"""
    source, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=SHARED)
    emulate(ptx, 1, [source, out], policy=policy).raise_for_findings()
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("policy", POLICIES)
def test_bulk_load(policy: str) -> None:
    body = f"""{BARRIER} mov.u32 %r1, buf; ld.param.u64 %rd1, [src];
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 512;
  @%p14 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 512, [%r280];
  {wait()} {copy_out("buf", 512)}"""
    source = np.random.default_rng(1).integers(0, 256, 512, np.uint8)
    room = np.zeros(528, np.uint8)
    aligned = room[-room.ctypes.data % 16 :][:512]
    aligned[:] = source
    out = np.zeros(512, np.uint8)
    ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=SHARED)
    emulate(ptx, 1, [aligned, out], policy=policy).raise_for_findings()
    np.testing.assert_array_equal(out, source)
    assert "misaligned" in _kinds(emulate(ptx.replace("[%rd1], 512", "[%rd1], 500"), 1, [aligned, out]))


def _aligned(array: Any) -> Any:
    room = np.zeros(array.nbytes + 16, np.uint8)
    out = room[-room.ctypes.data % 16 :][: array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


@pytest.mark.parametrize(
    ("operation", "kind", "dtype"),
    [
        ("", "", np.uint32),
        ("add", "f32", np.float32),
        ("min", "s32", np.int32),
        ("xor", "b32", np.uint32),
        ("add", "u64", np.uint64),
    ],
)
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_bulk_store_and_reduce(operation: str, kind: str, dtype: Any, policy: str) -> None:
    rng = np.random.default_rng(2)
    source, target = rng.integers(0, 99, 64).astype(dtype), _aligned(rng.integers(0, 99, 64).astype(dtype))
    before, size = target.copy(), source.nbytes
    opcode = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}.{kind}"
    opcode = opcode if operation else "cp.async.bulk.global.shared::cta.bulk_group"
    body = f"""{copy_in("buf", size)} mov.u32 %r1, buf; ld.param.u64 %rd1, [dst]; setp.eq.u32 %p1, %r0, 0;
  @%p1 {opcode} [%rd1], [%r1], {size}; @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    ptx = kernel(body, params=".param .u64 src, .param .u64 dst", shared=SHARED)
    emulate(ptx, 1, [source, target], policy=policy).raise_for_findings()
    functions: dict[str, Any] = {"add": np.add, "min": np.minimum, "xor": np.bitwise_xor}
    np.testing.assert_array_equal(target, functions[operation](before, source) if operation else source)
    lost = ptx.replace("@%p1 cp.async.bulk.wait_group 0;", "")
    assert "async_race" in _kinds(emulate(lost, 1, [source, target], policy=policy))


def test_wait_group_counts_groups() -> None:
    """Two stores from two buffers; after wait_group.read 1 the first may be overwritten, the second not."""
    body = f"""{copy_in("buf", 512)} mov.u32 %r1, buf; ld.param.u64 %rd1, [dst]; setp.eq.u32 %p1, %r0, 0;
  @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 256; @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1+256], [%r1+256], 256; @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.wait_group.read 1; @%p1 st.shared.u32 [%r1+OFFSET], %r0; @%p1 cp.async.bulk.wait_group 0;"""
    source, target = np.arange(128, dtype=np.uint32), _aligned(np.zeros(128, np.uint32))
    for offset, wrong in ((0, False), (256, True)):
        ptx = kernel(body.replace("OFFSET", str(offset)), params=".param .u64 src, .param .u64 dst", shared=SHARED)
        assert ("async_race" in _kinds(emulate(ptx, 1, [source, target], policy="lazy"))) == wrong
        if not wrong:
            np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("opcode", ["st.async.shared::cluster.mbarrier::complete_tx::bytes.u32", "bulk", "red"])
@pytest.mark.parametrize("policy", POLICIES)
def test_to_the_other_cta(opcode: str, policy: str) -> None:
    """Each CTA of a pair sends 128 bytes to the other one, which waits for them on its barrier."""
    send = f"{opcode} [%r7], %r8, [%r9];"
    if opcode == "red":
        send = "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r7], %r8, [%r9];"
    elif opcode == "bulk":
        send = (
            """@%p14 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [%r3], 128, [%r9];"""
        )
    body = f"""{BARRIER}
  mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r3, src_buf; mov.u32 %r4, buf; shl.b32 %r5, %r0, 2;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 128;
  mapa.shared::cluster.u32 %r6, %r4, %r2; add.u32 %r7, %r6, %r5; mapa.shared::cluster.u32 %r9, %r280, %r2;
  mad.lo.u32 %r8, %r1, 100, %r0; add.u32 %r10, %r3, %r5; st.shared.u32 [%r10], %r8;
  add.u32 %r10, %r4, %r5; mov.u32 %r11, 7; {"st.shared.u32 [%r10], %r11;" if opcode == "red" else ""}
  fence.proxy.async.shared::cta; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  {send} {wait()}
  ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r1, 128, %rd60;
""" + copy_out("buf", 128).replace("ld.param.u64 %rd60, [out];", "")
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    shared = SHARED + ".shared .align 16 .b8 src_buf[128];"
    out = np.zeros((2, 32), np.uint32)
    emulate(
        kernel(body, params=".param .u64 out", shared=shared), 2, [out], cluster=2, policy=policy
    ).raise_for_findings()
    expected = np.stack([100 + np.arange(32), np.arange(32)]) + (7 if opcode == "red" else 0)
    np.testing.assert_array_equal(out, expected)


def test_reductions_of_types() -> None:
    old, new = np.array([3, 7, 0], np.uint32), np.array([5, 2, 9], np.uint32)
    for name, expected in {"inc": [4, 0, 1], "dec": [2, 2, 9], "and": [1, 2, 0], "max": [5, 7, 9]}.items():
        got = reduce.apply(name, "u32", old.view(np.uint8), new.view(np.uint8)).view(np.uint32)
        np.testing.assert_array_equal(got, expected)
    a, b = np.array([1.0, 2.5], np.float32), np.array([2.0**-8, 3.0**-9], np.float32)
    half = [x.view(np.uint32) >> 16 for x in (a, b)]
    got = reduce.apply("add", "bf16", *(h.astype(np.uint16).view(np.uint8) for h in half)).view(np.uint16)
    np.testing.assert_array_equal(got, [0x3F80, 0x4020])  # 1 + 2^-8 is a tie and rounds to even
    with pytest.raises(ValueError, match="xor of type f32"):
        reduce.apply("xor", "f32", a.view(np.uint8), b.view(np.uint8))


def test_tensormap_replace_changes_single_fields() -> None:
    raw = bytearray(tensor_map(0x10000, "f16", (64, 32, 8), (128, 4096), (64, 8, 2), swizzle="128B"))
    for name, value, ordinal in (
        ("global_address", 0x7F0000004560, 0),
        ("global_dim", 48, 1),
        ("global_stride", 1 << 37, 1),
        ("box_dim", 16, 2),
        ("element_stride", 4, 1),
        ("swizzle_mode", 2, 0),
        ("elemtype", 9, 0),
    ):
        launch_control.replace_field(raw, name, value, ordinal)
    got = tensormap.decode(bytes(raw[:64]))
    assert (got.base, got.sizes, got.strides, got.box) == (0x7F0000004560, (64, 48, 8), (0, 128, 1 << 37), (64, 8, 16))
    assert (got.steps, got.swizzle) == ((1, 4, 1), "64B")


@pytest.mark.parametrize("policy", POLICIES)
def test_cluster_launch_control_hands_out_every_tile_once(policy: str) -> None:
    """A CTA counts its own tile, then takes over clusters that have not started until there are none."""
    body = f"""{BARRIER}
  mov.u32 %r20, %ctaid.x; mov.u32 %r21, 0; mov.u32 %r1, answer; ld.param.u64 %rd1, [out];
AGAIN:
  mul.wide.u32 %rd2, %r20, 4; add.u64 %rd3, %rd1, %rd2; mov.u32 %r22, 1;
  @%p14 red.global.add.u32 [%rd3], %r22;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 16;
  @%p14 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r1], [%r280];
WAIT:
  mbarrier.try_wait.parity.shared.b64 %p13, [%r280], %r21;
  @!%p13 bra WAIT;
  xor.b32 %r21, %r21, 1;
  ld.shared.v2.u64 {{%rd10, %rd11}}, [%r1];
  mov.b128 %handle, {{%rd10, %rd11}};
  clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %handle;
  clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r20, %handle;
  fence.proxy.async.shared::cta; bar.sync 0;
  @%p2 bra AGAIN;"""
    shared = ".reg .b128 %handle; .shared .align 16 .b8 answer[16]; .shared .align 8 .b8 bar[8];"
    out = np.zeros(12, np.uint32)
    ptx = kernel(body, params=".param .u64 out", shared=shared, target="sm_100a")
    emulate(ptx, 12, [out], policy=policy).raise_for_findings()
    np.testing.assert_array_equal(out, 1)
