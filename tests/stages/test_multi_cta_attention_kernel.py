"""The fused attention kernels for sm_90a, emulated: whole launches, the arguments from the host side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.inspect import kernels
from megamoe.errors import ArgumentError
from megamoe.testing import compare
from megamoe.testing.guards import same_bytes
from megamoe_stages.multi_cta_attention import contract, kernel, launch, limits, sm90
from megamoe_stages.multi_cta_attention.cases import CASES, make
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.reference import multi_cta_attention as reference
from megamoe_stages.multi_cta_attention.shape import DTYPES, HEADS, SHARED_BYTES, Shape, shape_of

SMS = 3  # so that CTAs take several tiles
PROBLEMS: dict[str, dict[str, Any]] = {
    "several-tiles-of-keys": {"lq": [150], "lk": [290], "heads": 2, "head_dim": 128},
    "tails-and-empty-sequences": {"lq": [40, 0, 70, 3], "lk": [60, 5, 300, 0], "heads": 6, "sink": True},
    "window": {"lq": [90, 20], "lk": [290, 20], "window": 50, "head_dim": 128},
    "full-window": {"lq": [70], "lk": [200], "window": 60, "causal": False},
    "full": {"lq": [33, 10], "lk": [140, 7], "causal": False, "sink": True, "head_dim": 192, "v_dim": 128},
    "more-queries-than-keys": {"lq": [200, 3], "lk": [40, 0], "sink": True, "head_dim": 256},
    "group-of-7": {"lq": [45], "lk": [60], "heads": 14, "kv_heads": 2, "head_dim": 128},
    "one-kv-head": {"lq": [9], "lk": [150], "heads": 40, "kv_heads": 1, "sink": True},
    "as-many-kv-heads": {"lq": [150], "lk": [150], "heads": 3, "kv_heads": 3, "head_dim": 256},
    "forty-sequences": {"lq": [i % 5 for i in range(40)], "lk": [7 * i % 11 for i in range(40)], "sink": True},
    "fp16": {"lq": [150], "lk": [200], "dtype": "float16", "head_dim": 128, "sink": True},
    "mask": {"lq": [40, 20], "lk": [160, 21], "mask": 0.3, "causal": False, "sink": True, "heads": 6},
    "mask-causal-window": {"lq": [140], "lk": [260], "mask": 0.5, "window": 90, "head_dim": 128},
    "mask-narrow": {"lq": [8, 8], "lk": [30, 10], "mask": 0.7, "mask_columns": 20, "causal": False, "head_dim": 256},
    "mask-values-of-other-width": {"lq": [70, 20], "lk": [260, 21], "mask": 0.4, "head_dim": 192, "v_dim": 128},
    "mask-nothing": {"lq": [8], "lk": [30], "mask": 0.0, "sink": True},
    "wide-scores": {"lq": [80], "lk": [200], "gain": 30.0, "head_dim": 128},
}


def inputs(name: str) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(0), **PROBLEMS[name])


def emulated(
    a: dict[str, Any], policy: str = "eager", seed: int = 0, shape: Shape | None = None, sms: int = SMS
) -> AttentionOutput:
    """What `sm90.multi_cta_attention` would return, its launch on the emulator; no tensor is empty."""
    q, k, v = a["q"], a["k"], a["v"]
    shape = shape or shape_of(q.shape[2], v.shape[2], str(q.dtype).removeprefix("torch."), masked="mask" in a)
    assert shape is not None
    out = contract.fake(q, k, v, a["cu_seqlens_q"], a["cu_seqlens_k"], softmax_scale=1.0)
    out.out.fill_(torch.nan), out.lse.fill_(torch.nan)
    arguments = launch.attend(
        q,
        k,
        v,
        a["cu_seqlens_q"],
        a["cu_seqlens_k"],
        a.get("sink"),
        a.get("mask"),
        out,
        softmax_scale=a["softmax_scale"],
        causal=a["causal"],
        window=a["window"],
        rows=shape.rows,
        sms=sms,
    )
    ptxemu.run(compiler.compile_kernel(kernel.spec(shape)), *arguments, policy=policy, seed=seed).raise_for_findings()
    return out


def unlike(got: AttentionOutput, a: dict[str, Any]) -> list[compare.LeafResult]:
    results = compare.compare(compare.leaves(got), compare.leaves(reference(**a)), contract.BOUNDS)
    return [result for result in results if not result.passed]


@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_the_reference(name: str) -> None:
    given = inputs(name)
    assert not unlike(emulated(given), given)


@pytest.mark.parametrize("policy", ["lazy", "random"])
@pytest.mark.parametrize("name", ["window", "tails-and-empty-sequences", "as-many-kv-heads"])
def test_no_order_of_events_matters(name: str, policy: str) -> None:
    """Copies and products as late as they may be, warps in any order: the same bytes."""
    given = inputs(name)
    first, second = emulated(given), emulated(given, policy, seed=5)
    assert same_bytes(first.out, second.out)
    assert same_bytes(first.lse, second.lse)


def test_any_number_of_ctas_gives_the_same_bytes() -> None:
    given = inputs("tails-and-empty-sequences")
    first, second = emulated(given, sms=1), emulated(given, sms=7)
    assert same_bytes(first.out, second.out)
    assert same_bytes(first.lse, second.lse)


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_of_other_sequences_are_not_read(name: str) -> None:
    """NaN all round a sequence, not even a product with a weight of 0."""
    given = inputs("several-tiles-of-keys")
    before, after = 5, 200
    guarded: dict[str, Tensor] = {}
    for each in ("k", "v"):
        rows = given[each]
        fill = float("nan") if each == name else 0.0
        guarded[each] = torch.cat(
            [rows.new_full((before, *rows.shape[1:]), fill), rows, rows.new_full((after, *rows.shape[1:]), fill)]
        )
    total = given["k"].shape[0]
    offsets = torch.tensor([0, before, before + total, before + total + after], dtype=torch.int32)
    queries = torch.tensor([0, 0, given["q"].shape[0], given["q"].shape[0]], dtype=torch.int32)
    got = emulated({**given, **guarded, "cu_seqlens_q": queries, "cu_seqlens_k": offsets})
    assert not unlike(got, given)


def test_lse_does_not_drift_over_many_tiles_of_keys() -> None:
    given = make(torch.Generator().manual_seed(1), lq=[4], lk=[16384], heads=1, kv_heads=1, causal=False)
    scores = given["q"][:, 0].double() @ given["k"][:, 0].double().T * given["softmax_scale"]
    error = emulated(given).lse[:, 0].double() - scores.logsumexp(1)
    assert error.abs().max() <= 2e-6  # a few units in the last place of scores


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_scales_that_are_not_positive(scale: float) -> None:
    given = {**inputs("window"), "softmax_scale": scale}
    assert not unlike(emulated(given), given)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_no_kernel_spills(head: tuple[int, int], masked: bool) -> None:
    shape = shape_of(*head, "bfloat16", masked)
    assert shape is not None
    assert not [k for k in kernels(compiler.compile_kernel(kernel.spec(shape)).cubin) if k.spills]


def test_shared_memory_holds_what_a_kernel_needs() -> None:
    for dtype in DTYPES:
        for head in HEADS:
            shape = shape_of(*head, dtype)
            assert shape is not None
            assert shape.shared_bytes <= SHARED_BYTES
            assert shape.part_bytes >= 64 * shape.out_row_bytes
            regions = [0, shape.keys_at, shape.values_at, shape.tile_ring_at, shape.barriers_at, shape.shared_bytes]
            assert regions == sorted(set(regions))
    assert shape_of(96, 96, "bfloat16") is None


def test_limits() -> None:
    assert not limits.supports({})
    assert not limits.supports({"dtype": "bfloat16", "head_dim": 128, "v_dim": 128})
    assert not limits.supports({"dtype": "float16", "head_dim": 192, "v_dim": 128})
    assert not limits.supports({"dtype": "float16", "head_dim": 192, "v_dim": 128, "masked": True})
    assert "float32" in limits.supports({"dtype": "float32"})[0]
    assert "96" in limits.supports({"head_dim": 96, "v_dim": 96})[0]
    assert not limits.supports({"heads": 128, "kv_heads": 1, "queries": 1 << 20, "keys": 1 << 23})
    assert "times heads" in limits.supports({"heads": 128, "kv_heads": 1, "queries": 1, "keys": 1 << 24})[0]
    assert not limits.supports({"heads": 128, "kv_heads": 128, "queries": 1, "keys": 1 << 24})
    assert "times heads" in limits.supports({"heads": 128, "kv_heads": 128, "queries": 1 << 24, "keys": 1})[0]


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ArgumentError, match="float32 queries"):
        sm90.multi_cta_attention(**CASES["fp32"].inputs("fp32"))
    with pytest.raises(ArgumentError, match="CUDA device"):
        sm90.multi_cta_attention(**CASES["causal-d64"].inputs("causal-d64"))
