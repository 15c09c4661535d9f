"""Inputs that `moe_permute` is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from megamoe.testing.cases import Case

_DTYPES = {"int32": torch.int32, "int64": torch.int64}


def make(
    generator: Generator,
    *,
    tokens: int,
    top_k: int,
    experts: int,
    dtype: str = "int32",
    routing: str = "uniform",
) -> dict[str, Any]:
    """Arguments for `moe_permute`.

    Args:
        generator: Source of all randomness.
        tokens: T.
        top_k: k.
        experts: E.
        dtype: Of the indices.
        routing: "uniform": k different experts a token, as a router gives them; "repeated": any k, some of them equal;
            "one": all visits go to the last expert but one; "skewed": nine visits of ten go to four experts.
    """
    if routing == "uniform":
        indices = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    elif routing == "one":
        indices = torch.full((tokens, top_k), max(experts - 2, 0))
    else:
        indices = torch.randint(experts, (tokens, top_k), generator=generator)
        if routing == "skewed":
            hot = torch.rand(tokens, top_k, generator=generator) < 0.9
            indices = torch.where(hot, indices % 4 + experts - 4, indices)
    return {"indices": indices.to(_DTYPES[dtype]).contiguous(), "experts": experts}


def _flash(tokens: int, *, gpu_only: bool = True, bench: bool = True, **changes: Any) -> Case:
    sizes = {"tokens": tokens, "top_k": 6, "experts": 256, **changes}
    return Case(make, sizes, gpu_only=gpu_only, bench=bench)


CASES: dict[str, Case] = {
    "one-token": _flash(1, gpu_only=False, bench=False),
    "one-expert": Case(make, {"tokens": 33, "top_k": 1, "experts": 1}),
    "no-tokens": Case(make, {"tokens": 0, "top_k": 6, "experts": 16}),
    "fewer-visits-than-experts": Case(make, {"tokens": 5, "top_k": 8, "experts": 512, "dtype": "int64"}),
    "repeated-int64": Case(make, {"tokens": 127, "top_k": 6, "experts": 16, "dtype": "int64", "routing": "repeated"}),
    "all-to-one": Case(make, {"tokens": 200, "top_k": 6, "experts": 16, "routing": "one"}),
    "skewed": Case(make, {"tokens": 701, "top_k": 8, "experts": 512, "routing": "skewed"}),
    "odd-k": Case(make, {"tokens": 171, "top_k": 3, "experts": 100, "dtype": "int64"}),
    "4095-visits": Case(make, {"tokens": 1365, "top_k": 3, "experts": 130}),
    "4097-visits": Case(make, {"tokens": 241, "top_k": 17, "experts": 384, "dtype": "int64"}),
    "flash-64": _flash(64, gpu_only=False, dtype="int64"),
    "flash-512": _flash(512, gpu_only=False),
    "pro-2001": _flash(2001, gpu_only=False, bench=False, experts=384),
    "flash-2048": _flash(2048),
    "flash-8192": _flash(8192),
    "top-8-8192": _flash(8192, top_k=8, experts=512, dtype="int64"),
    "skewed-8191": _flash(8191, routing="skewed", bench=False),
    "prefill-65537": _flash(65537, routing="repeated", bench=False),
}
