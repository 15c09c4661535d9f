"""What the fused mhc_quant kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

STREAMS = 4
MAX_VALUES = 2**28  # tokens * H: what x holds is counted in 32 bits
MAX_HIDDEN = 7168  # 16 CTAs with 172 KB of fn each
SMALL = 256  # up to here any H: further up a slice that is not whole leaves too few registers
CTAS = {SMALL: 1, 512: 2, 1024: 4, 2048: 8, 4096: 16, MAX_HIDDEN: 16}  # of a cluster, by the hidden dims that it covers
TEAMS = {MAX_HIDDEN: 2}  # of a CTA; 4 where not named
WARPS = {MAX_HIDDEN: 7}  # of a team, 64 hidden dims each; 4 where not named
PARTS = {MAX_HIDDEN: 6}  # fn as fp32; as three terms of bf16, 10, where not named
MANY_HIDDEN = (1024, 2048, 4096, 7168)  # of the kernel made for many tokens, the faster one from one token on


def covered(hidden: int) -> int:
    """Hidden dims that the cluster for `hidden`, which `supports` lets pass, covers."""
    return next(dims for dims in CTAS if hidden <= dims)


def supports_many(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernel made for many tokens cannot do a problem; facts that are not given count as fine."""
    reasons, hidden = supports(facts), int(facts.get("hidden", 4096))
    if hidden not in MANY_HIDDEN and not reasons:
        reasons.append(f"H = {hidden}: the kernel has {', '.join(map(str, MANY_HIDDEN))}")
    return reasons


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("dtype", "bfloat16") != "bfloat16":
        reasons.append(f"dtype {facts['dtype']}: the kernel has bfloat16 only")
    streams, hidden = int(facts.get("streams", STREAMS)), int(facts.get("hidden", 0))
    if streams != STREAMS:
        reasons.append(f"{streams} streams: the kernel has {STREAMS} only")
    if hidden > SMALL and hidden not in CTAS:
        sizes = ", ".join(str(size) for size in CTAS if size > SMALL)
        reasons.append(f"H = {hidden}: the kernel has any up to {SMALL}, and {sizes}")
    rows = int(facts.get("rows", 0))
    if rows * hidden > MAX_VALUES:
        reasons.append(f"about {rows} tokens of {hidden}: the kernel counts up to {MAX_VALUES} values")
    return reasons
