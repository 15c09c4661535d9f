"""What the fused attention_quant kernel leaves to the fallback; no torch here, it is asked before loading."""

from __future__ import annotations

from collections.abc import Mapping

from megamoe_stages.multi_cta_attention.limits import too_long
from megamoe_stages.quantize.limits import MAX_SCALES, tiled_scales

HEAD_DIM, ROPE_DIM = 512, 64  # what the kernel is compiled for
_BLOCK = 16


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("dtype", "bfloat16") != "bfloat16":
        reasons.append(f"{facts['dtype']} queries: the kernel takes bfloat16")
    for name, wanted in (("head_dim", HEAD_DIM), ("v_dim", HEAD_DIM), ("rope_dim", ROPE_DIM)):
        if facts.get(name, wanted) != wanted:
            reasons.append(f"{name} {facts[name]}: the kernel is compiled for {wanted}")
    rows, groups = int(facts.get("queries") or 0), max(int(facts.get("groups") or 1), 1)
    cols = int(facts.get("heads") or 0) // groups * (HEAD_DIM // _BLOCK)
    scales = groups * (tiled_scales(rows, cols) if facts.get("scale_layout") == "128x4" else rows * cols)
    if scales > MAX_SCALES:
        reasons.append(f"{scales} scales, padding too: the kernel counts up to {MAX_SCALES}")
    return reasons + too_long(facts)
