"""The first size of every sweep: its inputs are made on the GPU, what is timed is right, and all get a figure."""

from __future__ import annotations

import pytest

from megamoe.runtime import runtime
from megamoe.testing import roofline

pytestmark = pytest.mark.gpu
SWEPT = [
    ("attention_quant", None),
    ("fp4_kv_decode", None),
    ("grouped_gemm", None),
    ("inverse_rope_quant", None),
    ("mhc_quant", None),
    ("moe_combine", None),
    ("multi_cta_attention", None),
    ("quantize", None),
    ("swiglu_quant", None),
    ("swiglu_quant", "experts"),
]


@pytest.mark.parametrize(("name", "part"), SWEPT)
def test_the_first_size_is_measured(name: str, part: str | None) -> None:
    stage = runtime().stages[name]
    point = next(roofline.sweep(stage, part, compile_seconds=0.0))
    assert point.case == next(iter(roofline.subject_of(stage, part).cases))
    assert point.bytes > 0
    assert all(us > 0 for us in point.us.values())
    assert 0 < point.share("fallback") < 1.5
