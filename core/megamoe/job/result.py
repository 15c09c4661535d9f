"""What the main job found, as plain values: `to_json` writes them, the report draws its table from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class OpRow:
    """One op's part in the run.

    Attributes:
        stage: Id of the op.
        items: Roadmap items that it implements.
        choice: What the configuration asked for.
        variant: Variants that ran, the most called first; empty when none did.
        why: Why the first of them was chosen, or why the op was not called.
        calls: Number of calls.
        seconds: Time inside them, of the checked pass.
        error: Worst error against the reference on the very inputs of the calls: relative L2, or where the bound is 0
            the share of bytes that differ.
        output: The output with that error.
        bound: What it may be.
        ok: Every output of every call was within its bound.
        reason: What was not, empty when ok.
    """

    stage: str
    items: tuple[str, ...]
    choice: str
    variant: tuple[str, ...]
    why: str
    calls: int
    seconds: float
    error: float
    output: str
    bound: float
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far logits a are from logits b, over the last prompt positions and every decoded token.

    Attributes:
        of: Which run a is.
        from_: Which run b is.
        relative_l2: ||a - b|| / ||b||.
        max_abs: Largest difference.
        kl: Mean KL(b || a) over the positions, in nats.
        argmax_agreement: Share of positions with the same most likely token.
        positions: How many positions.
    """

    of: str
    from_: str
    relative_l2: float
    max_abs: float
    kl: float
    argmax_agreement: float
    positions: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens and seconds of the timed pass, prompt and decoding apart."""

    prompt_tokens: int
    prefill_s: float
    decoded_tokens: int
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 where nothing was timed."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """0 where nothing was timed."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything the main job reports.

    Attributes:
        model: The folder, or a description of the small model.
        device: Name of the device for people.
        dtype: Of the activations.
        codec: How text became tokens.
        prompt: The text.
        completion: What was decoded, greedily.
        quantise_s: Time to quantise the weights.
        total_s: Time of the whole job.
        hook_points: What each hook point of the model runs: "megamoe", or "own" where a stage is off.
        ops: One row an op, in the order of the registry.
        speed: Of the timed pass.
        distances: From the reference variants and from the unquantised model.
    """

    model: str
    device: str
    dtype: str
    codec: str
    prompt: str
    completion: str
    quantise_s: float
    total_s: float
    hook_points: dict[str, str]
    ops: tuple[OpRow, ...]
    speed: Speed
    distances: tuple[Distance, ...]

    @property
    def ok(self) -> bool:
        """No op was outside its bound."""
        return all(row.ok for row in self.ops)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the derived ones too."""
        derived = {
            "prefill_tokens_per_s": self.speed.prefill_tokens_per_s,
            "decode_tokens_per_s": self.speed.decode_tokens_per_s,
        }
        tree = asdict(self)
        return {**tree, "ok": self.ok, "speed": {**tree["speed"], **derived}}

    def to_json(self) -> str:
        """Indented JSON; a value that is not finite becomes a string, as JSON has no word for it."""
        return json.dumps(_plain(self.as_dict()), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
