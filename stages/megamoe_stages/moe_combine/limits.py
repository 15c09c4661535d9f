"""What the `moe_combine` kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

PIECE = 8  # values that a thread owns: 16 bytes of bf16
MAX_PIECES = 2**30  # of the result: 32-bit numbers of pieces


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernel cannot do a problem; facts that are not given count as fine."""
    tokens, hidden = int(facts.get("tokens") or 0), int(facts.get("hidden") or 0)
    reasons = []
    if hidden % PIECE:
        reasons.append(f"{hidden} values a row: the kernel takes a multiple of {PIECE}")
    if tokens * (hidden // PIECE) > MAX_PIECES:
        reasons.append(f"about {tokens} tokens of {hidden}: the kernel counts up to {MAX_PIECES} pieces of {PIECE}")
    return reasons
