"""What the `moe_route` kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

MAX_EXPERTS = 512  # 16 logits a lane
MAX_TOP_K = 32  # a lane holds one chosen expert
MAX_LOGITS = 2**30  # 32-bit offsets


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    experts, top_k, tokens = (int(facts.get(name) or 0) for name in ("experts", "top_k", "tokens"))
    reasons = []
    if experts > MAX_EXPERTS:
        reasons.append(f"{experts} experts: the kernel takes up to {MAX_EXPERTS}")
    if top_k > MAX_TOP_K:
        reasons.append(f"{top_k} experts a token: the kernel chooses up to {MAX_TOP_K}")
    if tokens * experts > MAX_LOGITS:
        reasons.append(f"about {tokens} tokens of {experts} logits: the kernel counts up to {MAX_LOGITS}")
    return reasons
