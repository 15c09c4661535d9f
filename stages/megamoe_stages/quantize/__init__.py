"""NVFP4 quantisation of a tensor: the foundation under every item that writes FP4.

Each 16 elements along the last dim get one E4M3 scale, the tensor (or each batch entry, or each part of its rows) one
fp32 scale. Rounding is to nearest even, once, from fp32, so every variant gives the same bytes.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Role, Stage, Variant

STAGE = Stage(
    id="quantize",
    title="NVFP4 quantisation of a tensor",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:quantize"),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:quantize"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Declares the stage."""
    return STAGE
