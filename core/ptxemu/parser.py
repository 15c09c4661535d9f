"""Reads PTX text: variables, entries, scoped registers and labels, instructions with their operands and lines."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptxemu.errors import PtxSyntaxError
from ptxemu.instruction import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Operand,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_WIDTHS = {
    "8": "b16",
    "16": "b16",
    "32": "b32",
    "64": "b64",
    "128": "b128",
}  # a register of 8 bits takes the room of 16
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SPACE = re.compile(r"\s+")
_DEBUG = re.compile(r"\.(?:loc|file)\b[^\n]*|\.section\b[^{]*\{[^}]*\}")
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_STATEMENT = re.compile(r"[^;]*;")
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s*")
_OPCODE = re.compile(r"[a-z][\w.:]*", re.IGNORECASE)
_REGISTERS = re.compile(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*);", re.DOTALL)
_HEADER = re.compile(r"\.(version|target|address_size)\s+([^\n]*)")
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    r"(?:\.(v[24])\s+)?\.(\w+)\s+([\w$%]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*?))?\s*;",
    re.DOTALL,
)
_ENTRY = re.compile(r"(?:\.(?:visible|extern|weak)\s+)*\.(entry|func)\b")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b[^,]*?\s)?([\w$%]+)\s*(?:\[(\d+)\])?$", re.DOTALL
)
_INTEGER = re.compile(r"([-+~]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]+)$")
_NAME = re.compile(r"[%$A-Za-z_][\w$.]*$")
_OFFSET = re.compile(r"(.*?[\w$\s])\s*([+-])\s*([-+]?\w+)$", re.DOTALL)


@dataclass
class Module:
    """A parsed PTX module: its kernels by name."""

    target: str
    kernels: dict[str, Kernel]

    def kernel(self, name: str | None = None) -> Kernel:
        """The kernel of a name; without one, the only kernel there is."""
        if name is None and len(self.kernels) == 1:
            return next(iter(self.kernels.values()))
        if name not in self.kernels:
            raise PtxSyntaxError(0, str(name), f"no such kernel among {', '.join(self.kernels) or 'none'}")
        return self.kernels[name]


def parse(text: str) -> Module:
    """Parses a module.

    Raises:
        PtxSyntaxError: What cannot be read, with its line.
    """
    return _Parser(_COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)).module()


def parse_kernel(text: str, name: str | None = None) -> Kernel:
    """Parses a module and gives one kernel of it, see `Module.kernel`."""
    return parse(text).kernel(name)


@dataclass
class _Scope:
    number: int
    registers: dict[str, str] = field(default_factory=dict)  # name as written: type
    labels: dict[str, int] = field(default_factory=dict)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.variables: dict[str, Variable] = {}

    def line(self, position: int | None = None) -> int:
        return bisect.bisect_left(self.newlines, self.position if position is None else position) + 1

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def error(self, what: str, text: str | None = None) -> PtxSyntaxError:
        shown = self.text[self.position : self.position + 80].partition("\n")[0] if text is None else text
        return PtxSyntaxError(self.line(), shown, what)

    def module(self) -> Module:
        target = ""
        kernels: dict[str, Kernel] = {}
        while self.match(_SPACE) or self.position < len(self.text):
            if self.position >= len(self.text):
                break
            if found := self.match(_HEADER):
                target = found.group(2).split(",")[0].strip() if found.group(1) == "target" else target
            elif self.match(_DEBUG):
                pass
            elif found := self.match(_ENTRY):
                kernel = self.function(found.group(1) == "entry")
                if kernel:
                    kernel.target = target
                    kernels[kernel.name] = kernel
            elif found := self.match(_VARIABLE):
                self.declare(found)
            elif (found := self.match(_STATEMENT)) is None or not found.group().lstrip().startswith("."):
                raise self.error("not a directive")
        for kernel in kernels.values():
            kernel.variables = {**self.variables, **kernel.variables}
        return Module(target, kernels)

    def declare(self, found: re.Match[str], into: dict[str, Variable] | None = None) -> None:
        space, align, vector, kind, name, dimensions, initial = found.groups()
        element = (
            int(re.sub(r"\D", "", kind.split("x")[0]) or 8) // 8 * (2 if kind.endswith("x2") and kind[0] != "f" else 1)
        )
        count = functools.reduce(lambda a, b: a * b, (int(d or 0) for d in re.findall(r"\[(\d*)\]", dimensions)), 1)
        size = element * count * (int(vector[1]) if vector else 1)
        data = self.initial(initial, element, size, found.start()) if initial else None
        target = self.variables if into is None else into
        target[name] = Variable(name, space, size, int(align or element), data)

    def initial(self, text: str, element: int, size: int, position: int) -> bytes:
        data = b""
        for item in filter(None, re.split(r"[\s,{}]+", text)):
            value = _number(item)
            if value is None:
                raise PtxSyntaxError(self.line(position), item, "only numbers can initialise a variable")
            data += (value & ((1 << 8 * element) - 1)).to_bytes(element, "little")
        return data.ljust(size, b"\0")

    def function(self, is_entry: bool) -> Kernel | None:
        """An entry; functions are skipped, and calling one is an error."""
        start = self.position
        opening = self.text.find("{", start)
        semicolon = self.text.find(";", start)
        if opening < 0 or (0 <= semicolon < opening):  # a declaration
            self.position = semicolon + 1
            return None
        head = self.text[start:opening]
        self.position = opening + 1
        if not is_entry:
            self.skip_body()
            return None
        found = re.match(r"\s*([\w$%]+)\s*(?:\((.*?)\))?(.*)$", head, re.DOTALL)
        if not found:
            raise self.error("not an entry", head)
        name, parameters, directives = found.groups()
        kernel = Kernel(name, tuple(self.parameters(parameters or "")), (), ())
        for directive, attribute in (("reqntid", "block"), ("reqnctapercluster", "cluster")):
            if numbers := re.search(rf"\.{directive}\s+([\d,\s]+)", directives):
                sizes = [int(n) for n in numbers.group(1).replace(",", " ").split()]
                setattr(kernel, attribute, tuple((sizes + [1, 1])[:3]))
        self.body(kernel)
        return kernel

    def parameters(self, text: str) -> Iterator[Parameter]:
        for item in filter(None, (part.strip() for part in text.split(","))):
            found = _PARAMETER.match(item)
            if not found:
                raise self.error("not a parameter", item)
            align, kind, name, count = found.groups()
            element = int(re.sub(r"\D", "", kind)) // 8
            yield Parameter(name, kind, element * int(count or 1), int(align or element))

    def skip_body(self) -> None:
        depth = 1
        while depth:
            found = re.compile(r"[{}]").search(self.text, self.position)
            if not found:
                raise self.error("a body without end")
            depth += 1 if found.group() == "{" else -1
            self.position = found.end()

    def statements(self) -> Iterator[tuple[str, str, int]]:
        """Kind ("{", "}", "label", "statement"), text and line, to the end of the body."""
        depth = 1
        while True:
            self.match(_SPACE)
            line = self.line()
            here = self.text[self.position : self.position + 1]
            if not here:
                raise self.error("a body without end")
            if here in "{}":
                self.position += 1
                depth += 1 if here == "{" else -1
                if not depth:
                    return
                yield here, here, line
            elif self.match(_DEBUG):
                pass
            elif found := self.match(_LABEL):
                yield "label", found.group(1), line
            elif found := self.match(_STATEMENT):
                yield "statement", found.group(), line
            else:
                raise self.error("a statement without end")

    def body(self, kernel: Kernel) -> None:
        statements = list(self.statements())
        scopes = _label_scopes(statements)
        builder = _Body(scopes[0])
        number = 0
        for kind, text, line in statements:
            if kind == "{":
                number += 1
                builder.scopes.append(scopes[number])
            elif kind == "}":
                builder.scopes.pop()
            elif kind == "statement":
                if text.startswith(".reg"):
                    builder.declare(text, line)
                elif found := _VARIABLE.match(text):
                    self.declare(found, kernel.variables)
                elif text[0] == "." or text == ";":
                    continue
                else:
                    builder.instruction(text[:-1], line)
        kernel.instructions = tuple(builder.instructions)
        kernel.registers = tuple(builder.registers.values())


def _label_scopes(statements: list[tuple[str, str, int]]) -> list[_Scope]:
    """The scopes of a body in order of their braces, with the instruction that each label stands before."""
    scopes = [_Scope(0)]
    stack = [scopes[0]]
    count = 0
    for kind, text, _ in statements:
        if kind == "{":
            scopes.append(_Scope(len(scopes)))
            stack.append(scopes[-1])
        elif kind == "}":
            stack.pop()
        elif kind == "label":
            stack[-1].labels[text] = count
        elif text[0] != "." and text != ";":
            count += 1
    return scopes


class _Body:
    def __init__(self, scope: _Scope) -> None:
        self.scopes = [scope]
        self.instructions: list[Instruction] = []
        self.registers: dict[str, Register] = {}  # by unique name

    def declare(self, text: str, line: int) -> None:
        found = _REGISTERS.match(text)
        if not found:
            raise PtxSyntaxError(line, text, "not a register declaration")
        kind, names = found.groups()
        digits = re.sub(r"\D", "", kind.replace("x2", ""))
        type_ = "pred" if kind == "pred" else _WIDTHS.get("32" if kind in {"f16x2", "bf16x2"} else digits, kind)
        for name in names.split(","):
            ranged = re.match(r"\s*([%\w$]+)<(\d+)>", name)
            if ranged:
                self.scopes[-1].registers.update((f"{ranged.group(1)}{k}", type_) for k in range(int(ranged.group(2))))
            else:
                self.scopes[-1].registers[name.strip()] = type_

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if type_ := scope.registers.get(name):
                unique = f"{name}@{scope.number}" if scope.number else name
                if unique not in self.registers:
                    self.registers[unique] = Register(unique, type_, len(self.registers))
                return self.registers[unique]
        return None

    def label(self, name: str, line: int) -> int:
        for scope in reversed(self.scopes):
            if name in scope.labels:
                return scope.labels[name]
        raise PtxSyntaxError(line, name, "no such label")

    def instruction(self, text: str, line: int) -> None:
        guard, negated, rest = None, False, text
        if found := _GUARD.match(text):
            guard, negated, rest = self.register(found.group(2)), found.group(1) == "!", text[found.end() :]
            if guard is None or guard.type != "pred":
                raise PtxSyntaxError(line, text, f"{found.group(2)} is not a predicate")
        found = _OPCODE.match(rest)
        if not found:
            raise PtxSyntaxError(line, text, "not an instruction")
        opcode, *modifiers = found.group().split(".")
        arguments = rest[found.end() :].strip()
        target = -1
        operands: tuple[Operand, ...] = ()
        try:
            if opcode == "bra":
                target = self.label(arguments, line)
            elif opcode != "call":
                operands = tuple(self.operand(part) for part in _split(arguments)) if arguments else ()
        except ValueError as error:
            raise PtxSyntaxError(line, text, str(error)) from None
        shown = " ".join(text.split())
        self.instructions.append(Instruction(opcode, tuple(modifiers), operands, guard, negated, target, line, shown))

    def operand(self, text: str) -> Operand:
        if register := self.register(text):
            return register
        first = text[:1]
        if text == "_":
            return Sink()
        if first == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1].strip())))
        if first == "[":
            return self.address(text[1:-1].strip())
        if first == "!":
            negated = self.register(text[1:].strip())
            if negated is None:
                raise ValueError(f"{text[1:]} is not a register")
            return Negated(negated)
        if "|" in text:
            left, right = text.split("|")
            return Pair(self.operand(left.strip()), self.operand(right.strip()))
        if (value := _number(text)) is not None:
            return Immediate(value)
        if first == "%":
            if not _NAME.match(text):
                raise ValueError(f"cannot read the operand {text!r}")
            return Special(text)
        if text == "WARP_SZ":
            return Immediate(32)
        base, offset = _offset(text)
        if _NAME.match(base):
            return Symbol(base, offset)
        raise ValueError(f"cannot read the operand {text!r}")

    def address(self, text: str) -> Address:
        parts = _split(text)
        base_text, offset = _offset(parts[0])
        base = self.operand(base_text)
        if isinstance(base, Symbol):
            base, offset = Symbol(base.name), offset + base.offset
        if not isinstance(base, Register | Immediate | Symbol):
            raise ValueError(f"cannot address through {base_text!r}")
        coordinates = tuple(self.operand(part) for part in parts[1:])
        if len(coordinates) == 1 and isinstance(coordinates[0], Vector):
            coordinates = coordinates[0].items
        return Address(base, offset, coordinates)


def _split(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses."""
    if "{" not in text and "[" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return parts


def _offset(text: str) -> tuple[str, int]:
    """`base+offset` in its parts."""
    found = _OFFSET.match(text)
    value = _number(found.group(3)) if found else None
    if not found or value is None:
        return text, 0
    value = value - (1 << 64) if value >> 63 else value
    return found.group(1).strip(), -value if found.group(2) == "-" else value


@functools.lru_cache(maxsize=4096)
def _number(text: str) -> int | None:
    """The 64 bits of a literal; None for anything else."""
    if found := _FLOAT.match(text):
        return int(found.group(2), 16)
    found = _INTEGER.match(text)
    if not found:
        return None
    sign, digits = found.groups()
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXbB"
    value = int(digits, 8 if octal else 0)
    return (-value if sign == "-" else ~value if sign == "~" else value) & ((1 << 64) - 1)
