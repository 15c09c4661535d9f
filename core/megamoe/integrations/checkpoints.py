"""Loads a DeepSeek-V4 checkpoint folder (config.json and safetensors) for transformers.

Weights go through transformers' own loading, which knows both spellings of the names and which modules stay fp32.
Routed experts that a checkpoint holds in NVFP4 already, by one of the conventions of `nn.stored` (ModelOpt,
compressed-tensors), are read as they are, beside a decoded copy for the plain model.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from megamoe.errors import ArgumentError, CheckpointError, nearest
from megamoe.integrations.transformers.scales import LayerScales
from megamoe.integrations.weights import ExpertWeights
from megamoe.nn import stored
from megamoe.nn.stored import CONVENTIONS, Convention
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FIELDS = {name for convention in CONVENTIONS.values() for name in convention.fields}
_NVFP4 = re.compile(
    r"^(?:model\.)?layers\.(?P<layer>\d+)\.(?:ffn|mlp)\.experts\.(?P<expert>\d+)\."
    rf"(?P<part>w1|w2|w3|gate_proj|down_proj|up_proj)\.(?P<field>{'|'.join(sorted(_FIELDS))})$"
)
_PARTS = {"w1": "gate", "gate_proj": "gate", "w2": "down", "down_proj": "down", "w3": "up", "up_proj": "up"}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: In evaluation mode.
        experts: By layer, routed experts that the files hold in NVFP4; empty for other checkpoints.
        scales: One a layer, from the files' input_scale; None without them.
    """

    model: DeepseekV4ForCausalLM
    experts: Mapping[int, ExpertWeights] = field(default_factory=dict)
    scales: tuple[LayerScales, ...] | None = None


def load_checkpoint(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Loads a checkpoint folder.

    Args:
        folder: Holds config.json and model.safetensors, or the shards that model.safetensors.index.json names.
        dtype: Of the weights that are not kept in fp32; default: what config.json says.
        device: Where the model ends up.

    Raises:
        CheckpointError: A file is missing or damaged, config.json is not a DeepSeek-V4 configuration, or a weight is
            missing, unexpected or of another shape; the nearest name that exists is given.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = tensor_files(folder)
    dtype = dtype or config.dtype or torch.bfloat16
    if convention := _convention(folder, config, files):
        return _load_nvfp4(folder, config, convention, files, dtype, device)
    model = _from_pretrained(folder, config, dtype, files, folder)
    return Checkpoint(model.to(device).eval())


def read_config(folder: Path) -> DeepseekV4Config:
    """Reads and checks config.json.

    Raises:
        CheckpointError: See `load_checkpoint`.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        near = nearest(folder.name, (p.name for p in folder.parent.glob("*/"))) if folder.parent.is_dir() else None
        raise CheckpointError(f"{folder}: no such folder" + (f"; did you mean {folder.parent / near}?" if near else ""))
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json in this folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != DeepseekV4Config.model_type:
        raise CheckpointError(f"{path}: model_type is {kind!r}, expected {DeepseekV4Config.model_type!r}")
    try:
        return DeepseekV4Config.from_dict(raw)
    except Exception as error:  # transformers' strict dataclasses raise several unrelated kinds
        raise CheckpointError(f"{path}: {_line(error)}") from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, checked against the files' headers.

    Raises:
        CheckpointError: No safetensors, a shard is missing or damaged, or lacks a tensor that the index promises.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            promised: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index with a weight_map: {_line(error)}") from error
    elif (folder / SINGLE).is_file():
        promised = dict.fromkeys(_header(folder / SINGLE), SINGLE)
    else:
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} in this folder")
    held = {name: set(_header(folder / name)) for name in sorted(set(promised.values()))}
    for tensor, name in promised.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{folder / name}: no tensor {tensor!r}{_hint(tensor, held[name])}")
    return {tensor: folder / name for tensor, name in promised.items()}


def _header(path: Path) -> list[str]:
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.safetensors")))
        raise CheckpointError(f"{path}: no such file" + (f"; the nearest is {near}" if near else ""))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {_line(error)}") from error


def _from_pretrained(
    source: Path | None, config: DeepseekV4Config, dtype: torch.dtype, names: Iterable[str], folder: Path, **more: Any
) -> DeepseekV4ForCausalLM:
    """Loads by transformers, with what it found wrong as a CheckpointError.

    Routed experts may be missing where `more` brings a state_dict: they are filled in afterwards.
    """
    try:
        model, info = DeepseekV4ForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
    except Exception as error:  # a converter that fails raises whatever it ran into
        raise CheckpointError(f"{folder}: transformers cannot load it: {_line(error)}") from error
    for name, got, expected in info["mismatched_keys"]:
        raise CheckpointError(f"{folder}: {name} has shape {tuple(got)}, expected {tuple(expected)}")
    missing = [n for n in info["missing_keys"] if "state_dict" not in more or ".mlp.experts." not in n]
    for name in sorted(missing):  # the nearest is most likely one that fits nothing
        raise CheckpointError(f"{folder}: no weight {name!r}{_hint(name, info['unexpected_keys'] or names)}")
    for name in sorted(info["unexpected_keys"]):
        expected_names = model.state_dict().keys()
        raise CheckpointError(f"{folder}: weight {name!r} fits nothing in the model{_hint(name, expected_names)}")
    return model


def _convention(folder: Path, config: DeepseekV4Config, files: Mapping[str, Path]) -> Convention | None:
    """How the files hold routed experts in NVFP4; None where they do not.

    The names of global scales tell.

    Raises:
        CheckpointError: Names of two conventions, or of one where config.json's quant_method names the other.
    """
    found = {
        convention: name
        for convention in CONVENTIONS.values()
        for name in files
        if name.endswith(f".{convention.global_scale}") and _NVFP4.search(name)
    }
    if len(found) > 1:
        names = " and ".join(f"{name!r} ({convention.name})" for convention, name in found.items())
        raise CheckpointError(f"{folder}: experts by two conventions: {names}")
    said = str((getattr(config, "quantization_config", None) or {}).get("quant_method"))
    for convention, name in found.items():
        if said in CONVENTIONS and said != convention.name:
            raise CheckpointError(
                f"{folder}: config.json says quant_method {said!r}, but {name!r} is a name of {convention.name}"
            )
        return convention
    return None


def _load_nvfp4(
    folder: Path,
    config: DeepseekV4Config,
    convention: Convention,
    files: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Checkpoint:
    """A checkpoint with routed experts in NVFP4: everything else by transformers, the experts by hand."""
    config.quantization_config = None  # transformers has no loader for it
    tensors = _read(files)
    fields: dict[tuple[int, int, str], dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    for name, tensor in tensors.items():
        match = _NVFP4.search(name)
        if match is None:
            rest[name] = tensor
        else:
            fields[int(match["layer"]), int(match["expert"]), _PARTS[match["part"]]][match["field"]] = tensor
    model = _from_pretrained(None, config, dtype, rest, folder, state_dict=rest)
    layers, count = config.num_hidden_layers, config.num_local_experts
    for at, expert, part in fields:
        if at >= layers or expert >= count:
            where = f"{folder}: layer {at}, expert {expert}, {part} projection"
            raise CheckpointError(f"{where} fits nothing in a model of {layers} layers with {count} experts")
    experts, scales = {}, []
    for i, layer in enumerate(model.model.layers):
        own = layer.mlp.experts
        of_layer = {(e, part): found for (at, e, part), found in fields.items() if at == i}
        gate, up, down = (
            _stack(folder, i, part, of_layer, own.num_experts, shape, convention)
            for part, shape in (
                ("gate", (own.intermediate_dim, own.hidden_dim)),
                ("up", (own.intermediate_dim, own.hidden_dim)),
                ("down", (own.hidden_dim, own.intermediate_dim)),
            )
        )
        gate_up = stored.join_gate_up(gate, up)
        with torch.no_grad():
            for e in range(own.num_experts):  # one at a time: the fp32 copy of a layer would not fit beside the model
                own.gate_up_proj[e] = torch.cat((dequantize(_expert(gate, e)), dequantize(_expert(up, e))))
                own.down_proj[e] = dequantize(_expert(down, e))
        experts[i] = ExpertWeights(gate_up.to(device), down.to(device))
        normed, product = (_input(of_layer, parts, convention) for parts in (("gate", "up"), ("down",)))
        scales.append(LayerScales(normed=normed, product=product))
    return Checkpoint(model.to(device).eval(), experts, tuple(scales))


def _read(files: Mapping[str, Path]) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys() if files.get(name) == path})  # noqa: SIM118
    return tensors


def _stack(
    folder: Path,
    layer: int,
    part: str,
    fields: Mapping[tuple[int, str], Mapping[str, Tensor]],
    count: int,
    shape: tuple[int, int],
    convention: Convention,
) -> NVFP4Tensor:
    """One projection of all experts of a layer, (E, N, K) with a global scale (E,)."""
    matrices = []
    for e in range(count):
        try:
            matrices.append(stored.matrix(fields.get((e, part), {}), convention, shape))
        except ArgumentError as error:
            where = f"{folder}: {error.argument} of layer {layer}, expert {e}, {part} projection"
            raise CheckpointError(f"{where}: got {error.got}, expected {error.expected}") from error
    return stored.stack(matrices)


def _expert(weights: NVFP4Tensor, e: int) -> NVFP4Tensor:
    return NVFP4Tensor(weights.codes[e], weights.scales[e], weights.global_scale_dec[e])


def _input(
    fields: Mapping[tuple[int, str], Mapping[str, Tensor]], parts: tuple[str, ...], convention: Convention
) -> float | None:
    """Largest activation that the input scales of some projections stand for."""
    some = (found for (_, part), found in fields.items() if part in parts)
    return stored.activation_amax(
        [found[convention.input_scale] for found in some if convention.input_scale in found], convention
    )


def _hint(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"; the nearest is {near!r}" if near else ""


def _line(error: Exception) -> str:
    """An error's first line that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
