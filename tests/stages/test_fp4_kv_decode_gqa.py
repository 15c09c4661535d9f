"""The fused decode kernel for grouped queries on sm_90a, emulated: whole launches, host side included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.inspect import kernels
from megamoe.testing import compare
from megamoe.testing.guards import clone, same_bytes
from megamoe_stages.fp4_kv_decode import append, contract, gqa_kernel, gqa_launch, launch
from megamoe_stages.fp4_kv_decode.cases import CASES, make
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput
from megamoe_stages.fp4_kv_decode.gqa_shape import SHAPES, SHARED_BYTES, Shape, shape_of
from megamoe_stages.fp4_kv_decode.reference import fp4_kv_decode as reference

ON_HOST = (
    "gqa-d128",
    "d64",
    "d192-v128",
    "d256-page64",
    "page128",
    "heads-not-grouped",
    "group-of-5",
    "queries-2",
    "queries-8-window",
    "more-queries-than-tokens",
    "all-empty",
    "some-empty",
    "window-evicted",
    "window-one",
    "window-wider",
    "split-3",
    "split-more-than-tokens",
)
D128: dict[str, Any] = {"heads": 8, "kv_heads": 1, "head_dim": 128, "page": 64, "new": None}
MORE: dict[str, dict[str, Any]] = {
    "ragged": {"lengths": [700, 1, 0, 333, 64, 65], **D128, "kv_heads": 2, "sink": True},
    "one-long": {"lengths": [2100], **D128, "splits": 5},
    "one-long-page16": {"lengths": [1100], **D128, "page": 16},
    "page48": {"lengths": [200, 90], **D128, "page": 48},
    "page96": {"lengths": [200, 90], **D128, "page": 96},
    "queries-2-d128": {"lengths": [300, 90], **D128, "queries": 2, "sink": True},
    "group-of-16": {"lengths": [300, 90], **D128, "heads": 32, "kv_heads": 2},
    "window-page16": {"lengths": [500, 90], **D128, "page": 16, "window": 77, "evicted": 3, "queries": 2},
    "hole-in-the-middle": {"lengths": [200], **D128, "page": 16},
    "many": {"lengths": [40] * 40, **D128},
}


def inputs(name: str) -> dict[str, Any]:
    if name in CASES:
        return CASES[name].inputs(name)
    given = make(torch.Generator().manual_seed(0), **MORE[name])
    if name == "hole-in-the-middle":
        given["block_table"][0, 3] = -1
        given["block_table"][0, 6] = 1 << 20  # beyond the cache
    return given


def emulated(a: dict[str, Any], policy: str = "eager", seed: int = 0, sms: int = 4) -> DecodeOutput:
    """What the op would return, its launches on the emulator."""
    q, k_codes, k_new, v_codes = a["q"], a["k_codes"], a.get("k_new"), a["v_codes"]
    keys = launch.Side(k_codes, a["k_scales"], a["k_scale"])
    values = launch.Side(v_codes, a["v_scales"], a["v_scale"])
    table, page, kv_heads = a["block_table"], k_codes.shape[2], k_codes.shape[1]
    if k_new is not None:
        artifact = compiler.compile_kernel(append.spec(str(k_new.dtype).removeprefix("torch.")))
        arguments = launch.append_new(keys, values, k_new, a.get("v_new"), table, a["lengths"], page)
        ptxemu.run(artifact, *arguments, policy=policy, seed=seed).raise_for_findings()
    out = contract.fake(q, k_codes, a["k_scales"], table, a["lengths"], a["k_scale"], v_codes, softmax_scale=1.0)
    out.out.fill_(torch.nan), out.lse.fill_(torch.nan)
    shape = shape_of(q.shape[3], v_codes.shape[3] * 2, q.shape[1] * q.shape[2] // kv_heads, page)
    assert shape is not None
    arguments = gqa_launch.attend(
        q,
        keys,
        values,
        table,
        a["lengths"],
        a.get("sink"),
        out,
        softmax_scale=a["softmax_scale"],
        window=a.get("window"),
        splits=a["splits"],
        kv_heads=kv_heads,
        page=page,
        sms=sms,
        fresh=0 if k_new is None else k_new.shape[1],
        shape=shape,
    )
    ptxemu.run(
        compiler.compile_kernel(gqa_kernel.spec(shape)), *arguments, policy=policy, seed=seed
    ).raise_for_findings()
    return out


@pytest.mark.parametrize("name", [*ON_HOST, *MORE])
def test_matches_the_reference(name: str) -> None:
    given = inputs(name)
    a, b = ({key: clone(value) for key, value in given.items()} for _ in range(2))
    mutates = ("k_codes", "k_scales", "v_codes", "v_scales")
    expected = compare.leaves(reference(**a), a, mutates)
    results = compare.compare(compare.leaves(emulated(b), b, mutates), expected, contract.BOUNDS)
    assert not [r for r in results if not r.passed]


@pytest.mark.parametrize("policy", ["lazy", "random"])
@pytest.mark.parametrize("name", ["ragged", "window-page16"])
def test_no_order_of_events_matters(name: str, policy: str) -> None:
    """Copies and products as late as they may be, warps in any order: the same bytes."""
    given = inputs(name)
    results = [emulated({k: clone(v) for k, v in given.items()}, how, seed=7) for how in ("eager", policy)]
    assert same_bytes(results[0].out, results[1].out)
    assert same_bytes(results[0].lse, results[1].lse)


def test_which_problems_suit() -> None:
    """Few rows a kv head, so that nothing is read twice, and pages that hold whole steps of 16 tokens."""
    assert shape_of(128, 128, rows=8, page=64) == SHAPES[2]
    assert shape_of(128, 128, rows=9, page=16) == SHAPES[3]
    assert shape_of(128, 128, rows=17, page=64) is None
    assert shape_of(128, 128, rows=8, page=40) is None
    assert shape_of(96, 96, rows=8, page=64) is None


def test_shared_memory_holds_what_a_kernel_needs() -> None:
    for shape in SHAPES:
        assert shape.shared_bytes <= SHARED_BYTES
        assert shape.sums_bytes <= shape.ring_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_no_kernel_spills(shape: Shape) -> None:
    assert not [k for k in kernels(compiler.compile_kernel(gqa_kernel.spec(shape)).cubin) if k.spills]
