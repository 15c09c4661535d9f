from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4RMSNorm

from megamoe.numerics.mhc import collapse, mix, post_mix, rms_norm, sinkhorn

HIDDEN = 96
FP32 = 1e-6  # relative L2: what the order of fp32 sums leaves


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _randn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _hf_site(seed: int) -> DeepseekV4HyperConnection:
    randn = _randn(seed)
    site = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=HIDDEN))
    with torch.no_grad():
        site.fn.copy_(randn(24, 4 * HIDDEN) * 0.1)
        site.base.copy_(randn(24))  # HF starts it at zero, which would leave half of the formula untested
        site.scale.copy_(randn(3))
    return site


@pytest.mark.parametrize("seed", range(3))
def test_mix_and_collapse_are_those_of_hf(seed: int) -> None:
    site, x = _hf_site(seed), _randn(seed + 10)(1, 33, 4, HIDDEN)
    with torch.no_grad():
        want_post, want_comb, want_y = site(x)
        pre, post, comb = mix(x, site.fn, site.base, site.scale)
    assert rel_l2(post, want_post) < FP32
    assert rel_l2(comb, want_comb) < FP32
    assert rel_l2(collapse(x, pre), want_y) < FP32


@pytest.mark.parametrize("n", [2, 4, 5])
def test_mix_against_float64(n: int) -> None:
    randn = _randn(n)
    x, fn, base, scale = randn(7, n, 32), randn(n * (n + 2), 32 * n) * 0.2, randn(n * (n + 2)), randn(3)
    flat, w, b, s = (t.double().numpy() for t in (x.flatten(1), fn, base, scale))
    logits = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6) @ w.T
    want_pre = 1 / (1 + np.exp(-(logits[:, :n] * s[0] + b[:n]))) + 1e-6
    want_post = 2 / (1 + np.exp(-(logits[:, n : 2 * n] * s[1] + b[n : 2 * n])))
    c = np.exp((logits[:, 2 * n :] * s[2] + b[2 * n :]).reshape(-1, n, n))
    c = c / c.sum(2, keepdims=True) + 1e-6
    for i in range(20):
        c = c if i == 0 else c / (c.sum(2, keepdims=True) + 1e-6)
        c = c / (c.sum(1, keepdims=True) + 1e-6)
    for got, want in zip(mix(x, fn, base, scale), (want_pre, want_post, c), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=5e-6)


def test_sinkhorn_ends_on_the_columns() -> None:
    logits = _randn(0)(40, 4, 4)
    comb = sinkhorn(logits, iters=2, eps=1e-12)  # an eps that vanishes in fp32: only rounding is left
    torch.testing.assert_close(comb.sum(-2), torch.ones(40, 4), rtol=0, atol=4 * 2**-23)
    assert (comb.sum(-1) - 1).abs().max() > 1e-3  # two iterations: rows are still off
    rows = sinkhorn(logits, iters=200).sum(-1)  # converged: off by eps and rounding
    torch.testing.assert_close(rows, torch.ones(40, 4), rtol=0, atol=1e-6 + 4 * 2**-23)


def test_sinkhorn_counts_its_iterations() -> None:
    logits = 3 * _randn(1)(40, 4, 4)
    assert rel_l2(sinkhorn(logits, iters=19), sinkhorn(logits, iters=20)) > FP32


def test_post_mix_sums_over_the_first_index_as_hf_does() -> None:
    randn = _randn(2)
    x, f, post, comb = randn(1, 17, 4, HIDDEN), randn(1, 17, HIDDEN), randn(1, 17, 4), randn(1, 17, 4, 4)
    # DeepseekV4DecoderLayer.forward, inline
    want = post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
    assert rel_l2(post_mix(x, f, post, comb), want) < FP32
    assert rel_l2(post_mix(x, f, post, comb.mT), want) > 0.1
    by_hand = np.einsum("btij,btih->btjh", comb.double().numpy(), x.double().numpy())
    by_hand += post.double().numpy()[..., None] * f.double().numpy()[:, :, None]
    assert rel_l2(post_mix(x, f, post, comb), torch.from_numpy(by_hand)) < FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype: torch.dtype) -> None:
    randn = _randn(3)
    x, f, post, comb = randn(9, 4, HIDDEN).to(dtype), randn(9, HIDDEN).to(dtype), randn(9, 4), randn(9, 4, 4)
    pre, weight = randn(9, 4), randn(HIDDEN)
    wide = x.float()
    assert torch.equal(post_mix(x, f, post, comb), post_mix(wide, f.float(), post, comb).to(dtype))
    assert torch.equal(collapse(x, pre), collapse(wide, pre).to(dtype))
    assert torch.equal(rms_norm(f, weight), rms_norm(f.float(), weight).to(dtype))


def test_rms_norm_is_that_of_hf() -> None:
    randn = _randn(4)
    norm, y = DeepseekV4RMSNorm(HIDDEN, eps=1e-6), randn(11, HIDDEN)
    with torch.no_grad():
        norm.weight.copy_(randn(HIDDEN))
        assert rel_l2(rms_norm(y, norm.weight, 1e-6), norm(y)) < FP32
        assert torch.equal(rms_norm(y.bfloat16(), norm.weight), norm(y.bfloat16()))


def test_zero_streams_stay_finite() -> None:
    site = _hf_site(5)
    pre, post, comb = mix(torch.zeros(3, 4, HIDDEN), site.fn, site.base, site.scale)
    assert all(t.isfinite().all() for t in (pre, post, comb))
    assert torch.equal(rms_norm(torch.zeros(3, HIDDEN), torch.ones(HIDDEN)), torch.zeros(3, HIDDEN))
