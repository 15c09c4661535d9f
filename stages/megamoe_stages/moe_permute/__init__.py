"""Where each visit of a token to an expert goes, so that an expert's rows lie together.

What stands between the router and the grouped GEMMs: a stable counting sort by expert, with no number read back by the
host.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

STAGE = Stage(
    id="moe_permute",
    title="Order of rows in which the experts see the tokens",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:moe_permute"),
        Variant(
            "fused",
            Role.FUSED,
            f"{__name__}.launch:moe_permute",
            archs=frozenset({Arch(90), Arch(100)}),
            needs=("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2"),
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:moe_permute"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Offers this stage to the core."""
    return STAGE
