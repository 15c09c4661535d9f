"""ldmatrix, stmatrix, movmatrix and mma.sync against loops over the fragment tables of the PTX ISA."""

from typing import Any

import numpy as np
import pytest

from ptxemu import emulate
from ptxemu.tensor import formats, fragments, mma_sync
from tests.ptxemu.tensor.kernels import copy_in, copy_out, kernel

SHARED = ".shared .align 128 .b8 buf[{0}];"


def _registers_out(count: Any) -> Any:
    """Stores %r100 .. of every lane to out as (registers, 32)."""
    lines = ["ld.param.u64 %rd50, [out]; cvt.u64.u32 %rd51, %r0; shl.b64 %rd51, %rd51, 2; add.u64 %rd50, %rd50, %rd51;"]
    return "\n".join(lines + [f"st.global.u32 [%rd50+{128 * i}], %r{100 + i};" for i in range(count)])


def _registers_in(count: Any, first: Any = 100, parameter: Any = "regs") -> Any:
    lines = [
        f"ld.param.u64 %rd50, [{parameter}];",
        "cvt.u64.u32 %rd51, %r0; shl.b64 %rd51, %rd51, 2; add.u64 %rd50, %rd50, %rd51;",
    ]
    return "\n".join(lines + [f"ld.global.u32 %r{first + i}, [%rd50+{128 * i}];" for i in range(count)])


def _names(count: Any, first: Any = 100) -> Any:
    return ", ".join(f"%r{first + i}" for i in range(count))


def _rows(count: Any) -> Any:
    return f"mov.u32 %r1, buf; and.b32 %r2, %r0, {count - 1}; shl.b32 %r2, %r2, 4; add.u32 %r1, %r1, %r2;"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_b16(count: Any, transposed: Any) -> None:
    """Thread t holds row t / 4, elements 2 (t % 4) and + 1; .trans holds the same of the transpose."""
    data = np.random.default_rng(1).integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    trans = ".trans" if transposed else ""
    size = data.nbytes
    body = f"""{copy_in("buf", max(size, 128))} {_rows(8 * count)}
  ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{_names(count)}}}, [%r1]; {_registers_out(count)}"""
    out = np.zeros((count, 32), np.uint32)
    emulate(
        kernel(body, params=".param .u64 src, .param .u64 out", shared=SHARED.format(size)), 1, [data, out]
    ).raise_for_findings()
    for matrix in range(count):
        for thread in range(32):
            source = data[matrix].T if transposed else data[matrix]
            low, high = source[thread // 4, 2 * (thread % 4)], source[thread // 4, 2 * (thread % 4) + 1]
            assert out[matrix, thread] == int(low) | int(high) << 16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_b16_undoes_ldmatrix(count: Any, transposed: Any) -> None:
    regs = np.random.default_rng(2).integers(0, 1 << 32, (count, 32)).astype(np.uint32)
    trans = ".trans" if transposed else ""
    body = f"""{_registers_in(count)} {_rows(8 * count)}
  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{_names(count)}}};
  bar.sync 0; {copy_out("buf", 128 * count)}"""
    out = np.zeros((count, 8, 8), np.uint16)
    ptx = kernel(body, params=".param .u64 regs, .param .u64 out", shared=SHARED.format(128 * count))
    emulate(ptx, 1, [regs, out]).raise_for_findings()
    for matrix in range(count):
        target = out[matrix].T if transposed else out[matrix]
        for thread in range(32):
            assert int(target[thread // 4, 2 * (thread % 4)]) == regs[matrix, thread] & 0xFFFF
            assert int(target[thread // 4, 2 * (thread % 4) + 1]) == regs[matrix, thread] >> 16


@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_b8_16x16(count: Any) -> None:
    """Each byte of the matrices lands where the layout of CuTe's SM100_U8x8_LDSM_T says."""
    data = np.random.default_rng(3).integers(0, 256, (count, 16, 16), np.uint8)
    body = f"""{copy_in("buf", data.nbytes)} {_rows(16 * count)}
  ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.b8 {{{_names(2 * count)}}}, [%r1]; {_registers_out(2 * count)}"""
    out = np.zeros((2 * count, 32), np.uint32)
    ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=SHARED.format(data.nbytes), target="sm_100a")
    emulate(ptx, 1, [data, out]).raise_for_findings()
    got = out.view(np.uint8).reshape(count, 2, 8, 4, 2, 2)  # matrix, register, t / 4, t % 4, v2, v1
    for matrix, register, t1, t0, v2, v1 in np.ndindex(got.shape):
        assert got[matrix, register, t1, t0, v2, v1] == data[matrix, 4 * t0 + 2 * register + v1, t1 + 8 * v2]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_b8_16x8(count: Any) -> None:
    regs = np.random.default_rng(4).integers(0, 1 << 32, (count, 32)).astype(np.uint32)
    body = f"""{_registers_in(count)} {_rows(8 * count)}
  stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%r1], {{{_names(count)}}};
  bar.sync 0; {copy_out("buf", 128 * count)}"""
    out = np.zeros((count, 8, 16), np.uint8)
    ptx = kernel(body, params=".param .u64 regs, .param .u64 out", shared=SHARED.format(128 * count), target="sm_100a")
    emulate(ptx, 1, [regs, out]).raise_for_findings()
    source = regs.view(np.uint8).reshape(count, 8, 4, 2, 2)
    for matrix, t1, t0, v2, v1 in np.ndindex(source.shape):
        assert out[matrix, 2 * t0 + v1, t1 + 8 * v2] == source[matrix, t1, t0, v2, v1]


@pytest.mark.parametrize(("packed", "bits"), [("b4x16_p64", 4), ("b6x16_p32", 6)])
def test_ldmatrix_expands_sub_byte_elements(packed: Any, bits: Any) -> None:
    codes = np.random.default_rng(5).integers(0, 1 << bits, (8, 16))
    rows = np.zeros((8, 16), np.uint8)
    for row in range(8):
        word = sum(int(c) << bits * i for i, c in enumerate(codes[row]))
        rows[row, : 2 * bits] = list(word.to_bytes(2 * bits, "little"))
    body = f"""{copy_in("buf", 128)} {_rows(8)}
  ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.{packed} {{%r100}}, [%r1]; {_registers_out(1)}"""
    out = np.zeros(32, np.uint32)
    ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=SHARED.format(128), target="sm_100a")
    emulate(ptx, 1, [rows, out]).raise_for_findings()
    np.testing.assert_array_equal(out.view(np.uint8).reshape(8, 16), codes)


def test_movmatrix() -> None:
    regs = np.random.default_rng(6).integers(0, 1 << 32, 32).astype(np.uint32)
    body = f"{_registers_in(1, 99)} movmatrix.sync.aligned.m8n8.trans.b16 %r100, %r99; {_registers_out(1)}"
    out = np.zeros(32, np.uint32)
    emulate(kernel(body, params=".param .u64 regs, .param .u64 out"), 1, [regs, out]).raise_for_findings()
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), regs.view(np.uint16).reshape(8, 8).T)


def test_unaligned_row_is_found() -> None:
    body = f"""{copy_in("buf", 128)} {_rows(8)} add.u32 %r1, %r1, 8;
  ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r100}}, [%r1];"""
    ptx = kernel(body, params=".param .u64 src", shared=SHARED.format(256))
    report = emulate(ptx, 1, [np.zeros(128, np.uint8)])
    assert [str(f.kind) for f in report.findings] == ["misaligned"]


def test_scatter_undoes_gather() -> None:
    rng = np.random.default_rng(7)
    for fragment in (
        fragments.HALVES,
        fragments.HALVES_TRANSPOSED,
        fragments.BYTES_16X16,
        fragments.BYTES_16X8,
        fragments.BYTES_8X16,
    ):
        rows = rng.integers(0, 256, (3, fragment.rows, 16), np.uint8)
        np.testing.assert_array_equal(fragments.scatter(fragment, fragments.gather(fragment, rows)), rows)


INTEGER = {"s8": np.int8, "u8": np.uint8}
SHAPES = [(k, t) for t, depths in mma_sync.DEPTHS.items() for k in depths]


def _a_place(depth_bits: Any, row: Any, k: Any) -> Any:
    """Register, lane and element of A's (row, k): PTX ISA tables of m16n8k*; e elements fill a register."""
    e = 32 // depth_bits
    register = row // 8 + 2 * (k // (4 * e))
    return register, row % 8 * 4 + k % (4 * e) // e, k % e


def _b_place(depth_bits: Any, k: Any, n: Any) -> Any:
    e = 32 // depth_bits
    return k // (4 * e), n * 4 + k % (4 * e) // e, k % e


@pytest.mark.parametrize(("depth", "kind"), SHAPES)
def test_mma_sync(depth: Any, kind: Any) -> None:
    """Small integers, so that every sum is exact and the result must be equal."""
    rng = np.random.default_rng(depth)
    low = 0 if kind == "u8" else -4
    a, b, c = rng.integers(low, 5, (16, depth)), rng.integers(low, 5, (depth, 8)), rng.integers(-9, 9, (16, 8))
    bits = formats.ELEMENT_BITS[kind]
    registers = np.zeros((16 * depth * bits // 1024 + 8 * depth * bits // 1024, 32), np.uint32)
    count_a = 16 * depth * bits // 1024

    def code(value: Any) -> Any:
        if kind in INTEGER:
            return int(value) & 255
        if kind == "tf32":
            return int(np.float32(value).view(np.uint32))
        return int(formats.encode(kind, np.array([float(value)]))[0])

    for row in range(16):
        for k in range(depth):
            r, lane, e = _a_place(bits, row, k)
            registers[r, lane] |= np.uint32(code(a[row, k]) << bits * e)
    for k in range(depth):
        for n in range(8):
            r, lane, e = _b_place(bits, k, n)
            registers[count_a + r, lane] |= np.uint32(code(b[k, n]) << bits * e)
    accumulator = np.zeros((4, 32), np.uint32)
    kind_c = "s32" if kind in INTEGER else "f32"
    for i in range(4):
        for lane in range(32):
            value = c[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
            accumulator[i, lane] = (
                np.int32(value).view(np.uint32) if kind_c == "s32" else np.float32(value).view(np.uint32)
            )
    count_b = len(registers) - count_a
    body = f"""{_registers_in(len(registers), 110)} {_registers_in(4, 100, "acc")}
  mma.sync.aligned.m16n8k{depth}.row.col.{kind_c}.{kind}.{kind}.{kind_c} {{{_names(4)}}},
    {{{_names(count_a, 110)}}}, {{{_names(count_b, 110 + count_a)}}}, {{{_names(4)}}};
  {_registers_out(4)}"""
    out = np.zeros((4, 32), np.uint32)
    ptx = kernel(body, params=".param .u64 regs, .param .u64 acc, .param .u64 out")
    emulate(ptx, 1, [registers, accumulator, out]).raise_for_findings()
    expected = a @ b + c
    values = out.view(np.int32 if kind_c == "s32" else np.float32)
    for i in range(4):
        for lane in range(32):
            assert values[i, lane] == expected[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
