"""A kernel made ready to run: lowered code, constants, parameters and variables at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptxemu import isa, isa_convert, isa_memory, isa_sync, memory, native, registry, tensor
from ptxemu.errors import ArgumentError, UnsupportedInstruction
from ptxemu.instruction import Address, Instruction, Kernel, Operand, Pair, Register, Symbol, Vector
from ptxemu.lowering import LANES, LOCAL_BASE, NO_GUARD, SHARED_BASE, Native, Places, lower
from ptxemu.memory import Region
from ptxemu.registry import Execute

__all__ = ["Program", "isa", "isa_convert", "isa_memory", "isa_sync", "tensor"]  # importing them fills the tables

Argument = int | float | bytes | np.ndarray
_REAL = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
_PARAMETER_ALIGNMENT = 128
_NO_RESULT = frozenset({"bar", "barrier", "nanosleep", "wgmma"})  # whose first operand is read; wgmma adds to it


@dataclass(frozen=True)
class PythonOperation:
    """An instruction that Python executes."""

    execute: Execute
    converged: bool


class Program:
    """A lowered kernel.

    Attributes:
        kernel: What it was made from.
        code: Native instructions, (instructions,).
        touched: Registers of all instructions, from `touch_start` of each on: first word in the register file times 2,
            plus 1 for a result. What is read comes first. Both empty for a kernel in which nothing asynchronous
            writes shared memory.
        operations: By instruction number, those that Python executes.
        places: Where registers, constants and special values lie.
        parameters: All parameters, as one region of memory.
        static_shared: Bytes of shared memory that variables take.
        local: Bytes of local memory of a thread.
        regions: Variables in global and constant memory.
    """

    def __init__(self, kernel: Kernel) -> None:
        """Lowers a kernel.

        Raises:
            UnsupportedInstruction: It holds an instruction that is not implemented.
        """
        self.kernel = kernel
        self.regions: list[Region] = []
        self.parameter_offsets: list[int] = []
        end = 0
        for parameter in kernel.parameters:
            end = -(-end // parameter.align) * parameter.align
            self.parameter_offsets.append(end)
            end += parameter.size
        block = _aligned(max(end, 8), _PARAMETER_ALIGNMENT)
        self.parameters = memory.over("the parameters", block, read_only=True)
        self.symbols, self.static_shared, self.local = self._symbols()
        self.places = Places(kernel, self.symbols, self.parameters.base)
        self.operations: dict[int, PythonOperation] = {}
        self.code = self._code()
        self.constants = self.places.constants()
        self.touched, self.touch_start = self._touched()

    def _symbols(self) -> tuple[dict[str, tuple[str, int]], int, int]:
        kernel = self.kernel
        symbols = {
            p.name: ("param", self.parameters.base + offset)
            for p, offset in zip(kernel.parameters, self.parameter_offsets, strict=True)
        }
        shared, local = 0, 0
        for variable in kernel.variables.values():
            if variable.space == "local":
                local = -(-local // variable.align) * variable.align
                symbols[variable.name] = ("local", LOCAL_BASE + local)
                local += variable.size
            elif variable.space == "shared" and variable.size:
                shared = -(-shared // variable.align) * variable.align
                symbols[variable.name] = ("shared", SHARED_BASE + shared)
                shared += variable.size
            elif variable.space in {"global", "const"}:
                data = _aligned(max(variable.size, 1), max(variable.align, 16))
                data[:] = np.frombuffer((variable.data or b"").ljust(data.size, b"\0"), np.uint8)
                self.regions.append(memory.over(variable.name, data, read_only=variable.space == "const"))
                symbols[variable.name] = (variable.space, self.regions[-1].base)
        for variable in kernel.variables.values():  # dynamic shared memory begins after the static variables
            if variable.space == "shared" and not variable.size:
                symbols[variable.name] = ("shared", SHARED_BASE + -(-shared // variable.align) * variable.align)
        return symbols, shared, -(-local // 16) * 16

    def _code(self) -> np.ndarray:
        numbers = native.operations()
        instructions = self.kernel.instructions
        rows: list[tuple[int, bool, int, int, list[int], int, int, int]] = []
        for k, instruction in enumerate(instructions):
            lowered = self._lower(k, instruction)
            if lowered.name not in numbers:
                raise UnsupportedInstruction(instruction, f"no operation {lowered.name}")
            count = len(lowered.operands)
            if count > native.OPERANDS:
                raise UnsupportedInstruction(instruction, f"{count} operands")
            guard = NO_GUARD if instruction.guard is None else self.places.register(instruction.guard)
            places = [*lowered.operands, *[0] * (native.OPERANDS - count)]
            number, target = numbers[lowered.name], max(instruction.target, 0)
            rows.append((number, instruction.negated, count, guard, places, lowered.offset, lowered.aux, target))
        rows.append((numbers["exit"], False, 0, NO_GUARD, [0] * native.OPERANDS, 0, 0, 0))  # it may end without ret
        code = np.empty(len(rows), native.INSTRUCTION)
        for name, column in zip(native.INSTRUCTION.names or (), zip(*rows, strict=True), strict=True):
            code[name] = column
        return code

    def _touched(self) -> tuple[np.ndarray, np.ndarray]:
        if not any(map(_writes_shared, self.kernel.instructions)):
            return np.empty(0, np.uint32), np.empty(0, np.uint32)
        words = [self._words(register) for register in self.kernel.registers]
        touched, starts = list[int](), [0]
        for instruction in self.kernel.instructions:
            results, sources = _results_and_sources(instruction)
            touched += [word << 1 for index in _indices(sources) for word in words[index]]
            touched += [word << 1 | 1 for index in _indices(results) for word in words[index]]
            starts.append(len(touched))
        starts.append(len(touched))  # the ret behind the last one
        return np.array(touched, np.uint32), np.array(starts, np.uint32)

    def _words(self, register: Register) -> tuple[int, ...]:
        """Where a register begins in the register file, in words: both halves of 128 bits; predicates are left out."""
        first = self.places.register(register) >> 2
        return (first, first + 2 * LANES)[: 2 if register.width == 16 else min(register.width, 1)]

    def _lower(self, number: int, instruction: Instruction) -> Native:
        operation = registry.find(instruction)
        if operation is None:
            return lower(instruction, self.places)
        self.operations[number] = PythonOperation(operation.decode(instruction), operation.converged)
        self._make_places(instruction.operands)
        return Native("python", (), int(operation.converged))

    def _make_places(self, operands: Sequence[Operand]) -> None:
        """Shared addresses that Python operations read have a place of their own too."""
        for operand in operands:
            self._make_places(_parts(operand))
            if isinstance(operand, Symbol) and self.symbols.get(operand.name, ("", 0))[0] == "shared":
                self.places.special_value("shared address", self.symbols[operand.name][1] + operand.offset, 8)

    def set_parameters(self, arguments: Sequence[Argument]) -> None:
        """Writes the parameters: numbers by their declared type, arrays as pointers, bytes as they are.

        Raises:
            ArgumentError: Wrong number, or bytes of the wrong size.
        """
        expected = self.kernel.parameters
        if len(arguments) != len(expected):
            raise ArgumentError("args", f"{len(arguments)} arguments", f"{len(expected)}: {[p.type for p in expected]}")
        for parameter, offset, argument in zip(expected, self.parameter_offsets, arguments, strict=True):
            data = _parameter_bytes(parameter.type, parameter.size, argument)
            if len(data) != parameter.size:
                raise ArgumentError(parameter.name, f"{len(data)} bytes", f"{parameter.size} bytes")
            self.parameters.data[offset : offset + parameter.size] = np.frombuffer(data, np.uint8)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    """The operands that one holds."""
    if isinstance(operand, Vector):
        return operand.items
    if isinstance(operand, Pair):
        return operand.first, operand.second
    return (operand.base, *operand.coordinates) if isinstance(operand, Address) else ()


def _writes_shared(instruction: Instruction) -> bool:
    """Whether the asynchronous proxy writes shared memory: copies to it, and answers of launch control."""
    memories = [m for m in instruction.modifiers if m.startswith("shared") or m == "global"]
    to_shared = instruction.has("bulk") and bool(memories) and memories[0] != "global"
    return to_shared or instruction.opcode == "clusterlaunchcontrol"


def _indices(operands: Sequence[Operand]) -> list[int]:
    """Of the registers that operands hold."""
    found = list[int]()
    for operand in operands:
        if isinstance(operand, Register):
            found.append(operand.index)
        elif parts := _parts(operand):
            found += _indices(parts)
    return found


def _results_and_sources(instruction: Instruction) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """Operands that are only written, and the others."""
    first, rest = instruction.operands[:1], instruction.operands[1:]
    writes = instruction.opcode not in _NO_RESULT or instruction.has("red")
    if writes and first and not isinstance(first[0], Address):
        return first, rest
    return (), instruction.operands


def _parameter_bytes(kind: str, size: int, argument: Argument) -> bytes:
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.ndarray):
        return int(argument.ctypes.data).to_bytes(8, "little")
    if isinstance(argument, float) or (kind in _REAL and not isinstance(argument, int)):
        return np.asarray(argument, _REAL.get(kind, np.float32 if size == 4 else np.float64)).tobytes()
    return (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _aligned(size: int, alignment: int) -> memory.Bytes:
    """Zeroed bytes at an aligned address."""
    room = np.zeros(size + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    return room[start : start + size]
