"""Where operations of the asynchronous and tensor units are registered: those whose semantics are Python on arrays.

Everything else is native, see `isa`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction
    from ptxemu.machine import CTA


@dataclass(frozen=True)
class Blocked:
    """What an execution returns that cannot go on yet, and so had no effect.

    Attributes:
        reason: What it waits for, as a deadlock is to report it.
    """

    reason: str


Execute = Callable[["Context"], Blocked | None]
Decode = Callable[["Instruction"], Execute]


@dataclass(frozen=True)
class Operation:
    """A registered operation.

    Attributes:
        prefix: Leading part of the instruction's name.
        section: Of the PTX ISA that defines it.
        decode: Checks an instruction once and gives what executes it.
        converged: All lanes of the warp that have not exited must take part.
    """

    prefix: str
    section: str
    decode: Decode
    converged: bool = False


OPERATIONS: dict[str, Operation] = {}
CTA_END: list[Callable[[CTA], None]] = []


def operation(prefix: str, *, section: str, converged: bool = False) -> Callable[[Decode], Decode]:
    """Registers how instructions whose name begins with a dotted prefix are decoded; the longest prefix wins."""

    def register(decode: Decode) -> Decode:
        OPERATIONS[prefix] = Operation(prefix, section, decode, converged)
        return decode

    return register


def at_cta_end(check: Callable[[CTA], None]) -> Callable[[CTA], None]:
    """Registers a check that runs when the last warp of a CTA has exited."""
    CTA_END.append(check)
    return check


def find(instruction: Instruction) -> Operation | None:
    """The operation that an instruction belongs to."""
    parts = (instruction.opcode, *instruction.modifiers)
    for length in range(len(parts), 0, -1):
        if found := OPERATIONS.get(".".join(parts[:length])):
            return found
    return None
