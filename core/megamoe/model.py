"""Every value that crosses a boundary. Frozen, no behaviour beyond parsing and printing, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a variant is for, in the order in which `auto` prefers them."""

    FUSED = "fused"
    FALLBACK = "fallback"
    REFERENCE = "reference"


class Gate(StrEnum):
    """Why a variant was turned down, in the order in which the gates run."""

    CONFIG = "config"
    BLOCKER = "blocker"
    ARCH = "arch"
    DEPENDENCY = "dependency"
    PROBLEM = "problem"
    EVIDENCE = "evidence"


HARD_GATES = frozenset({Gate.ARCH, Gate.DEPENDENCY, Gate.PROBLEM})  # no choice by name gets past these


class Kind(StrEnum):
    """How strong a piece of evidence is."""

    VERIFIED = "verified"  # ran on that hardware
    EMULATED = "emulated"  # ran in the PTX emulator
    COMPILED = "compiled"  # built, never ran


class Status(StrEnum):
    """What people decided about a roadmap item. "blocked" is derived, never written."""

    PLANNED = "planned"
    BUILDING = "building"
    EXPERIMENTAL = "experimental"
    STABLE = "stable"
    DONE = "done"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, order=True)
class Arch:
    """A GPU architecture by its compute capability.

    The suffix of sm_100a says how a binary was built, not what the chip is, so it is not kept.
    """

    cc: int

    @classmethod
    def parse(cls, text: str) -> Arch:
        """Reads "sm_90", "sm_100a", "sm_103f".

        Raises:
            ValueError: `text` is not of that form.
        """
        match = re.fullmatch(r"sm_(\d{2,3})[af]?", text)
        if match is None:
            raise ValueError(f"not an architecture: {text!r}, expected one like sm_90 or sm_100a")
        return cls(int(match[1]))

    def __str__(self) -> str:
        return f"sm_{self.cc}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What a variant would run on: one device and the packages round it.

    Attributes:
        arch: None where the work runs on the CPU.
        packages: Installed version of each distribution that some variant needs.
        device: Name for people.
    """

    arch: Arch | None
    packages: Mapping[str, str] = field(default_factory=dict)
    device: str = "CPU"


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation of an op; what it claims, not whether it is true.

    Attributes:
        name: Unique within its stage.
        role: See Role.
        target: "package.module:function", imported only when chosen.
        archs: Where it can run; empty for any device, the CPU included.
        needs: Requirements beyond torch ("nvidia-cutlass-dsl>=4.8,<4.9").
        rank: Among variants of one role the highest goes first.
        supports: "package.module:function" from the problem's facts to a list of reasons why it cannot.
        provider: Distribution that brought it, filled in by the plugin loader.
    """

    name: str
    role: Role
    target: str
    archs: frozenset[Arch] = frozenset()
    needs: tuple[str, ...] = ()
    rank: int = 0
    supports: str | None = None
    provider: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One op and its variants.

    Attributes:
        id: Name of the op, of its folder and of its torch.library operator.
        title: One line for people.
        contract: Module with `check`, `problem`, `fake` and `BOUNDS` (see CONTRIBUTING.md).
        cases: "package.module:CASES".
        variants: Exactly one reference and at least one fallback among them.
        mutates: Parameters that the op writes to.
    """

    id: str
    title: str
    contract: str
    cases: str
    variants: tuple[Variant, ...]
    mutates: tuple[str, ...] = ()

    @property
    def reference(self) -> Variant:
        """The variant that defines the op."""
        return next(v for v in self.variants if v.role is Role.REFERENCE)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one case went.

    Attributes:
        case: Its name.
        passed: Every check held.
        error: Worst error over the outputs, as a share of nothing: relative L2, or the share of unequal bytes.
        bound: What that error may be; 0 means every byte equal.
        reason: What failed, empty when passed.
    """

    case: str
    passed: bool
    error: float
    bound: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Speed:
    """Time of a variant beside the fallback's, medians of one interleaved run, in microseconds."""

    case: str
    problem: Mapping[str, str | int | float | bool | None]
    variant_us: float
    fallback_us: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """A record that a variant was tried; `arch` None is the CPU, `origin` "shipped" or "local"."""

    stage: str
    variant: str
    arch: Arch | None
    kind: Kind
    fingerprint: str
    cases: tuple[CaseResult, ...]
    speeds: tuple[Speed, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    date: str = ""
    version: str = ""
    origin: str = "local"

    @property
    def passed(self) -> int:
        """Number of cases that passed."""
        return sum(c.passed for c in self.cases)

    @property
    def ok(self) -> bool:
        """Whether there are cases and all passed."""
        return bool(self.cases) and self.passed == len(self.cases)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason against one variant, and what would lift it."""

    variant: str
    gate: Gate
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """Which variant an op uses for a problem on a machine, and every reason the others are not used."""

    stage: str
    variant: Variant
    why: str
    refusals: tuple[Refusal, ...]
    evidence: Evidence | None = None
