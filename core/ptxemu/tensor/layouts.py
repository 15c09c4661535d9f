"""Where the bytes of an operand lie in shared memory: swizzles and matrix descriptors. Pure functions on addresses.

Sources: PTX ISA 9.7.15.5.1 (wgmma shared memory layout and matrix descriptor), 9.7.16.4.1 (tcgen05 shared memory
descriptor), 5.5.7 (swizzle modes of tensor maps); the canonical layouts in the notation of CuTe are named beside
each case.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.int64]

# First bit moved, number of bits, distance to the bits that are xored in. CuTe: Swizzle<bits, first, distance>.
SWIZZLES: dict[str, tuple[int, int, int]] = {
    "none": (4, 0, 3),
    "32B": (4, 1, 3),
    "64B": (4, 2, 3),
    "128B": (4, 3, 3),
    "128B_atom32B": (5, 2, 2),
}
WIDTH = {"none": 16, "32B": 32, "64B": 64, "128B": 128, "128B_atom32B": 128}


def swizzle(addresses: Addresses, mode: str, base_offset: int = 0) -> Addresses:
    """Byte addresses after the swizzle, which is a function of the address alone.

    Args:
        addresses: Byte addresses in shared memory.
        mode: A key of `SWIZZLES`.
        base_offset: Rows of 128 bytes by which the pattern's start lies behind a multiple of the pattern's size.
    """
    first, bits, distance = SWIZZLES[mode]
    if not bits:
        return addresses
    row = addresses - (base_offset << 7) if base_offset else addresses
    return addresses ^ (((row >> (first + distance)) & ((1 << bits) - 1)) << first)


@dataclass(frozen=True)
class MatrixDescriptor:
    """A decoded matrix descriptor.

    Attributes:
        start: Byte address in the CTA's shared memory.
        leading: Leading dimension byte offset.
        stride: Stride dimension byte offset.
        base_offset: Of the swizzle pattern, 0 to 7.
        mode: A key of `SWIZZLES`.
        problems: What is illegal about it, in words.
    """

    start: int
    leading: int
    stride: int
    base_offset: int
    mode: str
    problems: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def hopper_descriptor(bits: int) -> MatrixDescriptor:
    """Decodes the 64-bit matrix descriptor of wgmma (PTX ISA 9.7.15.5.1.2.2)."""
    problems = []
    reserved = bits & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62)
    if reserved:
        problems.append(f"reserved bits {reserved:#x} are set")
    mode = ("none", "128B", "64B", "32B")[bits >> 62 & 3]
    return MatrixDescriptor(
        (bits & 0x3FFF) << 4,
        (bits >> 16 & 0x3FFF) << 4,
        (bits >> 32 & 0x3FFF) << 4,
        bits >> 49 & 7,
        mode,
        tuple(problems),
    )


@lru_cache(maxsize=4096)
def blackwell_descriptor(bits: int) -> MatrixDescriptor:
    """Decodes the 64-bit shared memory descriptor of tcgen05 (PTX ISA 9.7.16.4.1, table 40)."""
    problems = []
    if bits >> 46 & 7 != 1:
        problems.append(f"bits 46-48 are {bits >> 46 & 7:#b}, not 0b001")
    if bits >> 52 & 1:
        problems.append("the absolute address mode of the leading dimension (bit 52) needs sm_103a")
    if bits >> 53 & 0xFF:
        problems.append(f"bits 53-60 are {bits >> 53 & 0xFF:#x}, not 0")
    if bits >> 14 & 3 or bits >> 30 & 3:
        problems.append("reserved bits 14, 15, 30 or 31 are set")
    code = bits >> 61 & 7
    mode = {0: "none", 1: "128B_atom32B", 2: "128B", 4: "64B", 6: "32B"}.get(code)
    if mode is None:
        problems.append(f"swizzle mode {code} is invalid")
        mode = "none"
    return MatrixDescriptor(
        (bits & 0x3FFF) << 4,
        (bits >> 16 & 0x3FFF) << 4,
        (bits >> 32 & 0x3FFF) << 4,
        bits >> 49 & 7,
        mode,
        tuple(problems),
    )


@lru_cache(maxsize=1024)
def _k_major(leading: int, stride: int, mode: str, rows: int, chunks: int) -> Addresses:
    row, chunk = np.arange(rows, dtype=np.int64)[:, None], np.arange(chunks, dtype=np.int64)[None, :]
    if mode == "none":  # ((8, m), (T, 2)) : ((1 T, SBO), (1, LBO))
        return (row // 8) * stride + (row % 8) * 16 + chunk * leading
    width = WIDTH[mode]  # ((8, m), (T, 2)) : ((W, SBO), (1, T))
    return (row // 8) * stride + (row % 8) * width + chunk * 16


@lru_cache(maxsize=1024)
def _mn_major(leading: int, stride: int, mode: str, chunks: int, depth: int) -> Addresses:
    k, chunk = np.arange(depth, dtype=np.int64)[:, None], np.arange(chunks, dtype=np.int64)[None, :]
    if mode == "none":  # ((T, 1, m), (8, k)) : ((1, T, SBO), (1 T, LBO))
        return chunk * stride + (k % 8) * 16 + (k // 8) * leading
    width = WIDTH[mode]  # ((T, W, m), (8, k)) : ((1, T, LBO), (W T, SBO)); the 32-byte atoms repeat every 4 rows of K
    per, rows = width // 16, 4 if mode == "128B_atom32B" else 8
    return (chunk // per) * leading + (chunk % per) * 16 + (k // rows) * stride + (k % rows) * width


def k_major_chunks(descriptor: MatrixDescriptor, rows: int, row_bytes: int) -> Addresses:
    """Addresses of the 16-byte chunks of an operand whose rows run along K.

    Args:
        descriptor: Decoded.
        rows: Of M or N.
        row_bytes: Bytes of K in each row, a multiple of 16.

    Returns:
        int64 (rows, row_bytes / 16), byte addresses in the CTA's shared memory.
    """
    linear = _k_major(descriptor.leading, descriptor.stride, descriptor.mode, rows, row_bytes // 16)
    return swizzle(descriptor.start + linear, descriptor.mode, descriptor.base_offset)


def mn_major_chunks(descriptor: MatrixDescriptor, row_bytes: int, depth: int) -> Addresses:
    """Addresses of the 16-byte chunks of an operand whose rows run along M or N.

    Args:
        descriptor: Decoded.
        row_bytes: Bytes of M or N in each row, a multiple of 16.
        depth: Elements of K.

    Returns:
        int64 (depth, row_bytes / 16), byte addresses in the CTA's shared memory.
    """
    linear = _mn_major(descriptor.leading, descriptor.stride, descriptor.mode, row_bytes // 16, depth)
    return swizzle(descriptor.start + linear, descriptor.mode, descriptor.base_offset)
