"""The NVFP4 weights of a layer: as they came, or rearranged once for the kernels that run on them."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.errors import ArgumentError
from megamoe.model import Decision, Role
from megamoe.numerics import fragments
from megamoe.numerics.gate_up import deinterleave, interleave
from megamoe.numerics.nvfp4 import NVFP4Tensor

_STATE = "_extra_state"  # torch's key for what `get_extra_state` returns


class Weight(nn.Module):
    """An NVFP4Tensor whose parts move, save and load with a module, in either of two forms.

    Args:
        tensor: The weights (..., rows, K).
        order: Of gate and up rows, "gate_up" or "up_gate"; None for weights that are not both.
    """

    codes: Tensor
    scales: Tensor
    global_scale_dec: Tensor

    def __init__(self, tensor: NVFP4Tensor, order: str | None = None) -> None:
        super().__init__()
        self.prepared = False
        self._given = self._layout = tensor.scale_layout
        self._given_order = order
        self._logical = tuple(tensor.shape)
        self._keep(tensor)

    @property
    def shape(self) -> torch.Size:
        """Logical shape, (..., rows, K)."""
        return torch.Size(self._logical)

    @property
    def order(self) -> str | None:
        """Of gate and up rows, as they are kept: prepared ones are interleaved."""
        return "interleaved" if self.prepared and self._given_order else self._given_order

    @property
    def scale_layout(self) -> str:
        """As they are kept."""
        return self._layout

    @property
    def operand(self) -> NVFP4Tensor:
        """The weights as they are kept, for an op, which must be told `order`."""
        return NVFP4Tensor(self.codes, self.scales, self.global_scale_dec, self._layout)

    @property
    def given(self) -> NVFP4Tensor:
        """The weights as they came, bit for bit."""
        if not self.prepared:
            return self.operand
        plain = self.operand.with_layout("linear")
        if self._given_order is not None:
            plain = deinterleave(plain)
        if self._given_order == "up_gate":
            plain = _halves_swapped(plain)
        return plain.with_layout(self._given)

    @property
    def as_if_prepared(self) -> NVFP4Tensor:
        """The weights with only the name of the prepared layout: for asking which variant would run on them."""
        return NVFP4Tensor(self.codes, self.scales, self.global_scale_dec, fragments.layout_name(*self._logical[-2:]))

    def prepare(self) -> None:
        """Rearranges the weights for the Hopper kernels, in place of those that came; done once.

        Raises:
            ArgumentError: A block scale is NaN or negative, or is zero for a block that is not.
        """
        if self.prepared:
            return
        self._keep(rearranged(self.operand, self._given_order))
        self.prepared = True

    def get_extra_state(self) -> Tensor:
        """What the buffers do not say: JSON, as uint8, for formats that hold nothing but tensors (safetensors)."""
        state = {
            "shape": self._logical,
            "layout": self._layout,
            "given": self._given,
            "order": self._given_order,
            "prepared": self.prepared,
            "version": fragments.VERSION,
        }
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes what `get_extra_state` gave.

        Raises:
            ArgumentError: Prepared weights whose bytes are in the order of another version of the layout.
        """
        known = _decoded(state)
        self._logical = tuple(known["shape"])
        self._layout, self._given, self._given_order = known["layout"], known["given"], known["order"]
        self.prepared = known["prepared"]

    def extra_repr(self) -> str:
        """For people."""
        return f"{self._logical}, {self._layout}{', prepared' if self.prepared else ''}"

    def _keep(self, tensor: NVFP4Tensor) -> None:
        self.register_buffer("codes", tensor.codes)
        self.register_buffer("scales", tensor.scales)
        self.register_buffer("global_scale_dec", tensor.global_scale_dec)
        self._layout = tensor.scale_layout

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = state_dict.get(prefix + _STATE)
        if state is not None and tuple(_decoded(state)["shape"]) == self._logical:  # refused before a buffer changes
            for name, buffer in self._buffers.items():  # the padding of the other layout makes them larger or smaller
                loaded = state_dict.get(prefix + name)
                if buffer is not None and isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                    self._buffers[name] = buffer.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def keep(module: nn.Module, name: str, weight: NVFP4Tensor | Tensor, order: str | None = None) -> None:
    """Gives a layer a weight: a submodule Weight for NVFP4, else a buffer, the exact mode."""
    if isinstance(weight, NVFP4Tensor):
        module.add_module(name, Weight(weight, order))
    else:
        module.register_buffer(name, weight)


def given(module: nn.Module, name: str) -> NVFP4Tensor | Tensor:
    """A weight that `keep` took, as it came."""
    kept = getattr(module, name)
    return kept.given if isinstance(kept, Weight) else module.get_buffer(name)


def is_kernel(decision: Decision) -> bool:
    """Whether a fused variant was chosen."""
    return decision.variant.role is Role.FUSED


def _decoded(state: Tensor) -> dict[str, Any]:
    """A state that can be read here; raises as `Weight.set_extra_state`."""
    found: dict[str, Any] = json.loads(bytes(state.tolist()))
    version = found.get("version", 1)
    if fragments.is_fragments(found["layout"]) and version != fragments.VERSION:
        got = f"prepared weights in version {version} of the {fragments.HOPPER} layout"
        expected = f"version {fragments.VERSION}: load the weights as they came, and prepare them again"
        raise ArgumentError("state", got, expected)
    return found


def rearranged(weights: NVFP4Tensor, order: str | None = None) -> NVFP4Tensor:
    """Weights as the Hopper kernels read them, by one kernel where there is one, else by plain torch: the same bytes.

    Args:
        weights: NVFP4 (..., rows, K).
        order: Of gate and up rows, "gate_up" or "up_gate", which get interleaved; None leaves the rows in place.

    Raises:
        ArgumentError: A block scale is NaN or negative, or is zero for a block that is not.
    """
    linear = weights.with_layout("linear")
    if linear.codes.is_cuda and importlib.util.find_spec("cutlass"):
        from megamoe.cute import prepare  # CuTe DSL takes seconds to load

        if prepare.takes(linear):
            return prepare.prepare(linear, order)
    plain = linear if order is None else interleave(linear, order)
    return plain.with_layout(fragments.HOPPER)


def _halves_swapped(weights: NVFP4Tensor) -> NVFP4Tensor:
    """Linear weights with the halves of their rows in turned order, and the global scales of the halves."""
    half = weights.shape[-2] // 2
    scales = weights.scales.view(torch.uint8).roll(half, -2).view(weights.scales.dtype)
    dec = weights.global_scale_dec
    return NVFP4Tensor(weights.codes.roll(half, -2), scales, dec.flip(-1) if dec.ndim == 2 else dec)
