"""The hopper layout against a decoder written from its description, bit by bit; and the way back."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe.contracts import check_nvfp4
from megamoe.errors import ArgumentError
from megamoe.numerics import fragments
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from tests.stages import oracle

SHAPES = [(64, 128), (3, 64, 128), (2, 128, 384), (1, 48, 64), (5, 72, 144), (131, 48), (2, 3, 16, 16)]
# T(r) of a lane's operand registers a0..a3 of two steps, and the words that hold them
ROTATIONS = (0, 4, 10, 2, 6, 12, 8, 14)
X_OF_Z = 0xC180C180


def random(shape: tuple[int, ...], low: int = 0x01, high: int = 0x7F) -> NVFP4Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    *batch, k = shape
    codes = torch.randint(0, 256, (*batch, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(low, high, (*batch, k // 16), generator=generator, dtype=torch.uint8)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))


def bit(word: int, position: int) -> int:
    return word >> position % 32 & 1


def element(words: tuple[int, int], register: int, half: int) -> int:
    """The E2M1 code of half a register."""
    x, y = words
    z = x & X_OF_Z | y & ~X_OF_Z
    word = x if register < 3 else y if register < 6 else z
    first = ROTATIONS[register] + 16 * half
    return bit(word, first) | bit(word, first + 1) << 1 | bit(word, first + 2) << 2 | bit(word, first + 9) << 3


def decoded(codes: np.ndarray, scales: np.ndarray, rows: int, k: int) -> np.ndarray:
    """E2M1 * E4M3 of one matrix in hopper order, padded rows and k: walks the lanes' operand registers."""
    out = np.full((rows, k), np.nan)
    code_words, scale_words = codes.view("<u4").reshape(-1, 1024), scales.view("<u4").reshape(-1, 128)
    for slab in range(len(code_words)):
        group, unit = divmod(slab, k // 128)
        for tile, q, lane in np.ndindex(4, 4, 32):
            g, t = divmod(lane, 4)
            at = ((tile * 2 + q // 2) * 32 + lane) * 4 + q % 2 * 2
            words = int(code_words[slab, at]), int(code_words[slab, at + 1])
            stored = int(scale_words[slab, (tile * 8 + g) * 4 + q])
            for register, half in np.ndindex(8, 2):
                lower = register % 2  # row g + 8
                turned = (stored << 8 | stored >> 24) & 0xFFFFFFFF if lower else stored
                byte = turned >> (4 + 16 * (register // 4)) & 0xFF  # of the step's block
                scale = np.ldexp(1 + byte % 8 / 8, byte // 8 - 22) if byte else 0.0
                where = unit * 128 + q * 32 + register // 4 * 16 + register % 4 // 2 * 8 + 2 * t + half
                out[group * 64 + tile * 16 + g + 8 * lower, where] = oracle.E2M1[element(words, register, half)] * scale
    return out


@pytest.mark.parametrize("shape", [(64, 256), (72, 144), (1, 16)])
def test_lanes_find_their_operands(shape: tuple[int, int]) -> None:
    plain = random(shape)
    hopper = plain.with_layout("hopper")
    rows, k = fragments.padded_shape(*shape)
    got = decoded(hopper.codes.numpy().ravel(), hopper.scales.view(torch.uint8).numpy().ravel(), rows, k)
    assert np.array_equal(got[: shape[0], : shape[1]], oracle.decode(plain))
    assert not got[shape[0] :].any()
    assert not got[:, shape[1] :].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_the_way_back_is_bit_for_bit(shape: tuple[int, ...], layout: str) -> None:
    plain = random(shape).with_layout(layout)
    hopper = plain.with_layout("hopper")
    assert hopper.shape == plain.shape
    assert hopper.scale_layout == fragments.layout_name(*shape[-2:])
    assert hopper.with_layout("hopper") is hopper
    back = hopper.with_layout(layout)
    assert torch.equal(back.codes, plain.codes)
    assert torch.equal(back.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    assert torch.equal(dequantize(hopper), dequantize(plain))


def test_every_scale_below_nan_comes_back() -> None:
    scales = torch.arange(0x7F, dtype=torch.uint8).repeat(2)[:128].view(8, 16).view(torch.float8_e4m3fn)
    plain = NVFP4Tensor(torch.zeros(8, 128, dtype=torch.uint8), scales, torch.tensor(1.0))
    back = plain.with_layout("hopper").with_layout("linear")
    assert torch.equal(back.scales.view(torch.uint8), scales.view(torch.uint8))


def test_a_scale_code_is_the_middle_of_a_bf16() -> None:
    """S0E5M3 codes as bits 4 to 11 of bf16(scale * 2^119), which all start with 0x7."""
    byte = np.arange(1, 0x7F, dtype=np.uint8)
    scaled = byte.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**119
    bits = scaled.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(bits & 0xF00F, np.full(126, 0x7000))
    scales = torch.from_numpy(byte).repeat_interleave(8).view(1, -1)[:, :1008]  # one row, 126 blocks of 8 equal scales
    codes = torch.zeros(1, 1008 * 8, dtype=torch.uint8)
    _, stored = fragments.to_fragments(codes, scales.contiguous().view(torch.float8_e4m3fn))
    words = stored.view(torch.uint8).numpy().ravel().view("<u4").reshape(-1, 128)  # (unit, 4 tiles x 8 rows x 4)
    assert np.array_equal(words[:, 0] >> 4 & 0xFF, bits >> 4 & 0xFF)


def test_negative_zero_codes_under_a_zero_scale_are_kept() -> None:
    codes = torch.tensor([[0x88, 0x08, 0x80, 0] * 2], dtype=torch.uint8)
    plain = NVFP4Tensor(codes, torch.zeros(1, 1).to(torch.float8_e4m3fn), torch.tensor(1.0))
    assert torch.equal(plain.with_layout("hopper").with_layout("linear").codes, codes)


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_nan_and_negative_scales_are_refused(byte: int) -> None:
    plain = random((2, 16, 32))
    plain.scales.view(torch.uint8)[1, 3, 1] = byte
    with pytest.raises(ArgumentError, match="negative or NaN"):
        plain.with_layout("hopper")


def test_a_code_under_a_zero_scale_is_refused() -> None:
    plain = random((2, 16, 32))
    plain.scales.view(torch.uint8)[1, 3, 1] = 0
    plain.codes[1, 3, 8:] = 0x88
    plain.with_layout("hopper")
    plain.codes[1, 3, 9] = 0x18
    with pytest.raises(ArgumentError, match="zero block scale"):
        plain.with_layout("hopper")


def test_a_vector_has_no_hopper_layout() -> None:
    plain = NVFP4Tensor(torch.zeros(8, dtype=torch.uint8), torch.ones(1).to(torch.float8_e4m3fn), torch.tensor(1.0))
    with pytest.raises(ArgumentError, match="hopper"):
        plain.with_layout("hopper")


def test_checks_know_the_layout() -> None:
    hopper = random((2, 48, 64)).with_layout("hopper")
    check_nvfp4("w", hopper, ("experts", 48, 64), hopper=True)
    with pytest.raises(ArgumentError, match="scale_layout"):
        check_nvfp4("w", hopper, ("experts", "N", "K"))
    with pytest.raises(ArgumentError, match="shape"):
        check_nvfp4("w", hopper, ("experts", 48, 80), hopper=True)
    renamed = NVFP4Tensor(hopper.codes, hopper.scales, hopper.global_scale_dec, "hopper:40x64")
    check_nvfp4("w", renamed, ("experts", "N", "K"), hopper=True)  # 40 rows are padded to 64 as well
    for name in ("hopper", "hopper:48x32", "hopper:64x128"):
        wrong = NVFP4Tensor(hopper.codes, hopper.scales, hopper.global_scale_dec, name)
        if name == "hopper":  # is a tensor without padding
            check_nvfp4("w", wrong, ("experts", 64, 128), hopper=True)
        elif name == "hopper:64x128":
            with pytest.raises(ArgumentError, match="layout"):
                check_nvfp4("w", wrong, ("experts", "N", "K"), hopper=True)
    with pytest.raises(ArgumentError, match="codes"):
        cut = NVFP4Tensor(hopper.codes[:, :32], hopper.scales, hopper.global_scale_dec, hopper.scale_layout)
        check_nvfp4("w", cut, ("experts", "N", "K"), hopper=True)


def test_prepared_weights_go_through_a_file(tmp_path: Path) -> None:
    hopper = random((2, 48, 64)).with_layout("hopper")
    save_file({"codes": hopper.codes, "scales": hopper.scales}, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    again = NVFP4Tensor(loaded["codes"], loaded["scales"], hopper.global_scale_dec, hopper.scale_layout)
    assert torch.equal(dequantize(again), dequantize(hopper))


def test_scales_alone_are_the_same() -> None:
    plain = random((2, 64, 256))
    assert torch.equal(
        fragments.scales_to_fragments(plain.scales).view(torch.uint8),
        plain.with_layout("hopper").scales.view(torch.uint8),
    )
