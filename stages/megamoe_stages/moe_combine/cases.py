"""Inputs that `moe_combine` is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from megamoe.testing.cases import Bound, Case

_FILLS = {
    "special": (2.0**-140, -(2.0**-127), 0.0, -0.0, 3.0e38),
    "nonfinite": (torch.nan, torch.inf, -torch.inf),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make(
    generator: Generator,
    *,
    tokens: int,
    top_k: int,
    hidden: int,
    a: str = "bf16",
    dtype: str | None = None,
    values: str = "normal",
) -> dict[str, Any]:
    """Arguments for `moe_combine`: each row belongs to one visit, in random order.

    Args:
        generator: Source of all randomness.
        tokens: T.
        top_k: k.
        hidden: H.
        a: Dtype of the outputs: "bf16", "fp16" or "fp32".
        dtype: Of the result.
        values: "normal"; "cancelling": the slots of a token are large and nearly cancel, so the order of the sum shows;
            "special": subnormals, zeros of both signs, numbers so large that sums overflow, and weights of 0;
            "nonfinite": NaN, infinities and weights of 0.
    """
    visits = tokens * top_k
    rows = torch.randperm(visits, generator=generator).int().view(tokens, top_k)
    outputs = torch.randn(visits, hidden, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.01
    if values == "cancelling":
        sign = 1 - 2 * (torch.arange(top_k) % 2)
        outputs[rows.flatten().long()] = (
            (outputs[rows[:, :1].long()] * 1000 + torch.randn(tokens, top_k, hidden, generator=generator))
            .mul(sign[:, None])
            .flatten(0, 1)
        )
    elif values in _FILLS:
        fills = torch.tensor(_FILLS[values])
        picked = fills[torch.randint(len(fills), outputs.shape, generator=generator)]
        outputs = torch.where(torch.rand(outputs.shape, generator=generator) < 0.2, picked, outputs)
        weights[::3, 0] = 0
    return {"outputs": outputs.to(_DTYPES[a]), "rows": rows, "weights": weights, "dtype": dtype}


def _flash(tokens: int, hidden: int = 4096) -> Case:
    return Case(make, {"tokens": tokens, "top_k": 6, "hidden": hidden}, gpu_only=True, bench=True)


_NAN = {"out": Bound(2**-40, "the bits of a NaN are the machine's own; everything else is equal, which this asks for")}

CASES: dict[str, Case] = {
    "bf16": Case(make, {"tokens": 33, "top_k": 6, "hidden": 136}),
    "bf16-fp32": Case(make, {"tokens": 33, "top_k": 6, "hidden": 136, "dtype": "float32"}),
    "bf16-fp16": Case(make, {"tokens": 17, "top_k": 8, "hidden": 64, "dtype": "float16"}),
    "fp16": Case(make, {"tokens": 33, "top_k": 4, "hidden": 136, "a": "fp16"}),
    "fp16-bf16": Case(make, {"tokens": 5, "top_k": 4, "hidden": 8, "a": "fp16", "dtype": "bfloat16"}),
    "fp16-fp32": Case(make, {"tokens": 5, "top_k": 4, "hidden": 8, "a": "fp16", "dtype": "float32"}),
    "fp32": Case(make, {"tokens": 33, "top_k": 6, "hidden": 72, "a": "fp32"}),
    "fp32-bf16": Case(make, {"tokens": 33, "top_k": 6, "hidden": 72, "a": "fp32", "dtype": "bfloat16"}),
    "fp32-fp16": Case(make, {"tokens": 33, "top_k": 7, "hidden": 72, "a": "fp32", "dtype": "float16"}),
    "one-slot": Case(make, {"tokens": 9, "top_k": 1, "hidden": 64}),
    "eleven-slots": Case(make, {"tokens": 9, "top_k": 11, "hidden": 64}),
    "sixteen-slots": Case(make, {"tokens": 9, "top_k": 16, "hidden": 64, "a": "fp32"}),
    "odd-columns": Case(make, {"tokens": 9, "top_k": 3, "hidden": 37}),
    "no-tokens": Case(make, {"tokens": 0, "top_k": 6, "hidden": 64}),
    "cancelling": Case(make, {"tokens": 40, "top_k": 6, "hidden": 256, "values": "cancelling"}),
    "cancelling-fp32": Case(
        make, {"tokens": 40, "top_k": 8, "hidden": 256, "a": "fp32", "values": "cancelling", "dtype": "bfloat16"}
    ),
    "special": Case(make, {"tokens": 40, "top_k": 6, "hidden": 256, "values": "special"}),
    "special-fp32": Case(make, {"tokens": 40, "top_k": 6, "hidden": 256, "values": "special", "a": "fp32"}),
    "nonfinite": Case(make, {"tokens": 40, "top_k": 6, "hidden": 256, "values": "nonfinite"}, bounds=_NAN),
    "nonfinite-fp32": Case(
        make, {"tokens": 40, "top_k": 6, "hidden": 256, "values": "nonfinite", "a": "fp32"}, bounds=_NAN
    ),
    "one-token": Case(make, {"tokens": 1, "top_k": 6, "hidden": 4096}, bench=True),
    "flash-64": _flash(64),
    "flash-512": _flash(512),
    "flash-8192": _flash(8192),
    "pro-8192": _flash(8192, 7168),
}

SWEEP: dict[str, Case] = {
    f"{name} {tokens}x6x{hidden}": _flash(tokens, hidden)
    for name, hidden in (("flash", 4096), ("pro", 7168))
    for tokens in (1, 8, 64, 512, 2048, 8192)
}
