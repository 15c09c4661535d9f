"""The weighted sum of what the experts made of a token: the end of the expert layer.

One kernel gathers a token's rows, multiplies and adds in fp32 in the order of the token's slots, and rounds once.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

STAGE = Stage(
    id="moe_combine",
    title="Weighted sum of each token's expert outputs",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:moe_combine"),
        Variant(
            "fused",
            Role.FUSED,
            f"{__name__}.launch:moe_combine",
            archs=frozenset({Arch(90), Arch(100)}),
            needs=("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2"),
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:moe_combine"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Offers this stage to the core."""
    return STAGE
