"""Matrix operands in shared memory: from a descriptor to numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ptxemu.instruction import Immediate, Register
from ptxemu.tensor import formats, layouts

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Operand

Values = npt.NDArray[np.float64]


@lru_cache(maxsize=8192)
def chunk_addresses(
    bits: int, blackwell: bool, mn_major: bool, rows: int, depth: int, element_bits: int
) -> npt.NDArray[np.int64]:
    """Offsets in the CTA's shared memory of the 16-byte chunks of an operand.

    Args:
        bits: The descriptor.
        blackwell: It is one of tcgen05, not of wgmma.
        mn_major: Its rows run along M or N instead of K.
        rows: Of M or N.
        depth: Of K.
        element_bits: Of an element in shared memory, padding included.

    Returns:
        int64 (rows, depth * element_bits / 128), or (depth, rows * element_bits / 128) where it is MN-major.
    """
    descriptor = layouts.blackwell_descriptor(bits) if blackwell else layouts.hopper_descriptor(bits)
    if mn_major:
        addresses = layouts.mn_major_chunks(descriptor, rows * element_bits // 8, depth)
    else:
        addresses = layouts.k_major_chunks(descriptor, rows, depth * element_bits // 8)
    addresses.setflags(write=False)
    return addresses


def decode_chunks(name: str, data: npt.NDArray[np.uint8], *, mn_major: bool, padded: bool = False) -> Values:
    """Numbers of an operand from its chunks: uint8 (lines, chunks, 16) to float64 (rows, depth)."""
    lines = data.reshape(len(data), -1)
    values = formats.decode_padded(name, lines) if padded else formats.decode_bytes(name, lines)
    return values.T if mn_major else values


def flag(ctx: Context, operand: Operand) -> bool:
    """A predicate operand of an instruction of which one value counts for the warp."""
    return bool(
        ctx.scalar(operand) if isinstance(operand, Immediate | Register) else ctx.read(operand, np.bool_)[ctx.lane]
    )


def sign(operand: Operand) -> int:
    """An immediate 1 or -1 that negates an operand."""
    value = operand.value if isinstance(operand, Immediate) else 1
    return -1 if value >> 63 & 1 else 1
