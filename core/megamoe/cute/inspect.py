"""What the compiler made of a kernel: registers, memory and instructions, read from its cubin.

Registers, stack and shared memory come from the ELF file itself; instructions need nvdisasm, from the wheel
nvidia-cuda-nvdisasm or a CUDA toolkit.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_SHT_SYMTAB = 2
_EIFMT_SVAL = 4  # an attribute of .nv.info with a payload of the size given in its header
_EIATTR_FRAME_SIZE = 0x11
_EIATTR_REGCOUNT = 0x2F
_ENCODED = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
_SECOND_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_SHARED_LOADS = ("LDS", "LDSM")
_BULK_COPIES = ("UBLKCP", "UTMALDG")  # into shared memory
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)[\w.]*")
# Instructions that a count is worth showing of, by the column they go to.
GROUPS: Mapping[str, frozenset[str]] = {
    "global": frozenset({"LDG", "STG", "RED", "ATOMG", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG"}),
    "shared": frozenset({"LDS", "STS", "LDSM", "STSM", "ATOMS", "UBLKRED"}),
    "local": frozenset({"LDL", "STL"}),
    "matrix": frozenset({"HMMA", "HGMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "OMMA", "QMMA"}),
    "special": frozenset({"MUFU"}),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin.

    Attributes:
        name: Its symbol.
        registers: Per thread.
        stack: Bytes of local memory a thread: spills and indexed arrays.
        shared: Bytes of static shared memory.
        instructions: How many of each there are in the code, by mnemonic; None where nvdisasm was not found.
        early_copies: As `early_copies` finds them; empty where nvdisasm was not found.
    """

    name: str
    registers: int
    stack: int
    shared: int
    instructions: Mapping[str, int] | None
    early_copies: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        """Number of instructions in the code."""
        return None if self.instructions is None else sum(self.instructions.values())

    def count(self, group: str) -> int | None:
        """Number of instructions of one of GROUPS."""
        if self.instructions is None:
            return None
        return sum(n for name, n in self.instructions.items() if name in GROUPS[group])

    @property
    def spills(self) -> bool:
        """Whether a thread touches local memory."""
        return self.stack > 0 or bool(self.count("local"))

    @property
    def faults(self) -> list[str]:
        """What no kernel may have."""
        early = "before its warp's loads of shared memory are there"
        copies = [f"a bulk copy at {at} {early}" for at in self.early_copies]
        return ([f"{self.stack} bytes of local memory"] if self.spills else []) + copies


def kernels(cubin: bytes) -> list[Kernel]:
    """The kernels of a cubin."""
    sections = {name: cubin[offset : offset + size] for name, _, offset, size, _ in _headers(cubin)}
    sizes = {name: size for name, _, _, size, _ in _headers(cubin)}  # shared memory takes no room in the file
    info = sections.get(".nv.info", b"")
    registers, stack = _attribute(info, _EIATTR_REGCOUNT), _attribute(info, _EIATTR_FRAME_SIZE)
    code = disassembly(cubin)
    instructions = None if code is None else _instructions(code)
    early = {} if code is None else early_copies(code)
    found = []
    for index, name in sorted(_symbols(cubin, sections).items()):
        if f".text.{name}" in sections and index in registers:
            counts = None if instructions is None else instructions.get(name, Counter())
            shared = sizes.get(f".nv.shared.{name}", 0)
            copies = tuple(early.get(name, ()))
            found.append(Kernel(name, registers[index], stack.get(index, 0), shared, counts, copies))
    return found


def _headers(cubin: bytes) -> Iterator[tuple[str, int, int, int, int]]:
    """Name, type, offset, size and link of each section of a little-endian ELF64 file."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    raw = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(count)]
    base = raw[names][4]
    for name, kind, _, _, offset, length, link, _, _, _ in raw:
        end = cubin.index(b"\0", base + name)
        yield cubin[base + name : end].decode(), kind, offset, length, link


def _symbols(cubin: bytes, sections: Mapping[str, bytes]) -> dict[int, str]:
    headers = list(_headers(cubin))
    for _, kind, offset, length, link in headers:
        if kind == _SHT_SYMTAB:
            strings = sections[headers[link][0]]
            starts = (struct.unpack_from("<I", cubin, offset + i)[0] for i in range(0, length, 24))
            return {i: strings[s : strings.index(b"\0", s)].decode() for i, s in enumerate(starts)}
    return {}


def _attribute(info: bytes, tag: int) -> dict[int, int]:
    """The values of one attribute of .nv.info, by symbol number."""
    values, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _EIFMT_SVAL:
            if attribute == tag:
                symbol, value = struct.unpack_from("<II", info, at)
                values[symbol] = value
            at += size
    return values


def disassembly(cubin: bytes) -> str | None:
    """SASS of a cubin, with its encoding, or None where there is no nvdisasm."""
    tool = nvdisasm()
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@functools.cache
def nvdisasm() -> str | None:
    """Path of nvdisasm: on PATH, in the wheel, or in the toolkit that CUDA_HOME names."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) / "cu13" / "bin" for p in (spec.submodule_search_locations or ())] if spec else []
    folders += [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((str(f / "nvdisasm") for f in folders if (f / "nvdisasm").is_file()), None)


def _instructions(text: str) -> dict[str, Counter[str]]:
    """Mnemonics without modifiers, counted, by kernel; NOP is padding and does not count."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith(".text."):
            current = counts.setdefault(line.removeprefix(".text.").rstrip(":"), Counter())
        elif (match := _INSTRUCTION.match(line)) and match[1] != "NOP":
            current[match[1]] += 1
    return counts


def early_copies(text: str) -> dict[str, list[str]]:
    """Addresses of bulk and tensor copies into shared memory that a warp asks for before its own loads of it are there.

    A load waits in a queue that the copy engine does not stand in, so one that reads what the copy writes may get the
    new bytes. Which place is written SASS does not say; no kernel has reason to ask for a copy before it has waited.
    The code is followed in its order. A load is there when something waits for its scoreboard, or for a later load's:
    loads of shared memory come in order.

    Args:
        text: As `disassembly`.

    Returns:
        By kernel; only those that have such copies.
    """
    found: dict[str, list[str]] = {}
    kernel, match, waiting = "", None, list[int]()  # scoreboards of loads on their way
    for line in text.splitlines():
        if line.startswith(".text."):
            kernel, match = line.removeprefix(".text.").rstrip(":"), None
            waiting.clear()
        elif first := _ENCODED.match(line):
            match = first
        elif match and (second := _SECOND_HALF.match(line)):
            control = int(second[1], 16)  # the bits above the second word's operands
            mask, scoreboard = control >> 52 & 0x3F, control >> 46 & 7
            there = [i for i, one in enumerate(waiting) if mask >> one & 1]  # 7, none, is in no mask
            del waiting[: there[-1] + 1 if there else 0]
            name = re.sub(r"^@!?U?P\d\s+", "", match[2]).split(".")[0].split(" ")[0]  # @!PT, never, stays
            if name in _SHARED_LOADS:
                waiting.append(scoreboard)
            elif name in _BULK_COPIES and waiting:
                found.setdefault(kernel, []).append(f"0x{match[1]}")
            elif name in ("BRA", "BRX", "EXIT", "RET") and not match[2].startswith("@"):
                waiting.clear()  # what follows is reached from elsewhere
            match = None
    return found
