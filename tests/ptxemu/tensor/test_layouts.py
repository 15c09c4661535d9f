"""Swizzles and matrix descriptors against straight loops over the canonical layouts of the PTX ISA."""

from typing import Any

import numpy as np
import pytest

from ptxemu.tensor import layouts


def test_swizzle_is_the_table_of_the_isa() -> None:
    """128B: 16-byte chunk j of row i of 8 rows lies at chunk j ^ i; 64B and 32B repeat rows in pairs and fours."""
    address = np.arange(0, 1024, 16)
    for mode, width in (("128B", 128), ("64B", 64), ("32B", 32)):
        got = layouts.swizzle(address, mode)
        for a, g in zip(address.tolist(), got.tolist(), strict=True):
            chunk, phase = a // 16 % (width // 16), a // 128 % (width // 16)
            assert g == a // width * width + (chunk ^ phase) * 16
    np.testing.assert_array_equal(layouts.swizzle(address, "none"), address)


def test_swizzle_with_32_byte_atoms() -> None:
    for a in range(0, 1024, 16):
        expected = a & ~0x60 | ((a >> 5 & 3) ^ (a >> 7 & 3)) << 5
        assert layouts.swizzle(np.array([a]), "128B_atom32B")[0] == expected


@pytest.mark.parametrize("mode", layouts.SWIZZLES)
def test_swizzle_is_a_permutation(mode: Any) -> None:
    address = np.arange(4096)
    assert len(np.unique(layouts.swizzle(address, mode))) == 4096


def _pack(start: Any, leading: Any, stride: Any, base: Any, code: Any, blackwell: Any) -> Any:
    bits = (start >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | base << 49
    return bits | (1 << 46 | code << 61 if blackwell else code << 62)


@pytest.mark.parametrize(("code", "mode"), [(0, "none"), (1, "128B"), (2, "64B"), (3, "32B")])
def test_hopper_descriptor(code: Any, mode: Any) -> None:
    got = layouts.hopper_descriptor(_pack(0x1400, 256, 1024, 3, code, False))
    assert got == layouts.MatrixDescriptor(0x1400, 256, 1024, 3, mode)


@pytest.mark.parametrize(("code", "mode"), [(0, "none"), (1, "128B_atom32B"), (2, "128B"), (4, "64B"), (6, "32B")])
def test_blackwell_descriptor(code: Any, mode: Any) -> None:
    got = layouts.blackwell_descriptor(_pack(0x2C00, 128, 512, 0, code, True))
    assert got == layouts.MatrixDescriptor(0x2C00, 128, 512, 0, mode)


def test_illegal_descriptors_say_why() -> None:
    assert "0b001" in layouts.blackwell_descriptor(0).problems[0]
    assert "swizzle mode 3" in layouts.blackwell_descriptor(1 << 46 | 3 << 61).problems[0]
    assert "sm_103a" in layouts.blackwell_descriptor(1 << 46 | 1 << 52).problems[0]
    assert "reserved" in layouts.hopper_descriptor(1 << 14).problems[0]


def _loop_k_major(width: Any, leading: Any, stride: Any, row: Any, byte: Any) -> Any:
    """PTX ISA 9.7.15.5.1: core matrices of 8 rows; those of 8 x 16 bytes lie LBO apart along K, SBO along M or N."""
    if width == 16:
        return row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
    return row // 8 * stride + row % 8 * width + byte


@pytest.mark.parametrize(("code", "width"), [(0, 16), (2, 128), (4, 64), (6, 32)])
def test_k_major_chunks(code: Any, width: Any) -> None:
    start, leading, stride = 0x4400 if code == 0 else 0x4000, 0x90, 8 * width + 0x400
    descriptor = layouts.blackwell_descriptor(_pack(start, leading, stride, 0, code, True))
    got = layouts.k_major_chunks(descriptor, 24, 32)
    for row in range(24):
        for chunk in range(2):
            a = start + _loop_k_major(width, leading, stride, row, 16 * chunk)
            if width > 16:
                a ^= (a >> 7 & (width // 16 - 1)) << 4
            assert got[row, chunk] == a


@pytest.mark.parametrize(("code", "width"), [(0, 16), (2, 128), (4, 64), (6, 32)])
def test_mn_major_chunks(code: Any, width: Any) -> None:
    start, leading, stride = 0x8000, 0x1000, 0x2000
    descriptor = layouts.blackwell_descriptor(_pack(start, leading, stride, 0, code, True))
    got = layouts.mn_major_chunks(descriptor, 256, 16)  # 128 elements of 16 bits, K of 16
    for k in range(16):
        for chunk in range(16):
            if width == 16:
                a = start + chunk * stride + k % 8 * 16 + k // 8 * leading
            else:
                per = width // 16
                a = start + chunk // per * leading + chunk % per * 16 + k // 8 * stride + k % 8 * width
                a ^= (a >> 7 & (per - 1)) << 4
            assert got[k, chunk] == a


def test_base_offset_moves_the_pattern() -> None:
    """A pattern that starts 3 rows of 128 bytes behind a multiple of 1024 is swizzled as if it started at one."""
    moved = layouts.MatrixDescriptor(0x180, 0, 1024, 3, "128B")
    plain = layouts.MatrixDescriptor(0, 0, 1024, 0, "128B")
    np.testing.assert_array_equal(layouts.k_major_chunks(moved, 4, 32) - 0x180, layouts.k_major_chunks(plain, 4, 32))
