"""Inputs that `moe_route` is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from megamoe.testing.cases import Case

_STEP = 1 / 64  # between the logits of a token: no rounding makes two experts change places
_VOCABULARY = 500


def make(
    generator: Generator,
    *,
    tokens: int,
    experts: int,
    top_k: int = 6,
    biased: bool = False,
    ids: str | None = None,
    table: str = "int64",
    values: str = "spread",
    scaling: float = 1.5,
) -> dict[str, Any]:
    """Arguments for `moe_route`.

    Args:
        generator: Source of all randomness.
        tokens: T.
        experts: E.
        top_k: k.
        biased: With a bias that changes the choice. Multiples of 16, so that the sums keep apart too.
        ids: Dtype of token ids, to look the experts up; None to choose them.
        table: Dtype of the table.
        values: "spread": each token's logits are a permutation of a grid round 0; "extreme": some are so large or
            small that softplus or exp leave fp32's range.
        scaling: Routed scaling factor.
    """
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    logits = (order.float() - experts / 2) * _STEP
    if values == "extreme":
        far = torch.tensor([-200.0, -100.0, -88.0, -40.0, 25.0, 90.0, 1e4, 1e30])
        logits[:, : len(far)] = far
    arguments: dict[str, Any] = {"logits": logits, "top_k": top_k, "scaling": scaling}
    if biased:
        arguments["bias"] = 16.0 * torch.randint(-2, 3, (experts,), generator=generator)
    if ids is not None:
        arguments["token_ids"] = torch.randint(_VOCABULARY, (tokens,), generator=generator).to(getattr(torch, ids))
        rows = torch.rand(_VOCABULARY, experts, generator=generator).argsort(dim=1)[:, :top_k]
        arguments["table"] = rows.to(getattr(torch, table)).contiguous()
    return arguments


def _flash(tokens: int, **changes: Any) -> Case:
    return Case(make, {"tokens": tokens, "experts": 256, "biased": True, **changes}, gpu_only=True, bench=True)


CASES: dict[str, Case] = {
    "flash": Case(make, {"tokens": 33, "experts": 256}, bench=True),
    "flash-biased": Case(make, {"tokens": 33, "experts": 256, "biased": True}),
    "pro": Case(make, {"tokens": 33, "experts": 384, "biased": True, "scaling": 2.5}),
    "512-experts": Case(make, {"tokens": 9, "experts": 512, "top_k": 8}),
    "odd-experts": Case(make, {"tokens": 9, "experts": 37, "top_k": 3, "biased": True}),
    "few-experts": Case(make, {"tokens": 9, "experts": 4, "top_k": 4}),
    "one-of-one": Case(make, {"tokens": 3, "experts": 1, "top_k": 1}),
    "32-of-100": Case(make, {"tokens": 5, "experts": 100, "top_k": 32}),
    "40-of-100": Case(make, {"tokens": 5, "experts": 100, "top_k": 40}),
    "one-token": Case(make, {"tokens": 1, "experts": 256, "biased": True}, bench=True),
    "no-tokens": Case(make, {"tokens": 0, "experts": 16}),
    "extreme": Case(make, {"tokens": 9, "experts": 64, "values": "extreme"}),
    "hash": Case(make, {"tokens": 33, "experts": 256, "ids": "int64"}, bench=True),
    "hash-int32": Case(make, {"tokens": 33, "experts": 384, "ids": "int32", "table": "int32"}),
    "hash-mixed": Case(make, {"tokens": 7, "experts": 16, "ids": "int64", "table": "int32", "top_k": 2}),
    "hash-extreme": Case(make, {"tokens": 9, "experts": 64, "ids": "int32", "values": "extreme"}),
    "flash-512": _flash(512),
    "flash-8192": _flash(8192),
}
