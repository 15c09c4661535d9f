"""Inputs for multi_cta_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megamoe.testing.cases import Bound, Case

_FP32 = {"out": Bound(4e-7, "fp32 sums in another order"), "lse": Bound(3e-7, "fp32 sums in another order")}
D512 = {"lse": Bound(6e-7, "tensor cores cut off what they add, 32 times in a score of 512 dims; seen 4.5e-7")}
_FP16 = {"out": Bound(7e-4, "probabilities and output are rounded to fp16")}


def make(
    generator: torch.Generator,
    *,
    lq: Sequence[int],
    lk: Sequence[int],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    v_dim: int | None = None,
    dtype: str = "bfloat16",
    sink: bool = False,
    mask: float | None = None,
    mask_columns: int | None = None,
    mask_ratio: int | None = None,
    mask_picks: int | None = None,
    causal: bool = True,
    window: int | None = None,
    entries: int = 0,
    gain: float = 1.0,
) -> dict[str, Any]:
    """Normal q, k and v; `gain` widens the scores, `mask` is the share of keys that a mask lets through.

    DeepSeek-V4's compressed entries: query t of the call sees those before (t + 1) // `mask_ratio`, and of them
    `mask_picks` at most, as its indexer picks.
    """
    queries, keys = sum(lq), sum(lk)
    args: dict[str, Any] = {
        "q": (torch.randn(queries, heads, head_dim, generator=generator) * gain).to(getattr(torch, dtype)),
        "k": torch.randn(keys, kv_heads, head_dim, generator=generator).to(getattr(torch, dtype)),
        "v": torch.randn(keys, kv_heads, v_dim or head_dim, generator=generator).to(getattr(torch, dtype)),
        "cu_seqlens_q": torch.tensor([0, *lq]).cumsum(0).int(),
        "cu_seqlens_k": torch.tensor([0, *lk]).cumsum(0).int(),
        "softmax_scale": head_dim**-0.5,
        "causal": causal,
        "window": window,
    }
    if entries:
        args["entries"] = entries
    if sink:
        args["sink"] = torch.randn(heads, generator=generator) * 2
    if mask is not None:
        columns = mask_columns if mask_columns is not None else entries or max(lk)
        chances = torch.rand(queries, columns, generator=generator)
        if mask_ratio is not None:
            ready = (torch.arange(queries)[:, None] + 1) // mask_ratio
            chances = torch.where(torch.arange(columns) < ready, chances, 2.0)
        if mask_picks is not None and mask_picks < columns:
            chances = torch.where(chances <= chances.kthvalue(mask_picks, dim=1, keepdim=True).values, chances, 2.0)
        args["mask"] = chances < mask
    return args


CASES: dict[str, Case] = {
    "causal-d64": Case(make, {"lq": [33], "lk": [33]}),
    "causal-d128-gqa8": Case(make, {"lq": [64], "lk": [64], "heads": 8, "kv_heads": 1, "head_dim": 128}, bench=True),
    "d192-v128": Case(make, {"lq": [50], "lk": [50], "head_dim": 192, "v_dim": 128, "kv_heads": 4}),
    "d192-v128-mask": Case(
        make,
        {"lq": [50, 9], "lk": [220, 30], "head_dim": 192, "v_dim": 128, "kv_heads": 4, "mask": 0.4, "sink": True},
    ),
    "d256": Case(make, {"lq": [17], "lk": [40], "head_dim": 256}),
    "d512-sink-window": Case(
        make,
        {"lq": [160], "lk": [200], "heads": 8, "kv_heads": 1, "head_dim": 512, "sink": True, "window": 128},
        bounds=D512,
        bench=True,
    ),
    "d512": Case(make, {"lq": [9, 3], "lk": [50, 3], "kv_heads": 1, "head_dim": 512, "sink": True}, bounds=D512),
    "d512-window": Case(
        make, {"lq": [30], "lk": [50], "heads": 2, "kv_heads": 1, "head_dim": 512, "window": 9}, bounds=D512
    ),
    "d512-more-queries-than-keys": Case(make, {"lq": [9, 3], "lk": [4, 0], "head_dim": 512, "sink": True}, bounds=D512),
    "d512-mask-few-keys": Case(
        make,
        {"lq": [9, 3], "lk": [44, 20], "heads": 2, "kv_heads": 1, "head_dim": 512, "mask": 0.4, "causal": False},
        bounds=D512,
    ),
    "d512-entries-few-keys": Case(
        make,
        {
            "lq": [9, 4, 2],
            "lk": [41, 9, 3],
            "heads": 3,
            "kv_heads": 1,
            "head_dim": 512,
            "entries": 5,
            "mask": 0.6,
            "window": 12,
            "sink": True,
        },
        bounds=D512,
    ),
    "d512-mask": Case(
        make,
        {"lq": [40, 5], "lk": [130, 21], "mask": 0.3, "head_dim": 512, "causal": False, "sink": True},
        bounds=D512,
    ),
    "d512-mask-causal-window": Case(
        make, {"lq": [40], "lk": [160], "mask": 0.5, "kv_heads": 1, "head_dim": 512, "window": 90}, bounds=D512
    ),
    "d512-mask-narrow": Case(
        make,
        {"lq": [8, 8], "lk": [90, 10], "mask": 0.7, "mask_columns": 70, "head_dim": 512, "causal": False},
        bounds=D512,
    ),
    "d512-mask-nothing": Case(make, {"lq": [8], "lk": [70], "mask": 0.0, "head_dim": 512, "sink": True}, bounds=D512),
    "d512-mask-one-key": Case(
        make, {"lq": [7, 60], "lk": [1, 1], "mask": 0.5, "heads": 6, "head_dim": 512, "causal": False}, bounds=D512
    ),
    "d512-compressed-by-4": Case(
        make,
        {
            "lq": [300],
            "lk": [75],
            "heads": 8,
            "kv_heads": 1,
            "head_dim": 512,
            "mask": 1.0,
            "mask_ratio": 4,
            "mask_picks": 16,
            "causal": False,
        },
        bounds=D512,
    ),
    "d512-compressed-by-128": Case(
        make,
        {
            "lq": [300],
            "lk": [2],
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 512,
            "mask": 1.0,
            "mask_ratio": 128,
            "causal": False,
        },
        bounds=D512,
    ),
    "entries": Case(make, {"lq": [40, 6, 3], "lk": [60, 20, 4], "entries": 9, "mask": 0.5, "window": 20, "sink": True}),
    "entries-all": Case(make, {"lq": [5, 30], "lk": [12, 60], "entries": 15}),
    "d512-entries": Case(
        make,
        {
            "lq": [40, 6, 3],
            "lk": [100, 25, 4],
            "head_dim": 512,
            "entries": 9,
            "mask": 0.5,
            "window": 20,
            "sink": True,
        },
        bounds=D512,
    ),
    "d512-entries-all": Case(
        make, {"lq": [5, 30], "lk": [12, 160], "kv_heads": 1, "head_dim": 512, "entries": 70}, bounds=D512
    ),
    "d512-entries-no-columns": Case(
        make, {"lq": [7], "lk": [80], "head_dim": 512, "entries": 70, "mask": 1.0, "mask_columns": 0}, bounds=D512
    ),
    "d512-v4-by-4": Case(
        make,
        {
            "lq": [300],
            "lk": [375],
            "heads": 8,
            "kv_heads": 1,
            "head_dim": 512,
            "entries": 75,
            "mask": 1.0,
            "mask_ratio": 4,
            "mask_picks": 16,
            "window": 128,
            "sink": True,
        },
        bounds=D512,
    ),
    "one-of-each": Case(make, {"lq": [1], "lk": [1]}),
    "decode-like": Case(make, {"lq": [1, 1, 1], "lk": [700, 1, 33], "sink": True}),
    "varlen": Case(make, {"lq": [5, 0, 127, 1], "lk": [9, 4, 127, 300], "sink": True, "window": 50}),
    "more-queries-than-keys": Case(make, {"lq": [9, 3], "lk": [4, 0], "sink": True}),
    "no-queries": Case(make, {"lq": [0], "lk": [7]}),
    "no-keys": Case(make, {"lq": [3], "lk": [0], "sink": True}),
    "no-sequences": Case(make, {"lq": [], "lk": []}),
    "full": Case(make, {"lq": [20, 31], "lk": [45, 31], "causal": False}),
    "full-window": Case(make, {"lq": [20], "lk": [45], "causal": False, "window": 7}),
    "window-one": Case(make, {"lq": [20], "lk": [20], "window": 1}),
    "mask": Case(make, {"lq": [40, 20], "lk": [60, 21], "mask": 0.3, "causal": False, "sink": True}),
    "mask-causal-window": Case(make, {"lq": [40], "lk": [60], "mask": 0.5, "window": 9}),
    "mask-narrow": Case(make, {"lq": [8, 8], "lk": [30, 10], "mask": 0.7, "mask_columns": 20, "causal": False}),
    "mask-nothing": Case(make, {"lq": [8], "lk": [30], "mask": 0.0, "sink": True}),
    "mask-no-columns": Case(make, {"lq": [4], "lk": [6], "mask": 1.0, "mask_columns": 0}),
    "many-tiles": Case(make, {"lq": [600], "lk": [1100], "heads": 2, "kv_heads": 1, "window": 900, "sink": True}),
    "fp16": Case(make, {"lq": [33, 20], "lk": [50, 20], "dtype": "float16", "sink": True}, bounds=_FP16),
    "d512-fp16": Case(
        make,
        {"lq": [33, 20], "lk": [90, 20], "dtype": "float16", "head_dim": 512, "sink": True},
        bounds={**D512, **_FP16},
    ),
    "d512-fp16-entries": Case(
        make,
        {
            "lq": [20, 9],
            "lk": [130, 31],
            "dtype": "float16",
            "head_dim": 512,
            "entries": 30,
            "mask": 0.5,
            "window": 40,
        },
        bounds={**D512, **_FP16},
    ),
    "fp32": Case(make, {"lq": [33, 20], "lk": [50, 20], "dtype": "float32", "sink": True}, bounds=_FP32),
    "fp32-wide-scores": Case(
        make, {"lq": [70], "lk": [90], "dtype": "float32", "gain": 20.0, "sink": True}, bounds=_FP32
    ),
    "rows-4001": Case(make, {"lq": [4001], "lk": [130], "heads": 1, "kv_heads": 1, "causal": False}),
    "flash-prefill": Case(
        make,
        {"lq": [4096], "lk": [4096], "heads": 64, "kv_heads": 1, "head_dim": 512, "sink": True, "window": 128},
        bounds=D512,
        gpu_only=True,
        bench=True,
    ),
    "dense-d128": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 128},
        gpu_only=True,
        bench=True,
    ),
    "dense-d64": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 64},
        gpu_only=True,
        bench=True,
    ),
    "dense-d192-v128": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 192, "v_dim": 128},
        gpu_only=True,
        bench=True,
    ),
    "dense-d256": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 256},
        gpu_only=True,
        bench=True,
    ),
    "full-d128": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 128, "causal": False},
        gpu_only=True,
        bench=True,
    ),
    "gqa-d128": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 32, "kv_heads": 4, "head_dim": 128},
        gpu_only=True,
        bench=True,
    ),
    "varlen-d128": Case(
        make,
        {
            "lq": [1000, 3000, 512, 4096, 2048, 777, 5000, 64],
            "lk": [1000, 3000, 512, 4096, 2048, 777, 5000, 64],
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
        },
        gpu_only=True,
        bench=True,
    ),
    "batch-d128": Case(
        make,
        {"lq": [1024] * 16, "lk": [1024] * 16, "heads": 16, "kv_heads": 16, "head_dim": 128},
        gpu_only=True,
        bench=True,
    ),
    "chunk-d128": Case(
        make,
        {"lq": [512], "lk": [16384], "heads": 32, "kv_heads": 8, "head_dim": 128},
        gpu_only=True,
        bench=True,
    ),
    "dense-d512-mha": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 16, "head_dim": 512},
        bounds=D512,
        gpu_only=True,
        bench=True,
    ),
    "dense-d512": Case(
        make,
        {"lq": [8192], "lk": [8192], "heads": 16, "kv_heads": 1, "head_dim": 512},
        bounds=D512,
        gpu_only=True,
        bench=True,
    ),
    "flash-by-4": Case(
        make,
        {
            "lq": [4096],
            "lk": [4096 + 1024],
            "heads": 64,
            "kv_heads": 1,
            "head_dim": 512,
            "entries": 1024,
            "mask": 1.0,
            "mask_ratio": 4,
            "mask_picks": 512,
            "window": 128,
            "sink": True,
        },
        bounds=D512,
        gpu_only=True,
        bench=True,
    ),
}
