"""Operands of the tensor cores, decoded on the CPU by the DSL's host JIT, against the numerics."""

from __future__ import annotations

from typing import Any

import cutlass
import pytest
import torch
from cutlass import Constexpr, Int32, Uint32, cute
from cutlass.cute.runtime import make_ptr

from megamoe.cute import fragments
from megamoe.cute.arith import Target
from megamoe.cute.decode_limits import (
    BARRIERS,
    COLUMNS,
    MAX_EXPERTS,
    MAX_PASSES,
    MAX_ROWS,
    MAX_STAGES,
    ROWS,
    SHARED_BYTES,
    SLAB_BYTES,
    SLICES,
    refuses,
    ring_stages,
    takes,
)
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize

HOST = Target.HOST


@cute.jit  # type: ignore[untyped-decorator]
def decode_units(codes: cute.Pointer, scales: cute.Pointer, out: cute.Pointer, lanes: Int32) -> None:
    """Each of `lanes` lanes of a unit of 16 rows x 128 k: 4 k32 groups, 8 registers each."""
    words = cute.make_tensor(codes, cute.make_layout((2, lanes, 4), stride=(lanes * 4, 4, 1)))
    scale_words = cute.make_tensor(scales, cute.make_layout((lanes // 4, 4), stride=(4, 1)))
    registers = cute.make_tensor(out, cute.make_layout((lanes, 4, 8), stride=(32, 8, 1)))
    for lane in range(lanes):
        for q in range(4):
            x, y = (Uint32(words[q // 2, lane, q % 2 * 2 + i]) for i in range(2))  # the DSL reads them as Int32
            a = fragments.decode_pair(x, y, Uint32(scale_words[lane // 4, q]), HOST)
            for i in cutlass.range_constexpr(8):
                registers[lane, q, i] = a[i]


@cute.jit  # type: ignore[untyped-decorator]
def arrange(first: cute.Pointer, second: cute.Pointer, out: cute.Pointer, scales: Constexpr) -> None:
    """32 values of a token as operands: bf16, or NVFP4 with two scale bytes."""
    count = 8 if scales is None else 2
    a, b = (cute.make_tensor(p, cute.make_layout(count)) for p in (first, second))
    operands = cute.make_tensor(out, cute.make_layout((4, 4), stride=(4, 1)))
    one, other = ([Uint32(block[i]) for i in range(count)] for block in (a, b))
    if cutlass.const_expr(scales is None):
        words = one + other
    else:
        words = fragments.activation_pairs(one, Uint32(scales[0]), HOST)
        words = words + fragments.activation_pairs(other, Uint32(scales[1]), HOST)
    ordered = fragments.operand_order(words)
    for t in cutlass.range_constexpr(4):
        for i in cutlass.range_constexpr(4):
            operands[t, i] = ordered[t][i]


def pointer(tensor: torch.Tensor) -> Any:
    return make_ptr(Uint32, tensor.data_ptr(), cute.AddressSpace.generic, assumed_align=16)


def pairs(words: torch.Tensor) -> torch.Tensor:
    """int32 (...) as bf16 (..., 2)."""
    return words.contiguous().view(torch.bfloat16).view(*words.shape, 2).float()


def test_units_decode_to_their_values() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (64, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 0x7F, (64, 8), generator=generator, dtype=torch.uint8)
    plain = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))
    hopper = plain.with_layout("hopper")
    values = dequantize(plain).view(4, 16, 4, 2, 16)  # (tile, row, k32, step, k)
    for tile in range(4):
        out = torch.empty(32, 4, 8, dtype=torch.int32)
        unit_codes = hopper.codes.flatten()[tile * 1024 :][:1024].clone()
        unit_scales = hopper.scales.view(torch.uint8).flatten()[tile * 128 :][:128].clone()
        decode_units(pointer(unit_codes), pointer(unit_scales), pointer(out), Int32(32))
        got = pairs(out).view(8, 4, 4, 2, 2, 2, 2) * 128  # (g, t, k32, step, k half, row half, pair)
        # operand a[i] of lane (g, t): row g + 8 * (i % 2), k 2t + 8 * (i // 2) and the next
        expected = values[tile].view(2, 8, 4, 2, 2, 4, 2).permute(1, 5, 2, 3, 4, 0, 6)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_activations_meet_the_weights(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    out = torch.empty(4, 4, dtype=torch.int32)
    if kind == "bf16":
        token = torch.randn(32, generator=generator).bfloat16()
        values, unit = token.float(), 1.0
        first, second = token[:16].clone(), token[16:].clone()
        arrange(pointer(first), pointer(second), pointer(out), None)
    else:
        codes = torch.randint(0, 256, (1, 16), generator=generator, dtype=torch.uint8)
        scales = torch.tensor([[0x07, 0x7E]], dtype=torch.uint8)  # a subnormal and the largest
        quantized = NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0))
        values, unit = dequantize(quantized)[0], 128.0
        first, second = codes[0, :8].clone(), codes[0, 8:].clone()
        arrange(pointer(first), pointer(second), pointer(out), (0x07, 0x7E))
    steps = values.view(2, 2, 4, 2)  # (step, k 0..7 or 8..15, t, pair)
    assert torch.equal(pairs(out).view(4, 2, 2, 2) * unit, steps.permute(2, 0, 1, 3))


def test_the_main_loop_fits_its_memory() -> None:
    assert BARRIERS % SLICES == 0
    assert MAX_STAGES <= BARRIERS
    for k, tiles in ((4096, 1), (4096, 2), (2048, 2), (7168, 1), (3072, 2)):
        stages = ring_stages(k, tiles)
        assert SLICES <= stages <= MAX_STAGES
        assert ROWS + tiles * COLUMNS * k * 2 + stages * SLAB_BYTES <= SHARED_BYTES
    passes = MAX_ROWS // COLUMNS + MAX_EXPERTS  # an expert's last pass may be a short one
    assert passes // 10 + 2 <= MAX_PASSES


def test_what_the_main_loop_leaves_to_others() -> None:
    assert not refuses({"experts": 256, "rows": 4096, "n": 4096, "k": 4096})
    assert "no room" in refuses({"k": 16384})[0]
    assert "609" in refuses({"experts": 609})[0]
    assert takes(2 * 256 - 1, 256, 4096, 4096)
    assert not takes(2 * 256, 256, 4096, 4096)
    assert takes(64, 1, 4096, 4096)
    assert not takes(65, 1, 4096, 4096)
    assert not takes(1, 1, 4096, 16384)
