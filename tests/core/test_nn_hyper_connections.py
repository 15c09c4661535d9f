from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4RMSNorm

from megamoe.errors import ArgumentError
from megamoe.nn.hyper_connections import HyperSite, HyperState, advance, enter, leave
from megamoe.numerics import nvfp4

HIDDEN, TOKENS = 96, 13


def rel_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _hf(seed: int) -> tuple[DeepseekV4HyperConnection, DeepseekV4RMSNorm]:
    generator = torch.Generator().manual_seed(seed)
    connection, norm = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=HIDDEN)), DeepseekV4RMSNorm(HIDDEN)
    with torch.no_grad():
        for parameter in (*connection.parameters(), *norm.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return connection, norm


def _site(connection: DeepseekV4HyperConnection, norm: DeepseekV4RMSNorm) -> HyperSite:
    return HyperSite(*(p.detach() for p in (connection.fn, connection.base, connection.scale, norm.weight)))


def _sublayer(normed: Tensor) -> Tensor:
    return torch.tanh(normed).roll(1, dims=-1)


def _streams() -> Tensor:
    return torch.randn(TOKENS, 4, HIDDEN, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_exact_mode_is_a_decoder_layer_of_hf() -> None:
    """Both sites of DeepseekV4DecoderLayer.forward, with a plain function for attention and experts."""
    modules = [_hf(0), _hf(1)]
    want = _streams()[None]
    for connection, norm in modules:
        post, comb, collapsed = connection(want)
        f = _sublayer(norm(collapsed))
        want = post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), want)

    state = enter(_streams(), _site(*modules[0]))
    assert state.quantized is None
    state = advance(state.residual, _sublayer(state.normed), state.post, state.comb, _site(*modules[1]))
    assert state.quantized is None
    got = leave(state.residual, _sublayer(state.normed), state.post, state.comb)
    assert rel_l2(got, want[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_mode_carries_the_same_numbers(dtype: torch.dtype) -> None:
    sites, enc = [_site(*_hf(0)), _site(*_hf(1))], torch.tensor(2688 / 8)
    x = _streams().to(dtype)
    exact, fast = enter(x, sites[0]), enter(x, sites[0], enc)
    _check_quantized(fast, enc)
    f = _sublayer(exact.normed)
    exact = advance(exact.residual, f, exact.post, exact.comb, sites[1])
    fast = advance(fast.residual, f, fast.post, fast.comb, sites[1], enc)
    _check_quantized(fast, enc)
    bound = 1e-6 if dtype is torch.float32 else 1.5e-3  # the op's own bounds
    for name in ("residual", "normed", "post", "comb"):
        assert rel_l2(getattr(fast, name), getattr(exact, name)) < bound, name


def _check_quantized(state: HyperState, enc: Tensor) -> None:
    want = nvfp4.quantize(state.normed, enc)
    assert state.quantized is not None
    assert torch.equal(state.quantized.codes, want.codes)
    assert torch.equal(state.quantized.scales.view(torch.uint8), want.scales.view(torch.uint8))


def test_options_of_the_site_reach_the_op() -> None:
    site = _site(*_hf(0))
    x, enc = _streams(), torch.tensor(2688 / 8)
    state = enter(x, site, enc)
    other = HyperSite(site.fn, site.base, site.scale, site.norm_weight, 1e-2, 1e-1, 2)
    args = (state.residual, _sublayer(state.normed), state.post, state.comb)
    exact, fast, plain = advance(*args, other), advance(*args, other, enc), advance(*args, site)
    assert rel_l2(fast.comb, exact.comb) < 1e-6
    assert rel_l2(fast.normed, exact.normed) < 1e-6
    assert rel_l2(plain.comb, exact.comb) > 1e-3
    assert rel_l2(plain.normed, exact.normed) > 1e-3


def test_misfit_is_named() -> None:
    site, x = _site(*_hf(0)), _streams()
    state = enter(x, site)
    with pytest.raises(ArgumentError, match="^f: "):
        advance(x, state.normed[:-1], state.post, state.comb, site, torch.ones(()))
