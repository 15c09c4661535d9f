"""Tensor memory: allocation, tcgen05.ld, st and their waits and fences.

Sources: PTX ISA 9.7.16.7 (allocation), 9.7.16.8 (ld, st, wait), 9.7.16.6 (ordering, fences), 9.7.16.2.3 (shapes).
Loads and stores take effect at once; what is asynchronous about them is tracked in shadow state: registers of a
load are pending until wait::ld, columns of a store until wait::st, and what crosses threads needs
fence::before_thread_sync on one side and fence::after_thread_sync on the other.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Address, Immediate, Register, Vector
from ptxemu.registry import Blocked, Execute, at_cta_end, operation

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction, Operand
    from ptxemu.machine import CTA

LANES, COLUMNS = 128, 512
Indices = npt.NDArray[np.int64]
EVENT = itertools.count(1)
REGISTERS_PER = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}
MOST = {"32x32b": 128, "16x64b": 128, "16x128b": 64, "16x256b": 32, "16x32bx2": 128}


@dataclass
class TensorMemory:
    """The tensor memory of a CTA and its shadow state.

    Attributes:
        cells: uint32 (lanes, columns).
        written: Which cells hold anything.
        allocations: Columns of each allocation, by its first column.
        relinquished: No more allocations are allowed.
        mma_event: For each column, when an asynchronous operation last completed a write to it.
        mma_warp: The warp that issued that operation.
        access_event: For each column, when a load or store last touched it.
        access_warp: The warp that did.
        unfenced: Columns that each warp has loaded or stored since its last fence::before_thread_sync.
        unwaited: Columns that each warp has stored since its last wait::st.
        in_flight: For each column, how many issued operations have yet to write it.
    """

    cells: npt.NDArray[np.uint32] = field(default_factory=lambda: np.full((LANES, COLUMNS), 0x7FC0DEAD, np.uint32))
    written: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((LANES, COLUMNS), np.bool_))
    allocations: dict[int, int] = field(default_factory=dict)
    relinquished: bool = False
    mma_event: Indices = field(default_factory=lambda: np.zeros(COLUMNS, np.int64))
    mma_warp: Indices = field(default_factory=lambda: np.full(COLUMNS, -1, np.int64))
    access_event: Indices = field(default_factory=lambda: np.zeros(COLUMNS, np.int64))
    access_warp: Indices = field(default_factory=lambda: np.full(COLUMNS, -1, np.int64))
    unfenced: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    unwaited: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    in_flight: Indices = field(default_factory=lambda: np.zeros(COLUMNS, np.int64))

    def allocated(self, first: int, count: int) -> bool:
        """Whether all of these columns belong to an allocation."""
        return any(base <= first and first + count <= base + n for base, n in self.allocations.items()) or all(
            any(base <= column < base + n for base, n in self.allocations.items())
            for column in range(first, first + count)
        )

    def free_place(self, count: int) -> int | None:
        """First column of a free, aligned run of columns."""
        for first in range(0, COLUMNS - count + 1, count):
            if all(first + count <= base or base + n <= first for base, n in self.allocations.items()):
                return first
        return None


def of(cta: CTA) -> TensorMemory:
    """The tensor memory of a CTA."""
    memory = cta.state.get("tmem")
    if memory is None:
        memory = cta.state["tmem"] = TensorMemory()
    assert isinstance(memory, TensorMemory)
    return memory


def warp_key(ctx: Context) -> int:
    """A number for the executing warp that is unique in the cluster."""
    return ctx.cta.rank * 64 + ctx.warp.index


def split(address: int) -> tuple[int, int]:
    """Lane and column of a tensor memory address."""
    return address >> 16 & 0x3FFF, address & 0xFFFF


# ---- allocation ------------------------------------------------------------------------------------------------------


@operation("tcgen05.alloc", section="9.7.16.7.1", converged=True)
def alloc(ins: Instruction) -> Execute:
    """Allocates columns and writes their address to shared memory; waits while there are too few."""
    target, count = ins.operands
    if not isinstance(target, Address):
        raise UnsupportedInstruction(ins, "a target that is not an address")

    def execute(ctx: Context) -> Blocked | None:
        memory, wanted = of(ctx.cta), ctx.uniform(count) & 0xFFFFFFFF
        if wanted not in (32, 64, 128, 256, 512):
            ctx.finding(
                "tensor_memory", f"tcgen05.alloc of {wanted} columns: not a power of two from 32 to 512", stop=True
            )
        if memory.relinquished:
            ctx.finding("tensor_memory", "tcgen05.alloc after tcgen05.relinquish_alloc_permit", stop=True)
        first = memory.free_place(wanted)
        if first is None:
            return Blocked(
                f"tcgen05.alloc: {wanted} columns wanted, allocated are {dict(memory.allocations)} (first: count)"
            )
        memory.allocations[first] = wanted
        memory.written[:, first : first + wanted] = False
        where = np.array([int(ctx.address(target)[ctx.lane])], np.int64)
        ctx.store(where, np.array([[first]], np.uint32).view(np.uint8), space="shared", proxy="generic")
        return None

    return execute


@operation("tcgen05.dealloc", section="9.7.16.7.1", converged=True)
def dealloc(ins: Instruction) -> Execute:
    """Frees columns."""
    address, count = ins.operands

    def execute(ctx: Context) -> None:
        memory = of(ctx.cta)
        lane, first = split(ctx.uniform(address))
        wanted = ctx.uniform(count) & 0xFFFFFFFF
        if lane or memory.allocations.get(first) != wanted:
            ctx.finding(
                "tensor_memory",
                f"tcgen05.dealloc of columns {first}..{first + wanted - 1}: allocated are {memory.allocations}",
                stop=True,
            )
        if memory.in_flight[first : first + wanted].any():
            ctx.finding("async_race", "tcgen05.dealloc of columns that an asynchronous operation has yet to write")
        del memory.allocations[first]

    return execute


@operation("tcgen05.relinquish_alloc_permit", section="9.7.16.7.1", converged=True)
def relinquish(ins: Instruction) -> Execute:
    """Gives up the right to allocate."""
    del ins

    def execute(ctx: Context) -> None:
        of(ctx.cta).relinquished = True

    return execute


@at_cta_end
def check_leak(cta: CTA) -> None:
    """All columns must have been freed when the CTA ends."""
    memory = cta.state.get("tmem")
    if isinstance(memory, TensorMemory) and memory.allocations:
        left = ", ".join(f"{first}..{first + n - 1}" for first, n in memory.allocations.items())
        cta.machine.finding("tensor_memory", f"CTA ends with columns {left} allocated", cta=cta)


# ---- ld, st ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def positions(shape: str, count: int, split_offset: int = 0) -> tuple[Indices, Indices]:
    """Lanes and columns, relative to the address, of each register of each thread.

    Args:
        shape: "32x32b", "16x64b", "16x128b", "16x256b" or "16x32bx2".
        count: The repetition, xN.
        split_offset: Of 16x32bx2: columns between its halves.

    Returns:
        Two int64 (registers, 32).
    """
    thread, register = np.arange(32)[None, :], np.arange(count * REGISTERS_PER[shape])[:, None]
    if shape == "32x32b":
        lane, column = thread, register
    elif shape == "16x64b":
        lane, column = thread // 4 + 8 * (thread % 2), thread // 2 % 2 + 2 * register
    elif shape == "16x128b":
        lane, column = thread // 4 + 8 * (register % 2), thread % 4 + 4 * (register // 2)
    elif shape == "16x256b":
        lane, column = thread // 4 + 8 * (register // 2 % 2), 2 * (thread % 4) + register % 2 + 8 * (register // 4)
    else:
        lane, column = thread % 16, register + split_offset * (thread // 16)
    lane, column = np.broadcast_arrays(lane, column)
    return np.ascontiguousarray(lane), np.ascontiguousarray(column)


class Form:
    """A tcgen05.ld or st, decoded."""

    def __init__(self, ins: Instruction, address: Operand, data: Operand, rest: tuple[Operand, ...]) -> None:
        self.shape = next((m for m in ins.modifiers if m in REGISTERS_PER), "")
        counts = [int(m[1:]) for m in ins.modifiers if re.fullmatch(r"x\d+", m)]
        if not self.shape or len(counts) != 1 or ins.has("red") or not isinstance(address, Address):
            raise UnsupportedInstruction(ins, "this form")
        count = counts[0]
        if count > MOST[self.shape] or count & (count - 1):
            raise UnsupportedInstruction(ins, f"x{count} of shape {self.shape}")
        self.packed = ins.has("pack::16b") or ins.has("unpack::16b")
        offset = rest[0].value if rest and isinstance(rest[0], Immediate) else 0
        if (self.shape == "16x32bx2") != bool(rest):
            raise UnsupportedInstruction(ins, "the immediate offset of the second half")
        self.lane, column = positions(self.shape, count, 0)
        if self.packed:  # a register holds the low halves of two neighbouring columns
            column = 2 * column
        if self.shape == "16x32bx2":
            column = column + offset * (np.arange(32)[None, :] // 16)
        self.column = column
        self.width = int(column.max()) + (2 if self.packed else 1)
        self.address = address
        items = data.items if isinstance(data, Vector) else (data,)
        self.registers = tuple(item for item in items if isinstance(item, Register))
        if len(items) != len(self.lane):
            raise UnsupportedInstruction(ins, f"{len(items)} registers where {len(self.lane)} are needed")
        self.items = items

    def place(self, ctx: Context, what: str) -> tuple[TensorMemory, int, int]:
        """Tensor memory, first lane and first column; findings for what the warp may not touch."""
        memory = of(ctx.cta)
        lane, column = split(int(ctx.address(self.address)[ctx.lane]) & 0xFFFFFFFF)
        quarter = 32 * (ctx.warp.index % 4)
        allowed = (quarter,) if self.shape == "32x32b" else (quarter, quarter + 16)
        if lane not in allowed:
            ctx.finding(
                "tensor_memory", f"{what} of lane {lane} by warp {ctx.warp.index}, which may touch {allowed}", stop=True
            )
        if column + self.width > COLUMNS:
            ctx.finding(
                "tensor_memory", f"{what} of columns {column}..{column + self.width - 1} of {COLUMNS}", stop=True
            )
        if not memory.allocated(column, self.width):
            ctx.finding(
                "tensor_memory",
                f"{what} of columns {column}..{column + self.width - 1}, allocated are {memory.allocations}",
            )
        return memory, lane, column


def note_access(ctx: Context, memory: TensorMemory, columns: slice, *, store: bool) -> None:
    """Shadow state of a load or store by the executing warp."""
    key = warp_key(ctx)
    late = (memory.mma_event[columns] > ctx.warp.state.get("tcgen05.after", 0)) & (memory.mma_warp[columns] != key)
    if late.any():
        ctx.finding(
            "missing_fence",
            "no tcgen05.fence::after_thread_sync between another thread's asynchronous write and this access",
        )
    if memory.in_flight[columns].any():
        ctx.finding("async_race", "columns that an asynchronous operation has yet to write")
    for other, pending in memory.unwaited.items():
        if other % 4 == key % 4 and pending[columns].any() and (other != key or not store):  # else: other lanes
            ctx.finding("missing_fence", f"columns stored by warp {other % 64} without tcgen05.wait::st")
    memory.access_event[columns], memory.access_warp[columns] = next(EVENT), key
    memory.unfenced.setdefault(key, np.zeros(COLUMNS, np.bool_))[columns] = True
    if store:
        memory.unwaited.setdefault(key, np.zeros(COLUMNS, np.bool_))[columns] = True


@operation("tcgen05.ld", section="9.7.16.8.1", converged=True)
def ld(ins: Instruction) -> Execute:
    """Loads from tensor memory to the registers of a warp, which are pending until wait::ld."""
    form = Form(ins, ins.operands[1], ins.operands[0], ins.operands[2:])

    def execute(ctx: Context) -> None:
        memory, lane, column = form.place(ctx, "tcgen05.ld")
        lanes, columns = lane + form.lane, column + form.column
        note_access(ctx, memory, slice(column, column + form.width), store=False)
        ready = memory.written[lanes, columns]
        values = memory.cells[lanes, columns]
        if form.packed:
            ready = ready & memory.written[lanes, columns + 1]
            values = values & np.uint32(0xFFFF) | memory.cells[lanes, columns + 1] << np.uint32(16)
        if not ready.all():
            register, thread = np.argwhere(~ready)[0]
            where = f"lane {lanes[register, thread]}, column {columns[register, thread]}"
            ctx.finding("uninitialised", f"tcgen05.ld of {where}, which nothing wrote")
        ctx.write_all(form.items, values)
        token = ctx.warp.state.setdefault("tcgen05.loads", object())
        ctx.pend(form.registers, token, "tcgen05.wait::ld")

    return execute


@operation("tcgen05.st", section="9.7.16.8.2", converged=True)
def st(ins: Instruction) -> Execute:
    """Stores registers of a warp to tensor memory."""
    form = Form(ins, ins.operands[0], ins.operands[-1], ins.operands[1:-1])

    def execute(ctx: Context) -> None:
        memory, lane, column = form.place(ctx, "tcgen05.st")
        lanes, columns = lane + form.lane, column + form.column
        note_access(ctx, memory, slice(column, column + form.width), store=True)
        values: Any = ctx.read_all(form.items)
        if form.packed:
            memory.cells[lanes, columns + 1] = values >> np.uint32(16)
            memory.written[lanes, columns + 1] = True
            values = values & np.uint32(0xFFFF)
        memory.cells[lanes, columns] = values
        memory.written[lanes, columns] = True

    return execute


@operation("tcgen05.wait::ld", section="9.7.16.8.3", converged=True)
def wait_ld(ins: Instruction) -> Execute:
    """Ends the pendency of the registers that the warp has loaded."""
    del ins

    def execute(ctx: Context) -> None:
        token = ctx.warp.state.pop("tcgen05.loads", None)
        if token is not None:
            ctx.warp.unpend(token)

    return execute


@operation("tcgen05.wait::st", section="9.7.16.8.3", converged=True)
def wait_st(ins: Instruction) -> Execute:
    """Makes the warp's stores complete."""
    del ins

    def execute(ctx: Context) -> None:
        of(ctx.cta).unwaited.pop(warp_key(ctx), None)

    return execute


@operation("tcgen05.fence::before_thread_sync", section="9.7.16.6.3")
def fence_before(ins: Instruction) -> Execute:
    """Orders the warp's earlier accesses before a synchronisation that follows."""
    del ins

    def execute(ctx: Context) -> None:
        of(ctx.cta).unfenced.pop(warp_key(ctx), None)

    return execute


@operation("tcgen05.fence::after_thread_sync", section="9.7.16.6.3")
def fence_after(ins: Instruction) -> Execute:
    """Orders the warp's later accesses after a synchronisation that went before."""
    del ins

    def execute(ctx: Context) -> None:
        ctx.warp.state["tcgen05.after"] = next(EVENT)

    return execute
