"""mma.sync: the warp-wide matrix multiply-accumulate on register fragments.

Sources: PTX ISA 9.7.14.5 (fragment layouts of m16n8k4 to m16n8k32 and of m8n8k4 for f64). Sums are those of Hopper,
see `sums`; integers wrap, or saturate with `.satfinite`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Vector
from ptxemu.registry import Execute, operation
from ptxemu.tensor import formats, sums

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction, Operand

Words = npt.NDArray[np.uint32]
Values = npt.NDArray[np.float64]
LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4
DEPTHS = {
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "s8": (16, 32),
    "u8": (16, 32),
    "e4m3": (16, 32),
    "e5m2": (16, 32),
}


def a_values(name: str, registers: Words, depth: int) -> Values:
    """Matrix A (16, depth) from its fragment.

    Args:
        name: Type of the elements.
        registers: uint32 (registers, 32): register i holds row t // 4 + 8 (i % 2) and, with e elements a register,
            columns
            e (t % 4) + {0 .. e - 1} + 4 e (i // 2).
        depth: K.
    """
    out = np.zeros((16, depth))
    for i, lanes in enumerate(_elements(name, registers)):
        per = lanes.shape[1]
        column = per * THREAD[:, None] + np.arange(per) + 4 * per * (i // 2)
        out[(GROUP + 8 * (i % 2))[:, None], column] = lanes
    return out


def b_values(name: str, registers: Words, depth: int) -> Values:
    """Matrix B transposed, (8, depth): register i of its fragment holds column t // 4, rows e (t % 4) + j + 4 e i."""
    out = np.zeros((8, depth))
    for i, lanes in enumerate(_elements(name, registers)):
        per = lanes.shape[1]
        out[GROUP[:, None], per * THREAD[:, None] + np.arange(per) + 4 * per * i] = lanes
    return out


def _elements(name: str, registers: Words) -> Values:
    """Values of the elements in each register: float64 (registers, 32, elements)."""
    return formats.decode_bytes(name, np.ascontiguousarray(registers)[..., None].view(np.uint8))


def c_positions(count: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows and columns of the accumulator's elements, (count, 32) each: four of 32 bits for each 16x8."""
    i = np.arange(count)[:, None]
    return GROUP + 8 * (i // 2 % 2), 2 * THREAD + i % 2


def to_accumulator(name: str, total: npt.NDArray[Any], *, saturate: bool = False) -> Words:
    """Codes of sums in the type of D: float64 or int64 (...) to uint32 (f32, s32) or to uint16 values (f16)."""
    if name == "s32":
        if saturate:
            total = np.clip(total, -(2**31), 2**31 - 1)
        return np.asarray(np.asarray(total, np.float64).astype(np.int64) & 0xFFFFFFFF, np.uint32)
    if name == "f16":
        return np.asarray(total, np.float64).astype(np.float16).view(np.uint16).astype(np.uint32)
    codes = np.asarray(total, np.float64).astype(np.float32).view(np.uint32)
    return np.where(np.isnan(total), np.uint32(0x7FFFFFFF), codes)


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@operation("mma.sync.aligned", section="9.7.14.5.14", converged=True)
def mma(ins: Instruction) -> Execute:
    """D = A B + C for dense m16n8 shapes, and m8n8k4 of f64."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)", ins.name)
    if shape is None or not (ins.has("row") and ins.has("col")):
        raise UnsupportedInstruction(ins, "this shape or layout of mma.sync")
    m, n, depth = map(int, shape.groups())
    types = [t for t in ins.modifiers if t in formats.ELEMENT_BITS or t in ("s32", "f64")]
    if (m, n, depth) == (8, 8, 4) and types == ["f64"] * 4:
        return _mma_f64(ins)
    if (m, n) != (16, 8) or len(types) != 4 or any(q.startswith(("kind", "block_scale", "sp")) for q in ins.modifiers):
        raise UnsupportedInstruction(ins, "this kind, shape or combination of types of mma.sync")
    d_type, a_type, b_type, c_type = types
    for name in (a_type, b_type):
        if depth not in DEPTHS.get(name, ()):
            raise UnsupportedInstruction(ins, f"k{depth} of type {name}")
    if any(q in ("xor", "and") for q in ins.modifiers):
        raise UnsupportedInstruction(ins, "single-bit mma.sync")
    d, a, b, c = (_items(operand) for operand in ins.operands[:4])
    saturate = ins.has("satfinite")

    def execute(ctx: Context) -> None:
        left, right = a_values(a_type, ctx.read_all(a), depth), b_values(b_type, ctx.read_all(b), depth).T  # (16, 8)
        rows, columns = c_positions(4)
        start = _accumulator(c_type, ctx.read_all(c))  # (4, 32)
        if d_type == "s32":
            codes = to_accumulator(d_type, (left @ right)[rows, columns] + start, saturate=saturate)
        else:
            codes = _hopper(left, right, start, (a_type, b_type), d_type)
        if d_type == "f16":
            codes = codes[0::2] | codes[1::2] << np.uint32(16)
        ctx.write_all(d, codes)

    return execute


def _hopper(left: Values, right: Values, start: Values, types: tuple[str, str], d_type: str) -> Words:
    """Sums as Hopper makes them, (4, 32), from A (16, depth) and B (depth, 8).

    ptxas makes products of f16 of those of 8-bit floats: first of the lower two of each four elements along K, then of
    the upper two, each sum rounded to the type of D; the accumulator is added last.
    """
    rows, columns = c_positions(4)
    a, bt = left.astype(np.float32), right.astype(np.float32)
    c = np.zeros((16, 8), np.float32)
    if types[0] not in {"e4m3", "e5m2"}:
        c[rows, columns] = start
        return np.asarray(sums.product(a, bt, c, types, d_type)[rows, columns])
    k = np.arange(a.shape[1])
    for part in (k[k % 4 < 2], k[k % 4 >= 2]):
        codes = sums.product(a[:, part], bt[part], c, types, d_type)
        c = codes.view(np.float32) if d_type == "f32" else codes.astype(np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore"):
        return to_accumulator(d_type, c[rows, columns] + start.astype(np.float32))


def _accumulator(name: str, registers: Words) -> Values:
    """Values of C's fragment, float64 (4, 32)."""
    if name == "f16":
        halves = formats.decode_bytes("f16", np.ascontiguousarray(registers)[..., None].view(np.uint8))  # (2, 32, 2)
        return np.asarray(halves.transpose(0, 2, 1).reshape(4, 32))
    return np.ascontiguousarray(registers).view(np.int32 if name == "s32" else np.float32).astype(np.float64)


def _mma_f64(ins: Instruction) -> Execute:
    d, a, b, c = (_items(operand) for operand in ins.operands[:4])

    def execute(ctx: Context) -> None:
        left, right = np.zeros((8, 4)), np.zeros((8, 4))
        left[GROUP, THREAD] = ctx.read(a[0], np.uint64).view(np.float64)
        right[GROUP, THREAD] = ctx.read(b[0], np.uint64).view(np.float64)
        for i, (target, source) in enumerate(zip(d, c, strict=True)):
            total = ctx.read(source, np.uint64).view(np.float64).tolist()
            for lane, column in enumerate(2 * THREAD + i):
                for x, y in zip(
                    left[lane // 4].tolist(), right[column].tolist(), strict=True
                ):  # one fma after the other
                    total[lane] = sums.fma(x, y, total[lane])
            ctx.write(target, np.array(total).view(np.uint64))

    return execute
