"""What `megamoe bench multi_cta_attention --sweep` measures: causal prefill of one sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megamoe.testing import rivals, roofline
from megamoe.testing.cases import Case
from megamoe.testing.roofline import Call, Subject
from megamoe_stages.multi_cta_attention import STAGE, cases, contract
from megamoe_stages.multi_cta_attention.reference import multi_cta_attention

LENGTHS = (1024, 4096, 8192)
HEADS = 16
V4: dict[str, Any] = {"heads": 64, "kv_heads": 1, "head_dim": 512, "window": 128, "sink": True}


def case(length: int, **params: Any) -> Case:
    """One sequence of `length`, every query head with keys of its own unless told otherwise."""
    given = {"lq": [length], "lk": [length], "heads": HEADS, "kv_heads": HEADS, **params}
    return Case(cases.make, given, gpu_only=True)


def calls(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dict[str, Call]:
    """The variants; torch's attention where it computes the same."""
    found = roofline.variants(STAGE, q=q, k=k, v=v, **options)
    if options["window"] is None and q.shape[1] == k.shape[1]:
        by_head = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, L, D)
        others = rivals.sdpa(*by_head, scale=options["softmax_scale"], causal=options["causal"])
        found |= {name: rows_of(call) for name, call in others.items()}
    return found


def rows_of(call: Call) -> Call:
    """(1, heads, L, Dv) to (L, heads, Dv)."""
    return lambda: call()[0].transpose(0, 1)


def pairs(length: int, window: int | None, causal: bool) -> int:
    """Pairs of a query and a key that it sees; what lies behind the query takes as many again but for its own key."""
    seen = min(window or length, length)
    before = length * seen - seen * (seen - 1) // 2
    return before if causal else before + length * (length - 1) // 2


def flops(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, causal: bool, **rest: Any) -> int:
    """2 (D + Dv) for each visible pair and head."""
    length, heads, head_dim = q.shape
    return 2 * heads * pairs(length, window, causal) * (head_dim + v.shape[2])


def bytes_moved(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> int:
    """q, k, v and the output, two bytes a value, and the lse."""
    rows = q.shape[0] * q.shape[1]
    return 2 * (q.numel() + k.numel() + v.numel() + rows * v.shape[2]) + 4 * rows


_DIMS: dict[str, dict[str, int]] = {
    "d64": {"head_dim": 64},
    "d128": {"head_dim": 128},
    "d192/128": {"head_dim": 192, "v_dim": 128},
    "d256": {"head_dim": 256},
    "d512": {"head_dim": 512},
}

SUBJECT = Subject(
    cases={
        **{f"{name} causal L {length}": case(length, **dims) for name, dims in _DIMS.items() for length in LENGTHS},
        **{f"d512 V4, window 128, L {length}": case(length, **V4) for length in LENGTHS if length <= 4096},
    },
    bytes_moved=bytes_moved,
    flops=flops,
    expected=multi_cta_attention,
    calls=calls,
    bounds={**contract.BOUNDS, **cases.D512},
)
