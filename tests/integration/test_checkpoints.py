from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from megamoe.errors import CheckpointError
from megamoe.integrations.checkpoints import load_checkpoint
from megamoe.integrations.weights import quantize_matrices, quantize_weights
from megamoe.nn.stored import COMPRESSED_TENSORS, CONVENTIONS, Convention, convention_named
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from tests.integration.tiny import tiny_model

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def tiny() -> DeepseekV4ForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def saved(tiny: DeepseekV4ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_a_saved_model_comes_back_the_same(tiny: DeepseekV4ForCausalLM, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert not loaded.model.training
    assert torch.equal(loaded.model(IDS).logits, tiny(IDS).logits)


@torch.no_grad()
def test_shards_are_read_through_their_index(tiny: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load_checkpoint(tmp_path).model(IDS).logits, tiny(IDS).logits)


def test_dtype_keeps_the_fp32_modules(saved: Path) -> None:
    layer = load_checkpoint(saved, dtype=torch.bfloat16).model.model.layers[1]
    assert layer.mlp.experts.down_proj.dtype == torch.bfloat16
    assert layer.attn_hc.fn.dtype == layer.input_layernorm.weight.dtype == layer.self_attn.sinks.dtype == torch.float32


def test_missing_folder_names_the_nearest(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no such folder; did you mean .*{saved.name}"):
        load_checkpoint(saved.with_name(saved.name[:-1]))


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ('{"model_type": "llama"}', "model_type is 'llama'"), ("[]", "model_type is None")],
)
def test_wrong_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_config_with_a_bad_value(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "hidden_size": "large"}))
    with pytest.raises(CheckpointError, match="hidden_size"):
        load_checkpoint(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_checkpoint(folder)


def test_damaged_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


def test_missing_shard_names_the_nearest(tiny: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="200KB")
    first = min(tmp_path.glob("*.safetensors"))
    first.rename(first.with_name("x" + first.name))
    with pytest.raises(CheckpointError, match=f"{first.name}: no such file; the nearest is x{first.name}"):
        load_checkpoint(tmp_path)


def test_index_that_promises_too_much(tiny: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weigth"] = raw["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.weigth'; the nearest is 'model\.norm\.weight'"):
        load_checkpoint(tmp_path)


def test_missing_weight_names_the_nearest(folder: Path) -> None:
    tensors = weights_of(folder)
    tensors["model.layers.0.attn.wq_aa.weight"] = tensors.pop("model.layers.0.attn.wq_a.weight")  # as HF spells files
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"no weight '.*q_a_proj\.weight'; the nearest is '.*wq_aa\.weight'"):
        load_checkpoint(folder)


def test_unexpected_weight(folder: Path) -> None:
    rewrite(folder, {**weights_of(folder), "model.layers.0.self_attn.q_c_proj.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"q_c_proj\.weight' fits nothing"):
        load_checkpoint(folder)


def test_wrong_shape(folder: Path) -> None:
    tensors = weights_of(folder)
    tensors["model.norm.weight"] = torch.ones(3)
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(3,\), expected \(64,\)"):
        load_checkpoint(folder)


@pytest.fixture(params=["modelopt", "compressed-tensors"])
def source(request: pytest.FixtureRequest) -> Convention:
    return convention_named(request.param)


@pytest.fixture
def packed_folder(tiny: DeepseekV4ForCausalLM, folder: Path, source: Convention) -> tuple[Path, dict[str, NVFP4Tensor]]:
    """The checkpoint with its routed experts in NVFP4, by the source's names; and what those tensors are."""
    tensors = {k: v for k, v in weights_of(folder).items() if ".ffn.experts." not in k}
    packed: dict[str, NVFP4Tensor] = {}
    for i, layer in enumerate(tiny.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        for name, matrices in (("w1", gate), ("w2", layer.mlp.experts.down_proj), ("w3", up)):
            packed[f"{i}.{name}"] = stack = quantize_matrices(matrices)
            for e in range(len(matrices)):
                key = f"model.layers.{i}.ffn.experts.{e}.{name}"
                numbers = [stack.global_scale_dec[e], torch.tensor((e + 1) / 2688)]
                if source is COMPRESSED_TENSORS:  # divisors, of shape (1,)
                    numbers = [(1 / number)[None] for number in numbers]
                values = (stack.codes[e], stack.scales[e], *numbers)
                tensors |= {f"{key}.{name}": value for name, value in zip(source.fields, values, strict=True)}
        if source is COMPRESSED_TENSORS:
            for name in ("w1", "w2", "w3"):
                held = packed[f"{i}.{name}"]
                packed[f"{i}.{name}"] = replace(held, global_scale_dec=1 / (1 / held.global_scale_dec))
    rewrite(folder, tensors)
    say(folder, source.name)
    return folder, packed


def say(folder: Path, method: str) -> None:
    """Writes a quant_method into config.json."""
    raw = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": method, "moe_quant_algo": "NVFP4", "group_size": 16}
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))


def test_nvfp4_experts_are_not_quantised_again(packed_folder: tuple[Path, dict[str, NVFP4Tensor]]) -> None:
    folder, packed = packed_folder
    loaded = load_checkpoint(folder)
    for i, layer in enumerate(loaded.model.model.layers):
        gate_up = loaded.experts[i].gate_up
        assert isinstance(gate_up, NVFP4Tensor)
        rows = gate_up.shape[1] // 2
        for part, (half, name) in enumerate(((slice(0, rows), "w1"), (slice(rows, None), "w3"))):
            assert torch.equal(gate_up.codes[:, half], packed[f"{i}.{name}"].codes)
            assert torch.equal(gate_up.global_scale_dec[:, part], packed[f"{i}.{name}"].global_scale_dec)
        torch.testing.assert_close(layer.mlp.experts.gate_up_proj.float(), dequantize(gate_up), rtol=0, atol=0)
    weights = quantize_weights(loaded.model, ready=loaded.experts, output=False)
    assert weights.experts[1] is loaded.experts[1]
    assert loaded.scales is not None
    experts = loaded.model.config.n_routed_experts
    assert loaded.scales[0].normed == pytest.approx(experts)
    assert loaded.scales[0].product == pytest.approx(experts)
    assert loaded.scales[0].z is None


def test_nvfp4_experts_with_a_missing_scale(packed_folder: tuple[Path, dict[str, NVFP4Tensor]]) -> None:
    folder, _ = packed_folder
    tensors = weights_of(folder)
    del tensors["model.layers.0.ffn.experts.1.w3.weight_scale"]
    rewrite(folder, tensors)
    with pytest.raises(
        CheckpointError, match="weight_scale of layer 0, expert 1, up projection: got nothing, expected a tensor"
    ):
        load_checkpoint(folder)


def test_nvfp4_experts_with_a_scale_of_zero(
    packed_folder: tuple[Path, dict[str, NVFP4Tensor]], source: Convention
) -> None:
    folder, _ = packed_folder
    key = f"model.layers.1.ffn.experts.0.w2.{source.global_scale}"
    rewrite(folder, {**weights_of(folder), key: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"layer 1, expert 0, down projection: got 0\.0, expected a positive"):
        load_checkpoint(folder)


def test_nvfp4_experts_that_fit_nothing(packed_folder: tuple[Path, dict[str, NVFP4Tensor]], source: Convention) -> None:
    folder, _ = packed_folder
    tensors = weights_of(folder)
    for old, new in (("layers.1.ffn.experts.0.w2", "layers.1.ffn.experts.99.w2"), ("layers.1.", "layers.77.")):
        key = f"model.layers.1.ffn.experts.0.w2.{source.codes}"
        rewrite(folder, {**tensors, key.replace(old, new): tensors[key].clone()})
        with pytest.raises(CheckpointError, match=r"layer \d+, expert \d+, down projection fits nothing"):
            load_checkpoint(folder)


def test_experts_of_a_prediction_head_are_not_the_models(
    packed_folder: tuple[Path, dict[str, NVFP4Tensor]], source: Convention
) -> None:
    """transformers leaves names with mtp out."""
    folder, packed = packed_folder
    tensors = weights_of(folder)
    key = f"layers.0.ffn.experts.0.w2.{source.codes}"
    rewrite(folder, {**tensors, f"mtp.{key}": torch.zeros_like(tensors[f"model.{key}"])})
    down = load_checkpoint(folder).experts[0].down
    assert isinstance(down, NVFP4Tensor)
    assert torch.equal(down.codes, packed["0.w2"].codes)


def test_names_of_two_conventions(packed_folder: tuple[Path, dict[str, NVFP4Tensor]], source: Convention) -> None:
    folder, _ = packed_folder
    other = next(c for c in CONVENTIONS.values() if c is not source)
    key = f"model.layers.0.ffn.experts.0.w1.{other.global_scale}"
    rewrite(folder, {**weights_of(folder), key: torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"experts by two conventions: .*weight_scale_2.* \(modelopt\) and "):
        load_checkpoint(folder)


def test_a_convention_that_the_config_contradicts(
    packed_folder: tuple[Path, dict[str, NVFP4Tensor]], source: Convention
) -> None:
    folder, _ = packed_folder
    other = next(c for c in CONVENTIONS.values() if c is not source)
    say(folder, other.name)
    with pytest.raises(CheckpointError, match=f"quant_method '{other.name}', but .* is a name of {source.name}"):
        load_checkpoint(folder)


def test_gate_and_up_get_their_own_global_scale() -> None:
    weights = torch.randn(3, 32, 16)
    weights[:, 16:] *= 1e-3
    packed = quantize_matrices(weights, parts=2)
    assert packed.global_scale_dec.shape == (3, 2)
    torch.testing.assert_close(packed.global_scale_dec[:, 1], weights[:, 16:].abs().amax((1, 2)) / 2688)
    error = (dequantize(packed) - weights)[:, 16:].norm() / weights[:, 16:].norm()
    assert error < 0.12  # E2M1 with a scale of 3 mantissa bits; with the gate's global scale it would be 1
