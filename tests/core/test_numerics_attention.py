"""The attention formula against torch's and transformers' own, and the merge rule against the undivided sum."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.numerics.attention import bmm_fp32, masked_attention, merge_lse, visible_keys

SCALE = 0.125


def draw(lq: int, lk: int, heads: int, kv_heads: int, d: int = 64, dv: int = 64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(lq, heads, d), (lk, kv_heads, d), (lk, kv_heads, dv)]
    return [torch.randn(*shape, generator=g) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_is_torch_sdpa_when_causal(heads: int, kv_heads: int) -> None:
    q, k, v = draw(23, 23, heads, kv_heads, dv=32)
    out, _ = masked_attention(q, k, v, visible_keys(torch.arange(23), torch.arange(23)), softmax_scale=SCALE)
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q4, k4, v4, is_causal=True, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(out, want[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_is_transformers_eager_attention_with_sinks() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

    q, k, v = draw(9, 30, 4, 1)
    sink = torch.tensor([0.0, 3.0, -2.0, 8.0])
    visible = visible_keys(torch.arange(9) + 21, torch.arange(30), window=12)
    module = SimpleNamespace(num_key_value_groups=4, sinks=sink, training=False)
    bias = torch.where(visible, 0.0, -torch.inf)[None, None]
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    want, _ = eager_attention_forward(module, q4, k4, v4, bias, SCALE)
    out, _ = masked_attention(q, k, v, visible, softmax_scale=SCALE, sink=sink)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-6)


def test_lse_is_the_log_of_the_sum_without_the_sink() -> None:
    q, k, v = draw(5, 11, 4, 2)
    _, lse = masked_attention(q, k, v, torch.ones(5, 11, dtype=torch.bool), softmax_scale=SCALE, sink=torch.ones(4))
    for i, h in ((0, 0), (4, 1), (2, 3)):
        scores = (k[:, h // 2].double() @ q[i, h].double()) * SCALE
        assert lse[i, h].item() == pytest.approx(scores.exp().sum().log().item(), rel=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_keys_by_definition(causal: bool, window: int | None) -> None:
    queries, keys = torch.tensor([-1, 0, 3, 9]), torch.arange(8)
    got = visible_keys(queries, keys, causal=causal, window=window)
    for i, p in enumerate(queries.tolist()):
        for t in range(8):
            assert got[i, t].item() == ((t <= p or not causal) and (window is None or t > p - window))


def test_rows_without_a_visible_key_are_zero_and_minus_infinity() -> None:
    q, k, v = draw(2, 3, 2, 1)
    visible = torch.tensor([[False] * 3, [True] * 3])
    for sink in (None, torch.zeros(2), torch.full((2,), -torch.inf)):
        out, lse = masked_attention(q, k, v, visible, softmax_scale=SCALE, sink=sink)
        assert (out[0] == 0).all()
        assert (lse[0] == -torch.inf).all()
        assert out[1].isfinite().all()
        assert (out[1] != 0).any()
    out, lse = masked_attention(q, k[:0], v[:0], visible[:, :0], softmax_scale=SCALE)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    q, k, v = draw(4, 6, 2, 1)
    visible = torch.ones(4, 6, dtype=torch.bool)
    out, _ = masked_attention(q, k, v, visible, softmax_scale=SCALE, sink=torch.full((2,), -torch.inf))
    assert torch.equal(out, masked_attention(q, k, v, visible, softmax_scale=SCALE)[0])


@pytest.mark.parametrize("edges", [(0, 40), (0, 1, 40), (0, 13, 13, 27, 40), (0, 40, 40)])
def test_merge_is_the_undivided_attention(edges: tuple[int, ...]) -> None:
    q, k, v = draw(7, 40, 4, 2, dv=16)
    sink = torch.tensor([0.5, -1.0, 4.0, 20.0])
    visible = visible_keys(torch.arange(7) * 5, torch.arange(40))
    parts = [
        masked_attention(q, k[a:b], v[a:b], visible[:, a:b], softmax_scale=SCALE)
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    outs, lses = zip(*parts, strict=True)
    for s in (None, sink):
        want, want_lse = masked_attention(q, k, v, visible, softmax_scale=SCALE, sink=s)
        out, lse = merge_lse(outs, lses, s)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)


def test_merge_of_nothing_visible_is_zero() -> None:
    none = torch.full((3, 2), -torch.inf)
    out, lse = merge_lse([torch.zeros(3, 2, 8)] * 2, [none, none], torch.zeros(2))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_merge_does_not_overflow() -> None:
    outs, lses = [torch.ones(1, 1, 4), torch.full((1, 1, 4), 3.0)], [torch.full((1, 1), 3e4), torch.full((1, 1), 3e4)]
    out, lse = merge_lse(outs, lses, torch.tensor([-3e4]))
    torch.testing.assert_close(out, torch.full((1, 1, 4), 2.0))
    torch.testing.assert_close(merge_lse(outs, lses, torch.tensor([3e5]))[0], torch.zeros(1, 1, 4))
    assert lse.item() == pytest.approx(3e4 + 0.6931, rel=1e-6)


def test_merge_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(ArgumentError, match="lses"):
        merge_lse([], [])
    with pytest.raises(ArgumentError, match="lses"):
        merge_lse([torch.zeros(1, 1, 4)], [])


def test_bmm_keeps_fp32_sums() -> None:
    g = torch.Generator().manual_seed(1)
    a = torch.randn(2, 5, 300, generator=g).bfloat16()
    b = torch.randn(2, 300, 7, generator=g).bfloat16()
    got = bmm_fp32(a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
