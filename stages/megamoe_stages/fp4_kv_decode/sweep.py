"""What `megamoe bench fp4_kv_decode --sweep` measures: attending over the cache, nothing appended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe.testing import rivals, roofline
from megamoe.testing.cases import Case
from megamoe.testing.roofline import Call, Subject
from megamoe_stages.fp4_kv_decode import STAGE, cases, contract
from megamoe_stages.fp4_kv_decode.fallback import fp4_kv_decode

_GQA: dict[str, Any] = {"heads": 64, "kv_heads": 8, "head_dim": 128, "page": 64, "new": None}
_MQA: dict[str, Any] = {"heads": 64, "kv_heads": 1, "head_dim": 512, "shared": True, "page": 64, "new": None}
_V4: dict[str, Any] = {**_MQA, "window": 128, "sink": True, "extra_page": 64}
_DENSE_MOST = 2**30  # values of a cache that is also held in bf16


def calls(q: Tensor, k_codes: Tensor, k_scales: Tensor, block_table: Tensor, **rest: Any) -> dict[str, Call]:
    """The variants; torch's attention over the same cache in bf16, the queries' heads as its queries."""
    found = roofline.variants(STAGE, q=q, k_codes=k_codes, k_scales=k_scales, block_table=block_table, **rest)
    batch, queries, heads, head_dim = q.shape
    _, kv_heads, page, _ = k_codes.shape
    whole = rest["window"] is None and "indices" not in rest and "extra_codes" not in rest and queries == 1
    if whole and batch * kv_heads * (block_table.shape[1] - 1) * page * head_dim <= _DENSE_MOST:
        k = v = _dense(k_codes, k_scales, rest["k_scale"], block_table)
        if "v_codes" in rest:
            v = _dense(rest["v_codes"], rest["v_scales"], rest["v_scale"], block_table)
        grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)
        others = rivals.sdpa(grouped, k, v, scale=rest["softmax_scale"])
        found |= {f"{name}, bf16 cache": _as_heads(call, q) for name, call in others.items()}
    return found


def _as_heads(call: Call, q: Tensor) -> Call:
    """(batch, kv_heads, group, Dv) to (batch, 1, heads, Dv)."""
    return lambda: call().reshape(*q.shape[:3], -1)


def _dense(codes: Tensor, scales: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The pages of whole sequences as bf16 (batch, kv_heads, tokens, D); the table's last column is empty."""
    pages = table[:, :-1].long()  # (batch, pages)
    picked = (t.view(torch.uint8)[pages].transpose(1, 2).flatten(2, 3) for t in (codes, scales))
    own_codes, own_scales = (t.contiguous() for t in picked)
    return dequantize(NVFP4Tensor(own_codes, own_scales.view(scales.dtype), scale), torch.bfloat16)


def seen(q: Tensor, lengths: Tensor, *, window: int | None, **rest: Any) -> int:
    """Tokens that queries see, counted once a query."""
    queries = q.shape[1]
    total = 0
    if rest.get("indices") is not None:
        total += int((rest["indices"] >= 0).sum())
    else:
        total += queries * int(lengths.clamp(max=window or int(lengths.max())).sum())
    if rest.get("extra_codes") is not None:
        picked = rest.get("extra_indices")
        total += queries * int(rest["extra_lengths"].sum()) if picked is None else int((picked >= 0).sum())
    return total


def bytes_moved(q: Tensor, k_codes: Tensor, lengths: Tensor, *, window: int | None, **rest: Any) -> int:
    """Codes and block scales of the tokens that are seen, once a query."""
    kv_heads = k_codes.shape[1]
    dims = 2 * k_codes.shape[3] + (2 * rest["v_codes"].shape[3] if "v_codes" in rest else 0)
    return seen(q, lengths, window=window, **rest) * kv_heads * dims * 9 // 16


def flops(q: Tensor, k_codes: Tensor, lengths: Tensor, *, window: int | None, **rest: Any) -> int:
    """2 (D + Dv) for each head and token that its query sees."""
    v_dim = 2 * rest["v_codes"].shape[3] if "v_codes" in rest else q.shape[3]
    return 2 * seen(q, lengths, window=window, **rest) * q.shape[2] * (q.shape[3] + v_dim)


SUBJECT = Subject(
    cases={
        f"{name} {size}": Case(cases.make, params, gpu_only=True)
        for name, size, params in (
            *(("GQA 64/8 d128, B32, L", n, {**_GQA, "lengths": [n] * 32}) for n in (1024, 4096, 8192, 16384)),
            *(("GQA 64/8 d128, B1, L", n, {**_GQA, "lengths": [n]}) for n in (8192, 32768, 131072)),
            ("GQA 64/8 d128, B8, L", 131072, {**_GQA, "lengths": [131072] * 8}),
            *(("MQA 64 d512, B64, L", n, {**_MQA, "lengths": [n] * 64}) for n in (1024, 4096, 8192)),
            *(
                (
                    "V4, B64, window 128, top",
                    n,
                    {**_V4, "lengths": [4096] * 64, "extra": [2 * n] * 64, "extra_picked": n},
                )
                for n in (512, 1024)
            ),
        )
    },
    bytes_moved=bytes_moved,
    flops=flops,
    expected=fp4_kv_decode,  # the fallback: the reference holds all scores and the cache in fp32
    calls=calls,
    bounds=contract.BOUNDS,
)
