"""Runs a model over a prompt and some decoded tokens, free or forced, timed or watched."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, DynamicCache

from megamoe.job.result import Distance
from megamoe.model import Decision, Role
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor
from megamoe.ops import op
from megamoe.testing.cases import Bound
from megamoe.testing.compare import LeafResult, Value, compare, leaves, worst

# Standard deviation of the error of an NVFP4 output, in shares of its mean, times the root of its blocks: 0.35 for the
# 96 blocks of one decoded token, measured over 320 calls of swiglu_quant's fallback.
BLOCK_DEVIATION = 3.4
DEVIATIONS = 3.0  # as far as chance may carry one call beyond its bound
KEPT_POSITIONS = 128  # logits of so many last prompt positions are compared; all of them would not fit for a real model


@dataclass(frozen=True)
class Trace:
    """What one pass produced.

    Attributes:
        tokens: int64 (1, decoded), what was fed back to the model.
        logits: fp32 (positions, vocabulary) on the CPU: the last prompt positions, then one for each decoded token.
        prefill_s: Seconds for the prompt.
        decode_s: Seconds for all decoded tokens.
    """

    tokens: Tensor
    logits: Tensor
    prefill_s: float
    decode_s: float


@torch.no_grad()
def run_pass(model: DeepseekV4ForCausalLM, ids: Tensor, steps: int, forced: Tensor | None = None) -> Trace:
    """Prefills `ids` (1, tokens), then feeds `steps` tokens one by one.

    Args:
        model: Plain or enabled.
        ids: int64 on the model's device.
        steps: Tokens to decode; an end-of-text token does not stop it.
        forced: int64 (1, steps), tokens to feed; default: the most likely one each time.
    """
    cache = DynamicCache(config=model.config)
    start = _now(ids)
    kept = min(KEPT_POSITIONS, ids.shape[1])
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept)
    middle = _now(ids)
    logits, fed = [out.logits[0]], []
    for i in range(steps):
        token = logits[-1][-1:].argmax(-1, keepdim=True) if forced is None else forced[:, i : i + 1]
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        fed.append(token)
        logits.append(out.logits[0])
    end = _now(ids)
    tokens = torch.cat(fed, dim=1) if fed else ids.new_empty(1, 0)
    return Trace(tokens, torch.cat(logits).float().cpu(), middle - start, end - middle)


def distance(of: str, ours: Trace, from_: str, theirs: Trace) -> Distance:
    """How far `ours`, by name `of`, is from `theirs`, by name `from_`; both must come from the same tokens."""
    a, b = ours.logits.double(), theirs.logits.double()
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return Distance(
        of,
        from_,
        relative_l2=float((a - b).norm() / b.norm()),
        max_abs=float((a - b).abs().max()),
        kl=float((log_b.exp() * (log_b - log_a)).sum(-1).mean()),
        argmax_agreement=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        positions=a.shape[0],
    )


@dataclass
class OpRecord:
    """What was seen of one op.

    Attributes:
        variants: Calls by variant.
        why: Reason of the first decision for each variant.
        seconds: Time inside the variants.
        worst: The output of a call that is nearest to its bound, or furthest past it.
    """

    variants: Counter[str] = field(default_factory=Counter)
    why: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    worst: LeafResult | None = None


class Checker:
    """An observer that repeats every call on the op's reference, with the very inputs, and compares."""

    def __init__(self) -> None:
        self.records: dict[str, OpRecord] = {}

    def called(self, stage_id: str, decision: Decision, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See ops.Observer."""
        called_op = op(stage_id)
        mutates = called_op.stage.mutates
        given = called_op.arguments(*args, **kwargs)
        twin = {
            name: value.clone() if name in mutates and value is not None else value for name, value in given.items()
        }
        record = self.records.setdefault(stage_id, OpRecord())
        device = next(value for value in given.values() if hasattr(value, "device"))
        start = _now(device)
        result = run(*args, **kwargs)
        record.seconds += _now(device) - start
        record.variants[decision.variant.name] += 1
        record.why.setdefault(decision.variant.name, decision.why)
        if decision.variant.role is not Role.REFERENCE:  # which is right by definition
            expected = leaves(called_op.reference(**twin), twin, mutates)
            bounds = bounds_of_call(called_op.bounds, expected)
            found = compare(leaves(result, given, mutates), expected, bounds)
            record.worst = worst([*found, *([record.worst] if record.worst else [])])
        return result


def bounds_of_call(bounds: Mapping[str, Bound], expected: Mapping[str, Value]) -> dict[str, Bound]:
    """The bounds for one call: wider for a small output in NVFP4, where a few flipped roundings are much of the error.

    A bound speaks of the mean over many blocks: values near a threshold of E2M1 or E4M3 round the other way, each by a
    whole step. Over B blocks that error deviates from its mean by BLOCK_DEVIATION / sqrt(B) of it.

    Args:
        bounds: The op's, by output.
        expected: The reference's outputs.

    Returns:
        A bound by output; those that ask for equal bytes, and those of plain tensors, as they were.
    """
    found = dict(bounds)
    for name, value in expected.items():
        bound = bounds.get(name)
        if isinstance(value, NVFP4Tensor) and bound is not None and bound.rel_l2 > 0 and value.codes.numel():
            blocks = value.codes.numel() * 2 / BLOCK
            slack = 1 + DEVIATIONS * BLOCK_DEVIATION / blocks**0.5
            found[name] = replace(bound, rel_l2=bound.rel_l2 * slack)
    return found


def _now(like: Any) -> float:
    """Seconds, after the device has finished what was launched."""
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
