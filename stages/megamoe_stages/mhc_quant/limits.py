"""What the fused mhc_quant kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

STREAMS = 4
MAX_HIDDEN = 7168  # 16 CTAs with 172 KB of fn each
MAX_VALUES = 2**28  # tokens * H: what x holds is counted in 32 bits
CTAS = {512: 1, 2048: 4, 4096: 8, MAX_HIDDEN: 16}  # of a cluster, by the hidden dims that it covers
WARPS = {512: 8, 2048: 8, 4096: 8, MAX_HIDDEN: 7}  # of a team: 64 hidden dims each


def covered(hidden: int) -> int:
    """Hidden dims that the cluster for `hidden` covers."""
    return next(dims for dims in CTAS if hidden <= dims)


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("dtype", "bfloat16") != "bfloat16":
        reasons.append(f"dtype {facts['dtype']}: the kernel has bfloat16 only")
    streams, hidden = int(facts.get("streams", STREAMS)), int(facts.get("hidden", 0))
    if streams != STREAMS:
        reasons.append(f"{streams} streams: the kernel has {STREAMS} only")
    if hidden > MAX_HIDDEN:
        reasons.append(f"H = {hidden}: a cluster's shared memory holds fn for up to {MAX_HIDDEN}")
    rows = int(facts.get("rows", 0))
    if rows * hidden > MAX_VALUES:
        reasons.append(f"about {rows} tokens of {hidden}: the kernel counts up to {MAX_VALUES} values")
    return reasons
