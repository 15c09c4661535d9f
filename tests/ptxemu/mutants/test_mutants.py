"""Broken kernels are caught: a sample here, all of them under the slow marker."""

from __future__ import annotations

import random

import pytest

from tests.ptxemu.mutants.equivalent import reason
from tests.ptxemu.mutants.subjects import SUBJECTS
from tests.ptxemu.mutants.suite import Verdict, baseline, judge, mutants, verdicts

SAMPLED = ("bulk_ring", "exchange", "cp_async", "tma_copy", "wgmma_gemm", "tcgen05_f16")
FROM_EACH = 2
ESCAPING = {"bulk_ring/drop-barrier/0", "bulk_ring/drop-barrier/1"}  # see core/ptxemu/README.md
LEAST = 0.95  # of all mutants that are not equivalent


@pytest.mark.parametrize("kernel", SAMPLED)
def test_a_sample_is_caught(kernel: str) -> None:
    """Also that the unmutated kernel is right, and without findings, under every policy."""
    subject = SUBJECTS[kernel]()
    base = baseline(subject)
    found = [m for m in mutants(kernel, subject, base.executed) if m.name not in ESCAPING and not reason(m)]
    for mutant in random.Random(kernel).sample(found, FROM_EACH):
        assert judge(mutant, subject, base).caught, mutant.name


def test_a_relaxed_count_of_split_sums_is_found_in_every_run() -> None:
    """Nothing orders the sums that other CTAs left in global memory then; see `megamoe.cute.split_sums`."""
    subject = SUBJECTS["grouped_gemm_split"]()
    base = baseline(subject)
    (mutant,) = [m for m in mutants("grouped_gemm_split", subject, base.executed) if m.operator.name == "relax-atomic"]
    assert {outcome.findings for outcome in judge(mutant, subject, base).outcomes} == {("unordered_read",)}


def test_equivalent_mutants_are_not_caught() -> None:
    """Of the kernels that need no compiler: what is caught cannot be equivalent."""
    judged = [v for v in verdicts(("exchange",)) if reason(v.mutant)]
    assert judged and not any(v.caught for v in judged)


@pytest.mark.slow
def test_almost_all_are_caught() -> None:
    judged: list[Verdict] = list(verdicts())
    counted = [v for v in judged if reason(v.mutant) is None]
    escaped = [v.mutant.name for v in counted if not v.caught]
    assert not [v.mutant.name for v in judged if reason(v.mutant) and v.caught]
    assert len({v.mutant.kernel for v in counted}) >= 6 and len(counted) >= 40
    assert len(escaped) <= (1 - LEAST) * len(counted), escaped
