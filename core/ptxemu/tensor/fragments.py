"""ldmatrix, stmatrix and movmatrix: 8x8, 16x16 and 8x16 matrices between shared memory and registers.

Sources: PTX ISA 9.7.14.5.15 (ldmatrix), 9.7.14.5.16 (stmatrix), 9.7.14.5.17 (movmatrix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Address, Vector
from ptxemu.registry import Execute, operation
from ptxemu.tensor import formats

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction, Operand

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
LANE = np.arange(32)


@dataclass(frozen=True)
class Fragment:
    """How a warp's registers hold one matrix of 16-byte rows.

    Attributes:
        rows: Of the matrix, each one address.
        row: Row of each byte, int (registers, 32 lanes, 4 bytes).
        column: Byte within the row, of the same shape.
    """

    rows: int
    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]

    @property
    def registers(self) -> int:
        """Of one matrix."""
        return int(self.row.shape[0])


def _halves(*, transposed: bool) -> Fragment:
    """8x8 of 16 bits: lane t holds row t // 4, columns 2 (t % 4) and + 1; transposed: the same of the transpose."""
    byte = np.arange(4)
    major, minor = np.broadcast_arrays(LANE[:, None] // 4, LANE[:, None] % 4 * 2 + byte // 2)
    row, element = (minor, major) if transposed else (major, minor)
    return Fragment(8, row[None], (element * 2 + byte % 2)[None])


def _bytes_16x16() -> Fragment:
    """16x16 of 8 bits, transposed: two registers hold rows 4 (t % 4) + {0, 1} and + {2, 3} of column t // 4 (+ 8)."""
    register, byte = np.arange(2)[:, None, None], np.arange(4)
    row, column = np.broadcast_arrays(
        4 * (LANE[None, :, None] % 4) + byte % 2 + 2 * register, LANE[None, :, None] // 4 + 8 * (byte // 2)
    )
    return Fragment(16, row, column)


def _bytes_16x8() -> Fragment:
    """16x8 of 8 bits, transposed: 8 rows of 16 bytes; lane t holds rows 2 (t % 4) + {0, 1} of column t // 4 (+ 8)."""
    byte = np.arange(4)
    row, column = np.broadcast_arrays(2 * (LANE[:, None] % 4) + byte % 2, LANE[:, None] // 4 + 8 * (byte // 2))
    return Fragment(8, row[None], column[None])


def _bytes_8x16() -> Fragment:
    """8x16 of 8 bits: lane t holds row t // 4, columns 4 (t % 4) and the next three."""
    row, column = np.broadcast_arrays(LANE[:, None] // 4, LANE[:, None] % 4 * 4 + np.arange(4))
    return Fragment(8, row[None], column[None])


HALVES, HALVES_TRANSPOSED = _halves(transposed=False), _halves(transposed=True)
BYTES_16X16, BYTES_16X8, BYTES_8X16 = _bytes_16x16(), _bytes_16x8(), _bytes_8x16()


def gather(fragment: Fragment, rows: Bytes) -> Words:
    """Registers of a warp from the rows of its matrices: uint8 (matrices, rows, 16) to uint32 (registers, 32)."""
    data = rows[:, fragment.row, fragment.column]  # (matrices, registers, 32, 4)
    return np.ascontiguousarray(data).view(np.uint32).reshape(-1, 32)


def scatter(fragment: Fragment, registers: Words) -> Bytes:
    """Rows of a warp's matrices from its registers: uint32 (registers, 32) to uint8 (matrices, rows, 16)."""
    data = np.ascontiguousarray(registers).view(np.uint8).reshape(-1, fragment.registers, 32, 4)
    rows = np.zeros((len(data), fragment.rows, 16), np.uint8)
    rows[:, fragment.row, fragment.column] = data
    return rows


def expand(rows: Bytes, packed: str) -> Bytes:
    """Rows of 16 packed elements, "b4x16_p64" in 8 or "b6x16_p32" in 12 bytes, to a byte each: uint8 (..., 16)."""
    if packed == "b4x16_p64":
        low = rows[..., :8]
        return np.stack([low & 15, low >> 4], -1).reshape(rows.shape)
    return formats.unpack_six(np.ascontiguousarray(rows[..., :12]))


def _count(ins: Instruction) -> int:
    counts = [int(m[1:]) for m in ins.modifiers if m in ("x1", "x2", "x4")]
    if len(counts) != 1:
        raise UnsupportedInstruction(ins, "a number of matrices other than x1, x2 and x4")
    return counts[0]


def _shape(ins: Instruction) -> str:
    for shape in ("m8n8", "m16n16", "m8n16", "m16n8"):
        if ins.has(shape):
            return shape
    raise UnsupportedInstruction(ins, "the matrix shape")


def _vector(ins: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise UnsupportedInstruction(ins, f"{len(items)} registers where {count} are needed")
    return items


def _row_addresses(ctx: Context, address: Address, rows: int) -> npt.NDArray[Any]:
    """Addresses given by the first lanes; a finding where one is not a multiple of 16."""
    addresses = ctx.address(address)[:rows]
    if (addresses & 15).any():
        bad = int(addresses[np.flatnonzero(addresses & 15)[0]])
        ctx.finding(
            "misaligned",
            f"row address {bad:#x} of {ctx.instruction.opcode} is not a multiple of 16",
            address=bad,
            stop=True,
        )
    return addresses


@operation("ldmatrix.sync.aligned", section="9.7.14.5.15", converged=True)
def ldmatrix(ins: Instruction) -> Execute:
    """Loads matrices whose row addresses come from the lanes."""
    shape, count = _shape(ins), _count(ins)
    packed = next((m for m in ins.modifiers if m in ("b4x16_p64", "b6x16_p32")), "")
    if shape == "m8n8" and ins.has("b16"):
        fragment = HALVES_TRANSPOSED if ins.has("trans") else HALVES
    elif shape == "m16n16" and ins.has("b8") and ins.has("trans") and count < 4:
        fragment = BYTES_16X16
    elif shape == "m8n16" and packed and not ins.has("trans"):
        fragment = BYTES_8X16
    else:
        raise UnsupportedInstruction(ins, "this shape and type")
    targets = _vector(ins, ins.operands[0], count * fragment.registers)
    source = ins.operands[1]
    if not isinstance(source, Address):
        raise UnsupportedInstruction(ins, "a source that is not an address")

    def execute(ctx: Context) -> None:
        addresses = _row_addresses(ctx, source, count * fragment.rows)
        rows = ctx.load(addresses, 16, space="shared", proxy="generic").reshape(count, fragment.rows, 16)
        ctx.write_all(targets, gather(fragment, expand(rows, packed) if packed else rows))
        ctx.loads_shared(targets, addresses, 16)

    return execute


@operation("stmatrix.sync.aligned", section="9.7.14.5.16", converged=True)
def stmatrix(ins: Instruction) -> Execute:
    """Stores matrices whose row addresses come from the lanes."""
    shape, count = _shape(ins), _count(ins)
    if shape == "m8n8" and ins.has("b16"):
        fragment = HALVES_TRANSPOSED if ins.has("trans") else HALVES
    elif shape == "m16n8" and ins.has("b8") and ins.has("trans"):
        fragment = BYTES_16X8
    else:
        raise UnsupportedInstruction(ins, "this shape and type")
    sources = _vector(ins, ins.operands[1], count)
    target = ins.operands[0]
    if not isinstance(target, Address):
        raise UnsupportedInstruction(ins, "a target that is not an address")

    def execute(ctx: Context) -> None:
        registers = ctx.read_all(sources)
        addresses = _row_addresses(ctx, target, count * fragment.rows)
        ctx.store(addresses, scatter(fragment, registers).reshape(-1, 16), space="shared", proxy="generic")

    return execute


@operation("movmatrix.sync.aligned", section="9.7.14.5.17", converged=True)
def movmatrix(ins: Instruction) -> Execute:
    """Transposes an 8x8 matrix of 16-bit elements across the warp."""
    if not (ins.has("m8n8") and ins.has("trans") and ins.has("b16")):
        raise UnsupportedInstruction(ins, "a form other than m8n8.trans.b16")
    target, source = ins.operands

    def execute(ctx: Context) -> None:
        rows = scatter(HALVES, ctx.read(source)[None])
        ctx.write(target, gather(HALVES_TRANSPOSED, rows)[0])

    return execute
