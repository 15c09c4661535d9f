"""What one forward pass of a model keeps between its layers; own to a thread, gone when the pass ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Model, DeepseekV4RotaryEmbedding

from megamoe.errors import ArgumentError
from megamoe.nn.hyper_connections import HyperState


@dataclass
class Scope:
    """State of one forward pass.

    Attributes:
        rotary: The model's rotary embedding.
        entered: For a layer, the streams it will be called with and its attention site, entered already by the layer
            before it.
        tables: fp32 cosines and sines by rope type.
    """

    rotary: DeepseekV4RotaryEmbedding
    entered: dict[int, tuple[Tensor, HyperState]] = field(default_factory=dict)
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def hand_over(self, layer: int, streams: Tensor, entered: HyperState) -> None:
        """Leaves what `layer` needs, if it is called with these very `streams`."""
        self.entered[layer] = (streams, entered)

    def take(self, layer: int, streams: Tensor) -> HyperState | None:
        """What the layer before left; None when there is nothing or somebody changed the streams in between."""
        left = self.entered.pop(layer, None)
        return left[1] if left is not None and left[0] is streams else None

    def table(self, rope_type: str, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 cos and sin (B or 1, S, R/2) of the queries' positions; the model's own are in its dtype.

        Args:
            rope_type: "main" or "compress".
            x: Any tensor on the device.
            position_ids: (B or 1, S).
        """
        if rope_type not in self.tables:
            self.tables[rope_type] = self.rotary(x.new_empty(0, dtype=torch.float32), position_ids, rope_type)
        return self.tables[rope_type]


_current: ContextVar[Scope | None] = ContextVar("megamoe_forward", default=None)


@contextlib.contextmanager
def forward_scope(rotary: DeepseekV4RotaryEmbedding) -> Iterator[Scope]:
    """Opens the scope of one forward pass in this thread."""
    token = _current.set(Scope(rotary))
    try:
        yield _current.get()  # type: ignore[misc]  # set in the line above
    finally:
        _current.reset(token)


def current_scope(rotary: DeepseekV4RotaryEmbedding) -> Scope:
    """The scope of the pass that is running; an empty one where a layer is called by itself."""
    return _current.get() or Scope(rotary)


def check_inputs(model: DeepseekV4Model, inputs: dict[str, Any]) -> None:
    """Refuses what the patched forwards do not compute.

    Args:
        model: The DeepseekV4Model.
        inputs: Its forward's arguments by name.

    Raises:
        ArgumentError: Training with gradients, or a mask that hides anything beyond causality and the window. Padding
            is refused because the model's own compressors pool it into the entries that real tokens read.
    """
    if model.training and torch.is_grad_enabled():
        raise ArgumentError("model", "training mode with gradients", "model.eval(), or a block under torch.no_grad()")
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if mask is None:
        return
    if mask.ndim == 2:
        plain = bool(mask.all())
    else:
        plain = _is_window(mask, model.config.sliding_window, inputs.get("past_key_values"))
    if not plain:
        expected = "no padding and no mask of your own; run prompts of one length together, others one by one"
        raise ArgumentError("attention_mask", "a mask that hides tokens", expected)


def _is_window(mask: Tensor, window: int, cache: Any) -> bool:
    """Whether a mask (B, 1, S, K), bool or additive, shows every query as many keys as the causal window does."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    past = cache.get_seq_length() if cache is not None else 0
    positions = torch.arange(mask.shape[2], device=mask.device) + past
    return bool((visible.sum(-1) == (positions + 1).clamp(max=window)).all())
