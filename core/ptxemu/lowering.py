"""What turns a PTX instruction into a native one: operands become places, modifiers become flags.

The rules, one for each opcode, are in `isa`; they take what they know from a `Form` and leave nothing over: a modifier
that no rule has taken is an error that names the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

LANES = 32
SHARED_BASE = 0x400  # offset of the first byte of shared memory, in each CTA's window
LOCAL_BASE = 0x100
NO_GUARD = 0xFFFFFFFF
CONSTANT, SPECIAL = 1 << 30, 2 << 30  # which of a warp's three arrays an operand lies in; registers are 0
SINK = SPECIAL  # the first 256 bytes there are what nobody reads

_TYPES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64, 128)},
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "bf16": 2,
    "tf32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "f32x2": 8,
    "u16x2": 4,
    "s16x2": 4,
    "pred": 0,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "e2m3x2": 2,
    "e3m2x2": 2,
    "e2m1x2": 1,
    "ue8m0x2": 2,
}


@dataclass(frozen=True)
class Native:
    """A lowered instruction.

    Attributes:
        name: Of the native operation.
        operands: Places: an offset, with CONSTANT or SPECIAL added.
        aux: Flags, their meaning is the operation's.
        offset: Of an address, or more flags.
    """

    name: str
    operands: tuple[int, ...] = ()
    aux: int = 0
    offset: int = 0


Rule = Callable[["Form"], Native]


@dataclass(frozen=True)
class Row:
    """A row of the instruction table: an opcode, where the PTX ISA defines it, and how it is lowered."""

    opcode: str
    section: str
    lower: Rule


TABLE: dict[str, Row] = {}


def rule(opcodes: str, section: str) -> Callable[[Rule], Rule]:
    """Adds a row to the table for each of the opcodes."""

    def register(lower: Rule) -> Rule:
        TABLE.update({opcode: Row(opcode, section, lower) for opcode in opcodes.split()})
        return lower

    return register


def width_of(kind: str) -> int:
    """Bytes of a type, 0 for pred."""
    return _TYPES[kind]


class Places:
    """Where the registers, constants and special values of a kernel lie."""

    def __init__(self, kernel: Kernel, symbols: dict[str, tuple[str, int]], parameter_base: int) -> None:
        """Lays out the registers.

        Args:
            kernel: Whose registers.
            symbols: Name of each variable and parameter to its space and address (in shared memory: its offset).
            parameter_base: Address of the block of all parameters.
        """
        self.kernel = kernel
        self.parameter_base = parameter_base
        self.symbols = symbols
        self.register_offsets: list[int] = []
        end = 0
        for register in kernel.registers:
            size = LANES * register.width if register.width else 4
            end = -(-end // size) * size if size > 4 else end
            self.register_offsets.append(end)
            end += size
        self.register_bytes = -(-end // 64) * 64
        self._constants: dict[tuple[int, int], int] = {}
        self._constant_parts: list[bytes] = []
        self._constant_end = 0
        self.special: dict[tuple[str, int, int], int] = {}  # (name, offset added, width): place without SPECIAL
        self._special_end = 256

    def register(self, register: Register) -> int:
        """Place of a register."""
        return self.register_offsets[register.index]

    def constant(self, value: int, width: int) -> int:
        """Place of a number, repeated for each lane; width 0 for a predicate."""
        value &= (1 << 8 * (width or 4)) - 1
        if (value, width) not in self._constants:
            data = value.to_bytes(width or 4, "little") * (LANES if width else 1)
            data = data.ljust(-(-len(data) // 64) * 64, b"\0")
            self._constants[value, width] = self._constant_end
            self._constant_parts.append(data)
            self._constant_end += len(data)
        return self._constants[value, width] | CONSTANT

    def special_value(self, name: str, added: int, width: int) -> int:
        """Place of a special register, or of the address of a shared or local variable, which differ between warps."""
        key = (name, added, width)
        if key not in self.special:
            self.special[key] = self._special_end
            self._special_end += 256
        return self.special[key] | SPECIAL

    @property
    def special_bytes(self) -> int:
        """Size of the array of special values."""
        return self._special_end

    def constants(self) -> np.ndarray:
        """The array of constants."""
        return np.frombuffer(b"".join(self._constant_parts) or bytes(64), np.uint8).copy()


class Form:
    """An instruction on its way through a rule: hands out its modifiers and the places of its operands."""

    def __init__(self, instruction: Instruction, places: Places) -> None:
        self.instruction = instruction
        self.places = places
        self.left = list(instruction.modifiers)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """As written."""
        return self.instruction.operands

    def unsupported(self, what: str) -> UnsupportedInstruction:
        """The error to raise."""
        return UnsupportedInstruction(self.instruction, what)

    # modifiers
    def flag(self, name: str, value: int = 1) -> int:
        """The value if a modifier is there, else 0."""
        if name in self.left:
            self.left.remove(name)
            return value
        return 0

    def one_of(self, names: Iterable[str], default: str | None = None) -> str:
        """Which of some modifiers is there."""
        for name in names:
            if self.flag(name):
                return name
        if default is None:
            raise self.unsupported(f"one of {', '.join(names)} is needed")
        return default

    def ignore(self, *names: str) -> None:
        """Takes modifiers that make no difference here."""
        for name in names:
            self.flag(name)

    def ignore_prefix(self, *prefixes: str) -> None:
        """Takes modifiers that make no difference here, by how they begin."""
        self.left = [name for name in self.left if not name.startswith(prefixes)]

    def type(self, allowed: str = "") -> str:
        """The last modifier, which is a type; `allowed` lists the ones there are."""
        kind = self.left.pop() if self.left else ""
        if kind not in (allowed.split() if allowed else _TYPES):
            raise self.unsupported(f"type {kind or 'missing'}")
        return kind

    def done(self) -> None:
        """Raises UnsupportedInstruction when a modifier is left over."""
        if self.left:
            raise self.unsupported("." + ".".join(self.left))

    # operands
    def count(self, *allowed: int) -> int:
        """Number of operands."""
        if len(self.operands) not in allowed:
            raise self.unsupported(f"{len(self.operands)} operands")
        return len(self.operands)

    def at(self, k: int) -> Operand:
        """An operand, or an error where there is none."""
        if k >= len(self.operands):
            raise self.unsupported(f"{len(self.operands)} operands")
        return self.operands[k]

    def place(self, operand: Operand, width: int, *, wider: bool = False) -> int:
        """Where an operand lies that is read with a width; `wider` registers are read in their low bytes."""
        if isinstance(operand, Register):
            if (
                operand.width != width
                and not (wider and operand.width >= width)
                and not (width == 1 and operand.width == 2)
            ):
                raise self.unsupported(f"{operand.name} of {operand.type} for {8 * width} bits")
            return self.places.register(operand)
        if isinstance(operand, Immediate):
            return self.places.constant(operand.value, width)
        if isinstance(operand, Special):
            return self.places.special_value(operand.name, 0, width)
        if isinstance(operand, Symbol):
            return self.symbol(operand, width)
        raise self.unsupported(f"operand {operand}")

    def symbol(self, symbol: Symbol, width: int) -> int:
        """Where the address of a variable lies."""
        if symbol.name not in self.places.symbols:
            raise self.unsupported(f"unknown name {symbol.name}")
        space, address = self.places.symbols[symbol.name]
        if space == "shared":
            return self.places.special_value("shared address", address + symbol.offset, width)
        return self.places.constant(address + symbol.offset, width)

    def destination(self, operand: Operand, width: int, *, wider: bool = False) -> int:
        """Where a result goes."""
        if isinstance(operand, Sink):
            return SINK
        if not isinstance(operand, Register):
            raise self.unsupported(f"destination {operand}")
        return self.place(operand, width, wider=wider)

    def predicate(self, operand: Operand) -> tuple[int, bool]:
        """Where a predicate lies and whether it is negated."""
        if isinstance(operand, Negated):
            return self.place(operand.register, 0), True
        if isinstance(operand, Immediate):
            return self.places.constant(0xFFFFFFFF if operand.value else 0, 0), False
        return self.place(operand, 0), False

    def pair(self, operand: Operand, first: int, second: int) -> tuple[int, int]:
        """`d|p`, of the given widths; what is not there goes nowhere."""
        if isinstance(operand, Pair):
            return self.destination(operand.first, first), self.destination(operand.second, second)
        return self.destination(operand, first), SINK

    def same(self, kind: str, *, sources: int | None = None) -> tuple[int, ...]:
        """Destination and sources, all of one type."""
        width = width_of(kind)
        self.count(*((sources + 1,) if sources is not None else range(2, 6)))
        head, *tail = self.operands
        return self.destination(head, width), *(self.place(operand, width) for operand in tail)

    def items(self, operand: Operand) -> tuple[Operand, ...]:
        """The members of a vector; another operand is its own only member."""
        return operand.items if isinstance(operand, Vector) else (operand,)

    def halves(self, operand: Operand, *, destination: bool) -> tuple[int, int]:
        """Both 64-bit halves of a 128-bit register, or of a vector of two."""
        if isinstance(operand, Register) and operand.width == 16:
            low = self.places.register(operand)
            return low, low + 8 * LANES
        items = self.items(operand)
        if len(items) != 2:
            raise self.unsupported(f"operand {operand} for 128 bits")
        low, high = (self.destination(x, 8) if destination else self.place(x, 8) for x in items)
        return low, high

    def address(self, operand: Operand, *, narrow: bool | None = None) -> tuple[int, int, bool]:
        """Place of the base, offset, and whether the address has 32 bits (then `narrow` may be left open)."""
        if not isinstance(operand, Address):
            raise self.unsupported(f"address {operand}")
        base = operand.base
        is_narrow = base.width == 4 if isinstance(base, Register) else bool(narrow)
        return self.place(base, 4 if is_narrow else 8), operand.offset, is_narrow


def lower(instruction: Instruction, places: Places) -> Native:
    """Lowers an instruction by its row of the table.

    Raises:
        UnsupportedInstruction: No row, or a modifier, type or operand that its rule does not know.
    """
    row = TABLE.get(instruction.opcode)
    form = Form(instruction, places)
    if row is None:
        raise form.unsupported(f"opcode {instruction.opcode}")
    try:
        native = row.lower(form)
    except ValueError:  # too few or too many operands to unpack
        raise form.unsupported(f"{len(form.operands)} operands") from None
    form.done()
    return native
