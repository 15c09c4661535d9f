"""The device arithmetic of mHC, compiled for the CPU by CuTe DSL's host JIT, against `megamoe.numerics.mhc`."""

from __future__ import annotations

import functools
from typing import Any

import cutlass
import pytest
import torch
from cutlass import Constexpr, Float32, Int32, Uint32, cute
from cutlass.cute.runtime import make_ptr
from torch import Tensor

from megamoe.cute import bf16, mhc, warp
from megamoe.cute.arith import Target
from megamoe.numerics import mhc as definition

HOST = Target.HOST
STREAMS = mhc.STREAMS
TOKENS = 97
TERMS = {"high": 0, "middle": 1, "low": 2}  # of bf16


@cute.jit  # type: ignore[untyped-decorator]
def sinkhorn_all(comb: cute.Pointer, count: Int32, iters: Int32, eps: Float32) -> None:
    matrices = cute.make_tensor(comb, cute.make_layout((count, STREAMS, STREAMS), stride=(16, 4, 1)))
    for i in range(count):
        own = cute.make_rmem_tensor((STREAMS, STREAMS), Float32)
        for k in cutlass.range_constexpr(16):
            own[k // 4, k % 4] = matrices[i, k // 4, k % 4]
        mhc.sinkhorn(own, iters, eps, HOST)
        for k in cutlass.range_constexpr(16):
            matrices[i, k // 4, k % 4] = own[k // 4, k % 4]


@cute.jit  # type: ignore[untyped-decorator]
def mix_all(
    x: cute.Pointer,
    f: cute.Pointer,
    post: cute.Pointer,
    comb: cute.Pointer,
    out: cute.Pointer,
    y: cute.Pointer,
    count: Int32,
) -> None:
    """A word of two hidden dims a token: the new streams, and those collapsed with `post` as weights."""
    old = cute.make_tensor(x, cute.make_layout((count, STREAMS), stride=(STREAMS, 1)))
    new = cute.make_tensor(out, cute.make_layout((count, STREAMS), stride=(STREAMS, 1)))
    added, collapsed = cute.make_tensor(f, cute.make_layout(count)), cute.make_tensor(y, cute.make_layout(count))
    weights = cute.make_tensor(post, cute.make_layout((count, STREAMS), stride=(STREAMS, 1)))
    mixing = cute.make_tensor(comb, cute.make_layout((count, 16), stride=(16, 1)))
    for i in range(count):
        factors = [weights[i, k] for k in range(STREAMS)]
        rows = [factors, *([mixing[i, 4 * s + k] for k in range(STREAMS)] for s in range(STREAMS))]
        sources = [[added[i]], *([old[i, k]] for k in range(STREAMS))]
        words = mhc.post_mix(sources, rows.__getitem__, HOST)
        for k in cutlass.range_constexpr(STREAMS):
            new[i, k] = words[k][0]
        collapsed[i] = mhc.collapse([words[k][0] for k in range(STREAMS)], factors, HOST)


@cute.jit  # type: ignore[untyped-decorator]
def apply_all(x: cute.Pointer, out: cute.Pointer, count: Int32, what: Constexpr) -> None:
    values = cute.make_tensor(x, cute.make_layout((count, 2), stride=(2, 1)))
    results = cute.make_tensor(out, cute.make_layout((count, 2), stride=(2, 1)))
    for i in range(count):
        low, high = values[i, 0], values[i, 1]
        if cutlass.const_expr(what == "sigmoid"):
            low, high = mhc.sigmoid(low, HOST), mhc.sigmoid(high, HOST)
        elif cutlass.const_expr(what == "bf16"):
            low, high = bf16.unpack(bf16.pack(low, high, HOST))
        elif cutlass.const_expr(what in TERMS):
            low, high = bf16.unpack(warp.split_bf16(low, high, HOST)[TERMS[what]])
        elif cutlass.const_expr(what == "normalise"):
            word = mhc.normalise(bf16.pack(low, high, HOST), Float32(0.37), [Float32(1.1), Float32(-0.7)], HOST)
            low, high = bf16.unpack(word)
        else:
            low = mhc.inverse_rms(low * low, 7, Float32(1e-6), HOST)
            high = mhc.inverse_rms(high * high, Int32(7), Float32(1e-6), HOST)
        results[i, 0], results[i, 1] = low, high


def pointer(tensor: Tensor, dtype: Any) -> Any:
    return make_ptr(dtype, tensor.data_ptr(), cute.AddressSpace.generic, assumed_align=16)


@functools.cache
def compiled(program: Any, *arguments: Any) -> Any:
    word, number = make_ptr(Uint32, 16, cute.AddressSpace.generic), make_ptr(Float32, 16, cute.AddressSpace.generic)
    given = {
        sinkhorn_all: (number, Int32(0), Int32(0), Float32(0)),
        mix_all: (word, word, number, number, word, word, Int32(0)),
        apply_all: (number, number, Int32(0)),
    }[program]
    return cute.compile(program, *given, *arguments)


def apply(what: str, x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    compiled(apply_all, what)(pointer(x, Float32), pointer(out, Float32), Int32(len(x)))
    return out


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_sinkhorn_is_the_definition(iters: int, spread: float) -> None:
    logits = spread * torch.randn(TOKENS, STREAMS, STREAMS, generator=torch.Generator().manual_seed(1))
    got = logits.clone()
    compiled(sinkhorn_all)(pointer(got, Float32), Int32(TOKENS), Int32(iters), Float32(1e-6))
    assert rel_l2(got, definition.sinkhorn(logits.double(), iters=iters)) < 3e-7
    if spread > 1 and iters > 1:  # still moving: one iteration more or less shows
        assert rel_l2(got, definition.sinkhorn(logits, iters=iters - 1)) > 1e-5


def test_sinkhorn_without_eps_keeps_columns_that_all_but_vanish() -> None:
    logits = torch.zeros(1, STREAMS, STREAMS)
    logits[0, :, 2] = -70.0  # e^-70 / 3 is far above what stands in for an eps of 0
    got = logits.clone()
    compiled(sinkhorn_all)(pointer(got, Float32), Int32(1), Int32(20), Float32(0.0))
    assert rel_l2(got, definition.sinkhorn(logits.double(), eps=0.0)) < 1e-6


def test_sinkhorn_of_a_nan_is_nan() -> None:
    logits = torch.zeros(2, STREAMS, STREAMS)
    logits[0, 2, 1] = torch.nan
    compiled(sinkhorn_all)(pointer(logits, Float32), Int32(2), Int32(20), Float32(1e-6))
    assert logits[0].isnan().all() and torch.allclose(logits[1], torch.full((4, 4), 0.25))


def test_streams_are_mixed_and_collapsed_as_defined() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, STREAMS, 2, generator=generator).bfloat16()
    f = torch.randn(TOKENS, 2, generator=generator).bfloat16()
    post, comb = torch.rand(TOKENS, STREAMS, generator=generator), torch.rand(TOKENS, 4, 4, generator=generator)
    out, y = torch.empty_like(x), torch.empty_like(f)
    arguments = [pointer(t, Uint32) for t in (x, f)] + [pointer(t, Float32) for t in (post, comb)]
    compiled(mix_all)(*arguments, pointer(out, Uint32), pointer(y, Uint32), Int32(TOKENS))
    assert rel_l2(out, definition.post_mix(x, f, post, comb)) < 4e-4
    assert rel_l2(out, definition.post_mix(x, f, post, comb.mT)) > 1e-2
    assert rel_l2(y, definition.collapse(out, post)) < 4e-4


def test_sigmoid_is_the_definition() -> None:
    x = torch.linspace(-80, 80, 4002).view(-1, 2)
    want = torch.sigmoid(x.double())
    assert float(((apply("sigmoid", x) - want).abs() / want.clamp_min(1e-36)).max()) < 4e-7
    ends = apply("sigmoid", torch.tensor([[torch.inf, -torch.inf], [torch.nan, 0.0]]))
    assert ends[0].tolist() == [1.0, 0.0] and ends[1, 0].isnan() and ends[1, 1] == 0.5


def test_bf16_is_rounded_as_torch_does() -> None:
    x = torch.randint(-(2**31), 2**31, (40000,), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    x = torch.cat([x, torch.arange(-40000, 40000, dtype=torch.int32)]).view(torch.float32).view(-1, 2)
    assert torch.equal(apply("bf16", x).nan_to_num(3.0), x.bfloat16().float().nan_to_num(3.0))


def test_three_bf16_terms_are_all_but_the_last_bits() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1000, 2, generator=generator) * torch.exp2(torch.randint(-60, 60, (1000, 2), generator=generator))
    terms = torch.stack([apply(term, x) for term in TERMS]).double()
    assert torch.equal(terms[0].float(), x.bfloat16().float())
    assert torch.equal((terms[0] + terms[1]).float(), terms[0].float() + (x - terms[0].float()).bfloat16().float())
    assert float(((terms.sum(0) - x.double()).abs() / x.double().abs()).max()) <= 2**-24


def test_norm_is_the_definition() -> None:
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(5))
    want = (x.bfloat16().float() * 0.37 * torch.tensor([1.1, -0.7])).bfloat16().float()
    assert rel_l2(apply("normalise", x), want) < 1e-4
    assert rel_l2(apply("rms", x), torch.rsqrt(x.double().square() / 7 + 1e-6)) < 3e-7
