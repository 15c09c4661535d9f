"""What the fused quantise kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

MAX_BLOCKS = 2**27  # a block's first word, of 16 at most, is a 32-bit offset
MAX_SCALES = 2**30  # bytes, padding of the tiles too: 32-bit offsets


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("fast"):
        reasons.append("fast=True: the kernel has the exact recipe only")
    if facts.get("zero_guard", "scale") != "scale":
        reasons.append(f"zero_guard={facts['zero_guard']!r}: the kernel has 'scale' only")
    if facts.get("four_over_six") is not None:
        reasons.append(f"four_over_six={facts['four_over_six']!r}: the kernel maps to 6 only")
    dims = facts.get("scale_dims", 0)
    if dims == -1:
        reasons.append("global_scale_enc=None: the kernel does not find a tensor's amax")
    elif dims != 0:
        reasons.append("global_scale_enc per batch entry: the kernel takes one for the tensor")
    rows, k = int(facts.get("rows") or 0), int(facts.get("k") or 0)
    if rows * (k // 16) > MAX_BLOCKS:
        reasons.append(f"about {rows} rows of {k}: the kernel counts up to {MAX_BLOCKS} blocks of 16")
    return reasons
