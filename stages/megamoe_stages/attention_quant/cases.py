"""Inputs for attention_quant."""

from __future__ import annotations

from typing import Any

import torch

from megamoe.numerics.rope import inverse_frequencies, rope_tables
from megamoe.testing.cases import Bound, Case
from megamoe_stages.multi_cta_attention import cases as attention

_TABLE = 600  # positions in the tables
_FP32 = {"out": Bound(2e-3, "fp32 sums in another order move a value over a rounding border now and then")}


def make(
    generator: torch.Generator,
    *,
    rope_dim: int = 64,
    groups: int = 2,
    index_dtype: torch.dtype = torch.int64,
    scale_layout: str = "linear",
    shared: bool = False,
    **attention_params: Any,
) -> dict[str, Any]:
    """Attention's inputs, at random positions; `shared` makes the keys the values."""
    args = attention.make(generator, **attention_params)
    queries = args["q"].shape[0]
    cos, sin = rope_tables(_TABLE, inverse_frequencies(rope_dim, 10000.0))
    return {
        **args,
        "v": args["k"] if shared else args["v"],
        "positions": torch.randint(0, _TABLE, (queries,), generator=generator, dtype=index_dtype),
        "cos": cos,
        "sin": sin,
        "global_scale_enc": torch.tensor(2688.0 / 4.0),
        "groups": groups,
        "scale_layout": scale_layout,
    }


def _case(**params: Any) -> Case:
    return Case(make, params, bounds=attention.D512 if params["head_dim"] == 512 else {})


_V4: dict[str, Any] = {
    "heads": 64,
    "kv_heads": 1,
    "head_dim": 512,
    "groups": 8,
    "shared": True,
    "sink": True,
    "window": 128,
    "index_dtype": torch.int32,
}

CASES: dict[str, Case] = {
    "d64": _case(lq=[33], lk=[33], head_dim=64, rope_dim=16),
    "d128-128x4": _case(lq=[20, 0, 9], lk=[30, 3, 9], head_dim=128, scale_layout="128x4", sink=True),
    "d192-v128": _case(lq=[50], lk=[50], head_dim=192, v_dim=128, kv_heads=4, groups=4),
    "mask": _case(lq=[20], lk=[40], head_dim=128, mask=0.4, causal=False),
    "fp32": Case(make, {"lq": [33, 20], "lk": [50, 20], "dtype": "float32", "sink": True}, bounds=_FP32),
    "d512": _case(lq=[9], lk=[20], heads=2, kv_heads=1, head_dim=512, groups=1),
    "d512-separate": _case(lq=[7, 3], lk=[12, 3], heads=4, kv_heads=2, head_dim=512, window=9),
    "d512-128x4": _case(
        lq=[5, 0, 4],
        lk=[20, 4, 3],
        heads=6,
        kv_heads=1,
        head_dim=512,
        groups=3,
        shared=True,
        sink=True,
        scale_layout="128x4",
        index_dtype=torch.int32,
    ),
    "d512-full": _case(lq=[8], lk=[31], heads=4, kv_heads=1, head_dim=512, causal=False),
    "d512-more-queries-than-keys": _case(lq=[9, 3], lk=[4, 0], heads=4, kv_heads=1, head_dim=512, sink=True),
    "d512-no-queries": _case(lq=[0], lk=[7], head_dim=512),
    "d512-no-keys": _case(lq=[3], lk=[0], head_dim=512, sink=True),
    "d512-one-of-each": _case(lq=[1], lk=[1], heads=64, kv_heads=1, head_dim=512, groups=8, shared=True),
    "d512-entries-few-keys": _case(
        lq=[9, 4], lk=[41, 9], heads=4, kv_heads=1, head_dim=512, entries=5, mask=0.6, window=12, sink=True
    ),
    "d512-mask": _case(lq=[9, 4], lk=[90, 7], heads=4, kv_heads=2, head_dim=512, mask=0.4, causal=False, sink=True),
    "d512-entries": _case(
        lq=[20],
        lk=[90],
        heads=8,
        kv_heads=1,
        head_dim=512,
        entries=70,
        mask=0.3,
        window=12,
        sink=True,
        shared=True,
        scale_layout="128x4",
    ),
    "d512-window": Case(
        make,
        {"lq": [130], "lk": [300], **_V4, "heads": 16, "groups": 2, "scale_layout": "128x4"},
        bounds=attention.D512,
        bench=True,
    ),
    "flash-prefill": Case(make, {"lq": [4096], "lk": [4096], **_V4}, bounds=attention.D512, gpu_only=True, bench=True),
    "flash-prefill-128x4": Case(
        make,
        {"lq": [4096], "lk": [4096], **_V4, "scale_layout": "128x4"},
        bounds=attention.D512,
        gpu_only=True,
        bench=True,
    ),
    "flash-by-4": Case(
        make,
        {"lq": [4096], "lk": [4096 + 1024], **_V4, "entries": 1024, "mask": 1.0, "mask_ratio": 4, "mask_picks": 512},
        bounds=attention.D512,
        gpu_only=True,
        bench=True,
    ),
    "dense-d512": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 512, "groups": 2},
        bounds=attention.D512,
        gpu_only=True,
        bench=True,
    ),
}
