"""Inverse RoPE and NVFP4 quantisation in front of the grouped output projection (roadmap item NVFP4-1.2).

In DeepSeek-V4 the values carry the rotation of their key, so attention's output is turned back at the query's position
before `wo_a`. Done here in one pass: read the heads, turn, quantise, and write group after group as `wo_a` reads them.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

_DSL = ("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2")

STAGE = Stage(
    id="inverse_rope_quant",
    title="Inverse RoPE with NVFP4 quantisation in front of wo_a",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:inverse_rope_quant"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:inverse_rope_quant",
            archs=frozenset({Arch(90)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant(
            "fused_sm100",
            Role.FUSED,
            f"{__name__}.sm100:inverse_rope_quant",
            archs=frozenset({Arch(100)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:inverse_rope_quant"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """The stage, for the plugin loader."""
    return STAGE
