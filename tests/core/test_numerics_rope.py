from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding, apply_rotary_pos_emb

from megamoe.errors import ArgumentError
from megamoe.numerics.rope import Yarn, inverse_frequencies, inverse_rope, rope_tables, rotate_interleaved

THETA = {"main": 10000.0, "compress": 160000.0}


def _hf_rotary() -> DeepseekV4RotaryEmbedding:
    yarn = {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    return DeepseekV4RotaryEmbedding(DeepseekV4Config(rope_scaling=yarn))


@pytest.mark.parametrize(("kind", "yarn"), [("main", None), ("compress", Yarn())])
def test_tables_are_those_of_hf(kind: str, yarn: Yarn | None) -> None:
    cos, sin = rope_tables(300, inverse_frequencies(64, THETA[kind], yarn))
    want_cos, want_sin = _hf_rotary()(torch.empty(1, 300, 1), torch.arange(300)[None], layer_type=kind)
    assert cos.shape == (300, 32)
    torch.testing.assert_close(cos, want_cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, want_sin[0], rtol=0, atol=1e-6)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain, scaled = inverse_frequencies(64, 160000.0), inverse_frequencies(64, 160000.0, Yarn(factor=16.0))
    assert torch.equal(plain[0], scaled[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 16)


def test_yarn_where_both_ends_meet_is_a_step() -> None:
    plain = inverse_frequencies(64, 160000.0)
    scaled = inverse_frequencies(64, 160000.0, Yarn(factor=4.0, original_length=6))
    assert torch.isfinite(scaled).all()
    torch.testing.assert_close(scaled[1:], plain[1:] / 4)


@pytest.mark.parametrize("rope_dim", [0, 63, -2])
def test_odd_rope_dim_is_refused(rope_dim: int) -> None:
    with pytest.raises(ArgumentError, match="rope_dim"):
        inverse_frequencies(rope_dim, 10000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverse_rope_is_hf_rotation_by_minus_theta(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    o = torch.randn(9, 4, 96, generator=generator).to(dtype)
    cos, sin = (t[torch.tensor([0, 1, 2, 70, 5, 5, 3, 4, 99])] for t in rope_tables(100, inverse_frequencies(32, 1e4)))
    want = apply_rotary_pos_emb(o.float(), cos, -sin)  # fp32 out, as ours is not rounded
    assert torch.equal(inverse_rope(o, cos, sin), want)


def test_inverse_rope_against_float64_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    o = torch.randn(50, 2, 80, generator=generator)
    cos, sin = rope_tables(50, inverse_frequencies(64, 1e4))
    angle = cos.double().numpy() + 1j * sin.double().numpy()
    pairs = o[..., 16:].double().numpy()
    turned = (pairs[..., 0::2] + 1j * pairs[..., 1::2]) * np.conj(angle)[:, None]
    got = inverse_rope(o, cos, sin)
    assert torch.equal(got[..., :16], o[..., :16])
    np.testing.assert_allclose(got[..., 16::2].numpy(), turned.real, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[..., 17::2].numpy(), turned.imag, rtol=0, atol=2e-6)


def test_inverse_undoes_forward() -> None:
    x = torch.randn(20, 3, 64, generator=torch.Generator().manual_seed(2))
    cos, sin = rope_tables(20, inverse_frequencies(64, 1e4))
    forward = rotate_interleaved(x, cos[:, None], sin[:, None])
    assert not torch.allclose(forward, x, atol=1e-2)
    torch.testing.assert_close(inverse_rope(forward, cos, sin), x, rtol=0, atol=2e-6)


def test_no_product_is_contracted() -> None:
    """x0 cos + x1 sin with both products rounded; an fma would keep the low bits of one."""
    generator = torch.Generator().manual_seed(3)
    o = torch.randn(64, 1, 16, generator=generator)
    cos, sin = (torch.randn(64, 8, generator=generator) for _ in range(2))
    x0, x1, c, s = (t.numpy() for t in (o[:, 0, 0::2], o[:, 0, 1::2], cos, sin))
    got = inverse_rope(o, cos, sin)[:, 0].numpy()
    assert np.array_equal(got[:, 0::2], x0 * c + x1 * s)
    assert np.array_equal(got[:, 1::2], x1 * c - x0 * s)


def test_rows_that_do_not_fit_are_refused() -> None:
    cos, sin = rope_tables(5, inverse_frequencies(64, 1e4))
    with pytest.raises(ArgumentError, match="cos_rows"):
        inverse_rope(torch.zeros(4, 2, 64), cos, sin)
    with pytest.raises(ArgumentError, match="sin_rows"):
        inverse_rope(torch.zeros(5, 2, 64), cos, sin[:4])
    with pytest.raises(ArgumentError, match="cos_rows"):
        inverse_rope(torch.zeros(5, 2, 32), cos, sin)
