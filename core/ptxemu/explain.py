"""Puts into words what the native core found, and what each warp waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptxemu import native
from ptxemu.context import Context
from ptxemu.instruction import Address, Immediate, Instruction, Operand
from ptxemu.mbarrier import WHY
from ptxemu.report import FindingKind

if TYPE_CHECKING:
    from ptxemu.machine import Machine, Warp

_WINDOWS = {0x53: "shared", 0x4C: "local"}
_MOST_LINES = 40


def note(machine: Machine, found: Any, kind: FindingKind, instruction: Instruction | None) -> tuple[str, str]:
    """Detail and region of a finding of the native core."""
    address, detail = int(found.address), int(found.detail)
    region = _region(machine, address, found.warp, instruction)
    size = f"{detail} bytes"
    if kind is FindingKind.PENDING_LOAD:
        return _pending_load(machine, detail), region
    if kind is FindingKind.UNORDERED_READ:
        return f"stored by warp {machine.name_of(detail)}, which has not released it to this one", region
    texts = {
        FindingKind.OUT_OF_BOUNDS: f"{size} at {address:#x}: {_nearest(machine, address, instruction)}",
        FindingKind.MISALIGNED: f"{size} at {address:#x}, which is not a multiple of {max(detail, 1)}",
        FindingKind.READ_ONLY: f"a store of {size} to {region}",
        FindingKind.MBARRIER: f"mbarrier {address:#x}: {WHY.get(detail, 'touched as data')}",
        FindingKind.BARRIER: _barrier(address, detail),
        FindingKind.DIVERGENCE: _divergence(address, detail),
        FindingKind.TRAP: "the kernel gave up",
        FindingKind.UNINITIALISED: "bytes were never written",
        FindingKind.ASYNC_RACE: f"bytes that an operation in flight {'writes' if detail & 2 else 'reads'}",
        FindingKind.PENDING_REGISTER: "a register is touched before the wait that makes its value defined",
    }
    if kind is FindingKind.PENDING_REGISTER and (warp := machine.warps.get(found.warp)):
        names = [
            f"{register.name} is touched before {why}"
            for parts, why in warp.tokens.values()
            for registers, _ in parts
            for register in registers
            if machine.program.places.register_offsets[register.index] == address
        ]
        return "; ".join(names) or texts[kind], ""
    return texts[kind], region


def _pending_load(machine: Machine, lines: int) -> str:
    copy, signal = (_line(machine, pc) for pc in (lines >> 32 & 0xFFFFFFFF, lines & 0xFFFFFFFF))
    told = f": the warp signalled before it used the value, at {signal}" if signal else ", whose value is not used yet"
    return f"the copy at {copy} may overtake this load{told}"


def _line(machine: Machine, pc: int) -> str:
    instructions = machine.program.kernel.instructions
    return f"PTX line {instructions[pc].line} ({instructions[pc].text})" if pc < len(instructions) else ""


def _divergence(members: int, why: int) -> str:
    if why == 0:
        return f"a lane executes it that its own member mask {members:#010x} does not name"
    if why == 1:
        return f"lanes that the member mask {members:#010x} names are excluded by the guard"
    return "all lanes of the warp must execute it, and the guard excludes some"


def _barrier(number: int, detail: int) -> str:
    if detail == -1:
        return "barrier.cluster.arrive twice without a wait in between"
    if detail == -2:
        return "barrier.cluster.wait without an arrive before it"
    return f"barrier {number} with {detail} threads: no such barrier, not whole warps, or another count than its others"


def _region(machine: Machine, address: int, warp: int, instruction: Instruction | None) -> str:
    space = _space(address, instruction)
    if space == "local":
        return "local memory"
    if space == "shared":
        found = machine.warps.get(warp)
        rank = address >> 24 & 0xFF
        ctas = found.cta.cluster.ctas if found else []
        return ctas[rank].shared.name if rank < len(ctas) else "shared memory of no CTA of the cluster"
    region = machine.memory.find(address)
    return region.name if region else ""


def _space(address: int, instruction: Instruction | None) -> str:
    modifiers = " ".join(instruction.modifiers) if instruction else ""
    for space in ("shared", "local"):
        if space in modifiers:
            return space
    if instruction and instruction.opcode in {"mbarrier", "mapa"}:
        return "shared"
    return _WINDOWS.get(address >> 56, "global")


def _nearest(machine: Machine, address: int, instruction: Instruction | None) -> str:
    space = _space(address, instruction)
    if space == "shared":
        return f"a CTA has {machine.shared_bytes} bytes of shared memory from 0x400 on, and none once it has exited"
    if space == "local":
        return f"a thread has {machine.program.local} bytes of local memory from 0x100 on"
    return machine.memory.nearest(address)


def waiting(machine: Machine) -> str:
    """Who waits where, for a deadlock."""
    warps = [(warp, warp.state_struct) for warp in machine.warps.values()]
    lines = [_group(machine, warp, group) for warp, s in warps for group in s.groups[: s.group_count]]
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more"]
    under_way = machine.asynchronous.texts()
    tail = f"\nstill under way: {'; '.join(under_way[:5])}" if under_way else ""
    return "every warp waits:\n" + "\n".join(f"  {line}" for line in lines) + tail


def _group(machine: Machine, warp: Warp, group: Any) -> str:
    who = f"CTA {warp.cta.index} warp {warp.index} lanes {group.mask:#010x}"
    if group.pc >= len(machine.program.kernel.instructions):
        return f"{who} at the end"
    instruction = machine.program.kernel.instructions[group.pc]
    return f"{who} line {instruction.line}: {instruction.text}{_why(machine, warp, group, instruction)}"


def _why(machine: Machine, warp: Warp, group: Any, instruction: Instruction) -> str:
    ctx = Context(machine, warp, instruction, group.mask)
    live = int(warp.state_struct.live)
    if group.pc in machine.program.operations:
        if machine.program.operations[group.pc].converged and group.mask != live:
            return f" -- waits for lanes {live & ~group.mask:#010x} to come here"
        return f" -- {warp.blocked.get(group.pc, 'waits')}"
    if instruction.opcode == "mbarrier":
        return _mbarrier_wait(machine, warp, ctx, instruction)
    if instruction.opcode in {"bar", "barrier"} and not instruction.has("warp"):
        return _barrier_wait(warp, ctx, instruction, group, live)
    if group.mask != live:
        return f" -- waits for lanes {live & ~group.mask:#010x} to come here"
    return ""


def _mbarrier_wait(machine: Machine, warp: Warp, ctx: Context, instruction: Instruction) -> str:
    operand: Operand = instruction.operands[1] if len(instruction.operands) > 1 else instruction.operands[0]
    if not isinstance(operand, Address) or "wait" not in instruction.name:
        return ""
    address = int(ctx.address(operand)[ctx.lane]) & 0xFFFFFFFF
    state = native.core().emu_mbarrier(warp.cta.cluster.struct, address)
    if not state:
        return f" -- mbarrier {address:#x}, which is not initialised"
    b = state.contents
    kind = "parity" if instruction.has("parity") else "state"
    text = f"{b.pending} of {b.expected} arrivals and {b.tx} bytes outstanding"
    return f" -- mbarrier {address:#x} {kind} {ctx.scalar(instruction.operands[2])}: phase {b.phase}, {text}"


def _barrier_wait(warp: Warp, ctx: Context, instruction: Instruction, group: Any, live: int) -> str:
    if group.mask != live:
        return f" -- waits for lanes {live & ~group.mask:#010x} to come here"
    if instruction.has("cluster"):
        c = warp.cta.cluster.struct.contents
        return f" -- barrier of the cluster: phase {c.barrier_phase}, {c.barrier_pending} threads missing"
    first = instruction.operands[1 if instruction.has("red") else 0]
    number = first.value if isinstance(first, Immediate) else ctx.scalar(first)
    b = warp.cta.struct.contents.named[number & 15]
    needed = b.needed or 32 * warp.cta.struct.contents.live_warps
    return f" -- barrier {number}: {b.arrived} of {needed} threads have come"
