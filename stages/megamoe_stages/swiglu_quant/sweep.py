"""What `megamoe bench swiglu_quant --sweep` measures: activation and quantisation, the part that is bound by memory.

The GEMM before it is the same in `fallback` and `fallback_fused_act`, and takes most of their time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.testing.cases import Bound, Case
from megamoe.testing.roofline import Subject
from megamoe_stages.quantize.fallback import quantize
from megamoe_stages.quantize.reference import quantize as quantize_reference
from megamoe_stages.swiglu_quant import fallback, fused_act

_LIMIT = 10.0


def make(generator: Generator, *, rows: int, intermediate: int, scale_layout: str) -> dict[str, Any]:
    """Arguments of `fused_act.activate`: gate and up of a few units, a scale that saturates no block."""
    gate_up = 2 * torch.randn(rows, 2 * intermediate, generator=generator)
    return {
        "gate_up": gate_up.bfloat16(),
        "global_scale_enc": torch.tensor(23.7),
        "scale_layout": scale_layout,
    }


def fused(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> NVFP4Tensor:
    """One launch."""
    return fused_act.activate(gate_up, global_scale_enc, limit=_LIMIT, scale_layout=scale_layout)


def separate(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> NVFP4Tensor:
    """What the fallback does after its GEMM."""
    return quantize(fallback.activate(gate_up, None, _LIMIT, "gate_up"), global_scale_enc, scale_layout=scale_layout)


def reference(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> NVFP4Tensor:
    """The definition, from gate and up as they were stored."""
    y = fallback.activate(gate_up, None, _LIMIT, "gate_up")
    return quantize_reference(y, global_scale_enc, scale_layout=scale_layout)


def bytes_moved(gate_up: Tensor, global_scale_enc: Tensor, *, scale_layout: str) -> int:
    """Gate and up read, half a byte a code and a byte a block scale written (padding left out)."""
    results = gate_up.numel() // 2
    return gate_up.numel() * gate_up.element_size() + results // 2 + results // 16


SUBJECT = Subject(
    cases={
        f"{name} {rows}x{half} {layout}": Case(
            make, {"rows": rows, "intermediate": half, "scale_layout": layout}, gpu_only=True
        )
        for name, half in (("flash", 2048), ("pro", 3072))
        for layout in ("linear", "128x4")
        for rows in (1, 64, 4096, 8192, 49152)
    },
    bytes_moved=bytes_moved,
    expected=reference,
    fallback=separate,
    variants=lambda inputs: {"fused_act": fused, "fallback": separate},
    bounds={"out": Bound(3e-3, "`exp` differs by an ulp or two, which moves one code in 10^4 by a step")},
)
