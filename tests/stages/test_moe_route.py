"""Routing against transformers' DeepSeek-V4 routers, and what they do not fix: ties, extreme logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe_stages.moe_route import kernel, launch
from megamoe_stages.moe_route.contract import Routing
from megamoe_stages.moe_route.fallback import moe_route as fallback
from megamoe_stages.moe_route.limits import MAX_EXPERTS, supports
from megamoe_stages.moe_route.reference import moe_route as reference

TOKENS, EXPERTS, TOP_K, VOCABULARY = 33, 16, 6, 50
BOTH = pytest.mark.parametrize("run", [reference, fallback])


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


def assert_same_experts(ours: Routing, indices: Tensor, weights: Tensor) -> None:
    """Same weight for the same expert, whatever the order of slots."""
    mine = torch.zeros(TOKENS, EXPERTS).scatter(1, ours.indices.long(), ours.weights)
    theirs = torch.zeros(TOKENS, EXPERTS).scatter(1, indices, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


@BOTH
def test_topk_routes_as_transformers(config: Any, run: Any) -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

    router = randomised(DeepseekV4TopKRouter(config))
    router.e_score_correction_bias.normal_()
    logits, weights, indices = router(torch.randn(TOKENS, 32))
    ours = run(logits.detach(), router.e_score_correction_bias, top_k=TOP_K, scaling=1.5)
    assert_same_experts(ours, indices, weights.detach())
    torch.testing.assert_close(ours.weights.sum(-1), torch.full((TOKENS,), 1.5))
    unbiased = run(logits.detach(), top_k=TOP_K, scaling=1.5)
    assert not torch.equal(unbiased.indices.sort().values, ours.indices.sort().values)


@BOTH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hash_routes_as_transformers(config: Any, dtype: torch.dtype, run: Any) -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

    router = randomised(DeepseekV4HashRouter(config))
    router.tid2eid.copy_(torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(VOCABULARY)]))
    token_ids = torch.randint(VOCABULARY, (TOKENS,))
    logits, weights, indices = router(torch.randn(TOKENS, 32), token_ids)
    ours = run(logits.detach(), None, token_ids.to(dtype), router.tid2eid.to(dtype), top_k=TOP_K, scaling=1.5)
    assert torch.equal(ours.indices.long(), indices)
    torch.testing.assert_close(ours.weights, weights.detach(), rtol=1e-6, atol=0)


@BOTH
def test_scores_of_extreme_logits_stay_finite(run: Any) -> None:
    logits = torch.tensor([[-200.0, -100.0, 0.0, 100.0], [-200.0, -200.0, -200.0, -200.0]])
    weights = run(logits, top_k=2, scaling=2.5).weights
    assert weights.isfinite().all()
    assert weights[1].sum() == 0, "scores that underflow weigh nothing"


def test_of_equal_scores_the_lower_number_goes_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0, 2.0]])
    assert reference(logits, top_k=5, scaling=1.0).indices.tolist() == [[1, 3, 5, 0, 2]]


def test_limits() -> None:
    assert not supports({"experts": 384, "top_k": 6, "tokens": 8192})
    assert len(supports({"experts": MAX_EXPERTS + 1, "top_k": 33, "tokens": 1})) == 2
    assert [kernel.logits_a_lane(n) for n in (1, 256, 257, 384, MAX_EXPERTS)] == [8, 8, 12, 12, 16]


def test_wrong_arguments_are_named() -> None:
    logits, ids = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    table = torch.zeros(9, 2, dtype=torch.int64)
    for argument, args, top_k in [
        ("logits", (logits.bfloat16(),), 2),
        ("top_k", (logits,), 5),
        ("bias", (logits, torch.zeros(3)), 2),
        ("bias", (logits, torch.zeros(4), ids, table), 2),
        ("token_ids", (logits, None, ids[:2], table), 2),
        ("token_ids", (logits, None, None, table), 2),
        ("table", (logits, None, ids), 2),
        ("table", (logits, None, ids, table), 3),
    ]:
        with pytest.raises(ArgumentError) as caught:
            reference(*args, top_k=top_k, scaling=1.0)  # type: ignore[arg-type]
        assert caught.value.argument == argument
    with pytest.raises(ArgumentError, match="CUDA"):
        launch.moe_route(logits, top_k=2, scaling=1.0)
