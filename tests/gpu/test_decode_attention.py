"""fp4_kv_decode on a GPU against sums in fp64: as near to them as a bf16 FlashAttention on the decoded cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe_stages.fp4_kv_decode.cases import make

pytestmark = pytest.mark.gpu
MLA: dict[str, Any] = {"heads": 64, "kv_heads": 1, "head_dim": 512, "shared": True, "page": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa-d64": {"lengths": [900, 65], "heads": 16, "kv_heads": 2, "head_dim": 64},
    "gqa-d128": {"lengths": [2000, 77], "heads": 32, "kv_heads": 4, "head_dim": 128},
    "gqa-d256": {"lengths": [700, 130], "heads": 16, "kv_heads": 2, "head_dim": 256},
    "mqa-d512": {"lengths": [3000, 64], **MLA},
    "mqa-d512-splits": {"lengths": [3000, 64], "splits": 8, **MLA},
    "two-caches": {"lengths": [3000, 64], "window": 128, "extra": [700, 16], "extra_page": 64, **MLA},
}


def decoded(a: dict[str, Any], side: str, b: int) -> Tensor:
    """bf16 (tokens, kv_heads, D) of a sequence: exact, as the decode scales are powers of two."""
    table, lengths = ("extra_table", "extra_lengths") if side == "extra" else ("block_table", "lengths")
    length, page = int(a[lengths][b]), a[f"{side}_codes"].shape[2]
    own = a[table][b, : -(-length // page)].long()
    pages = NVFP4Tensor(a[f"{side}_codes"][own], a[f"{side}_scales"][own], a[f"{side}_scale"])
    return dequantize(pages).transpose(1, 2).flatten(0, 1)[:length].bfloat16()


def seen(a: dict[str, Any], b: int) -> tuple[Tensor, Tensor]:
    """Keys and values (tokens, heads, D) that the only query of a sequence sees."""
    window = a["window"] or int(a["lengths"][b])
    k = decoded(a, "k", b)[-window:]
    v = decoded(a, "v", b)[-window:] if "v_codes" in a else k
    if "extra_codes" in a:
        k = v = torch.cat([k, decoded(a, "extra", b)])
    group = a["q"].shape[2] // k.shape[1]
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def in_fp64(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("hd,khd->hk", q.double(), k.double()) * scale
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v.double())


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What a FlashAttention kernel for bf16 computes: weights rounded to bf16, all sums and their total in fp32."""
    scores = torch.einsum("hd,khd->hk", q.float(), k.float()) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    sums = torch.einsum("hk,khd->hd", weights.bfloat16().float(), v.float())
    return (sums / weights.sum(-1, keepdim=True)).bfloat16()


@pytest.mark.parametrize("name", SHAPES)
def test_error_is_that_of_a_bf16_flash_attention(name: str) -> None:
    from megamoe_stages.fp4_kv_decode.sm90 import fp4_kv_decode

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compiled for sm_90a")
    made = make(torch.Generator().manual_seed(0), **SHAPES[name])
    a: dict[str, Any] = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in made.items()}
    for side in ("k", "v", "extra"):
        if f"{side}_scale" in a:
            a[f"{side}_scale"].fill_(0.25)
    got = fp4_kv_decode(**a).out[:, 0]
    want, other = (torch.empty_like(got, dtype=torch.float64) for _ in range(2))
    for b in range(len(got)):
        k, v = seen(a, b)
        want[b] = in_fp64(a["q"][b, 0], k, v, a["softmax_scale"])
        other[b] = flash(a["q"][b, 0], k, v, a["softmax_scale"])
    mine, theirs = (float((x.double() - want).norm() / want.norm()) for x in (got, other))
    assert mine <= 1.05 * theirs
    assert theirs < 3e-3
