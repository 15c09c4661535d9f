"""Cases of `grouped_gemm`, and the makers of NVFP4 operands that other stages' cases use too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from megamoe.numerics.fragments import HOPPER, layout_name, scales_to_fragments
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor, encode_e4m3, pack_nibbles
from megamoe.testing.cases import EXACT, Bound, Case

_ONE = 2  # E2M1 code of 1.0
_SCALE_NAN = 0x7F
_SCALES_AROUND_ONE = (0x30, 0x40)  # E4M3 bytes of 0.5 to 2
_EXPERTS_DRAWN = 8  # whose scales are drawn and put in hopper order; a layer's would take a minute
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make(
    generator: Generator,
    *,
    rows: Sequence[int],
    n: int,
    k: int,
    a: str = "bf16",
    values: str = "random",
    layout: str = "linear",
    a_layout: str = "linear",
    alphas: int | None = 1,
    indexed: bool = False,
) -> dict[str, Any]:
    """Arguments of `grouped_gemm`.

    Args:
        generator: Source of every random value.
        rows: How many each expert owns.
        n: Rows of an expert's weights.
        k: Length of the sums.
        a: Dtype of the activations: "bf16", "fp16", "fp32" or "nvfp4".
        values: "random"; "one_hot": each sum has one term; "integers": every sum is exact in fp32; "scales": one-hot
            over weights with zero, subnormal and largest block scales; "nonfinite": rows with NaN and Inf, and a block
            scale that is NaN.
        layout: Scale layout of the weights.
        a_layout: Scale layout of NVFP4 activations.
        alphas: Global scales of the weights: None one for all, 1 one an expert, else so many an expert.
        indexed: Whether rows are gathered by a random `row_index`.
    """
    experts = len(rows)
    exact = values == "integers"
    ones = (0x38, 0x39) if exact else None
    weights = random_nvfp4(
        generator, (experts, n, k), layout="linear" if values == "scales" else layout, scale_bytes=ones
    )
    if values == "scales":
        weights = _with_special_scales(generator, weights, zero_codes=layout == HOPPER).with_layout(layout)
    dec = torch.tensor(0.25) if exact else random_alphas(generator, experts, alphas)
    weights = replace(weights, global_scale_dec=dec)
    total = sum(rows)
    tokens = total // 2 + 1 if indexed else total
    if values in ("one_hot", "scales"):
        activations = one_hot(tokens, k, a, a_layout)
    elif a == "nvfp4":
        activations = random_nvfp4(generator, (tokens, k), layout=a_layout, scale_bytes=ones)
        activations = replace(activations, global_scale_dec=torch.tensor(0.5 if exact else 0.0123))
    else:
        plain = torch.randn(tokens, k, generator=generator)
        activations = (plain.mul(4).round() if exact else plain).to(_DTYPES[a])
        if values == "nonfinite":
            activations[0, 3], activations[2, 5], activations[4, 7] = torch.nan, torch.inf, -torch.inf
            if layout != HOPPER:
                weights.scales.view(torch.uint8)[-1, -1, 0] = _SCALE_NAN
    arguments = {"a": activations, "weights": weights, "offsets": offsets_of(rows)}
    if indexed:
        arguments["row_index"] = torch.randint(tokens, (total,), generator=generator, dtype=torch.int32)
    return arguments


def _with_special_scales(generator: Generator, weights: NVFP4Tensor, *, zero_codes: bool) -> NVFP4Tensor:
    """Zero, subnormal, one and largest block scales; hopper weights have no nonzero code under a zero scale."""
    special = torch.tensor([0x00, 0x01, 0x07, 0x08, 0x38, 0x7E], dtype=torch.uint8)
    picked = special[torch.randint(len(special), weights.scales.shape, generator=generator)]
    codes = weights.codes.clone()
    if zero_codes:
        codes.view(*picked.shape, BLOCK // 2)[picked == 0] &= 0x88
    return replace(weights, codes=codes, scales=picked.view(torch.float8_e4m3fn))


def offsets_of(rows: Sequence[int]) -> Tensor:
    """int32 (E + 1): where each expert's rows start."""
    return torch.tensor([0, *rows]).cumsum(0).to(torch.int32)


def random_nvfp4(
    generator: Generator,
    shape: tuple[int, ...],
    *,
    layout: str = "linear",
    scale_bytes: tuple[int, int] | None = None,
) -> NVFP4Tensor:
    """Random codes and E4M3 scale bytes in [low, high), of 0.5 to 2 unless told; global scale 1."""
    *batch, k = shape
    low, high = scale_bytes or _SCALES_AROUND_ONE
    ordered = layout == HOPPER and layout_name(*shape[-2:]) == HOPPER  # random codes are random in any order
    drawn = (min(batch[0], _EXPERTS_DRAWN), *batch[1:]) if ordered and len(batch) == 2 else tuple(batch)
    scales = torch.randint(low, high, (*drawn, k // BLOCK), generator=generator, dtype=torch.uint8)
    codes = random_bytes(generator, (*batch, k // 2))
    if ordered:
        packed = scales_to_fragments(scales.view(torch.float8_e4m3fn)).view(torch.uint8)
        packed = packed if drawn == tuple(batch) else packed[torch.arange(batch[0]) % drawn[0]]
        return NVFP4Tensor(codes, packed.view(torch.float8_e4m3fn), torch.tensor(1.0), HOPPER)
    plain = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))
    return plain.with_layout(layout)


def random_bytes(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    """uint8; drawn eight at a time, or the weights of a whole layer would take a minute."""
    size = torch.Size(shape).numel()
    words = torch.randint(-(2**63), 2**63 - 1, (-(-size // 8),), generator=generator)
    return words.view(torch.uint8)[:size].reshape(shape).clone()


def random_alphas(generator: Generator, experts: int, parts: int | None) -> Tensor:
    """fp32 (), (E,) or (E, parts) in 0.01 to 0.03; all different, so that a mix-up shows."""
    shape = () if parts is None else (experts,) if parts == 1 else (experts, parts)
    return 0.01 + 0.02 * torch.rand(shape, generator=generator)


def one_hot(rows: int, k: int, dtype: str, layout: str = "linear") -> Tensor | NVFP4Tensor:
    """Activations (rows, K) whose row r is 1 at (7 * r) % K and 0 elsewhere."""
    row = torch.arange(rows)
    ones = torch.zeros(rows, k, dtype=torch.uint8)
    ones[row, 7 * row % k] = 1
    if dtype != "nvfp4":
        return ones.to(_DTYPES[dtype])
    scales = encode_e4m3(torch.ones(rows, k // BLOCK))
    return NVFP4Tensor(pack_nibbles(ones * _ONE), scales, torch.tensor(0.75)).with_layout(layout)


_FP32 = {"out": Bound(1e-5, "fp32 sums in another order: about sqrt(K) * 2^-24 of their terms")}
_FP16 = {"out": Bound(2**-11, "fp32 sums in another order may round to the neighbouring fp16")}
_ALL_EQUAL = {"out": EXACT}
_UNEVEN = (3, 0, 1, 40, 0, 17)
_DECODE = tuple(1 if e % 4 else 0 for e in range(256))  # 32 tokens, top 6: 192 rows over 256 experts
_SKEWED = tuple(300 if e == 7 else e % 2 for e in range(256))  # one expert with most of the rows


def _exact(**params: Any) -> Case:
    return Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, **params}, bounds=_ALL_EQUAL)


def _hopper(*, gpu_only: bool = False, bench: bool = False, **params: Any) -> Case:
    exact = params.get("values") in ("one_hot", "scales", "integers")
    bounds = _ALL_EQUAL if exact else {}
    given = {"rows": _UNEVEN, "n": 48, "k": 64, "layout": HOPPER, **params}
    return Case(make, given, bounds=bounds, gpu_only=gpu_only, bench=bench)


_HOPPER_CASES: dict[str, Case] = {
    "bf16": _hopper(),
    "nvfp4": _hopper(a="nvfp4"),
    "indexed": _hopper(indexed=True),
    "indexed-nvfp4-128x4": _hopper(a="nvfp4", a_layout="128x4", indexed=True, n=160, k=80),
    "fp16": _hopper(a="fp16"),
    "shared-alpha": _hopper(alphas=None),
    "three-parts": _hopper(a="nvfp4", alphas=3),
    "parts-of-four-rows": _hopper(n=64, alphas=16),
    "one-column": _hopper(values="integers", rows=(5, 9), n=1, k=32, a="nvfp4"),
    "odd-columns": _hopper(rows=(5, 9), n=131, k=48, a="nvfp4"),
    "one-row": _hopper(rows=(0, 1, 0), n=64, k=128),
    "4001-rows": _hopper(rows=(4001, 0), n=24, k=32, a="nvfp4"),
    "no-rows": _hopper(rows=(0, 0, 0), values="one_hot"),
    "one-hot": _hopper(values="one_hot", n=128, k=1152),
    "one-hot-nvfp4": _hopper(values="one_hot", a="nvfp4", alphas=2, n=192, k=2048),
    "special-scales": _hopper(values="scales", a="nvfp4"),
    "integers": _hopper(values="integers", k=512),
    "integers-many-rows": _hopper(values="integers", rows=(130, 3), n=136, k=512, a="nvfp4", indexed=True),
    "integers-twelve-rows-an-expert": _hopper(
        values="integers", rows=tuple(5 + 7 * e % 16 for e in range(48)), n=272, k=256, a="nvfp4", indexed=True
    ),
    "integers-forty-rows-an-expert": _hopper(
        values="integers", rows=tuple(20 + 11 * e % 45 for e in range(16)), n=320, k=384
    ),
    "one-hot-one-expert": _hopper(values="one_hot", rows=(20,), n=320, k=4096),
    "integers-one-expert-nine-rows": _hopper(values="integers", rows=(9,), n=80, k=256, a="nvfp4"),
    "integers-one-expert-two-rows": _hopper(values="integers", rows=(2,), n=320, k=2048),
    "integers-one-expert-200-rows": _hopper(values="integers", rows=(200,), n=136, k=1024),
    "integers-one-expert-odd-blocks": _hopper(values="integers", rows=(100,), n=200, k=448),
    "integers-one-expert-indexed": _hopper(values="integers", rows=(70,), n=136, k=192, indexed=True),
    "integers-one-expert-600-rows": _hopper(values="integers", rows=(600,), n=1104, k=384, a="nvfp4", alphas=3),
    "integers-one-expert-unaligned": _hopper(values="integers", rows=(300,), n=1100, k=256, alphas=None),
    "one-hot-one-expert-nvfp4": _hopper(values="one_hot", rows=(70,), n=320, k=1024, a="nvfp4", alphas=2, indexed=True),
    "integers-one-expert-many-rows": _hopper(values="integers", rows=(4500,), n=1600, k=256, gpu_only=True),
    "integers-one-expert-600-rows-bf16": _hopper(values="integers", rows=(600,), n=1104, k=384, alphas=3),
    # On 132 SMs these and those before take each shape of one expert with bf16 and with NVFP4 activations, with tails.
    "integers-one-expert-many-rows-nvfp4": _hopper(
        values="integers", rows=(4500,), n=1600, k=256, a="nvfp4", gpu_only=True
    ),
    "integers-one-expert-clusters": _hopper(values="integers", rows=(2000,), n=8000, k=8192, gpu_only=True),
    "integers-one-expert-wide-clusters": _hopper(values="integers", rows=(5500,), n=4648, k=448, gpu_only=True),
    "integers-one-expert-wide-clusters-nvfp4": _hopper(
        values="integers", rows=(5500,), n=4648, k=448, a="nvfp4", gpu_only=True
    ),
    "integers-one-expert-two-turns": _hopper(values="integers", rows=(1000,), n=8104, k=448, gpu_only=True),
    "integers-one-expert-two-turns-nvfp4": _hopper(
        values="integers", rows=(1000,), n=8104, k=448, a="nvfp4", gpu_only=True
    ),
    "integers-one-expert-one-turn": _hopper(values="integers", rows=(2000,), n=1500, k=448, a="nvfp4", gpu_only=True),
    "integers-one-expert-one-turn-bf16": _hopper(values="integers", rows=(1900,), n=1500, k=448, gpu_only=True),
    "integers-one-expert-wide": _hopper(values="integers", rows=(2100,), n=7144, k=448, alphas=2, gpu_only=True),
    "integers-one-expert-wide-nvfp4": _hopper(values="integers", rows=(2100,), n=7144, k=448, a="nvfp4", gpu_only=True),
    "one-expert-100-rows": _hopper(rows=(100,), n=512, k=4096, a="nvfp4"),
    "nonfinite": _hopper(values="nonfinite"),
    "all-experts-live": _hopper(rows=tuple(1 + e % 3 for e in range(256)), n=64, k=256, a="nvfp4", indexed=True),
}


CASES: dict[str, Case] = {
    "bf16": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64}),
    "fp16": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, "a": "fp16"}, bounds=_FP16),
    "fp32": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, "a": "fp32"}, bounds=_FP32),
    "nvfp4": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, "a": "nvfp4"}),
    "nvfp4-128x4": Case(
        make, {"rows": (130, 0, 5), "n": 160, "k": 80, "a": "nvfp4", "layout": "128x4", "a_layout": "128x4"}
    ),
    "weights-128x4": Case(make, {"rows": _UNEVEN, "n": 48, "k": 144, "layout": "128x4"}),
    "shared-alpha": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, "alphas": None}),
    "three-parts": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, "a": "nvfp4", "alphas": 3}),
    "one-expert-127-rows": Case(make, {"rows": (127,), "n": 72, "k": 96, "a": "nvfp4"}),
    "one-row": Case(make, {"rows": (0, 1, 0), "n": 64, "k": 128}),
    "one-column": _exact(values="integers", rows=(5, 9), n=1, k=32, a="nvfp4"),
    "fewer-rows-than-experts": _exact(values="integers", rows=(0, 2, 0, 0, 1, 0, 3, 0), a="nvfp4", layout="128x4"),
    "odd-columns": Case(make, {"rows": (5, 9), "n": 131, "k": 48}),
    "4001-rows": Case(make, {"rows": (4001, 0), "n": 24, "k": 32, "a": "nvfp4"}),
    "no-rows": _exact(rows=(0, 0, 0)),
    "no-rows-nvfp4-128x4": _exact(rows=(0, 0), a="nvfp4", layout="128x4", a_layout="128x4"),
    "one-hot": _exact(values="one_hot"),
    "one-hot-nvfp4": _exact(values="one_hot", a="nvfp4", layout="128x4", alphas=2),
    "one-hot-fp32": _exact(values="one_hot", a="fp32", alphas=None),
    "special-scales": _exact(values="scales", a="nvfp4"),
    "integers": _exact(values="integers", k=512),
    "integers-nvfp4": _exact(values="integers", k=512, a="nvfp4", layout="128x4"),
    "integers-one-expert": _exact(values="integers", rows=(130,), n=136, k=512, a="nvfp4"),
    "nonfinite": Case(make, {"rows": _UNEVEN, "n": 48, "k": 64, "values": "nonfinite"}),
    "bench-few-rows": Case(make, {"rows": (1, 0, 2, 1), "n": 256, "k": 256, "a": "nvfp4"}, bench=True),
    "bench-many-rows": Case(make, {"rows": (64, 128), "n": 256, "k": 256, "a": "nvfp4"}, bench=True),
    **{f"hopper-{name}": case for name, case in _HOPPER_CASES.items()},
    "hopper-bench-few-rows": _hopper(rows=(1, 0, 2, 1), n=256, k=256, a="nvfp4", bench=True),
    "hopper-bench-many-rows": _hopper(rows=(64, 128), n=256, k=256, a="nvfp4", bench=True),
    "hopper-flash-down-decode": _hopper(rows=_DECODE, n=4096, k=2048, a="nvfp4", gpu_only=True, bench=True),
    "hopper-flash-down-prefill": _hopper(rows=(192,) * 256, n=4096, k=2048, a="nvfp4", gpu_only=True, bench=True),
    "hopper-flash-down-skewed": _hopper(rows=_SKEWED, n=4096, k=2048, a="nvfp4", gpu_only=True),
    "flash-down-decode": Case(make, {"rows": _DECODE, "n": 4096, "k": 2048, "a": "nvfp4"}, gpu_only=True, bench=True),
    "flash-down-prefill": Case(
        make, {"rows": (192,) * 256, "n": 4096, "k": 2048, "a": "nvfp4"}, gpu_only=True, bench=True
    ),
    "flash-wo_a": Case(make, {"rows": (256,) * 8, "n": 1024, "k": 4096, "a": "nvfp4"}, gpu_only=True, bench=True),
}
