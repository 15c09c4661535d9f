"""What the fused attention leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

from megamoe_stages.multi_cta_attention import shape_512
from megamoe_stages.multi_cta_attention.shape import DTYPES, HEADS

_MOST_ROWS = (1 << 31) - 256  # some way to what 32 bits count


def supports(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Reasons why the kernels cannot do a problem; facts that are not given count as fine."""
    reasons = []
    if facts.get("dtype", DTYPES[0]) not in DTYPES:
        reasons.append(f"{facts['dtype']} queries: the kernels take {' and '.join(DTYPES)}")
    if "head_dim" in facts:
        head = int(facts["head_dim"] or 0), int(facts.get("v_dim") or facts["head_dim"] or 0)
        if head != (shape_512.DIM, shape_512.DIM) and facts.get("entries"):
            reasons.append(f"entries with keys of {head[0]}: the kernel of {shape_512.DIM} knows them")
        if head != (shape_512.DIM, shape_512.DIM) and head not in HEADS:
            reasons.append(f"keys of {head[0]} with values of {head[1]}: no kernel is compiled for them")
    return reasons + too_long(facts)


def too_long(facts: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Why there are more rows than the kernels count, if there are: queries times heads, of a kv head also of keys."""
    heads, kv_heads = int(facts.get("heads") or 1), int(facts.get("kv_heads") or 1)
    rows = max(int(facts.get("queries") or 0) * heads, int(facts.get("keys") or 0) * (heads // kv_heads))
    return [f"{rows} queries or keys times heads: the kernels count up to {_MOST_ROWS}"] if rows > _MOST_ROWS else []
