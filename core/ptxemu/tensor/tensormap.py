"""Tensor maps (TMA descriptors): the 64 bytes that matter of the 128, decoded, and the elements of a box.

The layout is not documented. It was calibrated against `cuTensorMapEncodeTiled` on an H200 (every data type, swizzle,
interleave, promotion, fill and element stride) and against the descriptors that CuTe DSL 4.8 writes itself, which
have the same layout:

| bytes | bits | field |
|---|---|---|
| 0-7 | | global address |
| 8-11 | 4-6 | rank - 1 |
| | 7-10 | data type |
| | 11-12 | interleave |
| | 13-14 | swizzle: none, 32B, 64B, 128B |
| | 15 | out-of-bounds elements are NaN instead of 0 |
| | 16 | with data type f32 or f32_ftz: tf32 |
| | 17-18, 21 | L2 promotion, a hint |
| | 19-20 | atom of the 128B swizzle: 16, 32, 32 with 8 flipped, 64 bytes |
| 12-27 | | strides of dimensions 1 to 4 in 16 bytes, low 32 bits |
| 28-31 | | their high 4 bits, a nibble each |
| 32-51 | | sizes - 1 |
| 52-54 | 0-14 | element strides - 1, 3 bits each; that of dimension 0 is ignored unless the layout is interleaved |
| 55-59 | | box - 1 |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

USED_BYTES = 64


@dataclass(frozen=True)
class DataType:
    """A data type of a tensor map.

    Attributes:
        name: As cuda.h has it, in short.
        bits: Of an element in global memory.
        shared_bits: Of an element in shared memory, padding included.
        reduction: The type that a reduction works on, or None where there is none.
    """

    name: str
    bits: int
    shared_bits: int
    reduction: str | None = None


TYPES: dict[int, DataType] = {
    0: DataType("u8", 8, 8),
    1: DataType("u16", 16, 16),
    2: DataType("u32", 32, 32, "u32"),
    3: DataType("s32", 32, 32, "s32"),
    4: DataType("u64", 64, 64, "u64"),
    5: DataType("s64", 64, 64, "s64"),
    6: DataType("f16", 16, 16, "f16"),
    7: DataType("f32", 32, 32, "f32"),
    8: DataType("f32_ftz", 32, 32, "f32_ftz"),
    9: DataType("f64", 64, 64, "f64"),
    10: DataType("bf16", 16, 16, "bf16"),
    11: DataType("16u4_align8b", 4, 4),
    12: DataType("16u4_align16b", 4, 8),
    13: DataType("16u6_align16b", 6, 8),
}
SWIZZLE = ("none", "32B", "64B", "128B")


@dataclass(frozen=True)
class TensorMap:
    """A decoded tensor map; dimension 0 is the contiguous one.

    Attributes:
        base: Global address.
        type: Of the elements.
        tf32: Elements are rounded to tf32 on the way to shared memory.
        swizzle: A key of `layouts.SWIZZLES`.
        interleave: 0, or 1 and 2 for the 16 and 32 byte interleaved layouts.
        nan_fill: Elements out of bounds are NaN.
        sizes: Elements of each dimension.
        strides: Bytes of each dimension; that of dimension 0 is not used.
        box: Of each dimension, in elements before the element strides.
        steps: Element strides.
        problems: What is illegal about it, in words.
        unsupported: What is legal but not emulated, in words.
    """

    base: int
    type: DataType
    tf32: bool
    swizzle: str
    interleave: int
    nan_fill: bool
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    problems: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.sizes)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Elements that a box holds in each dimension: the box divided by the element stride, rounded up."""
        return tuple(-(-box // step) for box, step in zip(self.box, self.steps, strict=True))

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a box's innermost row in shared memory, padding included."""
        return self.counts[0] * self.type.shared_bits // 8

    @cached_property
    def shared_bytes(self) -> int:
        """Bytes of a box in shared memory; what a load adds to the transaction count."""
        return int(np.prod(self.counts[1:], dtype=np.int64)) * self.row_bytes

    @cached_property
    def _grid(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Offsets within the box of every innermost row, one array (rows,) for each dimension from 1."""
        axes = [np.arange(n, dtype=np.int64) * s for n, s in zip(self.counts[1:], self.steps[1:], strict=True)]
        mesh = np.meshgrid(*axes[::-1], indexing="ij")
        return tuple(m.reshape(-1) for m in mesh[::-1])

    def rows(self, coordinates: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Global addresses of element 0 of the innermost rows of a box, and which rows are inside the tensor.

        Args:
            coordinates: Of the box's first element, one for each dimension; may be negative or too large.

        Returns:
            int64 (rows,) and bool (rows,), in the order of shared memory.
        """
        if self.rank == 1:
            return np.array([self.base], np.int64), np.ones(1, np.bool_)
        address: Any = np.int64(self.base)
        inside: Any = np.bool_(True)
        for dimension, grid in enumerate(self._grid, 1):
            index = grid + coordinates[dimension]
            address = address + index * self.strides[dimension]
            inside = inside & (index >= 0) & (index < self.sizes[dimension])
        return address, inside

    def columns(self, first: int) -> tuple[int, int]:
        """Which elements of the innermost row are inside: from (included) and to (excluded)."""
        low = min(max(0, -first), self.counts[0])
        return low, max(min(self.counts[0], self.sizes[0] - first), low)


@lru_cache(maxsize=512)
def decode(raw: bytes) -> TensorMap:
    """Decodes the first 64 bytes of a tensor map; what is illegal is listed in `problems`."""
    problems: list[str] = []
    unsupported: list[str] = []
    base, flags = struct.unpack_from("<QI", raw)
    rank = (flags >> 4 & 7) + 1
    if rank > 5:
        problems.append(f"rank {rank} is more than 5")
        rank = 5
    kind = flags >> 7 & 15
    if kind not in TYPES:
        problems.append(f"data type {kind} is not known")
    dtype = TYPES.get(kind, TYPES[0])
    tf32 = bool(flags >> 16 & 1)
    if tf32 and kind not in (7, 8):
        problems.append(f"the tf32 bit is set with data type {dtype.name}")
    swizzle, atom = SWIZZLE[flags >> 13 & 3], flags >> 19 & 3
    if atom == 1 and swizzle == "128B":
        swizzle = "128B_atom32B"
    elif atom and swizzle == "128B":
        unsupported.append("the 128B swizzle with 64-byte atoms or flipped 8-byte halves")
    elif atom:
        problems.append(f"swizzle atom {atom} with swizzle {swizzle}")
    if flags & 0xD or flags >> 22:
        problems.append(f"unknown bits {flags & 0xD | flags >> 22 << 22:#x} in bytes 8-11: not a tiled tensor map")
    low = struct.unpack_from("<4I", raw, 12)
    (high,) = struct.unpack_from("<I", raw, 28)
    strides = (0, *((low[i] | (high >> 4 * i & 15) << 32) << 4 for i in range(rank - 1)))
    sizes = tuple(n + 1 for n in struct.unpack_from(f"<{rank}I", raw, 32))
    packed = int.from_bytes(raw[52:55], "little")
    steps = tuple((packed >> 3 * i & 7) + 1 if i or flags >> 11 & 3 else 1 for i in range(rank))
    box = tuple(n + 1 for n in raw[55 : 55 + rank])
    if base % 16:
        problems.append(f"the global address {base:#x} is not a multiple of 16")
    problems += [
        f"box {b} of dimension {i} is not a multiple of its element stride {s}, so its bytes are not defined"
        for i, (b, s) in enumerate(zip(box, steps, strict=True))
        if b % s
    ]
    tensor_map = TensorMap(
        base, dtype, tf32, swizzle, flags >> 11 & 3, bool(flags >> 15 & 1), sizes, strides, box, steps
    )
    problems += _box_problems(tensor_map)
    if tensor_map.interleave:
        unsupported.append("interleaved layouts")
    return TensorMap(**{**_fields(tensor_map), "problems": tuple(problems), "unsupported": tuple(unsupported)})


def _fields(tensor_map: TensorMap) -> dict[str, Any]:
    return {name: getattr(tensor_map, name) for name in TensorMap.__dataclass_fields__}


def _box_problems(tensor_map: TensorMap) -> list[str]:
    """Rules of cuTensorMapEncodeTiled about the box, the type and the swizzle."""
    out = []
    if tensor_map.counts[0] * tensor_map.type.shared_bits % 128:
        out.append(f"the box's innermost row of {tensor_map.row_bytes} bytes is not a multiple of 16")
    span = {"32B": 32, "64B": 64, "128B": 128, "128B_atom32B": 128}.get(tensor_map.swizzle)
    if span and tensor_map.row_bytes > span:
        out.append(
            f"the box's innermost row of {tensor_map.row_bytes} bytes is longer than the {tensor_map.swizzle} swizzle"
        )
    if tensor_map.type.bits < 8 and tensor_map.type.shared_bits == 8 and tensor_map.box[0] != 128:
        out.append(f"type {tensor_map.type.name} needs a box of 128 elements in dimension 0, not {tensor_map.box[0]}")
    return out
