"""From a router's logits to the experts of every token: DeepSeek-V4's sqrtsoftplus scores, by top-k or by token id.

A selection bias takes part in the choice alone; the model's first layers look the experts up by token id. One launch,
where a composition of library calls takes ten.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

STAGE = Stage(
    id="moe_route",
    title="Experts and weights of every token from the router's logits",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:moe_route"),
        Variant(
            "fused",
            Role.FUSED,
            f"{__name__}.launch:moe_route",
            archs=frozenset({Arch(90), Arch(100)}),
            needs=("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2"),
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:moe_route"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Offers this stage to the core."""
    return STAGE
