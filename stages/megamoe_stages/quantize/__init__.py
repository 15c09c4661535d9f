"""NVFP4 quantisation of a tensor: the foundation under every item that writes FP4.

Each 16 elements along the last dim get one E4M3 scale, the tensor (or each batch entry, or each part of its rows) one
fp32 scale. Rounding is to nearest even, once, from fp32, so every variant gives the same bytes.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

_DSL = ("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2")

STAGE = Stage(
    id="quantize",
    title="NVFP4 quantisation of a tensor",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:quantize"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:quantize",
            archs=frozenset({Arch(90)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant(
            "fused_sm100",
            Role.FUSED,
            f"{__name__}.sm100:quantize",
            archs=frozenset({Arch(100)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:quantize"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Declares the stage."""
    return STAGE
