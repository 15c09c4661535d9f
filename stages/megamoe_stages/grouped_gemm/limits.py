"""What the fused kernels of grouped_gemm leave to the fallback; no torch here, it is asked before loading."""

from __future__ import annotations

from collections.abc import Mapping

MAX_ROWS = 2**21  # of the result; with padding, and times K, they stay countable
MAX_EXPERTS = 768  # that of `cute.weight_pieces`: a thread counts the tiles of two
_LAYOUT = "hopper"
_ROWS_OF_THREAD = 8  # of weights, which have one alpha


def supports(facts: Mapping[str, str | int | float | bool]) -> list[str]:
    """Reasons why the kernels cannot do a problem; facts that are not given count as fine."""
    reasons = gemm_refuses(facts, str(facts.get("scale_layout", _LAYOUT)))
    if int(facts.get("part_rows", 0)) % _ROWS_OF_THREAD:
        reasons.append(
            f"a global scale for {facts['part_rows']} rows: the kernel takes a multiple of {_ROWS_OF_THREAD}"
        )
    return reasons


def gemm_refuses(facts: Mapping[str, str | int | float | bool], layout: str) -> list[str]:
    """What `supports` says, for weights in a given layout."""
    reasons = []
    if layout != _LAYOUT:
        reasons.append(f"weights in the layout {layout!r}: the kernel reads 'hopper' (NVFP4Tensor.with_layout)")
    if facts.get("dtype", "bfloat16") != "bfloat16":
        reasons.append(f"{facts['dtype']} activations: the kernel takes bfloat16 and NVFP4")
    for name, most in (("rows", MAX_ROWS), ("experts", MAX_EXPERTS)):
        if int(facts.get(name, 0)) > most:
            reasons.append(f"{facts[name]} {name}: the kernel counts up to {most}")
    return reasons
