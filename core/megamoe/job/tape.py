"""Records which experts and which compressed entries a run picks, and makes a later run pick the same.

A random, or a quantised, network picks others at the least difference, and then logits differ by tens of per cent for
no fault of any kernel (reference/deepseek_v4.md section 6). With the picks held, a distance measures arithmetic.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer, DeepseekV4TopKRouter

from megamoe.errors import ArgumentError
from megamoe.integrations.transformers.patching import Patches


@dataclass
class Tape:
    """Picks of every top-k router and indexer by module name, in the order of the calls; hash routing is fixed."""

    picks: dict[str, list[Tensor]] = field(default_factory=dict)


@contextlib.contextmanager
def record(model: DeepseekV4ForCausalLM) -> Iterator[Tape]:
    """Yields a tape that fills while the model runs; keeps references only, so it costs next to nothing."""
    tape, patches = Tape(), Patches()
    try:
        for name, module in _choosers(model):
            place = tape.picks.setdefault(name, [])
            patches.hook(module, _recorder(place, -1 if isinstance(module, DeepseekV4TopKRouter) else None))
        yield tape
    finally:
        patches.undo()


@contextlib.contextmanager
def hold(model: DeepseekV4ForCausalLM, tape: Tape) -> Iterator[None]:
    """Makes the model pick what is on the tape; it must be called with inputs of the same shapes, in the same order.

    Raises:
        ArgumentError: A call finds no pick left, or one of another shape.
    """
    patches = Patches()
    try:
        for name, module in _choosers(model):
            held = deque(tape.picks.get(name, ()))
            wrap = _held_router if isinstance(module, DeepseekV4TopKRouter) else _held_indexer
            patches.set(module, "forward", wrap(module, name, held))
        yield
    finally:
        patches.undo()


def _choosers(model: DeepseekV4ForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, DeepseekV4TopKRouter | DeepseekV4Indexer):
            yield name, module


def _recorder(place: list[Tensor], index: int | None) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, out: Any) -> None:
        place.append(out if index is None else out[index])

    return hook


def _held_router(module: DeepseekV4TopKRouter, name: str, held: deque[Tensor]) -> Callable[..., Any]:
    """A router's forward with its own scores, gathered at the held indices."""
    run = module.forward

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, own = run(hidden_states)
        indices = _next(name, held, own)
        weights = module.score_fn(logits).gather(1, indices.long())
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * module.routed_scaling_factor, indices

    return forward


def _held_indexer(module: DeepseekV4Indexer, name: str, held: deque[Tensor]) -> Callable[..., Any]:
    """An indexer's forward, which also keeps its cache up to date, with the held picks for a result."""
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return _next(name, held, run(*args, **kwargs))

    return forward


def _next(name: str, held: deque[Tensor], own: Tensor) -> Tensor:
    if not held:
        raise ArgumentError("tape", f"no pick left for {name}", "a run of the same length as the recorded one")
    pick = held.popleft()
    if pick.shape != own.shape:
        raise ArgumentError("tape", f"picks {tuple(pick.shape)} for {name}", f"picks {tuple(own.shape)}")
    return pick.to(own.device)
