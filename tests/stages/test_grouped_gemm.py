"""The grouped GEMM against numpy: bit for bit where every sum is exact, bounded by its one rounding elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.errors import ArgumentError
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe_stages.grouped_gemm import cases, contract, fallback, reference
from tests.stages import oracle

VARIANTS = [reference.grouped_gemm, fallback.grouped_gemm]
ROWS = (3, 0, 1, 40, 17)
Variant = Callable[..., Tensor]


def inputs(**params: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return cases.make(generator, **{"rows": ROWS, "n": 48, "k": 64, **params})


def sums(kw: dict[str, Any]) -> oracle.F64:
    a = kw["a"]
    rows = oracle.decode(a) if isinstance(a, NVFP4Tensor) else oracle.array(a)
    return oracle.grouped(rows, oracle.decode(kw["weights"]), kw["offsets"])


def expected(kw: dict[str, Any]) -> Tensor:
    """One fp32 product with alpha, one rounding; right to the bit where the sums are exact in fp32."""
    product = oracle.alphas(kw["a"], kw["weights"], kw["offsets"]) * sums(kw).astype(np.float32)
    return oracle.to_dtype(product, contract.out_dtype(kw["a"]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alphas", [None, 1, 2, 3])
@pytest.mark.parametrize("a", ["bf16", "fp16", "fp32", "nvfp4"])
def test_one_hot_rows_pick_weights_bit_for_bit(variant: Variant, a: str, alphas: int | None) -> None:
    kw = inputs(a=a, alphas=alphas, values="one_hot")
    assert torch.equal(variant(**kw), expected(kw))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("a_layout", ["linear", "128x4"])
def test_scale_layouts_hold_the_same_values(variant: Variant, layout: str, a_layout: str) -> None:
    kw = inputs(rows=(130, 0, 2), n=144, k=80, a="nvfp4", layout=layout, a_layout=a_layout, values="one_hot")
    assert torch.equal(variant(**kw), expected(kw))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("a", ["bf16", "nvfp4"])
@pytest.mark.parametrize("experts", ["many", "one"])
def test_alpha_meets_the_exact_sum_before_the_only_rounding(variant: Variant, a: str, experts: str) -> None:
    kw = inputs(a=a, k=512, values="integers", rows=ROWS if experts == "many" else (61,))
    w = kw["weights"]
    dec = torch.linspace(0.011, 0.029, w.shape[0])
    kw["weights"] = NVFP4Tensor(w.codes, w.scales, dec, w.scale_layout)
    want = expected(kw)
    assert torch.equal(variant(**kw), want)
    alpha = torch.from_numpy(oracle.alphas(kw["a"], kw["weights"], kw["offsets"]))
    twice = (torch.from_numpy(sums(kw)).bfloat16().float() * alpha).bfloat16()
    assert not torch.equal(twice, want), "the data must tell one rounding from two"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("a", "bound"),
    [
        ("bf16", oracle.U_BF16 / 3**0.5),  # the root mean square of a rounding error is at most u / sqrt(3)
        ("nvfp4", oracle.U_BF16 / 3**0.5),
        ("fp16", oracle.U_FP16 / 3**0.5),
        ("fp32", 256**0.5 * 2.0**-24),  # a sum of 256 products, each addition rounded once
    ],
)
def test_random_values_lie_within_one_rounding_of_fp64(variant: Variant, a: str, bound: float) -> None:
    kw = inputs(a=a, k=256, n=96, alphas=2)
    alpha = oracle.alphas(kw["a"], kw["weights"], kw["offsets"]).astype(np.float64)
    assert oracle.relative(oracle.array(variant(**kw)), alpha * sums(kw)) <= bound


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [(0,), (0, 0, 0), (1,), (0, 1, 0), (0, 0, 127), (2, 0, 0)])
def test_experts_without_and_with_few_rows(variant: Variant, rows: tuple[int, ...]) -> None:
    kw = inputs(rows=rows, values="one_hot", a="nvfp4", alphas=2)
    out = variant(**kw)
    assert out.shape == (sum(rows), 48)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected(kw))


@pytest.mark.parametrize("variant", VARIANTS)
def test_special_block_scales(variant: Variant) -> None:
    kw = inputs(values="scales", a="nvfp4")
    assert torch.equal(variant(**kw), expected(kw))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_inf_stay_in_their_rows_and_columns(variant: Variant) -> None:
    kw = inputs(values="nonfinite")
    out = variant(**kw)
    bad_rows, bad_column = [0, 2, 4], 47
    last_expert = slice(int(kw["offsets"][-2]), None)
    assert not out[bad_rows].isfinite().any()
    assert out[last_expert, bad_column].isnan().all()
    good = torch.ones_like(out, dtype=torch.bool)
    good[bad_rows] = False
    good[last_expert, bad_column] = False
    assert out[good].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_is_exact_for_every_byte_and_scale(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_DECODED_AT_ONCE", 5 * 512)  # experts in uneven pieces
    codes = torch.arange(256, dtype=torch.uint8).expand(127, 1, 256).contiguous()
    scales = torch.arange(127, dtype=torch.uint8)[:, None, None].expand(127, 1, 32).contiguous()
    tensor = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(3.0))
    got = fallback.decode(tensor, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.float(), dequantize(tensor, apply_global=False))
    assert np.array_equal(oracle.array(got), oracle.decode(tensor))
    assert torch.equal(got.signbit(), dequantize(tensor, apply_global=False).signbit())


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_alpha_multiplies_bf16_sums_in_fp32(shape: tuple[int, ...]) -> None:
    """What follows a library GEMM that returns bf16: alpha itself must not be rounded to bf16."""
    generator = torch.Generator().manual_seed(3)
    sums = torch.randn(9, 8, generator=generator).bfloat16()
    alpha = 0.01 + 0.02 * torch.rand(shape, generator=generator)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    expert = torch.tensor([0] * 4 + [2] * 5)
    each = alpha.expand(9, 1) if alpha.ndim == 0 else alpha[expert].view(9, -1)
    factors = each.repeat_interleave(8 // each.shape[1], dim=1)
    want = (sums.float() * factors).bfloat16()
    assert torch.equal(fallback.multiply_by_alpha(sums.clone(), alpha, offsets), want)


@pytest.mark.parametrize("rows", [(0, 2, 0, 0, 1, 0, 3, 0), (0, 0, 0, 4), (1, 0, 0, 0), (3, 9)])
def test_library_gemm_sees_only_experts_with_rows(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path, on the CPU: few rows must not decode every expert."""
    kw = inputs(rows=rows, k=512, values="integers", layout="128x4")
    decoded: list[int] = []
    decode = fallback.decode

    def counted(tensor: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
        decoded.append(tensor.shape[0])
        return decode(tensor, dtype)

    monkeypatch.setattr(fallback, "decode", counted)
    got = fallback.gemm_by_library(kw["a"], kw["weights"], kw["offsets"])
    assert decoded == [min(sum(rows), len(rows))]
    assert torch.equal(got, torch.from_numpy(sums(kw)).bfloat16())


def _with(kw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    w = kw["weights"]
    parts = {"codes": w.codes, "scales": w.scales, "global_scale_dec": w.global_scale_dec}
    return {**kw, "weights": NVFP4Tensor(**{**parts, **changes})}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "dtype": (lambda kw: {**kw, "a": kw["a"].double()}, "a"),
    "not a tensor": (lambda kw: {**kw, "a": [1.0]}, "a"),
    "K": (lambda kw: {**kw, "a": kw["a"][:, :48].contiguous()}, "weights.codes"),
    "K not of blocks": (lambda kw: {**kw, "a": kw["a"][:, :40].contiguous()}, "a"),
    "strides": (lambda kw: {**kw, "a": kw["a"].T.contiguous().T}, "a"),
    "plain weights": (lambda kw: {**kw, "weights": torch.zeros(5, 48, 64)}, "weights"),
    "flat weights": (lambda kw: _with(kw, codes=kw["weights"].codes[0]), "weights.codes"),
    "scales": (lambda kw: _with(kw, scales=kw["weights"].scales[..., :-1].contiguous()), "weights.scales"),
    "scale dtype": (lambda kw: _with(kw, scales=kw["weights"].scales.float()), "weights.scales"),
    "global scale": (lambda kw: _with(kw, global_scale_dec=torch.ones(4)), "weights.global_scale_dec"),
    "global parts": (lambda kw: _with(kw, global_scale_dec=torch.ones(5, 7)), "weights.global_scale_dec"),
    "offsets dtype": (lambda kw: {**kw, "offsets": kw["offsets"].long()}, "offsets"),
    "offsets size": (lambda kw: {**kw, "offsets": kw["offsets"][1:].contiguous()}, "offsets"),
    "device": (lambda kw: {**kw, "offsets": kw["offsets"].to("meta")}, "offsets"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(variant: Variant, wrong: str) -> None:
    change, argument = WRONG[wrong]
    with pytest.raises(ArgumentError) as caught:
        variant(**change(inputs()))
    assert caught.value.argument == argument


def test_activations_have_one_global_scale() -> None:
    kw = inputs(a="nvfp4")
    kw["a"] = NVFP4Tensor(kw["a"].codes, kw["a"].scales, torch.ones(1))
    with pytest.raises(ArgumentError, match="a.global_scale_dec"):
        fallback.grouped_gemm(**kw)


@pytest.mark.parametrize("a", ["bf16", "fp32", "nvfp4"])
def test_fake_result_is_like_the_real_one(a: str) -> None:
    kw = inputs(a=a)
    real = reference.grouped_gemm(**kw)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = contract.fake(**kw)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_problem_is_made_of_metadata() -> None:
    kw = inputs(a="nvfp4", layout="128x4")
    problem = contract.problem(**kw)
    assert hash(problem) == hash(contract.problem(**kw))
    assert problem._fields[0] == "device"
    assert (problem.rows, problem.n, problem.k, problem.experts) == (64, 48, 64, 5)
    assert problem.quantized
    meta = {"a": kw["a"].to("meta"), "weights": kw["weights"].to("meta"), "offsets": kw["offsets"].to("meta")}
    assert contract.problem(**meta)._replace(device=problem.device) == problem
    contract.check(**meta)
