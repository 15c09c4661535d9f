"""DeepSeek-V4 core attention: a sliding window and compressed entries under one softmax, over NVFP4 or plain keys.

Each query sees the window's keys and some compressed entries. A prompt is attended to as it came, both parts in one
call, and stored in NVFP4; decoding reads both stores in one call. The exact mode keeps no store: `attend` over the
given keys serves for decoding too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megamoe.contracts import ACTIVATIONS, check_tensor
from megamoe.dispatch import NoVariantError
from megamoe.errors import ArgumentError
from megamoe.nn.weights import is_kernel
from megamoe.numerics.attention import visible_keys
from megamoe.numerics.nvfp4 import BLOCK, E4M3_MAX, NVFP4Tensor
from megamoe.ops import current_config, op


def kv_scale(amax: Tensor) -> Tensor:
    """Decode scale of a cache whose values reach `amax` (fp32, any shape): amax / 448, and 1 where amax is 0.

    448 and not 6 * 448, as FlashInfer, vLLM, TensorRT-LLM and ModelOpt have it: E2M1 * E4M3 then stays within 448.
    """
    return torch.where(amax == 0, 1.0, amax.float() / E4M3_MAX)


class PagedKV:
    """A paged NVFP4 cache of one layer: all sequences grow together, a page at a time.

    Args:
        batch: Number of sequences.
        head_dim: D, a multiple of 16.
        kv_heads: Heads of the cache.
        v_dim: Dv; None when the keys are the values.
        page: Tokens a page.
        window: Queries see this many tokens, their own included; pages that fell out of it are used again.
        k_scale: fp32 (), decode scale of the keys; see `kv_scale`. 1 by default.
        v_scale: fp32 (), decode scale of the values.
        padding: Tokens at the start of each sequence that are padding; they are never stored. None by default.
        device: Where the cache lives.

    Attributes:
        length: Tokens given so far to each sequence, padding included.
        lengths: int32 (batch,), stored positions of each sequence: without padding.
        block_table: int32 (batch, pages of a sequence), -1 where a page fell out of the window.

    Raises:
        ArgumentError: `head_dim`, `v_dim`, `page`, `window` or `padding` does not fit.
    """

    def __init__(
        self,
        batch: int,
        head_dim: int,
        *,
        kv_heads: int = 1,
        v_dim: int | None = None,
        page: int = 64,
        window: int | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        padding: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, of in (("head_dim", head_dim, BLOCK), ("v_dim", v_dim or BLOCK, BLOCK), ("page", page, 1)):
            if value <= 0 or value % of:
                raise ArgumentError(name, value, f"a positive multiple of {of}")
        if window is not None and window < 1:
            raise ArgumentError("window", window, "None or at least 1 (it counts the query's own position)")
        if padding is not None and (len(padding) != batch or any(p < 0 for p in padding)):
            raise ArgumentError("padding", list(padding), f"{batch} counts of at least 0")
        self.batch, self.page, self.window = batch, page, window
        self.padding = list(padding or [0] * batch)
        self.k_scale = torch.ones((), device=device) if k_scale is None else k_scale.to(device)
        self.v_scale = None
        self.k_codes, self.k_scales = _no_pages(kv_heads, page, head_dim, device)
        self.v_codes: Tensor | None = None
        self.v_scales: Tensor | None = None
        if v_dim is not None:
            self.v_scale = torch.ones((), device=device) if v_scale is None else v_scale.to(device)
            self.v_codes, self.v_scales = _no_pages(kv_heads, page, v_dim, device)
        self.reset()

    def reset(self) -> None:
        """Forgets every token; the pages stay allocated."""
        self.length = 0
        self._free = list(range(self.k_codes.shape[0]))
        self._table = torch.empty(self.batch, 0, dtype=torch.int32)  # on the host
        self._publish(table_changed=True)

    def append(self, k_new: Tensor, v_new: Tensor | None = None) -> None:
        """Stores new tokens, `k_new` (batch, new, kv_heads, D) and `v_new` (batch, new, kv_heads, Dv)."""
        no_queries = k_new.new_empty(self.batch, 0, k_new.shape[2], k_new.shape[3])
        self.attend(no_queries, k_new, v_new, softmax_scale=1.0)

    def attend(
        self,
        q: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        sink: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        softmax_scale: float,
        extra: PagedKV | None = None,
        extra_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens, then attends: the op fp4_kv_decode, which describes the arguments.

        Args:
            q: (batch, queries, heads, D), the last positions.
            k_new: (batch, new, kv_heads, D); None for nothing new.
            v_new: (batch, new, kv_heads, Dv).
            sink: fp32 (heads,).
            indices: int32 (batch, queries, n), the only tokens to look at; the window then plays no part.
            softmax_scale: What the scores are multiplied by.
            extra: A second cache under the same softmax, all of it in sight; both without values of their own.
            extra_indices: int32 (batch, queries, m), the only entries of `extra` to look at.

        Returns:
            out (batch, queries, heads, Dv) and lse fp32 (batch, queries, heads), without the sink.

        Raises:
            ArgumentError: What came fits neither the cache nor the op.
        """
        q = q.contiguous()
        if k_new is not None:
            k_new, v_new = k_new.contiguous(), v_new if v_new is None else v_new.contiguous()
            _, kv_heads, _, half = self.k_codes.shape
            check_tensor("k_new", k_new, [self.batch, "new", kv_heads, half * 2], ACTIVATIONS, like=self.k_codes)
            reach = self._extend(k_new.shape[1], q.shape[1])
            if reach < k_new.shape[1]:  # the rest is out of every window already
                k_new = k_new[:, -reach:].contiguous()
                v_new = v_new if v_new is None else v_new[:, -reach:].contiguous()
        second: tuple[Tensor | None, ...] = (None,) * 5
        if extra is not None:
            second = (extra.k_codes, extra.k_scales, extra.block_table, extra.lengths, extra.k_scale)
        result = op("fp4_kv_decode")(
            q,
            self.k_codes,
            self.k_scales,
            self.block_table,
            self.lengths,
            self.k_scale,
            self.v_codes,
            self.v_scales,
            self.v_scale,
            k_new,
            v_new,
            sink,
            indices,
            *second,
            extra_indices,
            softmax_scale=softmax_scale,
            window=self.window if indices is None else None,
        )
        return result.out, result.lse

    def reorder(self, sources: Sequence[int]) -> None:
        """Makes each sequence b a copy of what sequence `sources[b]` was, as beam search does."""
        live = self._table[:, self._first :].long()  # (batch, pages), none of them -1
        to, of = live.flatten(), live[list(sources)].flatten()
        for store in (self.k_codes, self.k_scales, self.v_codes, self.v_scales):
            if store is not None:
                raw = store.view(torch.uint8)
                raw[to.to(raw.device)] = raw[of.to(raw.device)]
        self.padding = [self.padding[s] for s in sources]
        self._publish(table_changed=False)

    @property
    def _first(self) -> int:
        """First page of a sequence that is still held."""
        return int((self._table[:1] < 0).sum())

    def _extend(self, new: int, queries: int) -> int:
        """Makes room for `new` more tokens; returns how many of the last tokens are still in some query's window."""
        self.length += new
        reach = self.length if self.window is None else self.window + max(queries, 1) - 1
        first = max(0, self.length - max(self.padding, default=0) - reach) // self.page
        pages = -(-self.length // self.page)
        before, held = self._first, self._table.shape[1]
        dropped = min(first, held)
        self._free += self._table[:, before:dropped].flatten().tolist()
        self._table[:, :dropped] = -1
        missing = max(0, pages - max(first, held))
        self._reserve(missing * self.batch)
        fresh = [self._free.pop() for _ in range(missing * self.batch)]
        lost = pad(self._table, (0, max(0, first - held)), value=-1)
        self._table = torch.cat([lost, torch.tensor(fresh, dtype=torch.int32).view(self.batch, missing)], dim=1)
        self._publish(table_changed=missing > 0 or dropped > before)
        return min(reach, new)

    def _reserve(self, wanted: int) -> None:
        """Allocates so that `wanted` pages are free; the store at least doubles when it grows."""
        have = self.k_codes.shape[0]
        if wanted <= len(self._free):
            return
        more = max(wanted - len(self._free), have)
        self._free += range(have, have + more)
        self.k_codes, self.k_scales = _grown(self.k_codes, more), _grown(self.k_scales, more)
        if self.v_codes is not None and self.v_scales is not None:
            self.v_codes, self.v_scales = _grown(self.v_codes, more), _grown(self.v_scales, more)

    def _publish(self, *, table_changed: bool) -> None:
        """Brings the host's view of lengths and table to the device."""
        device = self.k_codes.device
        stored = [max(0, self.length - padded) for padded in self.padding]
        self.lengths = torch.tensor(stored, dtype=torch.int32).to(device, non_blocking=True)
        if table_changed:
            self.block_table = self._table.to(device, non_blocking=True, copy=True)


def attend(
    q: Tensor,
    k: Tensor,
    sink: Tensor | None = None,
    *,
    softmax_scale: float,
    window: int | None,
    compressed: Tensor | None = None,
    visible: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Core attention over keys as they are: a prompt, or any step of the exact mode. Keys are the values.

    Args:
        q: (batch, queries, heads, D); query i sits at key position i + keys - queries.
        k: (batch, keys, kv_heads, D).
        sink: fp32 (heads,), in the denominator, once.
        softmax_scale: What the scores are multiplied by.
        window: Keys a query sees, its own included; None for all before it.
        compressed: (batch, entries, kv_heads, D), attended to besides.
        visible: bool (batch, queries, entries): which entries each query sees; None for all.
        mask: bool (batch, queries, keys): hides keys, such as padding, that causality and the window would show.

    Returns:
        (batch, queries, heads, D), dtype of q.

    Raises:
        ArgumentError: An argument does not fit the others or the op multi_cta_attention.
    """
    _check(q, k, compressed, visible)
    if mask is not None:
        _check_part("mask", mask, (q.shape[0], q.shape[1], k.shape[1]), torch.bool, q)
    entries = 0 if compressed is None else compressed.shape[1]
    if entries and mask is not None:  # one mask of all keys: positions are in it
        at = torch.arange(q.shape[1], device=q.device) + (k.shape[1] - q.shape[1])
        near = visible_keys(at, torch.arange(k.shape[1], device=q.device), window=window)
        far = mask.new_ones(*mask.shape[:2], entries) if visible is None else visible
        visible, causal, window, entries = torch.cat([near & mask, far], dim=2), False, None, 0
    else:
        visible, causal = (visible if entries else mask), True
    result = op("multi_cta_attention")(
        *_back_to_back(q, k, compressed),
        sink,
        _rows_of(visible),
        softmax_scale=softmax_scale,
        causal=causal,
        window=window,
        entries=entries,
    )
    out: Tensor = result.out.view(q.shape)
    return out


def attend_quantized(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale_enc: Tensor,
    sink: Tensor | None = None,
    *,
    groups: int,
    softmax_scale: float,
    window: int | None,
    compressed: Tensor | None = None,
    visible: Tensor | None = None,
) -> NVFP4Tensor:
    """`attend`, inverse RoPE and quantisation, for `AttentionOutput.project`: in one op or in two.

    In one, attention_quant, where the configuration names a variant for it, and in two, multi_cta_attention and
    inverse_rope_quant, where it names one only for these; an op that is off is not called. Else in one, unless only
    multi_cta_attention has a kernel for the problem. While torch.compile traces: always in one.

    Args:
        q: (batch, queries, heads, D); query i sits at key position i + keys - queries.
        k: (batch, keys, kv_heads, D).
        positions: int32 or int64 (batch * queries,), rows of the tables.
        cos: fp32 (P, R/2).
        sin: fp32 (P, R/2).
        scale_enc: fp32 (), encode scale of the turned heads.
        sink: fp32 (heads,), in the denominator, once.
        groups: Of heads.
        softmax_scale: What the scores are multiplied by.
        window: Keys a query sees, its own included; None for all before it.
        compressed: (batch, entries, kv_heads, D), attended to besides.
        visible: bool (batch, queries, entries): which entries each query sees; None for all.

    Returns:
        NVFP4 of logical shape (groups, batch * queries, heads / groups * D), linear scales.

    Raises:
        ArgumentError: An argument does not fit the others or the ops.
        ConfigError: Neither way is left, as its ops are off.
        NoVariantError: No variant may run an op that is left.
    """
    _check(q, k, compressed, visible)
    entries = 0 if compressed is None else compressed.shape[1]
    given, mask = _back_to_back(q, k, compressed), _rows_of(visible if entries else None)
    turn = (positions, cos, sin, scale_enc)
    how = {"softmax_scale": softmax_scale, "window": window, "entries": entries}
    one, two = (*given, *turn, sink, mask), (*given, sink, mask)
    if _in_one(one, two, groups, how):
        result: NVFP4Tensor = op("attention_quant")(*one, groups=groups, **how).out
    else:
        result = op("inverse_rope_quant")(op("multi_cta_attention")(*two, **how).out, *turn, groups=groups)
    return result


def _in_one(
    one: tuple[Tensor | None, ...], two: tuple[Tensor | None, ...], groups: int, how: Mapping[str, Any]
) -> bool:
    """Whether `attend_quantized` calls attention_quant with `one`, rather than multi_cta_attention with `two`."""
    if torch.compiler.is_compiling():
        return True  # a trace holds for other configurations too, and cannot ask for this one
    config, apart = current_config(), ("multi_cta_attention", "inverse_rope_quant")
    if config.choice("attention_quant") == "off":
        return False
    if config.names("attention_quant") or any(config.choice(name) == "off" for name in apart):
        return True
    if any(config.names(name) for name in apart):
        return False
    try:
        if is_kernel(op("attention_quant").decide(*one, groups=groups, **how)):
            return True
    except NoVariantError:
        return False
    try:
        return not is_kernel(op("multi_cta_attention").decide(*two, **how))
    except NoVariantError:
        return True


def decode(
    q: Tensor,
    cache: PagedKV,
    k_new: Tensor | None,
    sink: Tensor | None = None,
    *,
    softmax_scale: float,
    compressed: PagedKV | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """Core attention over NVFP4 caches, after storing the new keys of the window.

    Args:
        q: (batch, queries, heads, D), the last positions.
        cache: The window's keys.
        k_new: (batch, new, kv_heads, D), stored first; None when they are already.
        sink: fp32 (heads,), in the denominator, once.
        softmax_scale: What the scores are multiplied by.
        compressed: The compressed entries, those of this step included.
        indices: int32 (batch, queries, n): entries that each query sees, -1 for none; None for all.

    Returns:
        (batch, queries, heads, D), dtype of q.
    """
    if compressed is None or compressed.length == 0:
        compressed = indices = None
    return cache.attend(q, k_new, sink=sink, softmax_scale=softmax_scale, extra=compressed, extra_indices=indices)[0]


def indices_of(visible: Tensor, most: int | None = None) -> Tensor:
    """The entries that each query sees as `fp4_kv_decode` takes them.

    Args:
        visible: bool (batch, queries, entries).
        most: No query sees more entries than this (the indexer's top-k); None for all.

    Returns:
        int32 (batch, queries, min(most, entries)), -1 where there are fewer; the highest entries first.
    """
    entries = torch.arange(visible.shape[-1], dtype=torch.int32, device=visible.device)
    width = len(entries) if most is None else min(most, len(entries))
    return torch.where(visible, entries, -1).topk(width, dim=-1).values


def _check(q: Tensor, k: Tensor, compressed: Tensor | None, visible: Tensor | None) -> None:
    """Raises ArgumentError for what an op cannot see once sequences lie back to back."""
    _check_part("q", q, ("batch", "queries", "heads", "D"), q.dtype, q)
    _check_part("k", k, (q.shape[0], "keys", "kv_heads", q.shape[3]), q.dtype, q)
    if compressed is not None:
        _check_part("compressed", compressed, (k.shape[0], "entries", *k.shape[2:]), q.dtype, q)
        if visible is not None:
            _check_part("visible", visible, (q.shape[0], q.shape[1], compressed.shape[1]), torch.bool, q)
    elif visible is not None:
        raise ArgumentError("visible", f"shape {tuple(visible.shape)}", "None without compressed entries")


def _check_part(name: str, value: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype, like: Tensor) -> None:
    """As `check_tensor`, for a tensor of any strides."""
    pairs = zip(shape, value.shape, strict=False)
    if value.ndim != len(shape) or any(isinstance(want, int) and want != have for want, have in pairs):
        raise ArgumentError(name, f"shape {tuple(value.shape)}", f"({', '.join(map(str, shape))})")
    if value.dtype != dtype:
        raise ArgumentError(name, str(value.dtype), str(dtype))
    if value.device != like.device:
        raise ArgumentError(name, f"device {value.device}", str(like.device))


def _back_to_back(q: Tensor, k: Tensor, compressed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sequences of equal lengths as the ops take them: queries, keys, the same as values, and the offsets of both.

    Compressed entries stand behind the keys of their sequence.
    """
    if compressed is not None and compressed.shape[1]:
        k = torch.cat([k, compressed], dim=1)
    edges = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    keys = k.flatten(0, 1).contiguous()
    return q.flatten(0, 1).contiguous(), keys, keys, edges * q.shape[1], edges * k.shape[1]


def _rows_of(mask: Tensor | None) -> Tensor | None:
    """A mask (batch, queries, columns) by rows."""
    return None if mask is None else mask.flatten(0, 1).contiguous()


def _no_pages(kv_heads: int, page: int, dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    codes = torch.empty(0, kv_heads, page, dim // 2, dtype=torch.uint8, device=device)
    return codes, torch.empty(0, kv_heads, page, dim // BLOCK, dtype=torch.float8_e4m3fn, device=device)


def _grown(store: Tensor, more: int) -> Tensor:
    """The store with `more` pages at its end, not filled: no slot is read before it is written."""
    grown = store.new_empty(store.shape[0] + more, *store.shape[1:])
    grown[: store.shape[0]] = store
    return grown
