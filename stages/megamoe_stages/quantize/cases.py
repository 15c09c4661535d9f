"""Inputs that decide whether a variant quantises like the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megamoe.numerics.nvfp4 import BLOCK
from megamoe.testing.cases import Case


def make(
    generator: Generator,
    *,
    shape: tuple[int, ...],
    dtype: str = "bfloat16",
    values: str = "normal",
    enc: tuple[int, ...] | None = (),
    **options: Any,
) -> dict[str, Any]:
    """Arguments for `quantize`.

    Args:
        generator: Source of all randomness.
        shape: Of x.
        dtype: Of x.
        values: A key of VALUES.
        enc: Shape of the global scale; None leaves it to the op.
        options: Passed on.
    """
    x = VALUES[values](torch.randn(shape, generator=generator), generator).to(getattr(torch, dtype))
    # about 6 * 448 / amax of normal data: some blocks saturate, and a bf16 product hits ties
    scale = None if enc is None else 500 + 300 * torch.rand(enc, generator=generator)
    return {"x": x, "global_scale_enc": scale, **options}


def _wide(x: Tensor, generator: Generator) -> Tensor:
    """Blocks spread over 30 binades, so that scales saturate, go subnormal and vanish."""
    exponent = torch.randint(-24, 7, (*x.shape[:-1], x.shape[-1] // BLOCK), generator=generator)
    return x * exponent.float().exp2().repeat_interleave(BLOCK, dim=-1)


def _ties(x: Tensor, generator: Generator) -> Tensor:
    """Multiples of 1/4 up to 6 with a maximum of 6 in each block: under a dyadic scale half of them are ties."""
    steps = torch.randint(-24, 25, x.shape, generator=generator).float() / 4
    steps[..., ::BLOCK] = 6
    return steps


def _special(x: Tensor, generator: Generator) -> Tensor:
    """Rows of zeros, negative zeros, NaN, infinities and subnormals, alone and beside ordinary values."""
    x = x.clone()
    fills = (0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 2.0**-140, 2.0**-127, 3.0e38, -3.0e38)
    for i, fill in enumerate(fills):
        x[..., 2 * i, :] = fill
        x[..., 2 * i + 1, :: BLOCK // 2 + 1] = fill
    return x


def _zero(x: Tensor, generator: Generator) -> Tensor:
    """Zeros of both signs only."""
    return x * 0


VALUES = {
    "normal": lambda x, generator: x,
    "wide": _wide,
    "ties": _ties,
    "special": _special,
    "zero": _zero,
}

CASES: dict[str, Case] = {
    "one_row": Case(make, {"shape": (1, 16)}),
    "127_rows": Case(make, {"shape": (127, 80)}),
    "4001_rows": Case(make, {"shape": (4001, 32)}),
    "no_rows": Case(make, {"shape": (0, 64)}),
    "no_rows_own_amax": Case(make, {"shape": (0, 64), "enc": None, "scale_layout": "128x4"}),
    "own_amax": Case(make, {"shape": (33, 256), "enc": None}),
    "own_amax_fp16": Case(make, {"shape": (33, 256), "enc": None, "dtype": "float16", "values": "wide"}),
    "own_amax_zero": Case(make, {"shape": (5, 64), "enc": None, "values": "zero"}),
    "own_amax_special": Case(make, {"shape": (20, 64), "enc": None, "values": "special"}),
    "fp16": Case(make, {"shape": (64, 192), "dtype": "float16"}),
    "fp32": Case(make, {"shape": (64, 192), "dtype": "float32"}),
    "ties": Case(make, {"shape": (64, 256), "values": "ties", "enc": None}),
    "wide": Case(make, {"shape": (64, 256), "values": "wide"}),
    "wide_amax_guard": Case(make, {"shape": (64, 256), "values": "wide", "zero_guard": "amax"}),
    "special": Case(make, {"shape": (20, 64), "values": "special"}),
    "special_fp32": Case(make, {"shape": (20, 64), "values": "special", "dtype": "float32"}),
    "special_amax_guard": Case(make, {"shape": (20, 64), "values": "special", "zero_guard": "amax"}),
    "special_four_over_six": Case(make, {"shape": (20, 64), "values": "special", "four_over_six": "mse"}),
    "fast": Case(make, {"shape": (64, 256), "fast": True}),
    "fast_wide": Case(make, {"shape": (64, 256), "fast": True, "values": "wide", "dtype": "float32"}),
    "four_over_six_mae": Case(make, {"shape": (64, 256), "four_over_six": "mae", "enc": None}),
    "four_over_six_mse": Case(make, {"shape": (64, 256), "four_over_six": "mse", "enc": None}),
    "four_over_six_everything": Case(
        make,
        {
            "shape": (2, 66, 144),
            "four_over_six": "mae",
            "enc": (2, 3),
            "values": "wide",
            "fast": True,
            "zero_guard": "amax",
            "scale_layout": "128x4",
        },
    ),
    "tiles": Case(make, {"shape": (127, 80), "scale_layout": "128x4"}),
    "tiles_whole": Case(make, {"shape": (256, 128), "scale_layout": "128x4"}),
    "experts": Case(make, {"shape": (3, 33, 96), "enc": (3,)}),
    "experts_tiles": Case(make, {"shape": (3, 33, 96), "enc": (3,), "scale_layout": "128x4"}),
    "experts_gate_up": Case(make, {"shape": (3, 34, 96), "enc": (3, 2)}),
    "experts_one_scale": Case(make, {"shape": (2, 3, 17, 48)}),
    "no_experts": Case(make, {"shape": (0, 16, 32), "enc": (0,)}),
    "hidden_4096": Case(make, {"shape": (32, 4096), "scale_layout": "128x4"}, bench=True),
    "hidden_4096_own_amax": Case(make, {"shape": (32, 4096), "enc": None}, bench=True),
    "flash_decode": Case(make, {"shape": (128, 4096), "scale_layout": "128x4"}, gpu_only=True, bench=True),
    "flash_prefill": Case(make, {"shape": (8192, 4096), "scale_layout": "128x4"}, gpu_only=True, bench=True),
    "pro_prefill": Case(make, {"shape": (8192, 7168), "enc": None}, gpu_only=True, bench=True),
}

SWEEP: dict[str, Case] = {
    f"{name} {rows}x{k} {layout}": Case(make, {"shape": (rows, k), "scale_layout": layout}, gpu_only=True)
    for name, k in (("flash", 4096), ("pro", 7168))
    for layout in ("linear", "128x4")
    for rows in (1, 64, 4096, 8192, 49152)
}
