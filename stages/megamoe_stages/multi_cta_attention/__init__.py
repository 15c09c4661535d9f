"""D2: attention of many heads by many CTAs, head_dim up to 512.

Sequences of different lengths lie back to back (cu_seqlens). Grouped queries, values narrower or wider than keys,
causal and sliding-window masks, a mask of one's own, attention sinks, and the log-sum-exp as a second output (D2.9), so
that results over disjoint sets of keys can be merged.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

STAGE = Stage(
    id="multi_cta_attention",
    title="Varlen attention with sinks and LSE, head_dim up to 512",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:multi_cta_attention"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:multi_cta_attention",
            archs=frozenset({Arch(90)}),
            needs=("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2"),
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:multi_cta_attention"),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Declares the stage."""
    return STAGE
