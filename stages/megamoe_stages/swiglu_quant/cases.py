"""Cases of `swiglu_quant`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator

from megamoe.numerics.fragments import HOPPER
from megamoe.numerics.gate_up import interleave
from megamoe.numerics.nvfp4 import NVFP4Tensor, pack_nibbles
from megamoe.testing.cases import EXACT, Bound, Case
from megamoe_stages.grouped_gemm.cases import make as make_gemm

_LARGE_GATES = torch.tensor([0, 4, 5, 6, 7, 8, 15], dtype=torch.uint8)  # E2M1: 0, 2, 3, 4, 6, -0, -6
_SCALE_128 = 0x70  # E4M3 byte of 128


def make(
    generator: Generator,
    *,
    rows: Sequence[int],
    intermediate: int,
    k: int,
    a: str = "bf16",
    values: str = "random",
    layout: str = "linear",
    a_layout: str = "linear",
    alphas: int | None = 2,
    weighted: bool = False,
    limit: float | None = 10.0,
    order: str = "gate_up",
    scale_layout: str = "linear",
    indexed: bool = False,
) -> dict[str, Any]:
    """Arguments of `swiglu_quant`.

    Args:
        generator: Source of every random value.
        rows: How many each expert owns.
        intermediate: I; each expert has 2I rows of weights.
        k: Length of the sums.
        a: Dtype of the activations: "bf16", "fp16", "fp32" or "nvfp4".
        values: "random"; "one_hot": gate and up are exact in bf16; "saturated": besides, every sigmoid is 0 or 1 in
            fp32, so the result does not depend on how `exp` rounds; "nonfinite": rows with NaN and Inf.
        layout: Scale layout of the weights.
        a_layout: Scale layout of NVFP4 activations.
        alphas: Global scales of the weights: None one for all, 1 an expert, 2 an expert and half.
        weighted: Whether rows have a routing weight.
        limit: See the op.
        order: See the op.
        scale_layout: See the op.
        indexed: Whether rows are gathered by a random `row_index`.
    """
    exact = values in ("one_hot", "saturated")
    mixed = order == "interleaved" and not exact and values != "nonfinite"  # random rows are random in any order
    gemm = make_gemm(
        generator,
        rows=rows,
        n=2 * intermediate,
        k=k,
        a=a,
        values="one_hot" if exact else values,
        layout=layout if mixed else "linear",
        a_layout=a_layout,
        alphas=alphas,
        indexed=indexed,
    )
    weights, activations = gemm["weights"], gemm["a"]
    if exact:  # powers of two keep gate and up exact in bf16
        powers = torch.randint(-1, 1, weights.global_scale_dec.shape, generator=generator)
        weights = replace(weights, global_scale_dec=torch.exp2(powers.float()))
        if isinstance(activations, NVFP4Tensor):
            activations = replace(activations, global_scale_dec=torch.tensor(0.5))
    else:  # gate and up of a few units: some beyond the limit, most not
        weights = replace(weights, global_scale_dec=weights.global_scale_dec * (128 if a == "nvfp4" else 8))
    if values == "saturated":
        weights = _with_large_gates(generator, weights, gate_first=order != "up_gate")
    if values == "nonfinite" and layout == HOPPER:  # its weights have no NaN
        weights.scales.view(torch.uint8)[-1, -1, 0] = _SCALE_128
    if order == "interleaved" and not mixed:
        weights = interleave(weights, "gate_up")
    total = sum(rows)
    return {
        "a": activations,
        "weights": weights.with_layout(layout),
        **({"row_index": gemm["row_index"]} if indexed else {}),
        "offsets": gemm["offsets"],
        # no block scale saturates: |y| is at most 100 with the usual limit, some thousands without
        "global_scale_enc": torch.tensor(23.7 if limit is not None else 0.051),
        "row_weight": torch.rand(total, generator=generator) + 0.05 if weighted else None,
        "limit": limit,
        "order": order,
        "scale_layout": scale_layout,
    }


def _with_large_gates(generator: Generator, weights: NVFP4Tensor, *, gate_first: bool) -> NVFP4Tensor:
    experts, rows, k = weights.shape
    half = rows // 2
    gate = slice(0, half) if gate_first else slice(half, rows)
    codes, scales = weights.codes.clone(), weights.scales.clone()
    picked = _LARGE_GATES[torch.randint(len(_LARGE_GATES), (experts, half, k), generator=generator)]
    codes[:, gate] = pack_nibbles(picked)
    scales.view(torch.uint8)[:, gate] = _SCALE_128
    return NVFP4Tensor(codes, scales, weights.global_scale_dec)


_UNEVEN = (3, 0, 1, 40, 0, 17)
_SIZES: dict[str, Any] = {"rows": _UNEVEN, "intermediate": 48, "k": 64}
_ONE_HOT = {
    "out": Bound(3e-3, "gate and up are exact; `exp` differs by an ulp or two, which moves one code in 10^4 by a step")
}
_FP32 = {"out": Bound(3e-3, "gate and up differ by the order of fp32 sums, which moves one code in 10^4 by a step")}
_EXACT = {"out": EXACT}
_DECODE = tuple(1 if e % 4 else 0 for e in range(256))  # 32 tokens, top 6: 192 rows over 256 experts


def _random(**params: Any) -> Case:
    return Case(make, {**_SIZES, **params})


def _one_hot(**params: Any) -> Case:
    return Case(make, {**_SIZES, "values": "one_hot", **params}, bounds=_ONE_HOT)


def _saturated(**params: Any) -> Case:
    return Case(make, {**_SIZES, "values": "saturated", "limit": None, **params}, bounds=_EXACT)


def _bench(*, gpu_only: bool = False, **params: Any) -> Case:
    return Case(make, {**params, "a": "nvfp4"}, gpu_only=gpu_only, bench=True)


def _hopper(
    *, bounds: dict[str, Bound] | None = None, gpu_only: bool = False, bench: bool = False, **params: Any
) -> Case:
    given = {**_SIZES, "layout": HOPPER, "order": "interleaved", **params}
    return Case(make, given, bounds=bounds or {}, gpu_only=gpu_only, bench=bench)


_HOPPER_CASES: dict[str, Case] = {
    "bf16": _hopper(),
    "nvfp4": _hopper(a="nvfp4"),
    "indexed": _hopper(indexed=True, k=512, intermediate=256),
    "indexed-nvfp4-128x4": _hopper(
        rows=(130, 0, 5), intermediate=144, k=80, a="nvfp4", a_layout="128x4", scale_layout="128x4", indexed=True
    ),
    "shared-alpha": _hopper(a="nvfp4", alphas=None),
    "alpha-an-expert": _hopper(a="nvfp4", alphas=1),
    "row-weight": _hopper(a="nvfp4", weighted=True, indexed=True),
    "no-limit": _hopper(a="nvfp4", limit=None),
    "tight-limit": _hopper(limit=0.5),
    "one-expert-127-rows": _hopper(a="nvfp4", rows=(127,)),
    "one-row": _hopper(rows=(0, 1, 0), k=256, intermediate=256),
    "4001-rows": _hopper(rows=(4001, 0), intermediate=16, k=32, a="nvfp4"),
    "nonfinite": _hopper(values="nonfinite"),
    "no-rows-128x4": _hopper(rows=(0, 0), a="nvfp4", scale_layout="128x4"),
    "one-hot": _hopper(values="one_hot", intermediate=80, k=1152, bounds=_ONE_HOT),
    "one-hot-nvfp4": _hopper(values="one_hot", a="nvfp4", weighted=True, scale_layout="128x4", bounds=_ONE_HOT),
    "saturated": _hopper(values="saturated", limit=None, bounds=_EXACT),
    "saturated-nvfp4": _hopper(
        values="saturated", limit=None, a="nvfp4", scale_layout="128x4", k=2048, indexed=True, bounds=_EXACT
    ),
    "saturated-row-weight": _hopper(values="saturated", limit=None, a="nvfp4", weighted=True, bounds=_EXACT),
    "saturated-many-rows": _hopper(
        values="saturated", limit=None, rows=(130, 3), intermediate=144, a="nvfp4", indexed=True, bounds=_EXACT
    ),
    "saturated-twelve-rows-an-expert": _hopper(
        values="saturated",
        limit=None,
        rows=tuple(5 + 7 * e % 16 for e in range(48)),
        intermediate=144,
        a="nvfp4",
        indexed=True,
        bounds=_EXACT,
    ),
    "saturated-forty-rows-an-expert": _hopper(
        values="saturated",
        limit=None,
        rows=tuple(20 + 11 * e % 45 for e in range(16)),
        intermediate=144,
        scale_layout="128x4",
        bounds=_EXACT,
    ),
    "all-experts-live": _hopper(
        rows=tuple(1 + e % 3 for e in range(256)), intermediate=32, k=256, a="nvfp4", indexed=True
    ),
    "plain-layout": _hopper(layout="linear", a="nvfp4"),
}

CASES: dict[str, Case] = {
    "bf16": _random(),
    "fp16": _random(a="fp16"),
    "fp32": Case(make, {**_SIZES, "a": "fp32"}, bounds=_FP32),
    "nvfp4": _random(a="nvfp4"),
    "nvfp4-128x4": _random(
        rows=(130, 0, 5), intermediate=144, k=80, a="nvfp4", layout="128x4", a_layout="128x4", scale_layout="128x4"
    ),
    "up-gate": _random(a="nvfp4", order="up_gate"),
    "shared-alpha": _random(a="nvfp4", alphas=None),
    "alpha-an-expert": _random(a="nvfp4", alphas=1),
    "row-weight": _random(a="nvfp4", weighted=True),
    "no-limit": _random(a="nvfp4", limit=None),
    "tight-limit": _random(a="nvfp4", limit=0.5),
    "one-expert-127-rows": _random(a="nvfp4", rows=(127,)),
    "one-row": _random(rows=(0, 1, 0), k=256, intermediate=256),
    "4001-rows": _random(rows=(4001, 0), intermediate=16, k=32, a="nvfp4"),
    "nonfinite": _random(values="nonfinite"),
    "no-rows": _saturated(rows=(0, 0, 0)),
    "no-rows-128x4": _saturated(rows=(0, 0), a="nvfp4", scale_layout="128x4"),
    "one-hot": _one_hot(),
    "one-hot-nvfp4": _one_hot(a="nvfp4", order="up_gate", weighted=True, scale_layout="128x4"),
    "one-hot-tight-limit": _one_hot(a="nvfp4", limit=0.5),
    "saturated": _saturated(),
    "saturated-nvfp4": _saturated(a="nvfp4", layout="128x4", scale_layout="128x4", order="up_gate"),
    "saturated-row-weight": _saturated(a="nvfp4", weighted=True),
    "bench-few-rows": _bench(rows=(1, 0, 2, 1), intermediate=128, k=256),
    "bench-many-rows": _bench(rows=(64, 128), intermediate=128, k=256),
    **{f"hopper-{name}": case for name, case in _HOPPER_CASES.items()},
    "hopper-bench-few-rows": _hopper(rows=(1, 0, 2, 1), intermediate=128, k=256, a="nvfp4", bench=True),
    "hopper-bench-many-rows": _hopper(rows=(64, 128), intermediate=128, k=256, a="nvfp4", bench=True),
    "hopper-flash-decode": _hopper(rows=_DECODE, intermediate=2048, k=4096, a="nvfp4", gpu_only=True, bench=True),
    "hopper-flash-prefill": _hopper(rows=(192,) * 256, intermediate=2048, k=4096, a="nvfp4", gpu_only=True, bench=True),
    "flash-decode": _bench(rows=_DECODE, intermediate=2048, k=4096, gpu_only=True),
    "flash-prefill": _bench(rows=(192,) * 256, intermediate=2048, k=4096, gpu_only=True),
}
