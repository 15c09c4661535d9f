"""What the fused decode kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

from megamoe_stages.fp4_kv_decode import mqa_shape
from megamoe_stages.fp4_kv_decode.shape import SHAPES


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("dtype", "bfloat16") != "bfloat16":
        reasons.append(f"{facts['dtype']} queries: the kernel takes bfloat16")
    if "head_dim" in facts:
        shared = bool(facts.get("shared"))
        dims = int(facts["head_dim"] or 0), int(facts.get("v_dim") or facts["head_dim"] or 0)
        known = dims == (mqa_shape.DIM,) * 2 if shared else dims in SHAPES and not facts.get("extra")
        if not known:
            kind = "that are the values" if shared else f"with values of {dims[1]}"
            reasons.append(f"keys of {dims[0]} {kind}: no kernel is compiled for them")
    return reasons
