"""What the `moe_permute` kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

MAX_EXPERTS = 512  # a counter for each, and each warp, in shared memory
MAX_VISITS = 2**30  # 32-bit numbers of visits, and a step beyond the last


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    experts, visits = int(facts.get("experts") or 0), int(facts.get("visits") or 0)
    reasons = []
    if experts > MAX_EXPERTS:
        reasons.append(f"{experts} experts: the kernel counts up to {MAX_EXPERTS}")
    if visits > MAX_VISITS:
        reasons.append(f"about {visits} visits: the kernel counts up to {MAX_VISITS}")
    return reasons
