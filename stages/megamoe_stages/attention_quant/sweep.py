"""What `megamoe bench attention_quant --sweep` measures: the FP4 epilogue beside the pair of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from megamoe.model import Role
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.plugins import load
from megamoe.testing import roofline
from megamoe.testing.cases import Case
from megamoe.testing.roofline import Call, Subject
from megamoe_stages import inverse_rope_quant, multi_cta_attention
from megamoe_stages.attention_quant import STAGE, cases, contract
from megamoe_stages.attention_quant.contract import QuantizedAttention
from megamoe_stages.attention_quant.reference import attention_quant
from megamoe_stages.multi_cta_attention import cases as attention_cases
from megamoe_stages.multi_cta_attention import sweep as attention


class Lse(NamedTuple):
    """The one result that attention alone shares."""

    lse: Tensor


def calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    global_scale_enc: Tensor,
    groups: int,
    scale_layout: str,
    **options: Any,
) -> dict[str, Call]:
    """The variants; the two fused kernels that they stand for, one after the other; attention's alone."""
    rest = {"positions": positions, "cos": cos, "sin": sin, "global_scale_enc": global_scale_enc}
    end = {**rest, "groups": groups, "scale_layout": scale_layout}
    found = roofline.variants(STAGE, q=q, k=k, v=v, **end, **options)
    for name, call in roofline.variants(multi_cta_attention.STAGE, (Role.FUSED,), q=q, k=k, v=v, **options).items():
        turn = load(f"{inverse_rope_quant.__name__}.sm90:inverse_rope_quant")

        def pair(first: Call = call, turn: Callable[..., NVFP4Tensor] = turn) -> QuantizedAttention:
            o, lse = first()
            return QuantizedAttention(turn(o, **end), lse)

        found[f"pair of {name}"] = pair

        def alone(first: Call = call) -> Lse:
            return Lse(first().lse)

        found[f"attention alone, {name}"] = alone
    return found


def bytes_moved(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> int:
    """As attention's, with half a byte a code and a byte a block scale for its output."""
    results = q.shape[0] * q.shape[1] * v.shape[2]
    return attention.bytes_moved(q, k, v) - 2 * results + results * 9 // 16


def _case(length: int, **params: Any) -> Case:
    given = {"lq": [length], "lk": [length], "head_dim": 512, **params}
    return Case(cases.make, given, gpu_only=True)


_LAYERS: dict[str, dict[str, Any]] = {
    "causal, 16 heads": {"heads": 16, "kv_heads": 16, "groups": 2},
    "V4, 64 heads": {**attention.V4, "window": None, "shared": True, "groups": 8},
    "V4, 64 heads, window 128": {**attention.V4, "shared": True, "groups": 8},
}

SUBJECT = Subject(
    cases={
        f"{name}, L {length}": _case(length, **params) for name, params in _LAYERS.items() for length in (1024, 4096)
    }
    | {"causal, 16 heads, L 8192": _case(8192, **_LAYERS["causal, 16 heads"])},
    bytes_moved=bytes_moved,
    flops=lambda q, k, v, *, window, causal, **rest: attention.flops(q, k, v, window=window, causal=causal),
    expected=attention_quant,
    calls=calls,
    bounds={**contract.BOUNDS, **attention_cases.D512},
)
