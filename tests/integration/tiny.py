"""A model even smaller than the job's: for tests of files and errors, where only names and shapes matter."""

from __future__ import annotations

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM


def tiny_model() -> DeepseekV4ForCausalLM:
    config = DeepseekV4Config(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, compress_ratios=[0, 4],
        num_hash_layers=1, num_attention_heads=2, head_dim=64, q_lora_rank=32, o_groups=2, o_lora_rank=16,
        n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=32, index_topk=4, sliding_window=16,
        max_position_embeddings=256, partial_rotary_factor=0.25, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager", dtype=torch.float32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DeepseekV4ForCausalLM(config).eval()
