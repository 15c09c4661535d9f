"""What the fused GEMM kernels of swiglu_quant leave to the fallback; no torch here, it is asked before loading."""

from __future__ import annotations

from collections.abc import Mapping

from megamoe_stages.grouped_gemm.limits import gemm_refuses


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernels cannot do a problem; facts that are not given count as fine."""
    reasons = gemm_refuses(facts, str(facts.get("weights_scale_layout", "hopper")))
    if facts.get("order", "interleaved") != "interleaved":
        reasons.append(f"order {facts['order']!r}: the kernel wants gate and up interleaved (gate_up.interleave)")
    return reasons
