"""The fused decode and append kernels for sm_90a, emulated: whole launches, host side included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.inspect import kernels
from megamoe.errors import ArgumentError
from megamoe.testing import compare
from megamoe.testing.guards import clone, same_bytes
from megamoe_stages.fp4_kv_decode import STAGE, append, contract, kernel, launch, limits, mqa_shape, sm90
from megamoe_stages.fp4_kv_decode.cases import CASES, make
from megamoe_stages.fp4_kv_decode.contract import DecodeOutput
from megamoe_stages.fp4_kv_decode.reference import fp4_kv_decode as reference
from megamoe_stages.fp4_kv_decode.shape import SHAPES, SHARED_BYTES, Shape

ON_HOST = (
    "d64",
    "d192-v128",
    "mla-d512-page64",
    "mla-window",
    "mla-indices",
    "two-caches",
    "two-caches-picked",
    "two-caches-queries-2-all",
    "two-caches-both-picked",
    "two-caches-nothing-near",
    "page-odd",
    "group-of-5",
    "queries-8-window",
    "more-queries-than-tokens",
    "append-from-empty",
    "some-empty",
    "indices-past-a-lost-page",
    "window-evicted",
    "window-one",
    "split-3",
)
MLA: dict[str, Any] = {"heads": 64, "kv_heads": 1, "head_dim": 512, "shared": True, "page": 64, "sink": True}
MORE: dict[str, dict[str, Any]] = {
    "two-row-blocks": {"lengths": [70], "queries": 2, "new": 2, **MLA},
    "picked-in-splits": {"lengths": [300], "new": None, "picked": 200, "splits": 3, **MLA},
    "fp32-new": {"lengths": [40, 3], "dtype": "float32", "queries": 0, "new": 3},
    "fp16-new": {"lengths": [40, 3], "dtype": "float16", "queries": 0, "new": 3},
}


def inputs(name: str) -> dict[str, Any]:
    if name in CASES:
        return CASES[name].inputs(name)
    return make(torch.Generator().manual_seed(0), **MORE[name])


def emulated(a: dict[str, Any], policy: str = "eager", seed: int = 0) -> DecodeOutput:
    """What `sm90.fp4_kv_decode` would return, its launches on the emulator; nothing that it looks at is empty."""
    q, k_codes, k_new, v_codes = a["q"], a["k_codes"], a.get("k_new"), a.get("v_codes")
    keys = values = launch.Side(k_codes, a["k_scales"], a["k_scale"])
    if v_codes is not None:
        values = launch.Side(v_codes, a["v_scales"], a["v_scale"])
    table, page = a["block_table"], k_codes.shape[2]
    if k_new is not None:
        artifact = compiler.compile_kernel(append.spec(str(k_new.dtype).removeprefix("torch.")))
        arguments = launch.append_new(keys, values, k_new, a.get("v_new"), table, a["lengths"], page)
        ptxemu.run(artifact, *arguments, policy=policy, seed=seed).raise_for_findings()
    out = contract.fake(q, k_codes, a["k_scales"], table, a["lengths"], a["k_scale"], v_codes, softmax_scale=1.0)
    if q.numel() == 0:
        return out
    names = ("codes", "scales", "table", "lengths", "scale", "indices")
    extra = contract.Extra.of(*(a.get(f"extra_{name}") for name in names))
    out.out.fill_(torch.nan), out.lse.fill_(torch.nan)
    shape, arguments = launch.attend(
        q,
        keys,
        values,
        table,
        a["lengths"],
        a.get("sink"),
        a.get("indices"),
        extra,
        out,
        softmax_scale=a["softmax_scale"],
        window=a.get("window"),
        splits=a["splits"],
        kv_heads=k_codes.shape[1],
        page=page,
        sms=8,
        fresh=0 if k_new is None else k_new.shape[1],
    )
    artifact = compiler.compile_kernel(kernel.spec(shape))
    ptxemu.run(artifact, *arguments, policy=policy, seed=seed).raise_for_findings()
    return out


@pytest.mark.parametrize("name", [*ON_HOST, *MORE])
def test_matches_the_reference(name: str) -> None:
    given = inputs(name)
    a, b = ({key: clone(value) for key, value in given.items()} for _ in range(2))
    expected = compare.leaves(reference(**a), a, STAGE.mutates)
    results = compare.compare(compare.leaves(emulated(b), b, STAGE.mutates), expected, contract.BOUNDS)
    assert not [r for r in results if not r.passed]


@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0])
def test_any_finite_scale(softmax_scale: float) -> None:
    given = inputs("d64") | {"softmax_scale": softmax_scale}
    a, b = ({key: clone(value) for key, value in given.items()} for _ in range(2))
    expected = compare.leaves(reference(**a), a, STAGE.mutates)
    results = compare.compare(compare.leaves(emulated(b), b, STAGE.mutates), expected, contract.BOUNDS)
    assert not [r for r in results if not r.passed]


@pytest.mark.parametrize("splits", [1, 2])
def test_sums_follow_rising_scores(splits: int) -> None:
    """Every page has larger keys than the last one, so that what is subtracted from scores changes often."""
    given = make(torch.Generator().manual_seed(0), lengths=[600, 330], **MLA | {"heads": 8, "splits": splits})
    scales = given["k_scales"].view(torch.uint8)
    for row in given["block_table"]:
        for place, page in enumerate(row[row >= 0].tolist()):
            scales[page] += (4 * place * (scales[page] < 0x7F)).to(torch.uint8)
    a, b = ({key: clone(value) for key, value in given.items()} for _ in range(2))
    expected = compare.leaves(reference(**a), a, STAGE.mutates)
    results = compare.compare(compare.leaves(emulated(b), b, STAGE.mutates), expected, contract.BOUNDS)
    assert not [r for r in results if not r.passed]


@pytest.mark.parametrize("policy", ["lazy", "random"])
@pytest.mark.parametrize("name", ["split-3", "mla-indices", "two-caches-queries-2"])
def test_no_order_of_events_matters(name: str, policy: str) -> None:
    """Copies and products as late as they may be, warps in any order: the same bytes."""
    given = inputs(name)
    results = [emulated({k: clone(v) for k, v in given.items()}, how, seed=7) for how in ("eager", policy)]
    assert same_bytes(results[0].out, results[1].out)
    assert same_bytes(results[0].lse, results[1].lse)


def test_attending_starts_behind_all_that_ran_before_appending() -> None:
    """It reads queries and old tokens without a wait: `append` must have waited before it lets it start."""
    text = compiler.compile_kernel(append.spec("bfloat16")).ptx
    assert 0 < text.index("griddepcontrol.wait") < text.index("griddepcontrol.launch_dependents")


@pytest.mark.parametrize("shape", [SHAPES[1], mqa_shape.SHAPES[1]])
def test_no_kernel_spills(shape: Shape | mqa_shape.Shape) -> None:
    assert not [k for k in kernels(compiler.compile_kernel(kernel.spec(shape)).cubin) if k.spills]


def test_shared_memory_holds_what_a_kernel_needs() -> None:
    for shape in SHAPES:
        assert shape.shared_bytes <= SHARED_BYTES
        assert shape.stages >= 1
        regions = [shape.tiles_at, shape.ring_at, shape.masks_at, shape.barriers_at, shape.flag_at]
        assert regions == sorted(regions)
    assert mqa_shape.Shape.shared_bytes <= SHARED_BYTES


def test_limits() -> None:
    assert not limits.supports({})
    assert not limits.supports({"dtype": "bfloat16", "head_dim": 512, "v_dim": 512, "shared": True})
    assert not limits.supports({"head_dim": 192, "v_dim": 128, "shared": False})
    assert "float16" in limits.supports({"dtype": "float16"})[0]
    assert not limits.supports({"head_dim": 512, "v_dim": 512, "shared": True, "extra": True})
    assert "96" in limits.supports({"head_dim": 96, "v_dim": 96, "shared": False})[0]
    assert "are the values" in limits.supports({"head_dim": 128, "v_dim": 128, "shared": True})[0]


def test_splits_fill_the_machine() -> None:
    assert launch.choose_splits(problems=64, tokens=640, sms=132) == 2
    assert launch.choose_splits(problems=200, tokens=1 << 17, sms=132) == 1
    assert launch.choose_splits(problems=1, tokens=64, sms=132) == 1
    assert launch.choose_splits(problems=8, tokens=1 << 17, sms=132) == 16
    assert launch.choose_splits(problems=64, tokens=128, sms=132, pairs=True) == 2
    assert launch.choose_splits(problems=64, tokens=64, sms=132, pairs=True) == 1
    assert launch.choose_splits(problems=44, tokens=1 << 17, sms=132, pairs=True) == 2
    assert launch.choose_splits(problems=67, tokens=1 << 17, sms=132, pairs=True) == 1


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ArgumentError, match="float32 queries"):
        sm90.fp4_kv_decode(**inputs("fp32"))
    with pytest.raises(ArgumentError, match="CUDA device"):
        sm90.fp4_kv_decode(**inputs("d64"))
