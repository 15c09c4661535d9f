"""multi_cta_attention against float64 sums over lists of visible keys, written without the package's helpers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.errors import ArgumentError
from megamoe.model import Role
from megamoe.numerics import attention
from megamoe_stages.multi_cta_attention import STAGE, contract, fallback, launch
from megamoe_stages.multi_cta_attention.cases import CASES

VARIANTS = {v.name: v.target for v in STAGE.variants if v.role is not Role.FUSED}
SMALL = [name for name, case in CASES.items() if not case.gpu_only]
# one rounding of the output; the fallback rounds the probabilities too
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 3e-6}


def variant(name: str) -> Callable[..., Any]:
    module, function = VARIANTS[name].split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def oracle(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Row by row in float64; every so many rows of a long case, the rest left NaN."""
    q, k, v = (a[n].double() for n in "qkv")
    group = q.shape[1] // k.shape[1]
    out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=torch.float64)
    lse = torch.full(q.shape[:2], torch.nan, dtype=torch.float64)
    every = 1 + q.shape[0] // 200
    cu_q, cu_k = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
    for b in range(len(cu_q) - 1):
        total, lq = cu_k[b + 1] - cu_k[b], cu_q[b + 1] - cu_q[b]
        entries = min(a.get("entries", 0), total)
        lk = total - entries
        for i in range(lq):
            row, at = cu_q[b] + i, i + lk - lq
            if row % every:
                continue
            keys = [j for j in range(lk) if not a["causal"] or j <= at]
            if a["window"] is not None:
                keys = [j for j in keys if j > at - a["window"]]
            allowed = a["mask"][row].tolist() if a.get("mask") is not None else [True] * total
            if a.get("entries"):
                keys += [lk + j for j in range(entries) if j < len(allowed) and allowed[j]]
            else:
                keys = [j for j in keys if j < len(allowed) and allowed[j]]
            if not keys:
                out[row], lse[row] = 0, -torch.inf
                continue
            rows = torch.tensor(keys) + cu_k[b]
            s = torch.einsum("hd,khd->hk", q[row], k[rows].repeat_interleave(group, 1)) * a["softmax_scale"]
            e = s.exp()
            lse[row] = e.sum(1).log()
            bottom = e.sum(1) + (a["sink"].double().exp() if a.get("sink") is not None else 0)
            out[row] = torch.einsum("hk,khd->hd", e, v[rows].repeat_interleave(group, 1)) / bottom[:, None]
    return out, lse


def relative(x: Tensor, want: Tensor) -> float:
    x, want = x[~want.isnan()], want[~want.isnan()]
    finite = want.isfinite()
    assert torch.equal(x.double()[~finite], want[~finite])
    return float((x.double() - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))


@pytest.mark.parametrize("which", VARIANTS)
@pytest.mark.parametrize("case", SMALL)
def test_matches_float64(case: str, which: str) -> None:
    args = CASES[case].inputs(case)
    want, want_lse = oracle(args)
    got = variant(which)(**args)
    assert got.out.dtype == args["q"].dtype
    assert got.lse.dtype == torch.float32
    assert relative(got.out, want) <= LIMIT[args["q"].dtype]
    assert relative(got.lse, want_lse) <= 2e-6


@pytest.mark.parametrize("which", VARIANTS)
def test_is_torch_sdpa_for_plain_causal_attention(which: str) -> None:
    args = CASES["causal-d128-gqa8"].inputs("sdpa")
    q, k, v = (args[n].float().transpose(0, 1)[None] for n in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative(variant(which)(**args).out, want[0].transpose(0, 1).double()) <= 4e-3


def test_fallback_tiles_and_holds_no_more_scores_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    args = CASES["varlen"].inputs("varlen")
    largest = 0
    whole = attention.bmm_fp32

    def measured(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        result = whole(a, b)
        largest = max(largest, result.numel() if b.shape[1] == args["q"].shape[2] else 0)
        return result

    monkeypatch.setattr(fallback, "bmm_fp32", measured)
    monkeypatch.setattr(fallback, "KEY_TILE", 7)
    monkeypatch.setattr(fallback, "WORKSPACE", 300)
    want, want_lse = oracle(args)
    got = fallback.multi_cta_attention(**args)
    assert 0 < largest <= 300
    assert relative(got.out, want) <= LIMIT[torch.bfloat16]
    assert relative(got.lse, want_lse) <= 2e-6


def test_fallback_without_known_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under CUDA graph capture all sequences share the tiles, and only the mask keeps them apart."""

    def one_segment(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> list[fallback.Segment]:
        return [fallback.Segment(0, queries, 0, keys, single=False)]

    for case in ("varlen", "mask-narrow", "more-queries-than-keys"):
        args = CASES[case].inputs(case)
        want, _ = oracle(args)
        with monkeypatch.context() as m:
            m.setattr(fallback, "_segments", one_segment)
            assert relative(fallback.multi_cta_attention(**args).out, want) <= LIMIT[torch.bfloat16]


def test_fallback_skips_tiles_that_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "KEY_TILE", 10)
    segment = fallback.Segment(0, 100, 0, 130, single=True)
    tiles = list(fallback._key_tiles(segment, slice(50, 60), True, 8, 0))
    assert (tiles[0].start, tiles[-1].stop) == (73, 90)  # positions 80 to 89, seven before them
    apart = list(fallback._key_tiles(segment, slice(50, 60), True, 8, 15))
    assert apart == [slice(58, 68), slice(68, 75), slice(115, 125), slice(125, 130)]  # 15 earlier, and the entries


@pytest.mark.parametrize("case", ["d512-sink-window", "decode-like"])
def test_fallback_waits_for_no_device_with_one_sequence(case: str) -> None:
    args = CASES[case].inputs(case)
    args["cu_seqlens_q"] = args["cu_seqlens_q"][[0, -1]]
    args["cu_seqlens_k"] = args["cu_seqlens_k"][[0, -1]]
    mode = FakeTensorMode()  # raises wherever a value would be read
    faked: dict[str, Any] = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in args.items()}
    with mode:
        got = fallback.multi_cta_attention(**faked)
    assert got.out.shape == args["q"].shape


def test_fake_gives_the_forms_of_the_real_outputs() -> None:
    args = CASES["d192-v128"].inputs("d192-v128")
    real, fake = variant("reference")(**args), contract.fake(**args)
    for name in real._fields:
        a, b = getattr(real, name), getattr(fake, name)
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_problem_is_hashable_and_buckets_rows() -> None:
    problem = contract.problem(**CASES["varlen"].inputs("varlen"))
    assert hash(problem) == hash(contract.problem(**CASES["varlen"].inputs("varlen")))
    assert (problem.queries, problem.keys) == (256, 512)


def wrong(name: str, value: object, *, case: str = "varlen") -> None:
    args = CASES[case].inputs(case)
    args[name] = value(args[name]) if callable(value) else value
    for which in VARIANTS:
        with pytest.raises(ArgumentError) as error:
            variant(which)(**args)
        assert error.value.argument == name


def test_refuses_arguments_that_do_not_fit() -> None:
    wrong("q", lambda q: q.double())
    wrong("q", lambda q: q[:, :3].contiguous())  # 3 heads on 2 kv heads
    wrong("q", lambda q: q.transpose(0, 1))
    wrong("q", None)
    wrong("k", lambda k: k[..., :32].contiguous())
    wrong("k", lambda k: k.float())
    wrong("v", lambda v: v[1:].contiguous())
    wrong("v", lambda v: v[..., :0])
    wrong("cu_seqlens_q", lambda c: c.long())
    wrong("cu_seqlens_q", lambda c: c[:0])
    wrong("cu_seqlens_q", lambda c: c[:1])  # queries of no sequence
    wrong("cu_seqlens_k", lambda c: c[1:].contiguous())
    wrong("sink", lambda s: s[1:].contiguous())
    wrong("sink", lambda s: s.double())
    wrong("mask", lambda m: m[1:].contiguous(), case="mask")
    wrong("mask", lambda m: m.int(), case="mask")
    wrong("window", 0)
    wrong("window", True)
    wrong("window", 1 << 31)
    wrong("causal", "no")
    wrong("causal", None)
    wrong("entries", -1)
    wrong("entries", True)
    wrong("entries", 10**12)
    wrong("softmax_scale", float("nan"))


@pytest.mark.parametrize("which", VARIANTS)
def test_no_sequence_has_no_queries(which: str) -> None:
    args = CASES["varlen"].inputs("varlen")
    none = {name: args[name][:0] for name in ("q", "k", "v")}
    offsets = {name: args[name][:1] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    got = variant(which)(**(args | none | offsets))
    assert got.out.shape == none["q"].shape
    assert got.lse.shape == none["q"].shape[:2]


def test_largest_window_hides_nothing() -> None:
    args = CASES["varlen"].inputs("varlen")
    for which in VARIANTS:
        whole, cut = (variant(which)(**{**args, "window": window}) for window in (None, (1 << 31) - 1))
        assert torch.equal(whole.out, cut.out)
        assert torch.equal(whole.lse, cut.lse)
    assert launch.window_argument(args["q"], args["k"], (1 << 31) - 1) == args["q"].shape[0] + args["k"].shape[0]


def test_check_values_takes_a_mask_of_entries() -> None:
    args = CASES["mask"].inputs("mask")
    given = {n: args[n] for n in ("q", "k", "cu_seqlens_q", "cu_seqlens_k")}
    contract.check_values(**given, mask=args["mask"][:, :5], entries=5)
    with pytest.raises(ArgumentError, match="the entries"):
        contract.check_values(**given, mask=args["mask"][:, :5], entries=6)


def test_check_values_names_the_culprit() -> None:
    args = CASES["mask"].inputs("mask")
    given = {n: args[n] for n in ("q", "k", "cu_seqlens_q", "cu_seqlens_k", "mask")}
    contract.check_values(**given)
    for name, value in (
        ("cu_seqlens_q", args["cu_seqlens_q"] + 1),
        ("cu_seqlens_k", args["cu_seqlens_k"].flip(0)),
        ("mask", args["mask"][:, :5]),
    ):
        with pytest.raises(ArgumentError) as error:
            contract.check_values(**{**given, name: value})
        assert error.value.argument == name
