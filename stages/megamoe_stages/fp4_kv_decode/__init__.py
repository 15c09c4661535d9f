"""NVFP4-2: decode attention over a paged NVFP4 KV cache.

Quantises the new tokens into their pages, then attends: grouped queries or one shared head whose keys are the values
(MLA style, head_dim up to 512), a sliding window, or the tokens an indexer picked for each query, with sinks, split
over the keys, and the log-sum-exp as a second output so that results over several caches can be merged.
"""

from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, Role, Stage, Variant

STAGE = Stage(
    id="fp4_kv_decode",
    title="Decode attention over a paged NVFP4 KV cache, appending to it",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.reference:fp4_kv_decode"),
        Variant(
            "fused_sm90",
            Role.FUSED,
            f"{__name__}.sm90:fp4_kv_decode",
            archs=frozenset({Arch(90)}),
            needs=("nvidia-cutlass-dsl>=4.8,<4.9", "apache-tvm-ffi>=0.1.11,<0.2"),
            supports=f"{__name__}.limits:supports",
        ),
        Variant("fallback", Role.FALLBACK, f"{__name__}.fallback:fp4_kv_decode"),
    ),
    mutates=("k_codes", "k_scales", "v_codes", "v_scales"),
)


@hookimpl
def megamoe_stage() -> Stage:
    """Declares the stage."""
    return STAGE
