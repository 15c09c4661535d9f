"""NVFP4-1.1: fuse FP4 quantisation into the SwiGLU epilogue.

The first GEMM of the experts computes gate and up together; its epilogue clamps, applies SwiGLU and writes NVFP4, so
the wide intermediate never reaches memory in 16 bits.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

_DSL = ("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2")

STAGE = Stage(
    id="swiglu_quant",
    title="Grouped GEMM with SwiGLU and FP4 quantisation in its epilogue",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:swiglu_quant"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:swiglu_quant",
            archs=frozenset({Arch(90)}),
            needs=_DSL,
            supports=f"{__name__}.gemm_limits:supports",
        ),
        Variant(
            "fallback_fused_act",
            Role.FALLBACK,
            f"{__name__}.fused_act:swiglu_quant",
            archs=frozenset({Arch(90), Arch(100)}),
            needs=_DSL,
            rank=1,
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:swiglu_quant"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Offers this stage to the core."""
    return STAGE
