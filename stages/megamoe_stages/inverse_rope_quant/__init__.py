"""Inverse RoPE and NVFP4 quantisation in front of the grouped output projection (roadmap item NVFP4-1.2).

In DeepSeek-V4 the values carry the rotation of their key, so attention's output is turned back at the query's position
before `wo_a`. Done here in one pass: read the heads, turn, quantise, and write group after group as `wo_a` reads them.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Role, Stage, Variant

STAGE = Stage(
    id="inverse_rope_quant",
    title="Inverse RoPE with NVFP4 quantisation in front of wo_a",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:inverse_rope_quant"),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:inverse_rope_quant"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """The stage, for the plugin loader."""
    return STAGE
