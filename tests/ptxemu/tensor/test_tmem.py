"""Tensor memory: allocation, load and store shapes, waits and fences."""

from typing import Any

import numpy as np
import pytest

from ptxemu import emulate
from ptxemu.tensor import tmem
from tests.ptxemu.tensor.kernels import kernel

SHARED = ".shared .align 8 .b8 slot[8];"
ALLOC = """
  mov.u32 %r1, slot; shr.u32 %r2, %r0, 5; setp.eq.u32 %p1, %r2, 0;
  @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], {columns};
  @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
  bar.sync 0; ld.shared.u32 %r3, [slot];
"""
FREE = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, {columns};"


def _names(count: Any, first: Any = 100) -> Any:
    return ", ".join(f"%r{first + i}" for i in range(count))


def _lines(count: Any, template: Any, first: Any = 100) -> Any:
    return "\n".join(template.format(i=i, r=first + i, offset=512 * i) for i in range(count))


def _kernel(body: Any, columns: Any = 512, params: Any = ".param .u64 src, .param .u64 out") -> Any:
    lanes = "shl.b32 %r4, %r2, 21; add.u32 %r5, %r3, %r4;"  # the quarter of the warp
    pointers = """cvt.u64.u32 %rd51, %r0; shl.b64 %rd51, %rd51, 2;
  ld.param.u64 %rd50, [src]; add.u64 %rd50, %rd50, %rd51; ld.param.u64 %rd52, [out]; add.u64 %rd52, %rd52, %rd51;"""
    alloc, free = ALLOC.format(columns=columns), FREE.format(columns=columns)
    return kernel(alloc + lanes + pointers + body + free, params=params, shared=SHARED, target="sm_100a", threads=128)


def _place(shape: Any, register: Any, thread: Any, count: Any) -> Any:
    """Lane and column of a register by the figures of the ISA, 9.7.16.2.3.1."""
    if shape == "32x32b":
        return thread, register
    if shape == "16x64b":
        return thread // 4 + 8 * (thread % 2), 2 * register + thread // 2 % 2
    if shape == "16x128b":
        return thread // 4 + 8 * (register % 2), 4 * (register // 2) + thread % 4
    if shape == "16x256b":
        return thread // 4 + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * (thread % 4) + register % 2
    return thread % 16, register + count * (thread // 16)


SHAPES = [
    ("32x32b", 1),
    ("32x32b", 64),
    ("16x64b", 8),
    ("16x128b", 4),
    ("16x256b", 2),
    ("16x256b", 16),
    ("16x32bx2", 8),
]


@pytest.mark.parametrize(
    ("shape", "count", "upper"),
    [(*case, upper) for case in SHAPES for upper in (False, True) if not (upper and case[0] == "32x32b")],
)
def test_load_shapes(shape: Any, count: Any, upper: Any) -> None:
    """Columns are written lane by lane with 32x32b and read back with the shape."""
    registers = count * tmem.REGISTERS_PER[shape]
    width = {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8, "16x32bx2": 2}[shape] * count
    data = np.random.default_rng(count).integers(0, 1 << 32, (width, 128)).astype(np.uint32)
    extra = f", {count}" if shape == "16x32bx2" else ""
    body = f"""
  {_lines(width, "ld.global.u32 %r{r}, [%rd50+{offset}];")}
  tcgen05.st.sync.aligned.32x32b.x{width}.b32 [%r5], {{{_names(width)}}};
  tcgen05.wait::st.sync.aligned;
  {"add.u32 %r5, %r5, 0x100000;" if upper else ""}
  tcgen05.ld.sync.aligned.{shape}.x{count}.b32 {{{_names(registers)}}}, [%r5]{extra};
  tcgen05.wait::ld.sync.aligned;
  {_lines(registers, "st.global.u32 [%rd52+{offset}], %r{r};")}"""
    out = np.zeros((registers, 128), np.uint32)
    emulate(_kernel(body), 1, [data, out]).raise_for_findings()
    for register in range(registers):
        for thread in range(128):
            lane, column = _place(shape, register, thread % 32, count)
            assert out[register, thread] == data[column, thread // 32 * 32 + lane + 16 * upper]


@pytest.mark.parametrize("shape", ["16x64b", "16x128b", "16x256b"])
def test_store_undoes_load(shape: Any) -> None:
    registers = 4 * tmem.REGISTERS_PER[shape]
    data = np.random.default_rng(1).integers(0, 1 << 32, (registers, 128)).astype(np.uint32)
    body = f"""
  {_lines(registers, "ld.global.u32 %r{r}, [%rd50+{offset}];")}
  tcgen05.st.sync.aligned.{shape}.x4.b32 [%r5], {{{_names(registers)}}};
  tcgen05.wait::st.sync.aligned;
  tcgen05.ld.sync.aligned.{shape}.x4.b32 {{{_names(registers, 200)}}}, [%r5];
  tcgen05.wait::ld.sync.aligned;
  {_lines(registers, "st.global.u32 [%rd52+{offset}], %r{r};", 200)}"""
    out = np.zeros_like(data)
    emulate(_kernel(body), 1, [data, out]).raise_for_findings()
    np.testing.assert_array_equal(out, data)


def test_pack_and_unpack() -> None:
    data = np.random.default_rng(2).integers(0, 1 << 32, (4, 128)).astype(np.uint32)
    body = f"""
  {_lines(4, "ld.global.u32 %r{r}, [%rd50+{offset}];")}
  tcgen05.st.sync.aligned.32x32b.x4.unpack::16b.b32 [%r5], {{{_names(4)}}};
  tcgen05.wait::st.sync.aligned;
  tcgen05.ld.sync.aligned.32x32b.x8.b32 {{{_names(8, 120)}}}, [%r5];
  tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {{{_names(4, 128)}}}, [%r5];
  tcgen05.wait::ld.sync.aligned;
  {_lines(12, "st.global.u32 [%rd52+{offset}], %r{r};", 120)}"""
    out = np.zeros((12, 128), np.uint32)
    emulate(_kernel(body), 1, [data, out]).raise_for_findings()
    np.testing.assert_array_equal(out[0:8:2], data & 0xFFFF)
    np.testing.assert_array_equal(out[1:8:2], data >> 16)
    np.testing.assert_array_equal(out[8:], data)


def _kinds(report: Any) -> Any:
    return {str(kind) for kind in report.kinds()}


def _fault(body: Any, columns: Any = 512, free: Any = True) -> Any:
    ptx = _kernel(body, columns)
    if not free:
        ptx = ptx.replace(FREE.format(columns=columns), "")
    return emulate(ptx, 1, [np.zeros((8, 128), np.uint32), np.zeros((8, 128), np.uint32)])


STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r5], {%r0}; tcgen05.wait::st.sync.aligned;"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (STORE, None),
        ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r100}, [%r5]; tcgen05.wait::ld.sync.aligned;", "uninitialised"),
        (STORE + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r100}, [%r5]; add.u32 %r101, %r100, 1;", "pending_register"),
        (
            STORE.replace("tcgen05.wait::st.sync.aligned;", "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r100}, [%r5];"),
            "missing_fence",
        ),
        (STORE.replace("[%r5]", "[%r3]"), "tensor_memory"),
        (STORE.replace("[%r5]", "[%r5+512]"), "tensor_memory"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", "tensor_memory"),
    ],
)
def test_faults(body: Any, kind: Any) -> None:
    report = _fault(body)
    assert (kind is None and not report.findings) or kind in _kinds(report)


def test_leak_and_wrong_sizes() -> None:
    assert "tensor_memory" in _kinds(_fault(STORE, free=False))
    assert "tensor_memory" in _kinds(_fault(STORE.replace("[%r5]", "[%r5+40]"), columns=32))
    assert "tensor_memory" in _kinds(_fault("", columns=48))
    assert "tensor_memory" in _kinds(_fault("mov.u32 %r3, 32;"))


def test_alloc_waits_for_columns() -> None:
    body = "mov.u32 %r1, slot; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 512;"
    ptx = kernel(body + body, params=".param .u64 out", shared=SHARED, target="sm_100a")
    report = emulate(ptx, 1, [np.zeros(8, np.uint32)])
    assert "deadlock" in _kinds(report)
    assert "512 columns wanted" in str(report)
