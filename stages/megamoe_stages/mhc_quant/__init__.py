"""mHC post, collapse, RMSNorm and NVFP4 quantisation at the border of two sublayers (roadmap item NVFP4-1.3).

A sublayer's output is mixed into the residual streams, the next site's weights come out of the new streams, and the
next sublayer's input is collapsed, normalised and quantised. The streams themselves are not: no GEMM over NVFP4 weights
reads them.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

_DSL = ("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2")

STAGE = Stage(
    id="mhc_quant",
    title="mHC post, collapse and RMSNorm with NVFP4 quantisation of the next sublayer's input",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:mhc_quant"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:mhc_quant",
            archs=frozenset({Arch(90)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant(
            "fused_sm100",
            Role.FUSED,
            f"{__name__}.sm100:mhc_quant",
            archs=frozenset({Arch(100)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:mhc_quant"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """The stage, for the plugin loader."""
    return STAGE
