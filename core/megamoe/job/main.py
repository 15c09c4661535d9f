"""The main job: a DeepSeek-V4 model run through the ops, every call of every op held against its reference.

Four passes over the same tokens: timed; checked (same tokens, same experts and compressed entries, every call repeated
on the op's reference); all ops on their reference variants; and the plain model, unquantised.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from megamoe.config import Config
from megamoe.errors import ArgumentError, UnknownNameError
from megamoe.integrations.checkpoints import Checkpoint, load_checkpoint
from megamoe.integrations.transformers import Handle, disable, enable
from megamoe.integrations.weights import Weights, quantize_weights
from megamoe.job.passes import Checker, OpRecord, distance, run_pass
from megamoe.job.result import OpRow, RunResult, Speed
from megamoe.job.small_model import build_small_model
from megamoe.job.tape import hold, record
from megamoe.job.text import codec_for, read_prompt
from megamoe.ops import resolve, use
from megamoe.runtime import runtime

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WARM_UP_TOKENS = 8
OURS, REFERENCE, PLAIN = "this run", "the reference variants", "the unquantised model"


@dataclass(frozen=True)
class RunOptions:
    """What to run.

    Attributes:
        model: A Hugging Face checkpoint folder; None for the small model.
        prompt: The text; None for `file`, or the default text.
        file: A UTF-8 text file.
        decode: Tokens to decode after the prompt.
        max_prompt: The prompt's last tokens are dropped beyond this many; None keeps all.
        config: As for `megamoe.use`.
        device: "cpu" or "cuda".
        dtype: "bfloat16", "float16" or "float32"; None: what the checkpoint says, and for the small model bfloat16 on
            a GPU and float32 on a CPU, where bfloat16 matrix products are slow.
        seed: Of the small model's weights.
    """

    model: Path | None = None
    prompt: str | None = None
    file: Path | None = None
    decode: int = 16
    max_prompt: int | None = None
    config: Config | Mapping[str, str] | str | Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0


def run(options: RunOptions, console: Console | None = None) -> RunResult:
    """Runs the main job.

    Args:
        options: What to run.
        console: Where progress goes; default stderr.

    Returns:
        RunResult; its `ok` says whether every op stayed within its bound.

    Raises:
        MegamoeError: Wrong options, configuration or checkpoint; one line that names the nearest right one.
    """
    start = time.perf_counter()
    config = resolve(options.config)
    dtype = _check(options)
    text = read_prompt(options.prompt, options.file)
    loaded = _load(options, dtype)
    model = loaded.model
    codec = codec_for(options.model, model.config.vocab_size)
    ids = codec.encode(text)[:, : options.max_prompt].to(options.device)
    _check_length(ids, options.decode, model)

    with use(config):
        handle, quantise_s = _enable(loaded, console)
        try:
            run_pass(model, ids[:, :WARM_UP_TOKENS], min(options.decode, 1))  # imports, first allocations
            with record(model) as tape:
                timed = run_pass(model, ids, options.decode)
            checker = Checker()
            with hold(model, tape), use(observer=checker):
                checked = run_pass(model, ids, options.decode, timed.tokens)
            with hold(model, tape), use(_all_reference(config)):
                reference = run_pass(model, ids, options.decode, timed.tokens)
        finally:
            disable(model)
        with hold(model, tape):
            plain = run_pass(model, ids, options.decode, timed.tokens)

    return RunResult(
        model=str(options.model) if options.model else f"small DeepSeek-V4, seed {options.seed}",
        device=runtime().machine().device if options.device == "cuda" else "CPU",
        dtype=str(model.dtype).removeprefix("torch."),
        codec=codec.name,
        prompt=codec.decode(ids[0]) if options.max_prompt else text,
        completion=codec.decode(timed.tokens[0]),
        quantise_s=quantise_s,
        total_s=time.perf_counter() - start,
        hook_points={name: "megamoe" if on else "own" for name, on in handle.hook_points.items()},
        ops=tuple(_row(stage, config, checker.records.get(stage, OpRecord())) for stage in _stages()),
        speed=Speed(ids.shape[1], timed.prefill_s, options.decode, timed.decode_s),
        distances=(
            distance(OURS, checked, REFERENCE, reference),
            distance(OURS, checked, PLAIN, plain),
            distance(REFERENCE, reference, PLAIN, plain),  # what NVFP4 costs, whatever computes it
        ),
    )


def _check(options: RunOptions) -> torch.dtype | None:
    """Checks the plain options; returns the dtype to use, None for the checkpoint's."""
    if options.device not in ("cpu", "cuda"):
        raise UnknownNameError("device", options.device, ("cpu", "cuda"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device", "cuda", "cpu, as torch sees no GPU here")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UnknownNameError("dtype", options.dtype, DTYPES)
    if options.decode < 0:
        raise ArgumentError("--decode", options.decode, "0 or more tokens")
    if options.max_prompt is not None and options.max_prompt < 1:
        raise ArgumentError("--max-prompt", options.max_prompt, "at least 1 token")
    if options.dtype is not None:
        return DTYPES[options.dtype]
    if options.model is not None:
        return None
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def _load(options: RunOptions, dtype: torch.dtype | None) -> Checkpoint:
    if options.model is not None:
        return load_checkpoint(options.model, dtype=dtype, device=options.device)
    return Checkpoint(build_small_model(seed=options.seed, dtype=dtype or torch.float32, device=options.device))


def _check_length(ids: Tensor, decode: int, model: DeepseekV4ForCausalLM) -> None:
    total, most = ids.shape[1] + decode, model.config.max_position_embeddings
    if total > most:
        raise ArgumentError("--prompt", f"{total} tokens with the decoded ones", f"at most {most} for this model")


def _enable(loaded: Checkpoint, console: Console | None) -> tuple[Handle, float]:
    """Quantises what the configuration in force needs and enables the model; returns the seconds for the first."""
    start = time.perf_counter()
    weights: Weights = quantize_weights(loaded.model, ready=loaded.experts, console=console)
    seconds = time.perf_counter() - start
    return enable(loaded.model, scales=loaded.scales, weights=weights), seconds


def _all_reference(config: Config) -> Config:
    """Every op on its reference; what is off stays off, so that both runs pass through the same hook points."""
    off = {stage: "off" for stage in runtime().stages if config.choice(stage) == "off"}
    return resolve({"default": "reference", **off})


def _stages() -> list[str]:
    """Stage ids in the order of the registry."""
    stages = runtime().stages
    listed = [item.stage for item in runtime().registry.item.values() if item.stage in stages]
    return list(dict.fromkeys([*(s for s in listed if s is not None), *stages]))


def _row(stage: str, config: Config, seen: OpRecord) -> OpRow:
    ranked = [name for name, _ in seen.variants.most_common()]
    choice = config.choice(stage)
    idle = f"off ({config.origin(stage)})" if choice == "off" else "nothing in this run calls it"
    worst = seen.worst
    return OpRow(
        stage=stage,
        items=tuple(runtime().registry.of_stage(stage)),
        choice=choice,
        variant=tuple(ranked),
        why=seen.why[ranked[0]] if ranked else idle,
        calls=seen.variants.total(),
        seconds=seen.seconds,
        error=worst.error if worst else 0.0,
        output=worst.name if worst else "",
        bound=worst.bound if worst else 0.0,
        ok=worst is None or worst.passed,
        reason=worst.reason if worst else "",
    )
