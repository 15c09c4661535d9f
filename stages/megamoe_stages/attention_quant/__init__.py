"""Attention with an FP4 epilogue: inverse RoPE and NVFP4 quantisation of the output, group-major as `wo_a` reads it.

Spans D2 and NVFP4-1.2: what lies between them, the output in bf16, is never written. The output is quantised from the
fp32 values that attention has in registers, after the rotation has been taken out of its last dims.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

_DSL = ("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2")

STAGE = Stage(
    id="attention_quant",
    title="Attention with inverse RoPE and NVFP4 quantisation in its epilogue",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:attention_quant"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:attention_quant",
            archs=frozenset({Arch(90)}),
            needs=_DSL,
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:attention_quant"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Declares the stage."""
    return STAGE
