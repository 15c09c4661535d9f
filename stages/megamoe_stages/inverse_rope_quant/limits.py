"""What the fused inverse_rope_quant kernel leaves to the fallback; no torch here, it is asked before loading."""

from __future__ import annotations

from collections.abc import Mapping

MAX_ROWS = 2**22  # tile rows go to a 31-bit grid with their columns, numbers of blocks into 32 bits
MAX_BLOCKS = 2**30


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    rows = int(facts.get("rows", 0))
    blocks = rows * int(facts.get("heads", 0)) * (int(facts.get("head_dim", 0)) // 16)
    if rows > MAX_ROWS or blocks > MAX_BLOCKS:
        return [
            f"about {rows} tokens, {blocks} blocks: the kernel counts up to {MAX_ROWS} tokens and {MAX_BLOCKS} blocks"
        ]
    return []
