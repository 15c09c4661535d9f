"""Images of operands in shared memory, element by element, as the PTX ISA draws the canonical layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptxemu.tensor import formats

WIDTH = {"none": 16, "32B": 32, "64B": 64, "128B": 128}
HOPPER = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
BLACKWELL = {"none": 0, "128B": 2, "64B": 4, "32B": 6}


def codes(kind: Any, values: Any) -> Any:
    """Codes of numbers that are exact in a format."""
    values = np.asarray(values)
    if kind in ("s8", "u8"):
        return values.astype(np.int64) & 255
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32).astype(np.int64)
    got = formats.encode(kind, values.astype(np.float64)).astype(np.int64)
    np.testing.assert_array_equal(formats.decode(kind, got.astype(np.uint32)), values)
    return got


def operand(kind: Any, values: Any, mode: Any, *, mn_major: Any = False, padded: Any = False, spread: Any = 0) -> Any:
    """The bytes of an operand, and the leading and stride byte offsets that its descriptor needs.

    Args:
        kind: Format of the elements.
        values: (rows of M or N, K).
        mode: Swizzle.
        mn_major: Rows run along M or N.
        padded: Sub-byte elements fill 16-byte chunks of 16 (kinds f8f6f4 and mxf8f6f4).
        spread: Bytes added to both offsets, to see that they are used.
    """
    code = codes(kind, values)
    bits = formats.ELEMENT_BITS[kind]
    container = 8 if padded else bits
    lines = code.T if mn_major else code  # along a line elements are neighbours in memory
    count, length = lines.shape
    line_bytes = length * container // 8
    width = WIDTH[mode]
    if mode == "none" and mn_major:  # chunks along MN: SBO apart; groups of 8 along K: LBO apart
        leading, stride = 128, 128 * -(-count // 8) + spread
    elif mode == "none":
        leading, stride = 128, 128 * (line_bytes // 16) + spread
    elif mn_major:
        stride = 8 * width
        leading = stride * -(-count // 8) + spread
    else:
        leading, stride = 16, 8 * width + spread

    def place(line: int, chunk: int) -> int:
        """Address of a 16-byte chunk before the swizzle."""
        if mode == "none":
            along, across = (stride, leading) if mn_major else (leading, stride)
            return int(chunk * along + line // 8 * across + line % 8 * 16)
        if mn_major:
            per = width // 16
            return int(chunk // per * leading + chunk % per * 16 + line // 8 * stride + line % 8 * width)
        return int(line // 8 * stride + line % 8 * width + chunk * 16)

    chunks = np.zeros((count, line_bytes // 16, 16), np.uint8)
    for line in range(count):
        for chunk in range(line_bytes // 16):
            if padded:
                group, size = lines[line, 16 * chunk : 16 * chunk + 16], bits
            else:
                group, size = lines[line, chunk * 128 // bits : (chunk + 1) * 128 // bits], bits
            word = sum(int(c) << size * i for i, c in enumerate(group))
            chunks[line, chunk] = list(word.to_bytes(16, "little"))
    last = max(place(line, chunk) for line in (0, count - 1) for chunk in (0, line_bytes // 16 - 1))
    image = np.zeros(-(-(last + 2048) // 1024) * 1024, np.uint8)
    mask = width // 16 - 1 if mode != "none" else 0
    for line in range(count):
        for chunk in range(line_bytes // 16):
            address = place(line, chunk)
            address ^= (address >> 7 & mask) << 4
            image[address : address + 16] = chunks[line, chunk]
    return image, leading, stride


def hopper_fields(mode: Any, leading: Any, stride: Any) -> Any:
    """The high bits of wgmma's descriptor, without the start address."""
    return (leading >> 4) << 16 | (stride >> 4) << 32 | HOPPER[mode] << 62


def blackwell_fields(mode: Any, leading: Any, stride: Any) -> Any:
    """The high bits of tcgen05's descriptor, without the start address."""
    return (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 46 | BLACKWELL[mode] << 61


def small(rng: Any, kind: Any, shape: Any) -> Any:
    """Numbers that are exact in every format, with sums that are exact in f32."""
    if kind == "e2m1":
        return rng.choice([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -3.0, -6.0], shape)
    if kind == "u8":
        return rng.integers(0, 8, shape)
    return rng.integers(-4, 5, shape)
