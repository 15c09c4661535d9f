"""NVFP4 numbers against ml_dtypes, NVIDIA's own host conversions, and a second implementation in numpy."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from megamoe.errors import ArgumentError
from megamoe.numerics import nvfp4

Array = np.ndarray[Any, Any]
FLT_MAX = np.finfo(np.float32).max
E2M1_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

# ---- every value that matters ----


def every_bf16() -> Array:
    return (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)


def every_fp16() -> Array:
    return np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def dense_fp32() -> Array:
    """Every exponent with edge and random mantissas, and 4 neighbours each side of every threshold; both signs."""
    rng = np.random.default_rng(0)
    edges = np.array([0, 1, 2, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF], dtype=np.uint32)
    mantissas = np.concatenate([edges, rng.integers(0, 1 << 23, 256, dtype=np.uint32)])
    sweep = (np.arange(256, dtype=np.uint32)[:, None] << 23 | mantissas).ravel()
    e4m3 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    thresholds = np.concatenate([E2M1_THRESHOLDS, (e4m3[1:] + e4m3[:-1]) / 2, e4m3, [464.0]]).astype(np.float32)
    around = (thresholds.view(np.int32)[:, None] + np.arange(-4, 5, dtype=np.int32)).ravel()
    around = around[around >= 0].view(np.uint32)
    bits = np.concatenate([sweep, around])
    return np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)


VALUES = {"bf16": every_bf16, "fp16": every_fp16, "fp32": dense_fp32}


@pytest.fixture(params=VALUES)
def values(request: pytest.FixtureRequest) -> Array:
    return VALUES[request.param]()


def as_e2m1(y: Array) -> Array:
    """ml_dtypes rounds right but has no rule for NaN: NVIDIA gives 7."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(y), 7, y.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)).astype(np.uint8)


def as_e4m3(y: Array) -> Array:
    """ml_dtypes overflows to NaN: clip first. The sign of NaN is dropped as NVIDIA's conversion does."""
    with np.errstate(invalid="ignore"):
        byte = np.clip(y, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(y), 0x7F, byte).astype(np.uint8)


# ---- conversions ----


def test_encode_e2m1_is_one_rounding_to_nearest_even(values: Array) -> None:
    np.testing.assert_array_equal(nvfp4.encode_e2m1(torch.from_numpy(values)).numpy(), as_e2m1(values))


def test_encode_e4m3_saturates_and_rounds_to_nearest_even(values: Array) -> None:
    got = nvfp4.encode_e4m3(torch.from_numpy(values)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, as_e4m3(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_inputs_convert_like_their_fp32_values(dtype: torch.dtype) -> None:
    x = torch.arange(65536).to(torch.uint16).view(dtype)
    assert torch.equal(nvfp4.encode_e2m1(x), nvfp4.encode_e2m1(x.float()))
    assert torch.equal(nvfp4.encode_e4m3(x).view(torch.uint8), nvfp4.encode_e4m3(x.float()).view(torch.uint8))


def test_encode_e2m1_at_its_landmarks() -> None:
    x = torch.tensor([0.0, -0.0, -0.1, 0.25, 0.75, 5.0, 5.0000005, 7, torch.inf, -torch.inf, torch.nan, -torch.nan])
    assert nvfp4.encode_e2m1(x).tolist() == [0, 8, 8, 0, 2, 6, 7, 7, 7, 15, 7, 7]


def test_encode_e4m3_at_its_landmarks() -> None:
    x = torch.tensor([2.0**-10, 2.0**-10 * (1 + 2**-23), 448, 464, 465, torch.inf, -1e30, torch.nan, -torch.nan])
    assert nvfp4.encode_e4m3(x).view(torch.uint8).tolist() == [0, 1, 0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x7F]


def test_decode_e2m1_gives_every_value_and_its_sign() -> None:
    got = nvfp4.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    want = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(got.numpy().view(np.uint32), want.view(np.uint32))
    assert got[:8].tolist() == list(nvfp4.E2M1_VALUES)


def test_nibbles_pack_low_first_and_unpack() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32) % 16
    packed = nvfp4.pack_nibbles(codes)
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    assert torch.equal(nvfp4.unpack_nibbles(packed), codes)


# ---- NVIDIA's host conversions ----

HOST_CONVERSIONS = """
#include <cuda_fp4.h>
#include <cuda_fp8.h>
extern "C" void e2m1(const float* x, unsigned char* y, long n) {
    for (long i = 0; i < n; i++) y[i] = __nv_cvt_float_to_fp4(x[i], __NV_E2M1, cudaRoundNearest);
}
extern "C" void e4m3(const float* x, unsigned char* y, long n) {
    for (long i = 0; i < n; i++) y[i] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3);
}
"""
Convert = Callable[[str, Array], Array]


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """NVIDIA's conversions, from the headers of the CUDA toolkit or of the nvidia-cuda-runtime, -crt, -cccl wheels."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="no cuda-pathfinder to look for the CUDA headers with")
    include = pathfinder.find_nvidia_header_directory("cudart")
    if include is None or not (Path(include) / "cuda_fp4.h").is_file():
        pytest.skip("no cuda_fp4.h: install nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl")
    folder = tmp_path_factory.mktemp("nvidia")
    source, library = folder / "host.cpp", folder / "host.so"
    source.write_text(HOST_CONVERSIONS)
    built = subprocess.run(
        ["g++", "-O2", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        pytest.skip(f"the CUDA headers do not compile on their own: {built.stderr.splitlines()[0]}")
    functions = ctypes.CDLL(str(library))

    def convert(name: str, x: Array) -> Array:
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty(x.shape, np.uint8)
        pointer = ctypes.c_void_p
        getattr(functions, name)(pointer(x.ctypes.data), pointer(out.ctypes.data), ctypes.c_long(x.size))
        return out

    return convert


def test_encode_e2m1_is_nvidias(nvidia: Convert, values: Array) -> None:
    np.testing.assert_array_equal(nvfp4.encode_e2m1(torch.from_numpy(values)).numpy(), nvidia("e2m1", values))


def test_encode_e4m3_is_nvidias(nvidia: Convert, values: Array) -> None:
    got = nvfp4.encode_e4m3(torch.from_numpy(values)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, nvidia("e4m3", values))


@pytest.mark.slow
def test_both_conversions_are_nvidias_for_every_fp32(nvidia: Convert) -> None:
    for start in range(0, 1 << 32, 1 << 24):
        x = np.arange(start, start + (1 << 24), dtype=np.uint32).view(np.float32)
        np.testing.assert_array_equal(nvfp4.encode_e2m1(torch.from_numpy(x)).numpy(), nvidia("e2m1", x))
        e4m3 = nvfp4.encode_e4m3(torch.from_numpy(x)).view(torch.uint8).numpy()
        np.testing.assert_array_equal(e4m3, nvidia("e4m3", x))


# ---- global scale ----


def test_global_scale_is_one_division() -> None:
    amax = np.random.default_rng(1).uniform(0.01, 1000, 4096).astype(np.float32)
    for e4m3_max in (448.0, 256.0):
        got = nvfp4.global_scale_enc(torch.from_numpy(amax), e4m3_max=e4m3_max).numpy()
        np.testing.assert_array_equal(got, np.float32(6 * e4m3_max) / amax)


def test_global_scale_is_finite_and_positive_for_any_amax() -> None:
    amax = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1e-38, FLT_MAX])
    enc = nvfp4.global_scale_enc(amax)
    assert enc[:5].tolist() == [1.0, 1.0, 1.0, FLT_MAX, FLT_MAX]
    assert enc[5] == np.float32(2688) / FLT_MAX


def test_amax_leaves_nan_out() -> None:
    assert nvfp4.amax(torch.tensor([1.0, -3.0, torch.nan])) == 3
    assert nvfp4.amax(torch.tensor([1.0, -torch.inf, torch.nan])) == torch.inf
    assert nvfp4.amax(torch.tensor([torch.nan])) == 0
    assert nvfp4.amax(torch.empty(0, 16)) == 0


# ---- the recipe ----


def oracle(
    x: Array, enc: Array, *, fast: bool = False, zero_guard: str = "scale", four_over_six: str | None = None
) -> tuple[Array, Array]:
    """The recipe once more: x fp32 (..., rows, K), enc fp32 broadcasting over (..., rows, K/16); codes and scales."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    v = np.fmax.reduce(np.abs(blocks), axis=-1, initial=np.float32(0))
    sixth = np.float32(1) / np.float32(6)

    def candidate(times: float) -> tuple[Array, Array, Array]:
        s = (enc * (v * sixth) if fast else v * (enc * sixth)) * np.float32(times)
        byte = as_e4m3(s)
        scale = byte.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        o = np.minimum(np.float32(1) / (scale * (np.float32(1) / enc)), FLT_MAX)
        o = np.where(v == 0 if zero_guard == "amax" else scale == 0, np.float32(0), o)
        codes = as_e2m1(blocks * o[..., None])
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        difference = blocks - values * scale[..., None] * (np.float32(1) / enc)[..., None]
        errors = np.abs(difference) if four_over_six == "mae" else difference * difference
        total = np.add.accumulate(errors, axis=-1, dtype=np.float32)[..., -1]  # one after another, in fp32
        return codes, byte, total

    with np.errstate(all="ignore"):
        codes, byte, error = candidate(1.0)
        if four_over_six is not None:
            codes4, byte4, error4 = candidate(1.5)
            codes = np.where((error4 < error)[..., None], codes4, codes)
            byte = np.where(error4 < error, byte4, byte)
    flat = codes.reshape(x.shape)
    return flat[..., 0::2] | flat[..., 1::2] << 4, byte


def assert_recipe(x: torch.Tensor, enc: torch.Tensor, **options: Any) -> None:
    out = nvfp4.quantize(x, enc, **options)
    rows = nvfp4.per_row(enc, x.shape).expand(*x.shape[:-1], x.shape[-1] // 16).numpy()
    codes, scales = oracle(x.float().numpy(), rows, **options)
    np.testing.assert_array_equal(out.scales.view(torch.uint8).numpy(), scales)
    np.testing.assert_array_equal(out.codes.numpy(), codes)
    np.testing.assert_array_equal(out.global_scale_dec.numpy(), np.float32(1) / enc.numpy())


def sample(kind: str, seed: int = 7) -> torch.Tensor:
    """bf16, because short significands hit exact ties, (128, 512)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 512, generator=generator)
    if kind == "swiglu":
        x = torch.nn.functional.silu(x) * torch.randn(128, 512, generator=generator)
    if kind == "wide":
        x = x * torch.randint(-24, 7, (128, 32), generator=generator).float().exp2().repeat_interleave(16, -1)
    if kind == "special":
        for row, fill in enumerate((0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0**-133, 3e38)):
            x[row] = fill
            x[row + 16, ::5] = fill
    return x.bfloat16()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fast": True},
    {"zero_guard": "amax"},
    {"four_over_six": "mae"},
    {"four_over_six": "mse"},
    {"four_over_six": "mae", "zero_guard": "amax", "fast": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "swiglu", "wide", "special"])
def test_quantize_gives_the_bytes_of_a_second_implementation(kind: str, options: dict[str, Any]) -> None:
    x = sample(kind)
    e4m3_max = 256.0 if "four_over_six" in options else 448.0
    own = nvfp4.global_scale_enc(nvfp4.amax(x.nan_to_num(0, 0, 0)), e4m3_max=e4m3_max)
    for enc in (own, torch.tensor(613.7), torch.tensor(1.0)):
        assert_recipe(x, enc, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_takes_fp16_and_fp32(dtype: torch.dtype) -> None:
    x = sample("swiglu").to(dtype) + sample("normal", 8).to(dtype) / 777
    assert_recipe(x, nvfp4.global_scale_enc(nvfp4.amax(x)))


def test_quantize_holds_at_both_ends_of_fp32() -> None:
    x = sample("normal").float()
    for factor in (1e-43, 1e-38, 1e-30, 1e30, 3e37):
        assert_recipe(x * factor, nvfp4.global_scale_enc(nvfp4.amax(x * factor)))


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (4, 32), (4, 1)])
def test_quantize_takes_a_scale_per_expert_and_per_part(shape: tuple[int, ...]) -> None:
    x = sample("normal").reshape(4, 32, 512)
    enc = 100 + 900 * torch.rand(shape, generator=torch.Generator().manual_seed(9))
    assert_recipe(x, enc)
    out = nvfp4.quantize(x, enc)
    assert out.global_scale_dec.shape == shape
    error = (nvfp4.dequantize(out) - x.float()).norm() / x.float().norm()
    assert error < 0.15  # a tenth is what FP4 costs; a scale on the wrong rows costs far more


def test_bf16_data_hits_ties() -> None:
    x = sample("normal")
    out = nvfp4.quantize(x, nvfp4.global_scale_enc(nvfp4.amax(x)))
    scale, dec = out.scales.double().repeat_interleave(16, -1), out.global_scale_dec.double()
    y = (x.double() / (scale * dec)).abs().unsqueeze(-1)
    near = ((y - torch.tensor(E2M1_THRESHOLDS)).abs() < 1e-6).any(-1)
    assert near.sum() > 50  # otherwise the bit-exact tests above would prove little


def test_a_block_scale_is_never_nan() -> None:
    v = torch.tensor([0.0, 1.0, torch.inf])[:, None]
    enc = torch.tensor([0.0, 1.0, torch.inf, torch.nan, -1.0, 1e-45])
    for fast in (False, True):
        scale, _ = nvfp4.block_scale(v, enc, fast=fast)
        assert not scale.float().isnan().any()


def test_a_scaled_block_maximum_stays_near_six() -> None:
    v = torch.logspace(-3, 3, 20001)
    scale, o = nvfp4.block_scale(v, torch.tensor(1.0))
    top = v * o
    normal = scale.float() >= 2.0**-6
    saturated = v * (1 / 6) > 448
    assert top[normal & ~saturated].min() >= 5.6249 and top[normal & ~saturated].max() <= 6.3751
    assert top[~normal & (o > 0)].min() >= 3 and top[~normal & (o > 0)].max() < 9


# ---- dequantize and the container ----


def test_dequantize_multiplies_in_the_stated_order() -> None:
    x = sample("normal").reshape(4, 32, 512)
    enc = torch.tensor([[300.0, 500.0]] * 4)
    out = nvfp4.quantize(x, enc, scale_layout="128x4")
    codes = nvfp4.unpack_nibbles(out.codes).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = out.linear_scales().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = codes * np.repeat(scales, 16, -1)
    dec = np.repeat(np.float32(1) / enc.numpy(), 16, -1)[..., None]
    np.testing.assert_array_equal(nvfp4.dequantize(out).numpy(), exact * dec)
    for dtype in (torch.bfloat16, torch.float16):
        np.testing.assert_array_equal(nvfp4.dequantize(out, dtype, apply_global=False).float().numpy(), exact)


def test_the_product_of_code_and_scale_is_exact_in_short_dtypes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[:, None]
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    product = nvfp4.decode_e2m1(codes) * scales.float()
    assert torch.equal(product.bfloat16().float(), product)
    assert torch.equal(product.half().float(), product)


def test_a_tensor_changes_layout_and_back() -> None:
    out = nvfp4.quantize(sample("normal").reshape(2, 64, 512)[:, :, :80], torch.tensor(600.0))
    tiled = out.with_layout("128x4")
    assert out.shape == tiled.shape == (2, 64, 80)
    assert tiled.scales.shape == (2, 128, 8)
    assert torch.equal(tiled.with_layout("linear").scales.view(torch.uint8), out.scales.view(torch.uint8))
    assert torch.equal(nvfp4.dequantize(tiled), nvfp4.dequantize(out))
    assert out.with_layout("linear") is out


def test_a_tensor_is_a_pytree_and_moves() -> None:
    out = nvfp4.quantize(sample("normal"), torch.tensor(600.0), scale_layout="128x4")
    leaves, spec = pytree.tree_flatten(out)
    assert leaves == [out.codes, out.scales, out.global_scale_dec]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, nvfp4.NVFP4Tensor) and again.scale_layout == "128x4"
    moved = out.to("meta")
    assert moved.device.type == "meta" and moved.shape == out.shape and moved.scale_layout == "128x4"


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x", lambda: nvfp4.quantize(torch.zeros(2, 24), torch.tensor(1.0))),
        ("zero_guard", lambda: nvfp4.quantize(torch.zeros(2, 16), torch.tensor(1.0), zero_guard="no")),
        ("four_over_six", lambda: nvfp4.quantize(torch.zeros(2, 16), torch.tensor(1.0), four_over_six="max")),
        ("scale_layout", lambda: nvfp4.quantize(torch.zeros(2, 16), torch.tensor(1.0), scale_layout="8x4")),
        ("global_scale", lambda: nvfp4.quantize(torch.zeros(2, 16), torch.ones(3))),
        ("global_scale", lambda: nvfp4.quantize(torch.zeros(2, 16), torch.ones(0))),
        ("global_scale", lambda: nvfp4.quantize(torch.zeros(2, 4, 16), torch.ones(4))),
    ],
)
def test_a_wrong_argument_is_named(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument == argument
