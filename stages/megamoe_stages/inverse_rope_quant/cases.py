"""Inputs that prove a variant of inverse_rope_quant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import amax, global_scale_enc
from megamoe.numerics.rope import inverse_frequencies, rope_tables
from megamoe.testing.cases import Case

_TABLE = 600  # positions in the tables; fewer than some cases have tokens, so positions repeat


def make(
    generator: torch.Generator,
    *,
    tokens: int,
    heads: int = 4,
    head_dim: int = 128,
    rope_dim: int = 64,
    groups: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    index_dtype: torch.dtype = torch.int64,
    scale_layout: str = "linear",
    special: bool = False,
) -> dict[str, Any]:
    """Random heads at random positions; `special` puts zeros, NaN, infinities, subnormals and exact ties among them."""
    o = torch.randn(tokens, heads, head_dim, generator=generator)
    positions = torch.randint(0, _TABLE, (tokens,), generator=generator, dtype=index_dtype)
    enc = global_scale_enc(amax(o))
    if special:
        enc = torch.ones(())  # a block maximum of 6 then has scale 1, and values meet E2M1's thresholds exactly
        _put_special(o, positions)
    cos, sin = rope_tables(_TABLE, inverse_frequencies(rope_dim, 10000.0))
    return {
        "o": o.to(dtype),
        "positions": positions,
        "cos": cos,
        "sin": sin,
        "global_scale_enc": enc,
        "groups": groups,
        "scale_layout": scale_layout,
    }


def _put_special(o: Tensor, positions: Tensor) -> None:
    """Overwrites the first eight tokens, one kind of trouble each, both in the rotated dims and before them."""
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    pattern = torch.cat((ties, -ties)).repeat(o.shape[-1] // 16)
    positions[:2] = 0  # cos 1, sin 0: the values stay what they are
    o[0] = pattern
    o[1] = -0.0
    o[2] = 0.0
    o[3, :, ::7] = torch.nan
    o[4, :, 5::16] = torch.inf
    o[5, :, ::3] = -torch.inf
    o[6] *= 2.0**-130  # subnormal in bf16 and fp32
    o[7] *= torch.logspace(-6, 4, o.shape[-1])


def _case(**params: Any) -> Case:
    return Case(make, params)


_FLASH = {"heads": 64, "head_dim": 512, "groups": 8}
_PRO = {"heads": 128, "head_dim": 512, "groups": 16}

CASES: dict[str, Case] = {
    "no_tokens": _case(tokens=0),
    "no_tokens_128x4": _case(tokens=0, scale_layout="128x4"),
    "one_token": _case(tokens=1, heads=8, head_dim=512),
    "odd_tokens": _case(tokens=127),
    "odd_tokens_128x4": _case(tokens=127, scale_layout="128x4"),
    "two_row_tiles_128x4": _case(tokens=130, groups=4, scale_layout="128x4"),
    "padded_columns_128x4": _case(tokens=5, heads=3, head_dim=48, rope_dim=16, groups=3, scale_layout="128x4"),
    "many_tokens": _case(tokens=4001, heads=2, head_dim=32, rope_dim=16),
    "one_group": _case(tokens=17, groups=1),
    "all_dims_rotated": _case(tokens=33, head_dim=64),
    "one_block_rotated": _case(tokens=33, head_dim=80, rope_dim=16),
    "int32_positions": _case(tokens=40, index_dtype=torch.int32),
    "float16": _case(tokens=40, dtype=torch.float16),
    "float32": _case(tokens=40, dtype=torch.float32),
    "special_values": _case(tokens=11, special=True),
    "special_values_float16": _case(tokens=11, special=True, dtype=torch.float16),
    "special_values_float32_128x4": _case(tokens=11, special=True, dtype=torch.float32, scale_layout="128x4"),
    "decode_small": Case(make, {"tokens": 1, "heads": 16, "head_dim": 512}, bench=True),
    "prefill_small": Case(make, {"tokens": 24, "heads": 16, "head_dim": 512, "scale_layout": "128x4"}, bench=True),
    "flash_decode": Case(make, {"tokens": 32, **_FLASH, "scale_layout": "128x4"}, gpu_only=True, bench=True),
    "flash_prefill": Case(make, {"tokens": 4096, **_FLASH, "scale_layout": "128x4"}, gpu_only=True, bench=True),
    "pro_prefill": Case(make, {"tokens": 2048, **_PRO, "scale_layout": "128x4"}, gpu_only=True, bench=True),
}

SWEEP: dict[str, Case] = {
    f"{name} {tokens}x{heads}x512 {layout}": Case(
        make,
        {
            "tokens": tokens,
            "heads": heads,
            "head_dim": 512,
            "groups": heads // 8,
            "index_dtype": torch.int32,
            "scale_layout": layout,
        },
        gpu_only=True,
    )
    for name, heads, layouts in (("flash", 64, ("linear", "128x4")), ("pro", 128, ("linear",)))
    for layout in layouts
    for tokens in (1, 64, 512, 4096)
}
