"""What the fused mhc_quant kernels leave to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

STREAMS = 4
MAX_VALUES = 2**29 - 1  # tokens * H: what x holds is counted in 32 bits
SMALL = 256  # up to here any H, a multiple of 16
NARROW = (SMALL, 512)  # hidden dims that the kernel for few of them covers
WIDE = (1024, 2048, 4096, 7168)  # those that the other one has


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why no kernel can do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("dtype", "bfloat16") != "bfloat16":
        reasons.append(f"dtype {facts['dtype']}: the kernels have bfloat16 only")
    streams, hidden = int(facts.get("streams", STREAMS)), int(facts.get("hidden", 0))
    if streams != STREAMS:
        reasons.append(f"{streams} streams: the kernels have {STREAMS} only")
    sizes = (*NARROW[1:], *WIDE)
    if hidden > SMALL and hidden not in sizes:
        reasons.append(f"H = {hidden}: the kernels have any up to {SMALL}, and {', '.join(map(str, sizes))}")
    rows = int(facts.get("rows", 0))
    if rows * hidden > MAX_VALUES:
        reasons.append(f"about {rows} tokens of {hidden}: the kernels count up to {MAX_VALUES} values")
    return reasons
