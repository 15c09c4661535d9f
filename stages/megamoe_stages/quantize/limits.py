"""What the fused quantise kernel leaves to the fallback; no torch here, since the chooser asks before loading it."""

from __future__ import annotations

from collections.abc import Mapping

MAX_SCALES = 2**30  # bytes, padding of the tiles too: their offsets are 32-bit numbers, those of codes and x 64-bit
_TILE_ROWS, _TILE_COLS = 128, 4


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
    scales = most_scales(facts)
    if scales > MAX_SCALES:
        reasons.append(f"about {scales} scales, padding too: the kernel counts up to {MAX_SCALES}")
    return reasons


def most_scales(facts: Mapping[str, str | int | float | bool | None]) -> int:
    """Scale bytes of a problem, exact for linear scales; with 128x4 no fewer than there are, each entry padded."""
    rows, cols = int(facts.get("rows") or 0), int(facts.get("k") or 0) // 16
    if facts.get("scale_layout") != "128x4":
        return rows * cols
    entries = int(facts.get("entries") or 1)
    if entries > 1:  # how the rows are spread over the entries is not known here
        rows += entries * (_TILE_ROWS - 1)
    return tiled_scales(rows, cols)


def tiled_scales(rows: int, cols: int) -> int:
    """Bytes of the 128x4 tiles of one matrix."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS * -(-cols // _TILE_COLS) * _TILE_COLS
