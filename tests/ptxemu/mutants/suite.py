"""Mutants of the kernels: which instructions are changed, and what the emulator says to them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptxemu.api import load
from ptxemu.instruction import Instruction
from tests.ptxemu.mutants.operators import OPERATORS, Operator, Statement
from tests.ptxemu.mutants.subjects import SUBJECTS, Subject

RUNS = (("eager", 0), ("tma_lazy", 0), ("mma_lazy", 0), ("lazy", 0), ("random", 0), ("random", 1), ("random", 2))
SEED = 0
SITES = 2  # of each kernel and operator


@dataclass(frozen=True)
class Mutant:
    """A kernel with one instruction changed.

    Attributes:
        kernel: A key of `SUBJECTS`.
        operator: What was done.
        number: Which of the instructions that the kernel executes, of those that the operator applies to.
        instruction: Before the change.
        ptx: The whole text after it.
    """

    kernel: str
    operator: Operator
    number: int
    instruction: Instruction
    ptx: str

    @property
    def name(self) -> str:
        """Unique; holds as long as the kernel does not change."""
        return f"{self.kernel}/{self.operator.name}/{self.number}"


@dataclass(frozen=True)
class Outcome:
    """What a run of a mutant showed: kinds of findings, and whether the output differs."""

    findings: tuple[str, ...]
    differs: bool

    @property
    def caught(self) -> bool:
        """Either."""
        return bool(self.findings) or self.differs


@dataclass(frozen=True)
class Verdict:
    """A mutant with the outcome of each of `RUNS`."""

    mutant: Mutant
    outcomes: tuple[Outcome, ...]

    @property
    def caught(self) -> bool:
        """By any run."""
        return any(outcome.caught for outcome in self.outcomes)

    @property
    def found(self) -> bool:
        """Some run named the fault, instead of only giving another result."""
        return any(outcome.findings for outcome in self.outcomes)


@dataclass(frozen=True)
class Baseline:
    """What the unmutated kernel gives: its output, what it executes, and instructions after which a mutant hangs."""

    output: bytes
    executed: tuple[Instruction, ...]
    budget: int


def baseline(subject: Subject) -> Baseline:
    """Runs a kernel unmutated.

    Raises:
        FaultError: It does something wrong under some policy.
        AssertionError: Its result is wrong, or depends on the policy.
    """
    first: Baseline | None = None
    for policy, seed in RUNS:
        report, output = subject.run(subject.ptx, policy, seed, budget=50_000_000)
        report.raise_for_findings()
        assert subject.right(), f"wrong result under {policy}"
        if first is None:
            hits = report.launches[0].hits
            program = load(subject.ptx)
            executed = tuple(i for i, count in zip(program.kernel.instructions, hits, strict=False) if count)
            first = Baseline(output, executed, 20 * report.instructions + 20_000)
        assert output == first.output, f"another result under {policy}"
    assert first is not None
    return first


def mutants(
    kernel: str, subject: Subject, executed: Sequence[Instruction], *, seed: int = SEED, sites: int = SITES
) -> Iterator[Mutant]:
    """Mutants of a kernel: for each operator some of the instructions that it applies to, chosen by the seed."""
    for operator in OPERATORS.values():
        changes = [(i, text) for i in executed if (text := operator.change(Statement.of(i))) is not None]
        chosen = random.Random(f"{seed} {kernel} {operator.name}").sample(range(len(changes)), min(sites, len(changes)))
        for number in sorted(chosen):
            instruction, text = changes[number]
            yield Mutant(kernel, operator, number, instruction, _replaced(subject.ptx, instruction, text))


def _replaced(ptx: str, instruction: Instruction, text: str) -> str:
    """The text with other text for one of its instructions."""
    lines = ptx.split("\n")
    start = sum(len(line) + 1 for line in lines[: instruction.line - 1])
    pattern = r"\s+".join(map(re.escape, instruction.text.split())) + r"\s*;"
    found = re.compile(pattern).search(ptx, start)
    assert found is not None and ptx.count("\n", 0, found.start()) == instruction.line - 1, instruction.text
    return ptx[: found.start()] + text + ptx[found.end() :]


def judge(mutant: Mutant, subject: Subject, base: Baseline) -> Verdict:
    """Runs a mutant under every policy. What the emulator cannot load is an error of the operator, and raised."""
    outcomes = []
    for policy, seed in RUNS:
        report, output = subject.run(mutant.ptx, policy, seed, base.budget)
        kinds = tuple(str(kind) for kind in report.kinds())
        outcomes.append(Outcome(kinds, output != base.output))
    return Verdict(mutant, tuple(outcomes))


def verdicts(kernels: Sequence[str] = tuple(SUBJECTS), *, sites: int = SITES) -> Iterator[Verdict]:
    """Judges the mutants of kernels, one after the other."""
    for kernel in kernels:
        subject = SUBJECTS[kernel]()
        base = baseline(subject)
        for mutant in mutants(kernel, subject, base.executed, sites=sites):
            yield judge(mutant, subject, base)
