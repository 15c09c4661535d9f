"""Routing against transformers' DeepSeek-V4 routers, and the permutation against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.errors import ArgumentError
from megamoe.nn.routing import combine, permute, route_hash, route_topk

TOKENS, EXPERTS, TOP_K, VOCABULARY = 33, 16, 6, 50


@pytest.fixture(scope="module")
def config() -> Any:
    from transformers import DeepseekV4Config

    return DeepseekV4Config(
        hidden_size=32,
        num_hidden_layers=2,
        compress_ratios=[0, 4],
        n_routed_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=VOCABULARY,
        routed_scaling_factor=1.5,
    )


def randomised(module: Any) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        module.weight.normal_()
    return module


def assert_same_experts(ours: tuple[Tensor, Tensor], indices: Tensor, weights: Tensor) -> None:
    """Same weight for the same expert, whatever the order of slots."""
    mine = torch.zeros(TOKENS, EXPERTS).scatter(1, ours[0], ours[1])
    theirs = torch.zeros(TOKENS, EXPERTS).scatter(1, indices, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_topk_routes_as_transformers(config: Any) -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

    router = randomised(DeepseekV4TopKRouter(config))
    router.e_score_correction_bias.normal_()
    logits, weights, indices = router(torch.randn(TOKENS, 32))
    ours = route_topk(logits.detach(), router.e_score_correction_bias, TOP_K, 1.5)
    assert ours.indices.dtype == torch.int64
    assert_same_experts(ours, indices, weights.detach())
    torch.testing.assert_close(ours.weights.sum(-1), torch.full((TOKENS,), 1.5))
    unbiased = route_topk(logits.detach(), None, TOP_K, 1.5)
    assert not torch.equal(unbiased.indices.sort().values, ours.indices.sort().values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash_routes_as_transformers(config: Any, dtype: torch.dtype) -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

    router = randomised(DeepseekV4HashRouter(config))
    router.tid2eid.copy_(torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(VOCABULARY)]))
    token_ids = torch.randint(VOCABULARY, (TOKENS,))
    logits, weights, indices = router(torch.randn(TOKENS, 32), token_ids)
    ours = route_hash(logits.detach(), token_ids.to(dtype), router.tid2eid.to(dtype), 1.5)
    assert torch.equal(ours.indices, indices)
    torch.testing.assert_close(ours.weights, weights.detach(), rtol=1e-6, atol=0)


def test_scores_of_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[-200.0, -100.0, 0.0, 100.0], [-200.0, -200.0, -200.0, -200.0]])
    weights = route_topk(logits, None, 2, 2.5).weights
    assert weights.isfinite().all()
    assert weights[1].sum() == 0, "scores that underflow weigh nothing"


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_permutation_is_a_stable_sort_by_expert(tokens: int, dtype: torch.dtype) -> None:
    indices = torch.randint(0, EXPERTS - 3, (tokens, TOP_K), generator=torch.Generator().manual_seed(2)).to(dtype)
    got = permute(indices, EXPERTS)
    visits = [(e, t) for e in range(EXPERTS) for t in range(tokens) for slot in range(TOP_K) if indices[t, slot] == e]
    assert got.tokens.tolist() == [t for _, t in visits]
    counts = [sum(e == expert for e, _ in visits) for expert in range(EXPERTS)]
    assert got.offsets.dtype == torch.int32
    assert got.offsets.tolist() == [sum(counts[:e]) for e in range(EXPERTS + 1)]
    for t in range(tokens):
        for slot in range(TOP_K):
            assert visits[int(got.rows[t, slot])] == (int(indices[t, slot]), t)
    assert got.rows.flatten().sort().values.tolist() == list(range(tokens * TOP_K))


def test_permutation_never_waits_for_the_device() -> None:
    """Fake tensors have no values: anything that reads one back fails."""
    with FakeTensorMode():
        indices = torch.empty(33, TOP_K, dtype=torch.int64)
        order = permute(indices, EXPERTS)
        out = combine(torch.empty(33 * TOP_K, 8), order, torch.empty(33, TOP_K), torch.bfloat16)
    assert order.offsets.shape == (EXPERTS + 1,)
    assert out.shape == (33, 8)


def test_combine_sums_in_fp32_and_rounds_once() -> None:
    generator = torch.Generator().manual_seed(4)
    indices = torch.randint(0, EXPERTS, (9, TOP_K), generator=generator)
    order = permute(indices, EXPERTS)
    outputs = torch.randn(9 * TOP_K, 8, generator=generator).bfloat16()
    weights = torch.rand(9, TOP_K, generator=generator)
    want = torch.einsum("tk,tkh->th", weights.double(), outputs[order.rows].double())
    torch.testing.assert_close(combine(outputs, order, weights, torch.float32).double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        combine(outputs, order, weights, torch.bfloat16),
        combine(outputs, order, weights, torch.float32).bfloat16(),
    )


def test_wrong_arguments_are_named() -> None:
    logits = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="logits"):
        route_topk(logits.bfloat16(), None, 2, 1.0)
    with pytest.raises(ArgumentError, match="top_k"):
        route_topk(logits, None, 5, 1.0)
    with pytest.raises(ArgumentError, match="bias"):
        route_topk(logits, torch.zeros(3), 2, 1.0)
    with pytest.raises(ArgumentError, match="token_ids"):
        route_hash(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(9, 2, dtype=torch.int64), 1.0)
    with pytest.raises(ArgumentError, match="tid2eid"):
        route_hash(logits, torch.zeros(3, dtype=torch.int64), torch.zeros(9, dtype=torch.int64), 1.0)
    with pytest.raises(ArgumentError, match="indices"):
        permute(torch.zeros(3, 2), 4)
