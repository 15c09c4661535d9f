"""`python -m tests.ptxemu.mutants [KERNEL ...]`: the mutants, and which policies catch them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from tests.ptxemu.mutants.equivalent import reason
from tests.ptxemu.mutants.subjects import SUBJECTS
from tests.ptxemu.mutants.suite import RUNS, Verdict, verdicts


def _marks(verdict: Verdict) -> str:
    """A letter a run: f a finding, r another result, . nothing."""
    return "".join("f" if o.findings else "r" if o.differs else "." for o in verdict.outcomes)


def _kinds(verdict: Verdict) -> str:
    kinds = sorted({kind for outcome in verdict.outcomes for kind in outcome.findings})
    return ", ".join(kinds) or ("result" if verdict.caught else "-")


def row(verdict: Verdict) -> str:
    """A line of the table."""
    mutant = verdict.mutant
    number = f"{mutant.operator.name}/{mutant.number}"
    return f"| {mutant.kernel} | {number} | {mutant.operator.breaks} | {_marks(verdict)} | {_kinds(verdict)} |"


def summary(judged: Sequence[Verdict]) -> str:
    """How many are caught, in all, by kernel and by run."""
    counted = [v for v in judged if reason(v.mutant) is None]
    caught = [v for v in counted if v.caught]
    kernels = Counter(v.mutant.kernel for v in counted)
    caught_of = Counter(v.mutant.kernel for v in caught)
    lines = [
        f"{len(caught)} of {len(counted)} mutants caught ({len(caught) / max(len(counted), 1):.1%}), "
        f"{sum(v.found for v in caught)} of them by a finding; "
        f"{len(judged) - len(counted)} more are equivalent",
        "by kernel: " + ", ".join(f"{kernel} {caught_of[kernel]}/{count}" for kernel, count in kernels.items()),
        "by run: "
        + ", ".join(
            f"{policy}{f' {seed}' if policy == 'random' else ''} {sum(v.outcomes[k].caught for v in counted)}"
            for k, (policy, seed) in enumerate(RUNS)
        ),
    ]
    lines += [f"escaped: {v.mutant.name}: {v.mutant.instruction.text}" for v in counted if not v.caught]
    for v in judged:
        if why := reason(v.mutant):
            lines.append(f"equivalent: {v.mutant.name}: {why}" + (" (BUT CAUGHT)" if v.caught else ""))
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(kernels: Sequence[str]) -> None:
    """Judges the mutants of some kernels, of all by default, and prints the table."""
    _say(f"Runs: {', '.join(f'{policy} {seed}' for policy, seed in RUNS)}; f finding, r another result, . nothing")
    _say("| kernel | mutant | what it breaks | runs | by |\n|---|---|---|---|---|")
    judged = []
    for verdict in verdicts(kernels or tuple(SUBJECTS)):
        judged.append(verdict)
        _say(row(verdict))
    _say(summary(judged))


if __name__ == "__main__":
    main(sys.argv[1:])
