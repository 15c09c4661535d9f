"""fp4_kv_decode against float64 sums over tokens that the test itself finds, decodes and quantises."""

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
from megamoe.numerics.nvfp4 import quantize
from megamoe.testing.guards import clone, same_bytes
from megamoe_stages.fp4_kv_decode import STAGE, contract, fallback
from megamoe_stages.fp4_kv_decode.cases import CASES

VARIANTS = {v.name: v.target for v in STAGE.variants if v.role is not Role.FUSED}
SMALL = [name for name, case in CASES.items() if not case.gpu_only]
# one rounding of the output; the fallback rounds the probabilities too
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1.5e-6}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def variant(name: str) -> Callable[..., Any]:
    module, function = VARIANTS[name].split(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def inputs(case: str) -> dict[str, Any]:
    return CASES[case].inputs(case)


def slot(a: dict[str, Any], b: int, t: int) -> tuple[int, int] | None:
    """Page and slot of token t, None where it does not exist."""
    page, table = a["k_codes"].shape[2], a["block_table"][b].tolist()
    if not 0 <= t < min(int(a["lengths"][b]), len(table) * page) or table[t // page] < 0:
        return None
    return table[t // page], t % page


def appended(a: dict[str, Any]) -> dict[str, Any]:
    """The arguments as they must be after the call."""
    a = {name: clone(value) for name, value in a.items()}
    for side in "kv":
        new = a.get(f"{side}_new", torch.empty(0))
        for b in range(new.shape[0]):
            for i in range(new.shape[1]):
                at = slot(a, b, int(a["lengths"][b]) - new.shape[1] + i)
                if at is not None:
                    row = quantize(new[b, i], 1 / a[f"{side}_scale"])
                    a[f"{side}_codes"][at[0], :, at[1]] = row.codes
                    a[f"{side}_scales"][at[0], :, at[1]] = row.scales
    return a


def entry(a: dict[str, Any], b: int, t: int) -> tuple[int, int] | None:
    """Page and slot of entry t of the second cache, None where it does not exist."""
    names = {"k_codes": "extra_codes", "block_table": "extra_table", "lengths": "extra_lengths"}
    return slot({name: a[other] for name, other in names.items()}, b, t)


def token(a: dict[str, Any], side: str, at: tuple[int, int]) -> Tensor:
    """float64 (kv_heads, D) of one slot."""
    code = a[f"{side}_codes"][at[0], :, at[1]].long()
    values = torch.stack((E2M1[code % 16], E2M1[code // 16]), -1).flatten(1)
    scales = a[f"{side}_scales"][at[0], :, at[1]].double().repeat_interleave(16, 1)
    value: Tensor = values * scales * a[f"{side}_scale"].double()
    return value


def oracle(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Query by query in float64, on a cache that already holds the new tokens."""
    q = a["q"].double()
    batch, queries, heads, _ = q.shape
    group = heads // a["k_codes"].shape[1]
    side = "v" if "v_codes" in a else "k"
    out = torch.zeros(batch, queries, heads, a[f"{side}_codes"].shape[3] * 2, dtype=torch.float64)
    lse = torch.full((batch, queries, heads), -torch.inf, dtype=torch.float64)
    for b, length in enumerate(a["lengths"].tolist()):
        homes = {t: at for t in range(length) if (at := slot(a, b, t)) is not None}
        k = {t: token(a, "k", at) for t, at in homes.items()}
        v = {t: token(a, side, at) for t, at in homes.items()}
        for i in range(queries):
            at = length - queries + i
            seen = [t for t in homes if t <= at and (a["window"] is None or t > at - a["window"])]
            if a.get("indices") is not None:
                seen = [t for t in a["indices"][b, i].tolist() if t in homes]
            chosen = [(k[t], v[t]) for t in seen]
            if "extra_codes" in a:
                picked = range(int(a["extra_lengths"][b]))
                if "extra_indices" in a:
                    picked = a["extra_indices"][b, i].tolist()
                found = [at for t in picked if (at := entry(a, b, t)) is not None]
                chosen += [(token(a, "extra", at), token(a, "extra", at)) for at in found]
            if not chosen:
                continue
            keys, values = (torch.stack(side).repeat_interleave(group, 1) for side in zip(*chosen, strict=True))
            e = (torch.einsum("hd,khd->hk", q[b, i], keys) * a["softmax_scale"]).exp()
            lse[b, i] = e.sum(1).log()
            bottom = e.sum(1) + (a["sink"].double().exp() if "sink" in a else 0)
            out[b, i] = torch.einsum("hk,khd->hd", e, values) / bottom[:, None]
    return out, lse


def relative(x: Tensor, want: Tensor) -> float:
    finite = want.isfinite()
    assert torch.equal(x.double()[~finite], want[~finite])
    return float((x.double() - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", SMALL)
def test_matches_float64_and_appends_bit_for_bit(case: str) -> None:
    after = appended(inputs(case))
    want, want_lse = oracle(after)
    for which in VARIANTS:
        args = inputs(case)
        got = variant(which)(**args)
        assert got.out.dtype == args["q"].dtype
        assert got.lse.dtype == torch.float32
        assert relative(got.out, want) <= LIMIT[args["q"].dtype]
        assert relative(got.lse, want_lse) <= 2e-6
        assert [name for name in args if not same_bytes(args[name], after[name])] == []


@pytest.mark.parametrize("which", VARIANTS)
def test_is_torch_sdpa_on_the_decoded_cache(which: str) -> None:
    args = inputs("queries-2") | {"q": torch.randn(2, 2, 4, 64, generator=torch.Generator().manual_seed(0))}
    after = appended(args)
    got = variant(which)(**args).out
    k, v = (torch.stack([token(after, s, slot(after, 0, t) or (0, 0)) for t in range(50)], 1)[None] for s in "kv")
    visible = torch.ones(2, 50, dtype=torch.bool).tril(48)
    want = torch.nn.functional.scaled_dot_product_attention(
        args["q"][:1].double().transpose(1, 2), k, v, visible, scale=args["softmax_scale"], enable_gqa=True
    )
    assert relative(got[:1], want.transpose(1, 2)) <= 2e-6


@pytest.mark.parametrize("which", VARIANTS)
def test_stale_slots_play_no_part(which: str) -> None:
    """Whatever lies past a sequence's end, before its window, on spare or on lost pages, the result is the same."""
    results = []
    for filling in (0x7F, 0x00, 0x7E):
        args = inputs("window-evicted")
        for side in "kv":
            stale = args[f"{side}_scales"].view(torch.uint8)
            stale[stale == 0x7F] = filling
        results.append(variant(which)(**args).out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_table_without_pages_drops_new_tokens_and_sees_nothing() -> None:
    for which in VARIANTS:
        args = inputs("gqa-d128")
        args["block_table"].fill_(-1)
        before = {name: clone(value) for name, value in args.items()}
        got = variant(which)(**args)
        assert (got.out == 0).all()
        assert (got.lse == -torch.inf).all()
        assert all(same_bytes(args[name], before[name]) for name in STAGE.mutates)
        for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
            args[name] = args[name][:0]
        assert (variant(which)(**args).out == 0).all()
        args["block_table"] = args["block_table"][:, :0].contiguous()
        assert (variant(which)(**args).out == 0).all()


@pytest.mark.parametrize("which", VARIANTS)
def test_a_page_that_is_not_the_caches_is_none(which: str) -> None:
    """Neither read nor written, whatever number the table holds; so are lengths past the table."""
    args, lost = inputs("gqa-d128"), inputs("gqa-d128")
    pages = args["k_codes"].shape[0]
    args["block_table"][:, 0], args["block_table"][1, 2] = pages, 2**31 - 1
    lost["block_table"][:, 0], lost["block_table"][1, 2] = -1, -1
    args["lengths"][0] += 1000
    lost["lengths"][0] = args["lengths"][0]
    got, want = variant(which)(**args), variant(which)(**lost)
    assert same_bytes(got.out, want.out)
    assert same_bytes(got.lse, want.lse)
    assert all(same_bytes(args[name], lost[name]) for name in STAGE.mutates)


@pytest.mark.parametrize("splits", [0, 1, 2, 7, 33, 1000])
def test_splits_change_nothing_but_rounding(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "WORKSPACE", 1)  # splits=0 then takes 16 tokens at a time
    args = inputs("fp32")
    want, want_lse = oracle(appended(args))
    got = fallback.fp4_kv_decode(**(args | {"splits": splits}))
    assert relative(got.out, want) <= LIMIT[torch.float32]
    assert relative(got.lse, want_lse) <= 2e-6


def test_fallback_reads_no_more_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs("queries-8-window")
    cache = fallback.Cache(args["k_codes"], args["k_scales"], args["k_scale"])
    keys = fallback._keys(cache, args["block_table"], args["lengths"], None, 8, 10)
    assert keys.slot.shape == (3, 10 + 8 - 1)


@pytest.mark.parametrize("case", ["gqa-d128", "mla-window", "queries-8-indices", "append-from-empty", "split-3"])
def test_fallback_waits_for_no_device(case: str) -> None:
    mode = FakeTensorMode()  # raises wherever a value would be read
    args = inputs(case)
    faked: dict[str, Any] = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in args.items()}
    with mode:
        assert fallback.fp4_kv_decode(**faked).lse.shape == args["q"].shape[:3]


@pytest.mark.parametrize("case", ["d192-v128", "mla-window", "append-only", "fp32"])
def test_fake_gives_the_forms_of_the_real_outputs(case: str) -> None:
    real, fake = variant("reference")(**inputs(case)), contract.fake(**inputs(case))
    for name in real._fields:
        a, b = getattr(real, name), getattr(fake, name)
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_problem_says_what_a_query_may_see() -> None:
    problem = contract.problem(**inputs("mla-window"))
    assert hash(problem) == hash(contract.problem(**inputs("mla-window")))
    assert (problem.tokens, problem.shared, problem.appends, problem.indexed) == (128, True, True, False)
    assert contract.problem(**inputs("mla-indices")).tokens == 32
    assert contract.problem(**inputs("gqa-d128")).tokens == 128  # 8 pages of 16


def wrong(name: str, value: object, *, case: str = "gqa-d128", **others: object) -> None:
    args = inputs(case) | others
    args[name] = value(args[name]) if callable(value) else value
    for which in VARIANTS:
        with pytest.raises(ArgumentError) as error:
            variant(which)(**args)
        assert error.value.argument == name


def test_refuses_arguments_that_do_not_fit() -> None:
    wrong("q", lambda q: q.double())
    wrong("q", lambda q: q[:, :, :7].contiguous())  # 7 heads on 2 kv heads
    wrong("q", lambda q: q[..., :24].contiguous())
    wrong("q", lambda q: q[0])
    wrong("k_codes", lambda c: c.int())
    wrong("k_codes", lambda c: c[..., :32].contiguous())
    wrong("k_codes", lambda c: c.transpose(1, 2))
    wrong("k_scales", lambda s: s.view(torch.uint8))
    wrong("k_scales", lambda s: s[1:])
    wrong("k_scale", lambda s: s[None])
    wrong("block_table", lambda t: t.long())
    wrong("block_table", lambda t: t[1:])
    wrong("lengths", lambda x: x.long())
    wrong("lengths", lambda x: x[1:])
    wrong("v_codes", lambda c: c[1:])
    wrong("v_scales", None)
    wrong("v_scale", None)
    wrong("v_scales", lambda s: s[..., 1:].contiguous())
    wrong("v_scales", torch.zeros(1), v_codes=None)
    wrong("k_new", lambda k: k[..., :32].contiguous())
    wrong("k_new", lambda k: k[1:])
    wrong("v_new", None)
    wrong("v_new", lambda v: v.float())
    wrong("v_new", lambda v: v, case="gqa-d128", k_new=None)
    wrong("sink", torch.zeros(3))
    wrong("sink", torch.zeros(8, dtype=torch.float64))
    wrong("indices", lambda i: i.long(), case="mla-indices")
    wrong("indices", lambda i: i[1:], case="mla-indices")
    for name in ("extra_scales", "extra_table", "extra_lengths", "extra_scale"):
        wrong(name, None, case="two-caches")
        wrong(name, torch.zeros(1))  # without extra_codes
    wrong("extra_indices", torch.zeros(1))
    wrong("extra_codes", lambda c: c.int(), case="two-caches")
    wrong("extra_codes", lambda c: c[..., :32].contiguous(), case="two-caches")
    wrong("extra_scales", lambda s: s[:, :, 1:].contiguous(), case="two-caches")  # another page size
    wrong("extra_table", lambda t: t[1:], case="two-caches")
    wrong("extra_lengths", lambda x: x.long(), case="two-caches")
    wrong("extra_indices", lambda i: i[:, :, :, None], case="two-caches-picked")
    wrong("k_scales", lambda s: s[:, :, 1:].contiguous())  # another page size
    codes, scales, table, held, scale = (
        inputs("two-caches")[f"extra_{name}"] for name in ("codes", "scales", "table", "lengths", "scale")
    )
    second = {"extra_scales": scales, "extra_table": table, "extra_lengths": held, "extra_scale": scale}
    wrong("extra_codes", codes, **second)  # beside values
    wrong("window", 0)
    wrong("window", 5, case="mla-indices")
    wrong("splits", -1)
    wrong("softmax_scale", float("inf"))


def test_caches_share_no_memory_where_tokens_are_appended() -> None:
    args = inputs("two-caches")
    codes, scales = args["k_codes"], args["k_scales"]
    room = torch.zeros(codes.numel() + args["extra_codes"].numel(), dtype=torch.uint8)  # one allocation for both caches
    apart = {
        "k_codes": room[: codes.numel()].view(codes.shape).copy_(codes),
        "extra_codes": room[codes.numel() :].view(args["extra_codes"].shape).copy_(args["extra_codes"]),
    }
    for which in VARIANTS:
        own = {name: clone(value) for name, value in args.items()}
        for name, value in variant(which)(**(args | apart))._asdict().items():
            assert same_bytes(value, variant(which)(**own)._asdict()[name])
    first: dict[str, Any] = {"case": "two-caches", "k_codes": codes, "k_scales": scales}
    wrong("extra_codes", lambda extra: codes.flatten()[-extra.numel() :].view(extra.shape), **first)
    wrong("extra_scales", lambda extra: scales.flatten()[: extra.numel()].view(extra.shape), **first)
    wrong(
        "extra_codes", lambda extra: room[: extra.numel()].view(extra.shape), **(first | {"k_codes": apart["k_codes"]})
    )
    wrong(
        "extra_codes",
        lambda extra: torch.utils.dlpack.from_dlpack(codes).flatten()[: extra.numel()].view(extra.shape),
        **first,
    )
    same = {"extra_codes": codes, "extra_scales": scales, "extra_table": args["block_table"]}
    for which in VARIANTS:
        variant(which)(**(args | same | {"k_new": None}))  # nothing is written


def test_check_values_names_the_culprit() -> None:
    extra = ("extra_codes", "extra_table", "extra_lengths", "extra_scale", "extra_indices")
    names = ("k_codes", "block_table", "lengths", "k_scale", "v_scale", "indices", "window", *extra)
    for case in ("gqa-d128", "mla-window", "mla-indices", "window-evicted", "two-caches", "two-caches-picked"):
        args = inputs(case)
        contract.check_values(**{n: args[n] for n in names if n in args})
    args = inputs("mla-indices")
    given = {n: args[n] for n in names if n in args}
    for name, value in (
        ("lengths", args["lengths"] + 1000),
        ("lengths", args["lengths"] - 1000),
        ("block_table", args["block_table"] + 1000),
        ("block_table", torch.zeros_like(args["block_table"])),
        ("k_scale", torch.tensor(0.0)),
        ("v_scale", torch.tensor(torch.nan)),
        ("indices", args["indices"] + 1000),
        ("indices", torch.full_like(args["indices"], 2)),
    ):
        with pytest.raises(ArgumentError) as error:
            contract.check_values(**(given | {name: value}))
        assert error.value.argument == name
    args = inputs("two-caches-picked")
    given = {n: args[n] for n in names if n in args}
    for name, value in (
        ("extra_lengths", args["extra_lengths"] + 1000),
        ("extra_table", args["extra_table"] + 1000),
        ("extra_scale", torch.tensor(-1.0)),
        ("extra_indices", args["extra_indices"] + 1000),
    ):
        with pytest.raises(ArgumentError) as error:
            contract.check_values(**(given | {name: value}))
        assert error.value.argument == name
    with pytest.raises(ArgumentError, match="visible"):
        args = inputs("window-evicted")
        contract.check_values(args["k_codes"], args["block_table"], args["lengths"], args["k_scale"])
