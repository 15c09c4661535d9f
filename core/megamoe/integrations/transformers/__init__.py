"""Runs a transformers DeepSeek-V4 model through megamoe's ops, and takes that back again.

    handle = enable(model)                    # NVFP4 weights, activations and KV cache; ops chosen by the config
    model.generate(...)
    disable(model)                            # the model is what it was, bit for bit

Six hook points, each left to the model's own code when one of the ops that it needs is "off" in the configuration:

- router: scores, choice and weights of DeepseekV4TopKRouter and DeepseekV4HashRouter; moe_route.
- experts: the routed experts of DeepseekV4SparseMoeBlock; moe_permute, swiglu_quant, grouped_gemm, moe_combine.
- attention_output: inverse RoPE, o_a_proj and o_b_proj of DeepseekV4Attention; inverse_rope_quant, grouped_gemm and
  quantize.
- hyper_connections: DeepseekV4DecoderLayer (post, next mix, collapse, norm, quantise); mhc_quant. It hands the experts
  their input in NVFP4; where it is off they read the unquantised input.
- prefill: core attention of a prompt, or of a chunk of one; multi_cta_attention.
- decode: core attention of a single token, over a cache in NVFP4; fp4_kv_decode.

The router's logits, shared expert, q and kv projections, compressors and indexer stay the model's and read the
unquantised normed input. The model's own cache keeps working beside the NVFP4 pages: its window and its compressed
entries are what the pages are filled from, so prompts continued in chunks read unquantised keys, and a cache that was
reordered, cropped or filled before `enable` is quantised again when a step finds it changed.

Inference only. Batches hold sequences of one length; padding raises ArgumentError (`scope.check_inputs` says why).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import nn
from transformers import DeepseekV4ForCausalLM

from megamoe.config import Config
from megamoe.errors import ArgumentError
from megamoe.integrations.transformers.build import HOOK_POINTS, install
from megamoe.integrations.transformers.patching import Patches
from megamoe.integrations.transformers.scales import LayerScales, calibrate, default_scales
from megamoe.integrations.weights import Weights, exact_weights, quantize_weights
from megamoe.ops import Session, current_config, resolve, use

__all__ = ["Handle", "LayerScales", "calibrate", "disable", "enable", "is_enabled"]

_handles: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Handle:
    """An enabled model; as a context manager it disables the model at the end.

    Attributes:
        hook_points: By name, whether megamoe runs it; see the module's table.
        scales: One LayerScales a layer, as used; empty in exact mode.
        weights: The prepared weights.
    """

    hook_points: Mapping[str, bool]
    scales: tuple[LayerScales, ...]
    weights: Weights
    _patches: Patches

    @property
    def active(self) -> bool:
        """Whether the model still runs through megamoe."""
        return self._patches.active

    def disable(self) -> None:
        """Gives the model its own forwards back; a second call does nothing."""
        self._patches.undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    model: DeepseekV4ForCausalLM,
    config: Config | Mapping[str, str] | str | Path | None = None,
    *,
    exact: bool = False,
    scales: Sequence[LayerScales] | None = None,
    weights: Weights | None = None,
) -> Handle:
    """Routes a model through megamoe's ops. A model that is enabled already is disabled first.

    Args:
        model: On its final device and in its final dtype; what is prepared here does not follow a later `.to()`.
        config: As for `megamoe.use`; in force while the model runs. None: whatever is in force at each call. Which hook
            points are replaced is settled now, by what is "off" now.
        exact: Keep weights, activations and cache as they are: the same forwards, without quantisation.
        scales: Largest activations by layer, from `calibrate` or a checkpoint. Default: bounds from the weights, see
            `scales.default_scales`; a field that is None takes its default.
        weights: From an earlier handle or a checkpoint; default: quantised here, which takes a while for a large model.

    Returns:
        Handle.

    Raises:
        ArgumentError: Not a DeepSeek-V4 causal model, or scales or weights of another number of layers.
        ConfigError, UnknownNameError: See `megamoe.use`.
    """
    if not isinstance(model, DeepseekV4ForCausalLM):
        raise ArgumentError("model", type(model).__name__, "a transformers DeepseekV4ForCausalLM")
    layers = len(model.model.layers)
    if scales is not None and len(scales) != layers:
        raise ArgumentError("scales", f"{len(scales)} layers", f"{layers}, one LayerScales for each layer of the model")
    disable(model)
    settled = current_config() if config is None else resolve(config)
    points = hook_points(settled)
    experts, output = points["experts"], points["attention_output"]
    if weights is None:
        prepare = exact_weights if exact else quantize_weights
        weights = prepare(model, experts=experts, output=output)
    for name, have, want in (("experts", weights.experts, experts), ("output", weights.output, output)):
        if want and set(have) != set(range(layers)):
            raise ArgumentError(f"weights.{name}", f"layers {sorted(have)}", f"all of the model's {layers} layers")
    bounds: tuple[LayerScales, ...] = ()
    if not exact:
        bounds = tuple(
            given.over(bound)
            for given, bound in zip(scales or [LayerScales()] * layers, default_scales(model), strict=True)
        )
    session = contextlib.nullcontext if config is None else functools.partial(use, Session(settled))
    patches = Patches()
    try:
        install(model, patches, points, weights, bounds, session)
    except BaseException:
        patches.undo()
        raise
    handle = Handle(points, bounds, weights, patches)
    _handles[model] = handle
    return handle


def disable(model: nn.Module) -> None:
    """Gives a model its own forwards back; does nothing for one that is not enabled."""
    handle = _handles.pop(model, None)
    if handle is not None:
        handle.disable()


def is_enabled(model: nn.Module) -> bool:
    """Whether the model runs through megamoe now."""
    return model in _handles and _handles[model].active


def hook_points(config: Config) -> dict[str, bool]:
    """Which hook points a configuration leaves to megamoe; see the module's table."""
    off = {name for ops in HOOK_POINTS.values() for name in ops if config.choice(name) == "off"}
    return {name: not off & set(ops) for name, ops in HOOK_POINTS.items()}
