"""The device primitives, compiled for the CPU by CuTe DSL's host JIT, against independent oracles."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import cutlass
import ml_dtypes
import numpy as np
import pytest
import torch
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Uint8, Uint32, cute
from cutlass.cute.runtime import make_ptr

from megamoe.cute import arith, convert, layout, recipe
from megamoe.cute.arith import Target
from megamoe.numerics import nvfp4
from megamoe.numerics.layout import offset_128x4, padded_shape
from megamoe_stages.quantize.cases import VALUES

HOST = Target.HOST
CHUNK = 1 << 26
NAN_BITS = 0x7F800001
KINDS = {"e2m1": 0, "e4m3": 1}
DTYPES = {torch.bfloat16: BFloat16, torch.float16: Float16, torch.float32: Float32}


# --- host programs ----------------------------------------------------------------------------------------------------


@cute.jit  # type: ignore[untyped-decorator]
def encode_patterns(out: cute.Pointer, start: Uint32, count: Int32, kind: Constexpr) -> None:
    codes = cute.make_tensor(out, cute.make_layout(count))
    for i in range(count):
        x = arith.number(start + Uint32(i))
        if cutlass.const_expr(kind == 0):
            codes[i] = Uint8(convert.encode_e2m1(x, HOST))
        elif cutlass.const_expr(kind == 1):
            codes[i] = Uint8(convert.encode_e4m3(x, HOST))
        else:
            codes[i] = Uint8(convert.code_of_bounded(x, HOST) & 0xFF)


@cute.jit  # type: ignore[untyped-decorator]
def decode_codes(e2m1: cute.Pointer, e4m3: cute.Pointer, bf16: cute.Pointer, codes: Uint32) -> None:
    narrow, wide = cute.make_tensor(e2m1, cute.make_layout(16)), cute.make_tensor(e4m3, cute.make_layout(256))
    words = cute.make_tensor(bf16, cute.make_layout((256, 8), stride=(8, 1)))
    for code in range(16):
        narrow[code] = convert.decode_e2m1(Uint32(code))
    for byte in range(256):
        wide[byte] = convert.decode_e4m3(Uint32(byte), HOST)
        factor = convert.bf16_factor(Uint32(byte), HOST)
        low = convert.decode_e2m1_to_bf16(codes, factor, HOST)  # 0 to 7
        high = convert.decode_e2m1_to_bf16(~codes, factor, HOST)  # 15 to 8
        for j in cutlass.range_constexpr(4):
            words[byte, j] = low[j]
            words[byte, j + 4] = high[j]


@cute.jit  # type: ignore[untyped-decorator]
def encode_blocks(
    x: cute.Pointer, enc: Float32, count: Int32, codes: cute.Pointer, scales: cute.Pointer, kinds: Constexpr
) -> None:
    dtype, repair = kinds
    n = recipe.words_of_block(dtype)
    words = cute.make_tensor(x, cute.make_layout((count, n), stride=(n, 1)))
    out = cute.make_tensor(codes, cute.make_layout((count, 2), stride=(2, 1)))
    bytes_ = cute.make_tensor(scales, cute.make_layout((count, 2), stride=(2, 1)))
    quick, exact = recipe.regular_global_scale(enc, HOST), recipe.global_scale(enc, HOST)
    for i in range(count):
        block = [words[i, j] for j in range(n)]
        encoded = recipe.encode_block(block, dtype, quick, HOST)
        bytes_[i, 1] = Uint8(arith.select(encoded.regular, Uint32(1), Uint32(0)))
        if cutlass.const_expr(repair):
            encoded = recipe.encode_any_block(block, dtype, exact, HOST)
        out[i, 0], out[i, 1], bytes_[i, 0] = encoded.low, encoded.high, Uint8(encoded.scale)


@cute.jit  # type: ignore[untyped-decorator]
def place_scales(out: cute.Pointer, rows: Int32, cols: Int32, inverse: cute.Pointer) -> None:
    offsets = cute.make_tensor(out, cute.make_layout((rows, cols), stride=(cols, 1)))
    places = cute.make_tensor(inverse, cute.make_layout((layout.TILE, 2), stride=(2, 1)))
    for row in range(rows):
        for col in range(cols):
            offsets[row, col] = layout.offset_128x4(row, col, cols)
    for offset in range(layout.TILE):
        row, col = layout.place_in_tile(Int32(offset))
        places[offset, 0], places[offset, 1] = row, col


def pointer(tensor: torch.Tensor, dtype: Any) -> Any:
    return make_ptr(dtype, tensor.data_ptr(), cute.AddressSpace.generic, assumed_align=16)


@functools.cache
def compiled(program: Any, *arguments: Any) -> Any:
    """A host program, compiled once for these compile-time values."""
    word, byte = make_ptr(Uint32, 16, cute.AddressSpace.generic), make_ptr(Uint8, 16, cute.AddressSpace.generic)
    number = make_ptr(Float32, 16, cute.AddressSpace.generic)
    given = {
        encode_patterns: (byte, Uint32(0), Int32(0)),
        decode_codes: (number, number, word, Uint32(0)),
        encode_blocks: (word, Float32(0), Int32(0), word, byte),
    }[program]
    return cute.compile(program, *given, *arguments)


def codes_of(kind: int, start: int, count: int) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.uint8)
    compiled(encode_patterns, kind)(pointer(out, Uint8), Uint32(start), Int32(count))
    return out


# --- the oracle: where the code changes, from exact arithmetic --------------------------------------------------------


def pattern(value: Fraction) -> int:
    """The bit pattern of a value that fp32 holds exactly."""
    single = np.float32(float(value))
    assert Fraction(float(single)) == value
    return int(single.view(np.uint32))


def first_patterns(values: list[Fraction]) -> list[int]:
    """The first fp32 bit pattern that rounds to each code after 0: the midpoint below it, or the one after at a tie."""
    midpoints = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    return [pattern(m) + (code % 2 == 0) for code, m in enumerate(midpoints)]


@functools.cache
def steps(kind: str) -> list[tuple[int, int]]:
    """(first pattern, code) of every run of magnitudes with one code."""
    if kind == "e2m1":
        values, nan = [Fraction(v) for v in nvfp4.E2M1_VALUES], 7
    else:
        table = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        values, nan = [Fraction(float(v)) for v in table], 0x7F
    return [(0, 0), *((at, code + 1) for code, at in enumerate(first_patterns(values))), (NAN_BITS, nan)]


def expected_codes(kind: str, start: int, count: int) -> torch.Tensor:
    """Codes of the patterns from `start` on, which lie on one side of the sign bit."""
    sign = (8 if kind == "e2m1" else 0x80) if start >> 31 else 0
    low = start & 0x7FFFFFFF
    out = torch.empty(count, dtype=torch.uint8)
    ends = [at for at, _ in steps(kind)[1:]] + [1 << 31]
    for (at, code), end in zip(steps(kind), ends, strict=True):
        begin, stop = max(at, low) - low, min(end, low + count) - low
        if begin < stop:
            out[begin:stop] = code | (0 if at == NAN_BITS else sign)
    return out


def sample() -> Iterator[tuple[int, int]]:
    """(start, count) of runs of patterns: both ends of every exponent, round every threshold, and the special ones."""
    edges = {at for kind in KINDS for at, _ in steps(kind)} | {e << 23 for e in range(256)} | {0x7F800000, 0x7FC00000}
    for edge in sorted(edges):
        for sign in (0, 1 << 31):
            start = max(edge - 64, 0)
            yield sign | start, min(128, (1 << 31) - start)
    for exponent in range(256):
        yield exponent << 23 | 0x2AAAA0, 256


@pytest.mark.parametrize("kind", KINDS)
def test_encode_gives_the_oracles_code_round_every_edge(kind: str) -> None:
    for start, count in sample():
        assert torch.equal(codes_of(KINDS[kind], start, count), expected_codes(kind, start, count)), hex(start)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_encode_gives_the_oracles_code_for_every_fp32_pattern(kind: str) -> None:
    for start in range(0, 1 << 32, CHUNK):
        assert torch.equal(codes_of(KINDS[kind], start, CHUNK), expected_codes(kind, start, CHUNK)), hex(start)


def test_the_oracle_agrees_with_the_definition() -> None:
    for start, count in sample():
        x = (torch.arange(count) + start).to(torch.uint32).view(torch.float32)
        assert torch.equal(expected_codes("e2m1", start, count), nvfp4.encode_e2m1(x))
        assert torch.equal(expected_codes("e4m3", start, count), nvfp4.encode_e4m3(x).view(torch.uint8))


def bounded_codes(start: int, count: int) -> torch.Tensor:
    """What the short encoding must give below BOUND; above the magic number's zero byte lies the code alone."""
    return expected_codes("e2m1", start, count)


def test_short_encode_gives_the_same_below_its_bound() -> None:
    bound = pattern(Fraction(convert.BOUND))
    for start, count in sample():
        if start + count <= bound:
            assert torch.equal(codes_of(2, start, count), bounded_codes(start, count)), hex(start)
    assert torch.equal(codes_of(2, bound - 4096, 4096), bounded_codes(bound - 4096, 4096))
    assert codes_of(2, pattern(Fraction(10)), 1).item() > 7  # the bound is needed: beyond it there are no codes


@pytest.mark.slow
def test_short_encode_gives_the_same_for_every_pattern_below_its_bound() -> None:
    bound = pattern(Fraction(convert.BOUND))
    for start in range(0, bound, CHUNK):
        count = min(CHUNK, bound - start)
        assert torch.equal(codes_of(2, start, count), bounded_codes(start, count)), hex(start)


def test_decode_gives_every_value() -> None:
    narrow, wide = torch.empty(16), torch.empty(256)
    words = torch.empty(256, 8, dtype=torch.int32)
    pointers = pointer(narrow, Float32), pointer(wide, Float32), pointer(words, Uint32)
    compiled(decode_codes)(*pointers, Uint32(0x76543210))
    assert narrow.tolist() == [*nvfp4.E2M1_VALUES, *(-v for v in nvfp4.E2M1_VALUES)]
    assert narrow[8].signbit() and not narrow[0].signbit()
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(wide.nan_to_num(nan=1e9), e4m3.nan_to_num(nan=1e9))
    values = words.view(torch.bfloat16).float()  # (scales, codes 0 to 7 and 15 to 8)
    codes = torch.cat([torch.arange(8), torch.arange(15, 7, -1)])
    scales = e4m3[:127, None]
    assert torch.equal(values[:127] * convert.DECODED_UNIT, scales * nvfp4.decode_e2m1(codes))


# --- blocks -----------------------------------------------------------------------------------------------------------


def run_blocks(x: torch.Tensor, enc: float, *, repair: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (blocks, 8), scales (blocks) and whether a block is regular (blocks), from the compiled recipe."""
    count = x.numel() // 16
    codes, scales = torch.empty(count, 8, dtype=torch.uint8), torch.empty(count, 2, dtype=torch.uint8)
    program = compiled(encode_blocks, (DTYPES[x.dtype], repair))
    program(pointer(x, Uint32), Float32(enc), Int32(count), pointer(codes, Uint32), pointer(scales, Uint8))
    return codes, scales[:, 0], scales[:, 1].bool()


def reference(x: torch.Tensor, enc: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = nvfp4.quantize(x.reshape(-1, 16), torch.tensor(enc))
    return out.codes, out.scales.view(torch.uint8).flatten()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_give_the_bytes_of_the_definition(dtype: torch.dtype, values: str) -> None:
    generator = torch.Generator().manual_seed(7)
    x = VALUES[values](torch.randn(64, 256, generator=generator), generator).to(dtype)
    for enc in (448.0, 611.7, 1.0, 3e-3, 1e6):
        codes, scales = reference(x, enc)
        whole, bytes_, _ = run_blocks(x, enc, repair=True)
        assert torch.equal(whole, codes) and torch.equal(bytes_, scales)
        short, bytes_, regular = run_blocks(x, enc, repair=False)
        assert torch.equal(short[regular], codes[regular]) and torch.equal(bytes_[regular], scales[regular])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordinary_blocks_are_regular(dtype: torch.dtype) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    enc = nvfp4.global_scale_enc(nvfp4.amax(x)).item()
    assert run_blocks(x, enc, repair=False)[2].all()
    assert run_blocks(torch.zeros(4, 16, dtype=dtype), enc, repair=False)[2].all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_infinity_is_not_regular(bad: float) -> None:
    for dtype in DTYPES:
        for at in range(16):
            x = torch.ones(2, 16, dtype=dtype)
            x[1, at] = bad
            assert run_blocks(x, 400.0, repair=False)[2].tolist() == [True, False]


def test_a_saturated_block_is_not_regular() -> None:
    x = torch.tensor([[1.0] * 16, [100.0] * 16], dtype=torch.bfloat16)
    assert run_blocks(x, 2688.0, repair=False)[2].tolist() == [True, False]


@pytest.mark.parametrize(
    "enc", [0.0, -1.0, torch.inf, torch.nan, nvfp4.FLT_MAX, 1e-38, 1e-44, 2.0**117, 2.0**118, 2.0**-117, 2.0**-118]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_global_scale_gives_the_bytes_of_the_definition(dtype: torch.dtype, enc: float) -> None:
    generator = torch.Generator().manual_seed(11)
    wide = torch.randn(512, 16, generator=generator) * torch.randint(-120, 120, (512, 1), generator=generator).exp2()
    x = torch.cat([wide, torch.randn(64, 16, generator=generator) / enc if enc else wide, wide * 0]).to(dtype)
    codes, scales = reference(x, enc)
    whole, bytes_, _ = run_blocks(x, enc, repair=True)
    assert torch.equal(whole, codes) and torch.equal(bytes_, scales)
    short, bytes_, regular = run_blocks(x, enc, repair=False)
    assert torch.equal(short[regular], codes[regular]) and torch.equal(bytes_[regular], scales[regular])
    assert not regular.any() or 2.0**-117 <= enc <= 2.0**117


@pytest.mark.slow
def test_every_bf16_value_at_many_scales_gives_the_bytes_of_the_definition() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for seed in range(64):
        generator = torch.Generator().manual_seed(seed)
        shuffled = x[torch.randperm(x.numel(), generator=generator)]
        ordered = x[(x.float().abs().nan_to_num(nan=0).log2() + torch.rand(x.shape, generator=generator)).argsort()]
        enc = float(2 ** (20 * torch.rand((), generator=generator)))
        for blocks in (shuffled, ordered.contiguous()):
            codes, scales = reference(blocks, enc)
            whole, bytes_, _ = run_blocks(blocks, enc, repair=True)
            assert torch.equal(whole, codes) and torch.equal(bytes_, scales)
            short, bytes_, regular = run_blocks(blocks, enc, repair=False)
            assert torch.equal(short[regular], codes[regular]) and torch.equal(bytes_[regular], scales[regular])


def test_scale_offsets_are_those_of_the_layout() -> None:
    rows, cols = 260, 7
    out, places = torch.empty(rows, cols, dtype=torch.int32), torch.empty(512, 2, dtype=torch.int32)
    arguments: tuple[Any, ...] = (pointer(out, Int32), Int32(rows), Int32(cols), pointer(places, Int32))
    cute.compile(place_scales, *arguments)(*arguments)
    row, col = torch.arange(rows)[:, None], torch.arange(cols)
    assert torch.equal(out.long(), offset_128x4(row, col, cols))
    assert out.max() < np.prod(padded_shape(rows, cols))
    assert offset_128x4(places[:, 0].long(), places[:, 1].long(), 4).tolist() == list(range(512))


def test_the_package_alone_loads_neither_torch_nor_cutlass() -> None:
    code = "import megamoe.cute, sys; assert not {'torch', 'cutlass'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
