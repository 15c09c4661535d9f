"""What an operation that Python executes sees of the machine: see `registry`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ptxemu import native
from ptxemu.access import Accessor, Hold
from ptxemu.instruction import Address, Immediate, Negated, Operand, Register, Sink, Special, Symbol
from ptxemu.mbarrier import MBarrier
from ptxemu.memory import Region
from ptxemu.policy import AsyncOp

if TYPE_CHECKING:
    from ptxemu.instruction import Instruction
    from ptxemu.machine import CTA, Cluster, Machine, Warp

Lanes = NDArray[Any]
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class Context:
    """One execution of an instruction by lanes of a warp.

    A deferred step may keep it, but registers are read when the instruction is issued.

    Attributes:
        machine: Of the launch.
        warp: That executes.
        instruction: That is executed.
        mask: The lanes that take part, one bit each; at least one.
    """

    machine: Machine
    warp: Warp
    instruction: Instruction
    mask: int

    @property
    def cta(self) -> CTA:
        """The warp's."""
        return self.warp.cta

    @property
    def cluster(self) -> Cluster:
        """The warp's."""
        return self.warp.cta.cluster

    @property
    def lanes(self) -> NDArray[np.intp]:
        """Numbers of the lanes that take part."""
        return np.flatnonzero(self.mask >> np.arange(32) & 1)

    @property
    def lane(self) -> int:
        """The first of them."""
        return (self.mask & -self.mask).bit_length() - 1

    # registers
    def read(self, operand: Operand, dtype: DTypeLike = np.uint32) -> Lanes:
        """An operand of all 32 lanes: its bits as `dtype`, zero-extended or truncated where the widths differ.

        Args:
            operand: A register, number, special register or symbol.
            dtype: np.bool_ for a predicate.
        """
        wanted = np.dtype(dtype)
        if isinstance(operand, Negated):
            return ~self.read(operand.register, np.bool_)
        if isinstance(operand, Register):
            self._check_pending(operand)
            if not operand.width:
                return self.warp.predicate(operand).astype(wanted)
            if operand.width == 16:
                raise TypeError(f"{operand.name} has 128 bits: read128")
            bits = self.warp.registers(operand)
            if operand.width == wanted.itemsize:
                return bits.view(wanted).copy()
        elif isinstance(operand, Immediate):
            if wanted == np.bool_:
                return np.full(32, bool(operand.value))
            bits = np.full(32, operand.value & _MASK64, np.uint64)
        elif isinstance(operand, Special):
            bits = self.warp.special(operand.name).astype(np.uint64)
        elif isinstance(operand, Symbol):
            bits = np.full(32, self.machine.address_of(operand, self.warp), np.uint64)
        else:
            raise TypeError(f"{operand} has no value")
        same = np.dtype(f"u{wanted.itemsize}")
        return bits.astype(same).view(wanted)

    def read128(self, operand: Operand) -> NDArray[np.uint64]:
        """A 128-bit register of all lanes, (32, 2): low words first."""
        if not isinstance(operand, Register) or operand.width != 16:
            raise TypeError(f"{operand} has not 128 bits")
        return np.ascontiguousarray(self.warp.wide(operand).T)

    def scalar(self, operand: Operand) -> int:
        """The unsigned value of an operand in the first lane that takes part."""
        if isinstance(operand, Immediate):
            return operand.value
        if not isinstance(operand, Register):
            return int(self.read(operand, np.uint64)[self.lane])
        self._check_pending(operand)
        if not operand.width:
            return self.warp.predicate_word(operand) >> self.lane & 1
        return int(self.warp.registers(operand)[self.lane])

    def uniform(self, operand: Operand) -> int:
        """As `scalar`; lanes that disagree are a finding."""
        first = self.scalar(operand)
        if isinstance(operand, Register):
            if not operand.width:
                differs = self.warp.predicate_word(operand) & self.mask not in {0, self.mask}
            else:
                values = self.warp.registers(operand)
                differs = bool((values != values[self.lane]).any()) and bool((values[self.lanes] != first).any())
            if differs:
                values = self.read(operand, np.uint64)[self.lanes]
                self.finding("not_uniform", f"{operand.name} differs between lanes: {values.tolist()}")
        return first

    def write(self, operand: Operand, values: object, lanes: int | None = None) -> None:
        """Writes a register: (32,) values or one for all; only to the lanes that take part, or to those of a mask."""
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise TypeError(f"{operand} cannot be written")
        self._check_pending(operand)
        self.warp.write(operand, values, self.mask if lanes is None else lanes)

    def read_all(self, operands: Sequence[Operand]) -> NDArray[np.uint32]:
        """Many 32-bit registers at once: uint32 (registers, 32)."""
        registers = [o for o in operands if isinstance(o, Register) and o.width == 4]
        if len(registers) == len(operands):
            if self.warp.tokens:
                for register in registers:
                    self._check_pending(register)
            return self.warp.matrix(tuple([r.index for r in registers]))
        return np.stack([self.read(operand) for operand in operands]).astype(np.uint32, copy=False)

    def write_all(self, operands: Sequence[Operand], values: NDArray[np.uint32]) -> None:
        """Writes many 32-bit registers at once: uint32 (registers, 32); only the lanes that take part."""
        registers = [o for o in operands if isinstance(o, Register) and o.width == 4]
        if self.mask == 0xFFFFFFFF and len(registers) == len(operands):
            if self.warp.tokens:
                for register in registers:
                    self._check_pending(register)
            self.warp.set_matrix(tuple(r.index for r in registers), values)
            return
        for operand, lanes in zip(operands, values, strict=True):
            self.write(operand, lanes)

    def single(self, lane: int) -> Context:
        """The same execution, by one of the lanes alone."""
        return replace(self, mask=1 << lane)

    def address(self, operand: Operand) -> NDArray[np.uint64]:
        """Base plus offset of an address operand, for all 32 lanes; shared addresses wrap at 32 bits."""
        if not isinstance(operand, Address):
            raise TypeError(f"{operand} is no address")
        base: NDArray[np.uint64] = self.read(operand.base, np.uint64)
        narrow = isinstance(operand.base, Register) and operand.base.width == 4
        total = base + np.uint64(operand.offset & _MASK64)
        return total & np.uint64(0xFFFFFFFF) if narrow else total

    def pend(self, registers: Iterable[Operand], token: Hashable, why: str) -> None:
        """Makes registers untouchable for other instructions until `warp.unpend(token)`."""
        self.warp.pend([r for r in registers if isinstance(r, Register)], token, why)

    def _check_pending(self, register: Register) -> None:
        if why := self.warp.pending_reason(register):
            self.finding("pending_register", f"{register.name} is touched before {why}")

    # findings
    def finding(self, kind: str, text: str, *, address: int | None = None, stop: bool = False) -> None:
        """Reports what is wrong, once for each line and kind; `stop` ends the launch."""
        self.machine.finding(
            kind, text, instruction=self.instruction, warp=self.warp, lanes=self.mask, address=address, stop=stop
        )

    # asynchronous work
    def defer(
        self, kind: str, steps: Sequence[Callable[[], None]], *, queue: Hashable | None = None, text: str = ""
    ) -> AsyncOp:
        """Starts an operation that completes when the policy says; see `policy`."""
        shown = text or f"line {self.instruction.line}: {self.instruction.text}"
        op = AsyncOp(kind, steps, shown, owner=self.cluster)
        self.machine.asynchronous.start(op, queue)
        return op

    def mbarrier(self, address: int) -> MBarrier:
        """The mbarrier at a shared::cluster address; one that is not initialised ends the launch."""
        return self.machine.mbarrier(int(address), self)

    # memory
    @property
    def _accessor(self) -> Accessor:
        return Accessor(self.machine, self.warp, self.instruction, self.mask)

    def load(self, addresses: object, width: int, *, space: str, proxy: str) -> NDArray[np.uint8]:
        """Reads `width` bytes at each of some addresses, checked.

        Args:
            addresses: Integers of any shape.
            width: Contiguous bytes at each.
            space: "shared", "global" or "generic".
            proxy: "async" or "generic".

        Returns:
            uint8 (*addresses.shape, width).
        """
        return self._accessor.load(np.asarray(addresses), width, space, proxy)

    def store(
        self, addresses: object, data: NDArray[np.uint8], *, space: str, proxy: str, hold: Hold | None = None
    ) -> None:
        """Writes data, uint8 (*addresses.shape, width), checked; see `load`. `hold`: the operation's own."""
        self._accessor.store(np.asarray(addresses), data, space, proxy, own=hold is not None)

    def hold(self, addresses: object, width: int, access: str, *, space: str) -> Hold:
        """Marks bytes as being read ("read") or written ("write") by something in flight, until it is released."""
        return self._accessor.hold(np.asarray(addresses), width, access, space)

    def overwrite(self, addresses: object, width: int) -> None:
        """Says that the asynchronous proxy is to write these bytes of shared memory: no load of them may be pending."""
        flat = np.ascontiguousarray(addresses, np.int64).reshape(-1)
        core, m = native.core(), self.machine.native
        core.emu_overwrite(m, self.warp.struct, m.contents.event_pc, flat.ctypes.data, flat.size, width)

    def loads_shared(self, targets: Iterable[Operand], addresses: Lanes, width: int) -> None:
        """Says that registers will hold what lies in shared memory at up to 32 addresses; see native/order.c."""
        numbers = tuple([t.index for t in targets if isinstance(t, Register)])
        slots, lanes = self.warp.slots(numbers).astype(np.uint32), np.zeros(32, np.uint64)
        lanes[: addresses.size] = addresses
        core, m, mask = native.core(), self.machine.native, (1 << addresses.size) - 1
        place = (m.contents.event_pc, mask, lanes.ctypes.data, width, slots.ctypes.data, slots.size)
        core.emu_load_issued(m, self.warp.struct, *place)

    def region(self, address: int, space: str) -> Region | None:
        """The region that an address lies in."""
        return self._accessor.find(int(address), space)


__all__ = ["Context", "Hold", "MBarrier"]
