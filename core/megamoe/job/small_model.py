"""A DeepSeek-V4 model small enough for two CPU cores, with every piece of the real one and nothing left at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

BYTES = 256  # the vocabulary: a token is a byte of UTF-8


def small_config() -> DeepseekV4Config:
    """The small model's configuration: head_dim 448 + 64, all three attention types, hash and top-k routing, YaRN.

    Sizes are multiples of what the NVFP4 layouts need; they follow reference/deepseek_v4.md section 6.
    """
    return DeepseekV4Config(
        vocab_size=BYTES,
        hidden_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        compress_ratios=[0, 4, 128, 4],
        num_hash_layers=1,
        num_attention_heads=8,
        head_dim=512,
        q_lora_rank=256,
        o_groups=2,
        o_lora_rank=128,
        n_routed_experts=16,
        num_experts_per_tok=6,
        index_n_heads=8,
        index_head_dim=128,
        index_topk=16,
        sliding_window=128,
        max_position_embeddings=65536,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


def build_small_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DeepseekV4ForCausalLM:
    """Builds the small model, the same weights for the same seed on every device.

    Args:
        seed: Seed of all weights.
        dtype: Dtype of the weights that a checkpoint keeps in bf16; mHC, norms, sinks and biases stay fp32.
        device: Where the model ends up; the weights are drawn on the CPU.

    Returns:
        The model in evaluation mode, 40 million parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(small_config())
        _randomise(model)
    _cast(model, dtype)
    return model.to(device).eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draws what transformers leaves at zero or one: with zeros, half of the math would go untested."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        if leaf in ("sinks", "e_score_correction_bias", "position_bias", "base", "hc_base"):
            tensor.normal_(std=0.3)
        elif leaf in ("scale", "hc_scale") or (leaf == "weight" and tensor.ndim == 1):
            tensor.normal_(mean=1.0, std=0.1)
    for module in model.modules():
        if isinstance(module, DeepseekV4HashRouter):
            module.tid2eid.copy_(_distinct(module.tid2eid, module.num_experts))


def _distinct(table: Tensor, experts: int) -> Tensor:
    """A different set of experts for every token, none twice."""
    return torch.rand(table.shape[0], experts).argsort(dim=-1)[:, : table.shape[1]]


def _cast(model: DeepseekV4ForCausalLM, dtype: torch.dtype) -> None:
    """Casts as `from_pretrained(dtype=...)` does; plain `.to(dtype)` would take the fp32 modules along."""
    keep = set(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not keep & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
