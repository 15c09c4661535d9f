"""The NVFP4 store and DeepSeek-V4's core attention against transformers' own attention over the same keys."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.errors import ArgumentError
from megamoe.nn import attention
from megamoe.nn.attention import PagedKV, attend, attend_quantized, decode, indices_of, kv_scale
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize, quantize

B, H, D, WINDOW, RATIO = 2, 4, 64, 12, 4
SCALE = D**-0.5


@pytest.fixture(params=["reference", "fallback"], autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixes the variant, so that a test does not depend on what the machine would choose."""

    def op(name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"megamoe_stages.{name}.{request.param}")
        return getattr(module, name)  # type: ignore[no-any-return]

    monkeypatch.setattr(attention, "op", op)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(k: Tensor, scale: float = 1.0) -> Tensor:
    """What NVFP4 makes of keys (..., D)."""
    held = quantize(k, torch.tensor(1 / scale))
    return dequantize(NVFP4Tensor(held.codes, held.scales, torch.tensor(scale)))


def transformers_attention(q: Tensor, k: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    """HF's eager DeepSeek-V4 attention: q (B, S, H, D), keys = values (B, L, 1, D), visible (B, S, L)."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

    module = SimpleNamespace(num_key_value_groups=H, sinks=sink.double(), training=False)
    bias = torch.where(visible, 0.0, -torch.inf).double()[:, None]
    kv = k.transpose(1, 2).double()
    out: Tensor = eager_attention_forward(module, q.transpose(1, 2).double(), kv, kv, bias, SCALE)[0]
    return out


def in_window(queries: Tensor, keys: int) -> Tensor:
    """bool (B, queries, keys) for absolute query positions (queries,)."""
    age = queries[:, None] - torch.arange(keys)
    return ((age >= 0) & (age < WINDOW)).expand(B, -1, -1)


def ready(queries: Tensor, entries: int) -> Tensor:
    """bool (B, queries, entries): the compressed entries whose source tokens are all past."""
    return (torch.arange(entries) < (queries[:, None] + 1) // RATIO).expand(B, -1, -1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


SINK = torch.tensor([0.0, 2.0, -1.0, 5.0])


@pytest.mark.parametrize("compress", [False, True])
def test_prompt_is_transformers_attention(compress: bool) -> None:
    s = 30
    q, k, c = draw(B, s, H, D), draw(B, s, 1, D, seed=1), draw(B, s // RATIO, 1, D, seed=2)
    positions = torch.arange(s)
    near, far = in_window(positions, s), ready(positions, c.shape[1])
    got = attend(
        q, k, SINK, softmax_scale=SCALE, window=WINDOW, **({"compressed": c, "visible": far} if compress else {})
    )
    keys, seen = (torch.cat([k, c], 1), torch.cat([near, far], -1)) if compress else (k, near)
    close(got, transformers_attention(q, keys, seen, SINK))


def test_prompt_with_padding_hidden_by_a_mask() -> None:
    q, k = draw(B, 20, H, D), draw(B, 20, 1, D, seed=1)
    mask = torch.ones(B, 20, 20, dtype=torch.bool)
    mask[1, :, :7] = False
    got = attend(q, k, SINK, softmax_scale=SCALE, window=WINDOW, mask=mask)
    close(got, transformers_attention(q, k, in_window(torch.arange(20), 20) & mask, SINK))


def test_prompt_with_padding_and_compressed_entries() -> None:
    s = 20
    q, k, c = draw(B, s, H, D), draw(B, s, 1, D, seed=1), draw(B, s // RATIO, 1, D, seed=2)
    mask = torch.ones(B, s, s, dtype=torch.bool)
    mask[1, :, :7] = False
    near, far = in_window(torch.arange(s), s) & mask, ready(torch.arange(s), c.shape[1])
    got = attend(q, k, SINK, softmax_scale=SCALE, window=WINDOW, compressed=c, visible=far, mask=mask)
    keys, seen = torch.cat([k, c], 1), torch.cat([near, far], -1)
    close(got, transformers_attention(q, keys, seen, SINK))
    got = attend(q, k, SINK, softmax_scale=SCALE, window=WINDOW, compressed=c, mask=mask)
    close(got, transformers_attention(q, keys, torch.cat([near, torch.ones_like(far)], -1), SINK))


def test_prompts_that_do_not_fit_are_refused_by_name() -> None:
    """Once sequences lie back to back, a batch of one for two would read behind the keys."""
    q, k, c = draw(B, 6, H, D), draw(B, 6, 1, D), draw(B, 3, 1, D)
    seen = torch.ones(B, 6, 3, dtype=torch.bool)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("k", {"k": k[:1]}),
        ("k", {"k": k.bfloat16()}),
        ("compressed", {"compressed": c[:1]}),
        ("visible", {"compressed": c, "visible": seen[..., :2]}),
        ("visible", {"compressed": c, "visible": seen.float()}),
        ("visible", {"visible": seen}),
        ("mask", {"compressed": c, "mask": seen}),
        ("mask", {"mask": seen}),
    ]
    for name, other in wrong:
        with pytest.raises(ArgumentError) as caught:
            attend(q, **{"k": k, **other}, softmax_scale=SCALE, window=WINDOW)
        assert caught.value.argument == name
    turn = (torch.arange(6).repeat(B), torch.ones(6, 8), torch.zeros(6, 8), torch.tensor(100.0))
    with pytest.raises(ArgumentError, match="k: got shape"):
        attend_quantized(q, k[:1], *turn, groups=1, softmax_scale=SCALE, window=WINDOW)


def test_exact_decoding_is_the_prompt_token_by_token() -> None:
    s = 25
    q, k, c = draw(B, s, H, D), draw(B, s, 1, D, seed=1), draw(B, s // RATIO, 1, D, seed=2)
    far = ready(torch.arange(s), c.shape[1])
    whole = attend(q, k, SINK, softmax_scale=SCALE, window=WINDOW, compressed=c, visible=far)
    for t in range(s):
        kept, entries = k[:, max(0, t + 1 - WINDOW) : t + 1], c[:, : (t + 1) // RATIO]
        step = attend(q[:, t : t + 1], kept, SINK, softmax_scale=SCALE, window=WINDOW, compressed=entries)
        close(step, whole[:, t : t + 1].double())


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("indexed", [True, False])
def test_decoding_reads_what_was_stored(queries: int, indexed: bool) -> None:
    """A prompt of 33 tokens, then steps of `queries`, beside transformers over fake-quantised keys."""
    prompt, steps = 33, 6
    total = prompt + steps * queries
    q, k, c = draw(B, total, H, D), draw(B, total, 1, D, seed=1), draw(B, total // RATIO, 1, D, seed=2)
    window = PagedKV(B, D, page=16, window=WINDOW)
    compressed = PagedKV(B, D, page=16, k_scale=torch.tensor(0.02))
    window.append(k[:, :prompt])
    held, held_c = stored(k), stored(c, 0.02)
    for start in range(prompt, total, queries):
        positions = torch.arange(start, start + queries)
        entries = (start + queries) // RATIO
        compressed.append(c[:, compressed.length : entries])
        far = ready(positions, entries) if indexed else torch.ones(B, queries, entries, dtype=torch.bool)
        now = slice(start, start + queries)
        got = decode(
            q[:, now],
            window,
            k[:, now],
            SINK,
            softmax_scale=SCALE,
            compressed=compressed,
            indices=indices_of(far) if indexed else None,
        )
        seen = torch.cat([in_window(positions, total), far], -1)
        close(got, transformers_attention(q[:, now], torch.cat([held, held_c[:, :entries]], 1), seen, SINK))


def test_without_entries_only_the_window_counts() -> None:
    q, k = draw(B, 3, H, D), draw(B, 3, 1, D, seed=1)
    empty = PagedKV(B, D)
    got = decode(q, PagedKV(B, D, window=WINDOW), k, SINK, softmax_scale=SCALE, compressed=empty)
    close(got, transformers_attention(q, stored(k), in_window(torch.arange(3), 3), SINK))
    assert torch.equal(got, decode(q, PagedKV(B, D, window=WINDOW), k, SINK, softmax_scale=SCALE))
    bare = torch.cat([k, k[:, :0]], 1)
    close(
        attend(q, k, SINK, softmax_scale=SCALE, window=None, compressed=k[:, :0]),
        attend(q, bare, SINK, softmax_scale=SCALE, window=None).double(),
    )


def test_a_window_needs_a_fixed_number_of_pages() -> None:
    cache = PagedKV(B, D, page=4, window=WINDOW)
    cache.append(draw(B, 500, 1, D))
    for t in range(60):
        cache.append(draw(B, 1, 1, D, seed=t))
    assert cache.length == 560
    assert cache.block_table.shape == (B, 140)
    assert int((cache.block_table >= 0).sum(1).max()) <= WINDOW // 4 + 1
    assert cache.k_codes.shape[0] <= 4 * B * (WINDOW // 4 + 1)
    used = cache.block_table[cache.block_table >= 0]
    assert len(set(used.tolist())) == used.numel()


def test_growth_keeps_what_was_stored_and_values_may_differ_from_keys() -> None:
    cache = PagedKV(B, D, kv_heads=2, v_dim=32, page=4, v_scale=torch.tensor(0.5))
    k, v = draw(B, 23, 2, D), draw(B, 23, 2, 32, seed=1)
    for part in (slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 22)):
        cache.append(k[:, part], v[:, part])
    q = draw(B, 1, H, D, seed=2)
    out, lse = cache.attend(q, k[:, 22:], v[:, 22:], softmax_scale=SCALE)
    assert cache.lengths.tolist() == [23, 23]
    keys, values = (x.double().transpose(1, 2) for x in (stored(k), stored(v, 0.5)))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double().transpose(1, 2), keys, values, scale=SCALE, enable_gqa=True
    )
    close(out, want.transpose(1, 2))
    assert lse.shape == (B, 1, H)


def test_padding_is_never_stored() -> None:
    """Sequence 1 starts with 5 tokens of padding: it must decode as if it were that much shorter."""
    q, k = draw(B, 1, H, D), draw(B, 40, 1, D, seed=1)
    for window in (None, WINDOW):
        cache = PagedKV(B, D, page=8, window=window, padding=[0, 5])
        for part in (slice(0, 3), slice(3, 7), slice(7, 39)):
            cache.append(k[:, part])
        got = decode(q, cache, k[:, 39:], SINK, softmax_scale=SCALE)
        alone = PagedKV(1, D, page=8, window=window)
        alone.append(k[1:, 5:39])
        torch.testing.assert_close(got[1:], decode(q[1:], alone, k[1:, 39:], SINK, softmax_scale=SCALE))
        seen = torch.ones(B, 1, 40, dtype=torch.bool) if window is None else in_window(torch.tensor([39]), 40).clone()
        seen[1, :, :5] = False
        close(got, transformers_attention(q, stored(k), seen, SINK))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_reorder_copies_sequences(window: int | None) -> None:
    k, q = draw(3, 30, 1, D), draw(3, 1, H, D, seed=1)
    cache, wanted = (PagedKV(3, D, page=8, window=window) for _ in range(2))
    cache.append(k)
    cache.reorder([2, 0, 0])
    wanted.append(k[[2, 0, 0]])
    new = draw(3, 1, 1, D, seed=2)
    got, want = (decode(q, c, new, SINK, softmax_scale=SCALE) for c in (cache, wanted))
    assert torch.equal(got, want)


def test_reset_forgets() -> None:
    cache, fresh = PagedKV(B, D, page=8), PagedKV(B, D, page=8)
    cache.append(draw(B, 30, 1, D))
    cache.reset()
    assert (cache.length, cache.block_table.shape) == (0, (B, 0))
    q, k = draw(B, 9, H, D), draw(B, 9, 1, D, seed=1)
    assert torch.equal(*(decode(q, c, k, softmax_scale=SCALE) for c in (cache, fresh)))


def test_indices_of_keeps_the_visible_ones() -> None:
    visible = torch.tensor([[[True, False, True, True], [False] * 4]])
    assert indices_of(visible).tolist() == [[[3, 2, 0, -1], [-1] * 4]]
    assert indices_of(visible, 3).tolist() == [[[3, 2, 0], [-1] * 3]]
    assert indices_of(visible[..., :0]).shape == (1, 2, 0)


def test_scale_follows_the_amax_over_448_convention() -> None:
    assert torch.equal(kv_scale(torch.tensor([448.0, 7.0, 0.0])), torch.tensor([1.0, 7.0 / 448.0, 1.0]))


def test_refuses_what_does_not_fit() -> None:
    for name, make in (
        ("head_dim", lambda: PagedKV(B, 24)),
        ("v_dim", lambda: PagedKV(B, D, v_dim=8)),
        ("page", lambda: PagedKV(B, D, page=0)),
        ("window", lambda: PagedKV(B, D, window=0)),
        ("padding", lambda: PagedKV(B, D, padding=[1])),
        ("k_new", lambda: PagedKV(B, D).append(draw(B, 3, 2, D))),
        ("v_new", lambda: PagedKV(B, D, v_dim=D).append(draw(B, 3, 1, D))),
    ):
        with pytest.raises(ArgumentError) as error:
            make()
        assert error.value.argument == name
