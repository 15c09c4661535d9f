"""A stage whose fused variants each have one fault, to see that verification finds it. It doubles its input."""

from __future__ import annotations

from megamoe.hookspecs import hookimpl
from megamoe.model import Role, Stage, Variant

FAULTS = (
    "good", "past_the_end", "before_the_start", "unwritten", "nondeterministic", "mutates", "dtype", "shape", "strides",
    "inexact", "nans", "other_type", "raises", "raises_when_timed", "exits", "segfaults", "hangs",
)  # fmt: skip

STAGE = Stage(
    id="faulty_double",
    title="Twice the input",
    contract=f"{__name__}.contract",
    cases=f"{__name__}.cases:CASES",
    variants=(
        Variant("reference", Role.REFERENCE, f"{__name__}.variants:reference"),
        Variant("fallback", Role.FALLBACK, f"{__name__}.variants:fallback"),
        *(
            Variant(fault, Role.FUSED, f"{__name__}.variants:{fault}", supports=f"{__name__}.limits:supports")
            for fault in FAULTS
        ),
    ),
)


@hookimpl
def megamoe_stage() -> Stage:
    return STAGE
