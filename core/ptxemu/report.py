"""What an emulated launch found."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptxemu.errors import FaultError


class FindingKind(enum.StrEnum):
    """What can be wrong; the comment says what happens after it is found."""

    OUT_OF_BOUNDS = "out_of_bounds"  # stops the launch
    MISALIGNED = "misaligned"  # stops the launch
    READ_ONLY = "read_only"  # a store to a parameter or to constant memory; stops the launch
    UNINITIALISED = "uninitialised"  # bytes, columns or registers read that nothing wrote
    MISSING_PROXY_FENCE = "missing_proxy_fence"  # the asynchronous proxy reads what the generic one wrote, unfenced
    ASYNC_RACE = "async_race"  # bytes touched while an asynchronous operation reads or writes them
    PENDING_REGISTER = "pending_register"  # a register touched before the wait that makes its value defined
    PENDING_LOAD = "pending_load"  # an asynchronous copy overwrites what a load of shared memory has yet to read
    UNORDERED_READ = "unordered_read"  # a store of another CTA read without a release and an acquire in between
    MISSING_FENCE = "missing_fence"  # another fence that the PTX ISA demands (tcgen05.fence, wgmma.fence)
    MBARRIER = "mbarrier"  # not initialised, arrived at too often, transaction count out of range; stops the launch
    BARRIER = "barrier"  # bar.sync or barrier.cluster used in a way that is not defined; stops the launch
    DEADLOCK = "deadlock"  # every warp waits and nothing asynchronous is left; stops the launch
    LIVELOCK = "livelock"  # the instruction budget is used up; stops the launch
    DIVERGENCE = "divergence"  # lanes missing that an instruction names; stops the launch
    NOT_UNIFORM = "not_uniform"  # an operand differs between lanes where it must not
    DESCRIPTOR = "descriptor"  # an illegal tensor map, matrix or instruction descriptor
    TENSOR_MEMORY = "tensor_memory"  # allocation, lane or column rules broken, or columns never freed
    TRAP = "trap"  # the kernel executed trap; stops the launch
    RESOURCE = "resource"  # more shared memory, threads or registers than the architecture has


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: What kind of thing.
        line: Of the PTX text, 0 when no instruction is to blame.
        text: The instruction.
        detail: What happened, with numbers.
        launch: Number of the launch, from 0.
        cta: Index in the grid.
        warp: Index in the CTA.
        lanes: Bit mask of the lanes concerned.
        address: First address concerned.
        region: Name of the memory that lies there, or nearest.
    """

    kind: FindingKind
    line: int
    text: str
    detail: str
    launch: int = 0
    cta: tuple[int, int, int] = (0, 0, 0)
    warp: int = 0
    lanes: int = 0
    address: int | None = None
    region: str = ""

    def __str__(self) -> str:
        where = f"CTA {self.cta} warp {self.warp} lanes {self.lanes:#010x}" if self.line else f"CTA {self.cta}"
        memory = f" address {self.address:#x}" if self.address is not None else ""
        memory += f" in {self.region}" if self.region else ""
        source = f"\n    PTX line {self.line}: {self.text}" if self.line else ""
        return f"{self.kind}: {self.detail} [launch {self.launch}, {where}{memory}]{source}"


@dataclass(frozen=True)
class LaunchFacts:
    """What was launched: geometry, how much was executed, and how often each instruction was (hits)."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int
    instructions: int
    seconds: float
    hits: np.ndarray = field(compare=False, repr=False)


@dataclass
class Report:
    """The result of one or more emulated launches.

    Attributes:
        findings: What is wrong; empty for a kernel that did nothing wrong under this policy.
        launches: In order.
        policy: When asynchronous operations completed.
        seed: Of the random policy.
    """

    findings: list[Finding] = field(default_factory=list)
    launches: list[LaunchFacts] = field(default_factory=list)
    policy: str = "eager"
    seed: int = 0

    @property
    def instructions(self) -> int:
        """Warp instructions executed."""
        return sum(launch.instructions for launch in self.launches)

    @property
    def seconds(self) -> float:
        """Time spent emulating."""
        return sum(launch.seconds for launch in self.launches)

    @property
    def rate(self) -> float:
        """Warp instructions a second."""
        return self.instructions / self.seconds if self.seconds else 0.0

    def kinds(self) -> Counter[FindingKind]:
        """How many findings of each kind."""
        return Counter(finding.kind for finding in self.findings)

    def raise_for_findings(self, ignore: Sequence[FindingKind] = ()) -> None:
        """Raises FaultError with all findings, unless there are none besides those of the kinds to ignore."""
        bad = [str(finding) for finding in self.findings if finding.kind not in ignore]
        if bad:
            raise FaultError("\n".join(bad))

    def __str__(self) -> str:
        names = ", ".join(f"{launch.kernel[:60]} grid {launch.grid}" for launch in self.launches)
        head = f"{len(self.launches)} launches ({names}), policy {self.policy}: {self.instructions} warp instructions"
        found = "\n".join(map(str, self.findings)) or "no findings"
        return f"{head} in {self.seconds:.2f} s\n{found}"
