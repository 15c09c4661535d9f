"""What the parser makes of PTX: instructions with typed operands, kernels and variables."""

from __future__ import annotations

from dataclasses import dataclass, field

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True, slots=True)
class Register:
    """A virtual register.

    Attributes:
        name: As written, with "@scope" appended when it was declared inside a block of inline assembly.
        type: "pred", "b16", "b32", "b64" or "b128", whatever the kind of number it was declared for.
        index: Number among the registers of its kernel.
        width: Bytes of one lane; 0 for a predicate.
    """

    name: str
    type: str
    index: int
    width: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", 0 if self.type == "pred" else BYTES[self.type[1:]])


@dataclass(frozen=True, slots=True)
class Immediate:
    """A literal.

    Attributes:
        value: Its 64 bits: two's complement for integers, the bits of the float for 0f (low 32) and 0d.
    """

    value: int


@dataclass(frozen=True, slots=True)
class Special:
    """A special register, "%tid.x"."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable or of a parameter.

    Attributes:
        name: Of the variable.
        offset: Bytes added to it.
    """

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    """Operands in braces."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """Operands in brackets: `[base+offset]`, or `[base, {coordinates}]` of a tensor copy."""

    base: Register | Immediate | Symbol
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two destinations, `d|p`."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """A predicate operand with `!`."""

    register: Register


@dataclass(frozen=True, slots=True)
class Sink:
    """The destination `_`."""


Operand = Register | Immediate | Special | Symbol | Vector | Address | Pair | Negated | Sink


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        opcode: What stands before the first dot, "cp".
        modifiers: What stands between dots after it, ("async", "bulk").
        operands: In the order written; the label of a branch is not among them.
        guard: Predicate that decides which lanes take part.
        negated: The guard is written `@!p`.
        target: For a branch: the number of the instruction it goes to.
        line: Of the PTX text, from 1.
        text: As written.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    target: int
    line: int
    text: str

    @property
    def name(self) -> str:
        """Opcode with all its modifiers."""
        return ".".join((self.opcode, *self.modifiers))

    def has(self, modifier: str) -> bool:
        """Whether a modifier is there."""
        return modifier in self.modifiers


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel; `type` is what it was declared as, "b8" for arrays of bytes."""

    name: str
    type: str
    size: int
    align: int


@dataclass(frozen=True)
class Variable:
    """A variable in a state space.

    Attributes:
        name: As written.
        space: "shared", "global", "const" or "local".
        size: Bytes; 0 for dynamic shared memory.
        align: Bytes.
        data: Initial bytes, or None where there is no initialiser.
    """

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None


@dataclass
class Kernel:
    """A `.entry` of a module.

    Attributes:
        name: Of the entry.
        parameters: In order.
        instructions: Labels resolved.
        registers: All of them, by index.
        variables: Of the module and of the kernel, by name.
        block: `.reqntid`, if given.
        cluster: `.reqnctapercluster`, if given.
        target: Architecture, "sm_90a".
    """

    name: str
    parameters: tuple[Parameter, ...]
    instructions: tuple[Instruction, ...]
    registers: tuple[Register, ...]
    variables: dict[str, Variable] = field(default_factory=dict)
    block: tuple[int, int, int] | None = None
    cluster: tuple[int, int, int] | None = None
    target: str = ""
