"""What the fused activation of swiglu_quant leaves to the fallback; no torch here, it is asked before loading."""

from __future__ import annotations

from collections.abc import Mapping

from megamoe_stages.quantize.limits import MAX_SCALES, tiled_scales


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    rows, cols = int(facts.get("rows", 0)), int(facts.get("n", 0)) // 32
    scales = tiled_scales(rows, cols) if facts.get("scale_layout") == "128x4" else rows * cols
    if scales > MAX_SCALES:
        return [f"about {scales} scales, padding too: the kernel counts up to {MAX_SCALES}"]
    return []
