"""Grouped GEMM over NVFP4 weights: each expert multiplies its own run of rows.

The foundation of the other stages: the second GEMM of the experts, `wo_a` as one expert a group, `wo_b` as one expert.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

STAGE = Stage(
    id="grouped_gemm",
    title="Grouped GEMM over NVFP4 weights",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:grouped_gemm"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:grouped_gemm",
            archs=frozenset({Arch(90)}),
            needs=("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2"),
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:grouped_gemm"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Offers this stage to the core."""
    return STAGE
