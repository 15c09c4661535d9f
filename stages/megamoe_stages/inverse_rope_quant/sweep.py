"""What `megamoe bench inverse_rope_quant --sweep` measures: the sizes of the cases, and Pro in 128x4 tiles."""

from __future__ import annotations

from dataclasses import replace

from megamoe.testing import roofline
from megamoe_stages.inverse_rope_quant import STAGE
from megamoe_stages.inverse_rope_quant.cases import SWEEP

_TILED = {
    name.replace("linear", "128x4"): replace(case, params={**case.params, "scale_layout": "128x4"})
    for name, case in SWEEP.items()
    if name.startswith("pro") and name.endswith("linear")
}

SUBJECT = replace(roofline.bound_by_memory(STAGE), cases={**SWEEP, **_TILED})
