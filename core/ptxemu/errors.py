"""Errors that stop ptxemu itself; what a kernel does wrong is not an error but a finding, see `report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptxemu.instruction import Instruction


class PtxemuError(Exception):
    """Base of all errors that ptxemu raises on purpose; the command line prints them as one line."""


class PtxSyntaxError(PtxemuError):
    """The PTX text cannot be read.

    Args:
        line: Where, counted from 1.
        text: The statement.
        what: What is wrong with it.
    """

    def __init__(self, line: int, text: str, what: str) -> None:
        super().__init__(f"PTX line {line}: {what}: {text}")
        self.line = line


class UnsupportedInstruction(PtxemuError, NotImplementedError):  # noqa: N818  (it names a thing, like NotImplementedError)
    """An instruction, or a modifier or operand of one, that the emulator does not implement.

    Args:
        instruction: Which one; the message names its line.
        what: The part that is not implemented.
    """

    def __init__(self, instruction: Instruction, what: str) -> None:
        super().__init__(f"PTX line {instruction.line}: not supported: {what}, in {instruction.text}")
        self.instruction = instruction
        self.what = what


class ArgumentError(PtxemuError, ValueError):
    """What was passed does not fit the kernel.

    Args:
        argument: Name of the offending argument.
        got: What came, in words.
        expected: What would have been accepted.
    """

    def __init__(self, argument: str, got: object, expected: str) -> None:
        super().__init__(f"{argument}: got {got}, expected {expected}")
        self.argument = argument


class BuildError(PtxemuError):
    """The native part cannot be built: no C compiler, no wheel to link, or the compiler failed.

    Args:
        what: What was to be built.
        why: What went wrong, and what to do about it.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"cannot build {what}: {why}")


class CaptureError(PtxemuError):
    """The launches of a compiled function cannot be captured."""


class FaultError(PtxemuError):
    """Raised by `Report.raise_for_findings`: the kernel did something wrong."""
