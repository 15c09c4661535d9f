"""NVFP4 caches of one attention layer, kept beside the layer's own cache of each generation.

The layer's own cache holds the window's last keys and the compressed entries unquantised. The pages are filled from it
when a step of decoding finds none, and again when its tensors are not those that the last step left: after a prompt or
a chunk of one, beam search, `crop`, `reset`, or a copy. Quantising the same keys again gives the same bytes.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RMSNorm

from megamoe.integrations.transformers.scales import key_bound
from megamoe.nn.attention import PagedKV, decode, kv_scale

COMPRESSOR = "compressor"  # the entry of the model's cache that core attention reads; the indexer has its own


class KVState:
    """The NVFP4 pages of one layer in one generation.

    Args:
        own: The layer's own cache, filled.
        window: Keys a query sees.
        scale: fp32 (), decode scale of the window's keys.
        compressed_scale: fp32 (), decode scale of the compressed entries.
    """

    def __init__(self, own: Any, window: int, scale: Tensor, compressed_scale: Tensor) -> None:
        keys: Tensor = own.keys  # (B, 1, kept, D)
        batch, _, _, head_dim = keys.shape
        self.window = PagedKV(batch, head_dim, window=window, k_scale=scale, device=keys.device)
        self.compressed = PagedKV(batch, head_dim, k_scale=compressed_scale, device=keys.device)
        self.window.append(keys[:, :, -window:].transpose(1, 2).contiguous())
        self._append_entries(_entries(own))
        self._seen = (keys, _entries(own))

    def in_step(self, own: Any) -> bool:
        """Whether the layer's own cache is as the last step left it."""
        return own.keys is self._seen[0] and _entries(own) is self._seen[1]

    def step(
        self, own: Any, q: Tensor, new: Tensor, picks: Tensor | None, sink: Tensor, softmax_scale: float
    ) -> Tensor:
        """Stores one token and attends from it.

        Args:
            own: The layer's own cache, which holds the token and its compressed entry already.
            q: (B, 1, heads, D).
            new: (B, 1, 1, D), its key.
            picks: int32 (B, 1, n), the compressed entries it sees, -1 for none; None for all.
            sink: fp32 (heads,).
            softmax_scale: What the scores are multiplied by.

        Returns:
            (B, 1, heads, D).
        """
        self._append_entries(_entries(own))
        self._seen = (own.keys, _entries(own))
        return decode(q, self.window, new, sink, softmax_scale=softmax_scale, compressed=self.compressed, indices=picks)

    def _append_entries(self, entries: Tensor | None) -> None:
        """Stores the compressed entries (B, entries, D) that are not stored yet."""
        if entries is not None and entries.shape[1] > self.compressed.length:
            self.compressed.append(entries[:, self.compressed.length :, None].contiguous())


class PagedCaches:
    """The NVFP4 caches of one attention module, one for each generation.

    Args:
        module: The DeepseekV4Attention; its norms bound the keys, so no key ever saturates.
    """

    def __init__(self, module: DeepseekV4Attention) -> None:
        self.window: int = module.sliding_window
        self._scale = _scale(module, module.kv_norm)
        compressor = module.compressor
        self._compressed_scale = self._scale if compressor is None else _scale(module, compressor.kv_norm)
        self._states: weakref.WeakKeyDictionary[Any, KVState] = weakref.WeakKeyDictionary()

    def in_step_with(self, own: Any) -> KVState:
        """The pages that hold what the layer's own cache `own` holds."""
        state = self._states.get(own)
        if state is None or not state.in_step(own):
            state = KVState(own, self.window, self._scale, self._compressed_scale)
            self._states[own] = state
        return state


def _scale(module: DeepseekV4Attention, norm: DeepseekV4RMSNorm) -> Tensor:
    return kv_scale(norm.weight.new_tensor(key_bound(module, norm)).float())


def _entries(own: Any) -> Tensor | None:
    """Compressed entries (B, entries, D) of a layer's own cache; None for a layer that has none (yet)."""
    entries: Tensor | None = getattr(own, "compressed_kv", {}).get(COMPRESSOR)
    return entries
