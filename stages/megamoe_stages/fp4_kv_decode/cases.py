"""Inputs for fp4_kv_decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import BLOCK
from megamoe.testing.cases import Bound, Case

SPARE = 2  # pages of no sequence
_FP32 = {"out": Bound(1.2e-6, "fp32 sums in another order"), "lse": Bound(3e-7, "fp32 sums in another order")}
_FP16 = {"out": Bound(9e-4, "probabilities and output are rounded to fp16")}


def make(
    generator: torch.Generator,
    *,
    lengths: Sequence[int],
    queries: int = 1,
    new: int | None = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    v_dim: int | None = None,
    shared: bool = False,
    page: int = 16,
    dtype: str = "bfloat16",
    sink: bool = False,
    picked: int | None = None,
    window: int | None = None,
    evicted: int = 0,
    splits: int = 0,
    extra: Sequence[int] | None = None,
    extra_page: int = 8,
    extra_picked: int | None = None,
) -> dict[str, Any]:
    """A random cache on shuffled pages and normal queries; slots that no query sees hold NaN scales.

    Args:
        generator: Source of the values.
        lengths: Tokens of each sequence, the new ones included.
        queries: Queries of each sequence.
        new: Tokens to append to each sequence; None for no k_new at all.
        heads: Query heads.
        kv_heads: Heads of the cache.
        head_dim: D.
        v_dim: Dv; None for D.
        shared: The keys are the values.
        page: Tokens a page.
        dtype: Of q and the new tokens.
        sink: With a sink.
        picked: Indices for each query, a quarter of them -1; None for none.
        window: As the op's.
        evicted: Leading pages of each sequence that the table has lost.
        splits: As the op's.
        extra: Entries of a second cache; None for none.
        extra_page: Entries a page.
        extra_picked: Entries for each query, a quarter of them -1; None for all.
    """
    batch = len(lengths)
    table, own = _table(generator, lengths, page)
    used = torch.zeros(sum(map(len, own)) + SPARE, page, dtype=torch.bool)
    for b, length in enumerate(lengths):
        position = torch.arange(len(own[b]) * page)
        held = position < length - (new or 0)
        if window is not None:
            held &= position > length - queries - window
        used[own[b]] = held.view(len(own[b]), page)
        table[b, : min(evicted, len(own[b]))] = -1

    args: dict[str, Any] = {
        "q": torch.randn(batch, queries, heads, head_dim, generator=generator).to(getattr(torch, dtype)),
        "block_table": table,
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "softmax_scale": head_dim**-0.5,
        "window": window,
        "splits": splits,
    }
    sides = {"k": head_dim} if shared else {"k": head_dim, "v": v_dim or head_dim}
    for side, dim in sides.items():
        args |= _cache(generator, side, used, kv_heads, dim)
        if new is not None:
            args[f"{side}_new"] = torch.randn(batch, new, kv_heads, dim, generator=generator).to(getattr(torch, dtype))
    if sink:
        args["sink"] = torch.randn(heads, generator=generator) * 2
    if picked is not None:
        args["indices"] = _pick(generator, lengths, queries, picked)
    if extra is not None:
        args |= _extra(generator, extra, kv_heads, head_dim, extra_page)
        if extra_picked is not None:
            args["extra_indices"] = _pick(generator, extra, queries, extra_picked)
    return args


def _table(generator: torch.Generator, lengths: Sequence[int], page: int) -> tuple[Tensor, list[Tensor]]:
    """A block table of shuffled pages, SPARE of them unused and its last column empty, and each sequence's pages."""
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + SPARE, generator=generator).int()
    table = torch.full((len(lengths), max([*counts, 0]) + 1), -1, dtype=torch.int32)
    starts = [sum(counts[:b]) for b in range(len(counts))]
    own = [order[start : start + count].long() for start, count in zip(starts, counts, strict=True)]
    for b, pages in enumerate(own):
        table[b, : len(pages)] = pages.int()
    return table, own


def _extra(generator: torch.Generator, lengths: Sequence[int], kv_heads: int, dim: int, page: int) -> dict[str, Tensor]:
    """A second cache; slots past its ends hold NaN scales."""
    table, own = _table(generator, lengths, page)
    used = torch.zeros(sum(map(len, own)) + SPARE, page, dtype=torch.bool)
    for pages, length in zip(own, lengths, strict=True):
        used[pages] = (torch.arange(len(pages) * page) < length).view(len(pages), page)
    cache = _cache(generator, "extra", used, kv_heads, dim)
    held = torch.tensor(lengths, dtype=torch.int32)
    return cache | {"extra_table": table, "extra_lengths": held, "extra_scale": torch.tensor(0.17)}


def _cache(generator: torch.Generator, side: str, used: Tensor, kv_heads: int, dim: int) -> dict[str, Tensor]:
    """Random codes under block scales from 0.5 to 2, which with the decode scale give about unit variance."""
    slots = (used.shape[0], kv_heads, used.shape[1])
    codes = torch.randint(0, 256, (*slots, dim // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0x30, 0x41, (*slots, dim // BLOCK), dtype=torch.uint8, generator=generator)
    scales.masked_fill_(~used[:, None, :, None], 0x7F)  # NaN
    scale = torch.tensor(0.28)
    return {f"{side}_codes": codes, f"{side}_scales": scales.view(torch.float8_e4m3fn), f"{side}_scale": scale}


def _pick(generator: torch.Generator, lengths: Sequence[int], queries: int, picked: int) -> Tensor:
    indices = torch.full((len(lengths), queries, picked), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for i in range(queries):
            chosen = torch.randperm(length, generator=generator)[: picked * 3 // 4].int()
            places = torch.randperm(picked, generator=generator)[: len(chosen)]
            indices[b, i, places] = chosen
    return indices


_MLA = {"heads": 8, "kv_heads": 1, "head_dim": 512, "shared": True}

CASES: dict[str, Case] = {
    "gqa-d128": Case(make, {"lengths": [100, 37, 1], "heads": 8, "head_dim": 128}, bench=True),
    "d64": Case(make, {"lengths": [33]}),
    "d192-v128": Case(make, {"lengths": [65, 20], "head_dim": 192, "v_dim": 128}),
    "d256-page64": Case(make, {"lengths": [150, 64], "head_dim": 256, "page": 64}),
    "mla-d512-page64": Case(make, {"lengths": [200, 65], "page": 64, "sink": True, **_MLA}, bench=True),
    "mla-window": Case(make, {"lengths": [300, 129, 128, 5], "page": 64, "window": 128, "sink": True, **_MLA}),
    "mla-indices": Case(make, {"lengths": [70, 9], "new": None, "picked": 32, "sink": True, **_MLA}, bench=True),
    "two-caches": Case(make, {"lengths": [150, 40, 3], "extra": [70, 9, 0], "window": 20, "sink": True, **_MLA}),
    "two-caches-picked": Case(
        make,
        {"lengths": [300, 129, 5], "page": 64, "window": 128, "sink": True, **_MLA}
        | {"extra": [90, 33, 1], "extra_page": 64, "extra_picked": 40},
        bench=True,
    ),
    "two-caches-queries-2": Case(
        make,
        {"lengths": [30, 2], "queries": 2, "new": 2, "window": 20, "extra": [9, 40], "extra_picked": 24, **_MLA},
    ),
    "two-caches-queries-2-all": Case(
        make, {"lengths": [30, 2], "queries": 2, "new": 2, "window": 20, "extra": [0, 70], "splits": 2, **_MLA}
    ),
    "two-caches-both-picked": Case(
        make,
        {"lengths": [80, 20], "new": None, "picked": 40, "extra": [90, 30], "extra_picked": 70, "splits": 3, **_MLA},
    ),
    "two-caches-nothing-near": Case(make, {"lengths": [0, 1], "new": None, "extra": [20, 0], "sink": True, **_MLA}),
    "page128": Case(make, {"lengths": [129, 128, 127], "page": 128}),
    "page-odd": Case(make, {"lengths": [20, 7], "page": 5}),
    "heads-not-grouped": Case(make, {"lengths": [20], "heads": 3, "kv_heads": 3}),
    "group-of-5": Case(make, {"lengths": [20], "heads": 5, "kv_heads": 1}),
    "queries-2": Case(make, {"lengths": [50, 2], "queries": 2, "new": 2}),
    "queries-8-window": Case(make, {"lengths": [90, 8, 20], "queries": 8, "new": 8, "window": 10, "sink": True}),
    "queries-8-indices": Case(make, {"lengths": [90, 8], "queries": 8, "new": 8, "picked": 12}),
    "more-queries-than-tokens": Case(make, {"lengths": [3, 0], "queries": 8, "new": 8, "sink": True}),
    "append-only": Case(make, {"lengths": [40, 12], "queries": 0, "new": 5}),
    "append-from-empty": Case(make, {"lengths": [17, 5, 0], "queries": 0, "new": 17}),
    "append-none": Case(make, {"lengths": [40], "new": 0}),
    "nothing-new": Case(make, {"lengths": [40, 16], "new": None}),
    "all-empty": Case(make, {"lengths": [0, 0], "new": 1, "sink": True}),
    "some-empty": Case(make, {"lengths": [0, 16, 0, 17], "new": None, "sink": True}),
    "no-sequences": Case(make, {"lengths": []}),
    "indices-none": Case(make, {"lengths": [20], "new": None, "picked": 0, "sink": True}),
    "indices-past-a-lost-page": Case(make, {"lengths": [40], "new": None, "picked": 30, "evicted": 1}),
    "window-evicted": Case(make, {"lengths": [100, 55], "window": 20, "evicted": 2}),
    "window-one": Case(make, {"lengths": [40], "window": 1}),
    "window-wider": Case(make, {"lengths": [40], "window": 1000}),
    "split-3": Case(make, {"lengths": [100, 3], "splits": 3, "sink": True}),
    "split-more-than-tokens": Case(make, {"lengths": [5], "splits": 64}),
    "fp16": Case(make, {"lengths": [100, 37], "dtype": "float16", "sink": True}, bounds=_FP16),
    "fp32": Case(make, {"lengths": [100, 37], "dtype": "float32", "sink": True, "splits": 2}, bounds=_FP32),
    "tokens-4001": Case(make, {"lengths": [4001, 127], "heads": 2, "kv_heads": 1, "page": 64}),
    "gqa-8k": Case(
        make,
        {"lengths": [8192] * 32, "heads": 64, "kv_heads": 8, "head_dim": 128, "page": 64},
        gpu_only=True,
        bench=True,
    ),
    "flash-window": Case(
        make,
        {"lengths": [4096] * 64, "page": 64, "window": 128, "sink": True, **_MLA, "heads": 64},
        gpu_only=True,
        bench=True,
    ),
    "flash-two-caches": Case(
        make,
        {"lengths": [4096] * 64, "page": 64, "window": 128, "sink": True, **_MLA, "heads": 64}
        | {"extra": [1024] * 64, "extra_page": 64, "extra_picked": 512},
        gpu_only=True,
        bench=True,
    ),
    "flash-indices": Case(
        make,
        {"lengths": [4096] * 64, "page": 64, "new": None, "picked": 512, **_MLA, "heads": 64},
        gpu_only=True,
        bench=True,
    ),
}
