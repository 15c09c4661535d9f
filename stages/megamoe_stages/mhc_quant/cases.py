"""Inputs that prove a variant of mhc_quant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megamoe.numerics.mhc import sinkhorn
from megamoe.testing.cases import EXACT, Bound, Case

_LARGEST = 8.0  # a normed row is about N(0, 1) times its weight: few values lie beyond, and those saturate


def make(
    generator: torch.Generator,
    *,
    tokens: int,
    hidden: int = 256,
    streams: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    norm_dtype: torch.dtype = torch.float32,
    scale_layout: str = "linear",
    trouble: bool = False,
    permute: bool = False,
    spread: float = 1.0,
    **options: float,
) -> dict[str, Any]:
    """Random streams and a random site.

    `trouble` makes tokens of zeros, NaN, an infinity, subnormals and large sublayer outputs. `permute` only moves the
    streams round by one, so that they come out as they went in, bit for bit, in one order and no other. `spread` widens
    the logits: a matrix of very unequal entries is still moving at Sinkhorn's last iteration, so their number shows.
    """

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n = streams
    x, f = randn(tokens, n, hidden), randn(tokens, hidden)
    if trouble:
        x[0], f[0] = 0.0, 0.0
        x[1, 0, 3] = torch.nan
        f[2, 5] = torch.nan
        x[3, n - 1, 7] = torch.inf
        x[4], f[4] = x[4] * 2.0**-130, f[4] * 2.0**-130
        f[tokens // 2 :] *= 1000.0
    post, comb = 2 * torch.sigmoid(randn(tokens, n)), sinkhorn(randn(tokens, n, n))
    if permute:
        post, comb = torch.zeros(tokens, n), torch.eye(n).roll(1, dims=1).repeat(tokens, 1, 1)
    return {
        "x": x.to(dtype),
        "f": f.to(dtype),
        "post": post,
        "comb": comb,
        "fn": randn(n * (n + 2), n * hidden) / (n * hidden) ** 0.5,  # logits of about N(0, 1)
        "base": spread * randn(n * (n + 2)),
        "scale": 0.5 + torch.rand(3, generator=generator),
        "norm_weight": (1 + 0.2 * randn(hidden)).to(norm_dtype),
        "global_scale_enc": torch.tensor(6.0 * 448.0 / _LARGEST),
        "scale_layout": scale_layout,
        **options,
    }


_SUMS = "order of fp32 sums"
_FLOAT32: Mapping[str, Bound] = {
    "residual": Bound(1.8e-7, _SUMS),
    "normed": Bound(3.3e-7, _SUMS),
    "quantized": Bound(1e-2, "of 16384 values one flipped code or block scale moves 0.6e-2"),
    "post": Bound(6e-7, _SUMS),
    "comb": Bound(8e-7, _SUMS),
}
_FLOAT16: Mapping[str, Bound] = {
    "residual": Bound(4e-5, f"{_SUMS} flips a rounding to fp16"),
    "normed": Bound(1.2e-4, f"{_SUMS} flips a rounding to fp16"),
    "quantized": Bound(1.3e-2, "of 16384 values two flipped codes or block scales move 1.2e-2"),
    "post": Bound(1.2e-5, "a flipped stream value moves the logits of its token"),
    "comb": Bound(1.8e-5, "a flipped stream value moves the logits of its token"),
}


_EXACT_STREAMS: Mapping[str, Bound] = {"residual": EXACT, "post": _FLOAT32["post"], "comb": _FLOAT32["comb"]}


def _case(bounds: Mapping[str, Bound] | None = None, **params: Any) -> Case:
    return Case(make, params, bounds or {})


_MANY: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Bound]]] = {  # more tokens than an emulator gets through
    "many_1024_128x4": ({"tokens": 1090, "hidden": 1024, "scale_layout": "128x4"}, {}),
    "many_1024_trouble": ({"tokens": 1101, "hidden": 1024, "trouble": True}, {}),
    "many_1024_permuted": ({"tokens": 1057, "hidden": 1024, "permute": True}, {"residual": EXACT}),
    "many_2048": ({"tokens": 1531, "hidden": 2048, "norm_dtype": torch.bfloat16}, {}),
    "many_2048_other_numbers": (
        {"tokens": 1025, "hidden": 2048, "sinkhorn_iters": 3, "hc_eps": 1e-3, "norm_eps": 1e-2},
        {},
    ),
    "many_4096": ({"tokens": 8191, "hidden": 4096}, {}),
    "many_4096_trouble_128x4": ({"tokens": 1040, "hidden": 4096, "trouble": True, "scale_layout": "128x4"}, {}),
    "many_7168": ({"tokens": 1099, "hidden": 7168}, {}),
}


CASES: dict[str, Case] = {
    "no_tokens": _case(tokens=0),
    "no_tokens_128x4": _case(tokens=0, scale_layout="128x4"),
    "one_token": _case(tokens=1, hidden=2048),
    "odd_tokens": _case(tokens=127),
    "odd_tokens_128x4": _case(tokens=127, scale_layout="128x4"),
    "many_tokens": _case(tokens=4001, hidden=32),
    "one_block_128x4": _case(tokens=130, hidden=16, scale_layout="128x4"),
    "odd_hidden_blocks": _case(tokens=19, hidden=208),
    "wide": _case(tokens=3, hidden=4096),
    "two_streams": _case(tokens=21, streams=2),
    "norm_weight_bfloat16": _case(tokens=21, norm_dtype=torch.bfloat16),
    "ten_iterations": _case(tokens=21, sinkhorn_iters=10),
    "one_iteration": _case(tokens=21, sinkhorn_iters=1),
    "other_eps": _case(tokens=21, hc_eps=1e-3, norm_eps=1e-2),
    "float16": _case(_FLOAT16, tokens=64, dtype=torch.float16),
    "float32": _case(_FLOAT32, tokens=64, dtype=torch.float32),
    "trouble": _case(tokens=64, trouble=True),
    "trouble_float32_128x4": _case(_FLOAT32, tokens=64, trouble=True, dtype=torch.float32, scale_layout="128x4"),
    "permuted_streams": _case({"residual": EXACT}, tokens=33, permute=True),
    "slow_sinkhorn": _case(_EXACT_STREAMS, tokens=33, permute=True, spread=4.0),
    "decode_small": Case(make, {"tokens": 1, "hidden": 4096}, bench=True),
    "prefill_small": Case(make, {"tokens": 16, "hidden": 4096, "scale_layout": "128x4"}, bench=True),
    **{name: Case(make, params, bounds, gpu_only=True) for name, (params, bounds) in _MANY.items()},
    "flash_decode": Case(make, {"tokens": 32, "hidden": 4096, "scale_layout": "128x4"}, gpu_only=True, bench=True),
    "flash_prefill": Case(make, {"tokens": 4096, "hidden": 4096, "scale_layout": "128x4"}, gpu_only=True, bench=True),
    "pro_prefill": Case(make, {"tokens": 2048, "hidden": 7168, "scale_layout": "128x4"}, gpu_only=True, bench=True),
}

SWEEP: dict[str, Case] = {
    f"{name} {tokens}x4x{hidden} {layout}": Case(
        make, {"tokens": tokens, "hidden": hidden, "scale_layout": layout}, gpu_only=True
    )
    for name, hidden, layout in (("flash", 4096, "linear"), ("flash", 4096, "128x4"), ("pro", 7168, "linear"))
    for tokens in (1, 4, 16, 64, 4096, 8192, 49152)
    if tokens < 49152 or layout == "linear"
}
