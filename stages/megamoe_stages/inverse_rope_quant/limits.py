"""What the fused inverse_rope_quant kernel leaves to the fallback; no torch here, it is asked before loading."""

from __future__ import annotations

from collections.abc import Mapping

from megamoe_stages.quantize.limits import MAX_SCALES, tiled_scales

MAX_ROWS = 2**29  # tokens: int64 positions are read as twice as many 32-bit words


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    rows, groups = int(facts.get("rows", 0)), max(int(facts.get("groups", 1)), 1)
    cols = int(facts.get("heads", 0)) // groups * (int(facts.get("head_dim", 0)) // 16)
    scales = groups * (tiled_scales(rows, cols) if facts.get("scale_layout") == "128x4" else rows * cols)
    if rows > MAX_ROWS or scales > MAX_SCALES:
        most = f"{MAX_ROWS} tokens and {MAX_SCALES} scales"
        return [f"about {rows} tokens, {scales} scales, padding too: the kernel counts up to {most}"]
    return []
