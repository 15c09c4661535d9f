"""wgmma: shapes, types, both majors, every swizzle, A in registers, and what its fences and waits are for."""

from typing import Any

import numpy as np
import pytest

from ptxemu import POLICIES, emulate
from ptxemu.tensor import formats
from tests.ptxemu.tensor.images import codes, hopper_fields, operand, small
from tests.ptxemu.tensor.kernels import copy_in, kernel

DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}


def _descriptor(register: Any, symbol: Any, fields: Any) -> Any:
    return f"""mov.u32 %r10, {symbol}; shr.u32 %r10, %r10, 4; cvt.u64.u32 {register}, %r10;
  or.b64 {register}, {register}, {fields:#x};"""


def _accumulators(n: Any, kind: Any) -> Any:
    return n // (4 if kind == "f16" else 2)


def _kernel(
    n: Any,
    a_kind: Any,
    d_kind: Any,
    a_fields: Any,
    b_fields: Any,
    sizes: Any,
    tail: Any,
    *,
    a_registers: Any = False,
    keep: Any = True,
    before: Any = "wgmma.fence.sync.aligned;",
    after: Any = None,
) -> Any:
    count = _accumulators(n, d_kind)
    d = ", ".join(f"%r{100 + i}" for i in range(count))
    loads = "\n".join(f"ld.global.u32 %r{100 + i}, [%rd50+{512 * i}];" for i in range(count))
    stores = "\n".join(f"st.global.u32 [%rd50+{512 * i}], %r{100 + i};" for i in range(count))
    a = "%rd1"
    a_load = _descriptor("%rd1", "abuf", a_fields) if not a_registers else ""
    if a_registers:
        a = "{%r240, %r241, %r242, %r243}"
        a_load = "ld.param.u64 %rd52, [aregs]; add.u64 %rd52, %rd52, %rd51;\n" + "\n".join(
            f"ld.global.u32 %r{240 + i}, [%rd52+{512 * i}];" for i in range(4)
        )
    body = f"""
  cvt.u64.u32 %rd51, %r0; shl.b64 %rd51, %rd51, 2; ld.param.u64 %rd50, [acc]; add.u64 %rd50, %rd50, %rd51;
  {"" if a_registers else copy_in("abuf", sizes[0], "asrc", 128)}
  {copy_in("bbuf", sizes[1], "bsrc", 128)}
  {loads} {a_load} {_descriptor("%rd2", "bbuf", b_fields)}
  setp.eq.u32 %p1, 0, {0 if keep else 1};
  {before}
  wgmma.mma_async.sync.aligned.m64n{n}k{DEPTH[a_kind]}.{d_kind}.{a_kind}.{a_kind} {{{d}}}, {a}, %rd2, %p1{tail};
  {after if after is not None else "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"}
  {stores}"""
    first = ".param .u64 aregs" if a_registers else ".param .u64 asrc"
    shared = f".shared .align 1024 .b8 abuf[{sizes[0]}]; .shared .align 1024 .b8 bbuf[{sizes[1]}];"
    return kernel(body, params=f"{first}, .param .u64 bsrc, .param .u64 acc", shared=shared, threads=128)


def _fragment(values: Any, kind: Any) -> Any:
    """D (64, n) as the registers of 128 threads, (registers, 128): loops over the table of the ISA."""
    n = values.shape[1]
    halves = kind == "f16"
    out = np.zeros((_accumulators(n, kind), 128), np.uint32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
            if halves:
                out[i // 2, thread] |= np.uint32(int(np.float16(values[row, column]).view(np.uint16)) << 16 * (i % 2))
            else:
                scalar = np.int32(values[row, column]) if kind == "s32" else np.float32(values[row, column])
                out[i, thread] = scalar.view(np.uint32)
    return out


def _tail(kind: Any, a_mn: Any, b_mn: Any, signs: Any = (1, 1), registers: Any = False) -> Any:
    if kind in ("s8", "u8"):
        return ""
    out = f", {signs[0]}, {signs[1]}"
    if kind in ("f16", "bf16"):
        out += f", {int(b_mn)}" if registers else f", {int(a_mn)}, {int(b_mn)}"
    return out


def _run(
    n: Any,
    kind: Any,
    d_kind: Any,
    mode: Any,
    *,
    a_mn: Any = False,
    b_mn: Any = False,
    signs: Any = (1, 1),
    keep: Any = True,
    registers: Any = False,
    policy: Any = "eager",
    **changes: Any,
) -> Any:
    rng = np.random.default_rng(n + len(mode))
    a, b, c = small(rng, kind, (64, DEPTH[kind])), small(rng, kind, (n, DEPTH[kind])), rng.integers(-9, 9, (64, n))
    a_image, a_leading, a_stride = operand(kind, a, mode, mn_major=a_mn, spread=1024 if not a_mn else 0)
    b_image, b_leading, b_stride = operand(kind, b, mode, mn_major=b_mn)
    if registers:
        a_image = _a_registers(kind, a)
    acc = _fragment(c, d_kind)
    ptx = _kernel(
        n, kind, d_kind, hopper_fields(mode, a_leading, a_stride), hopper_fields(mode, b_leading, b_stride),
        (max(a_image.size, 512), b_image.size), _tail(kind, a_mn, b_mn, signs, registers),
        a_registers=registers, keep=keep, **changes,
    )  # fmt: skip
    report = emulate(ptx, 1, [a_image, b_image, acc], policy=policy)
    expected = signs[0] * signs[1] * (a @ b.T) + (c if keep else 0)
    return report, acc, _fragment(expected, d_kind)


def _a_registers(kind: Any, a: Any) -> Any:
    """A (64, k) as registers (4, 128): e elements a register, rows t / 4 and + 8, columns e (t % 4) and + 4 e."""
    bits = formats.ELEMENT_BITS[kind]
    e = 32 // bits
    code = codes(kind, a)
    out = np.zeros((4, 128), np.uint32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            row, first = 16 * warp + lane // 4 + 8 * (i % 2), e * (lane % 4) + 4 * e * (i // 2)
            for j in range(e):
                out[i, thread] |= np.uint32(int(code[row, first + j]) << bits * j)
    return out


@pytest.mark.parametrize("kind", DEPTH)
@pytest.mark.parametrize("n", [8, 64, 256])
def test_shapes_and_types(n: Any, kind: Any) -> None:
    d_kind = "s32" if kind in ("s8", "u8") else "f32"
    report, got, expected = _run(n, kind, d_kind, "128B")
    report.raise_for_findings()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("n", [24, 96])
def test_accumulator_in_f16(n: Any) -> None:
    report, got, expected = _run(n, "f16", "f16", "64B")
    report.raise_for_findings()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize(("a_mn", "b_mn"), [(False, False), (True, False), (False, True), (True, True)])
def test_layouts(mode: Any, a_mn: Any, b_mn: Any) -> None:
    report, got, expected = _run(128, "f16", "f32", mode, a_mn=a_mn, b_mn=b_mn)
    report.raise_for_findings()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["f16", "bf16", "e4m3", "tf32", "s8"])
def test_a_in_registers(kind: Any) -> None:
    report, got, expected = _run(32, kind, "s32" if kind == "s8" else "f32", "128B", registers=True)
    report.raise_for_findings()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("signs", "keep"), [((-1, 1), True), ((-1, -1), True), ((1, -1), False)])
def test_signs_and_scale_d(signs: Any, keep: Any) -> None:
    report, got, expected = _run(16, "f16", "f32", "32B", signs=signs, keep=keep)
    report.raise_for_findings()
    np.testing.assert_array_equal(got.view(np.float32), expected.view(np.float32))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_same(policy: Any) -> None:
    report, got, expected = _run(64, "f16", "f32", "128B", policy=policy)
    report.raise_for_findings()
    np.testing.assert_array_equal(got, expected)


def _kinds(report: Any) -> Any:
    return {str(kind) for kind in report.kinds()}


@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_accumulators_are_pending_until_the_wait(policy: Any) -> None:
    report, _, _ = _run(16, "f16", "f32", "128B", policy=policy, after="wgmma.commit_group.sync.aligned;")
    assert "pending_register" in _kinds(report)
    report, _, _ = _run(
        16,
        "f16",
        "f32",
        "128B",
        policy=policy,
        after="wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;",
    )
    assert "pending_register" in _kinds(report)


def test_first_operation_needs_a_fence() -> None:
    report, _, _ = _run(16, "f16", "f32", "128B", before="")
    assert _kinds(report) == {"missing_fence"}


@pytest.mark.parametrize("fenced", [False, True])
def test_registers_written_between_operations_need_a_fence(fenced: Any) -> None:
    again = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; add.u32 %r100, %r100, 1;"
    again += "wgmma.fence.sync.aligned;" if fenced else ""
    again += (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r100, %r101, %r102, %r103}, %rd1, %rd2, 1, 1, 1, 0, 0;"
    )
    again += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    report, _, _ = _run(8, "f16", "f32", "128B", after=again)
    assert _kinds(report) == (set() if fenced else {"missing_fence"})


def test_generic_writes_need_a_proxy_fence() -> None:
    rng = np.random.default_rng(1)
    image, leading, stride = operand("f16", small(rng, "f16", (64, 16)), "128B")
    fields = hopper_fields("128B", leading, stride)
    ptx = _kernel(64, "f16", "f32", fields, fields, (image.size, image.size), _tail("f16", False, False))
    report = emulate(
        ptx.replace("fence.proxy.async.shared::cta;", ""), 1, [image, image, np.zeros((32, 128), np.uint32)]
    )
    assert _kinds(report) == {"missing_proxy_fence"}


def test_operand_overwritten_before_the_wait() -> None:
    late = "wgmma.commit_group.sync.aligned; mov.u32 %r11, bbuf; st.shared.u32 [%r11], %r11;"
    late += "wgmma.wait_group.sync.aligned 0;"
    report, _, _ = _run(16, "f16", "f32", "128B", policy="mma_lazy", after=late)
    assert "async_race" in _kinds(report)


def test_reserved_bits_of_a_descriptor() -> None:
    rng = np.random.default_rng(1)
    image, leading, stride = operand("f16", small(rng, "f16", (64, 16)), "128B")
    fields = hopper_fields("128B", leading, stride)
    ptx = _kernel(64, "f16", "f32", fields | 1 << 60, fields, (image.size, image.size), _tail("f16", False, False))
    assert "descriptor" in _kinds(emulate(ptx, 1, [image, image, np.zeros((32, 128), np.uint32)]))
