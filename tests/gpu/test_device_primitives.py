"""The device primitives on a GPU, over every fp32 bit pattern: bit for bit what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Int32, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, compiler, convert
from megamoe.cute.arith import Target
from megamoe.numerics.nvfp4 import encode_e2m1, encode_e4m3

THREADS = 256
CHUNK = 1 << 26


@cute.jit
def encode_patterns(
    e2m1: cute.Tensor,
    e4m3: cute.Tensor,
    bounded: cute.Tensor,
    first: Int32,
    stream: CUstream,
    target: Constexpr[Target],
) -> None:
    encode_pattern(e2m1, e4m3, bounded, first, target).launch(
        grid=[cute.size(e2m1) // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
    )


@cute.kernel
def encode_pattern(
    e2m1: cute.Tensor, e4m3: cute.Tensor, bounded: cute.Tensor, first: Int32, target: Constexpr[Target]
) -> None:
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    i = cta * THREADS + thread
    x = arith.number(Uint32(first + i))
    e2m1[i] = Uint8(convert.encode_e2m1(x, target))
    e4m3[i] = Uint8(convert.encode_e4m3(x, target))
    bounded[i] = Uint8(convert.code_of_bounded(x, target) & 0xFF)


def spec(target: Target) -> compiler.KernelSpec:
    def arguments() -> tuple[object, ...]:
        size = (cute.sym_int32(),)
        bytes_ = [make_fake_compact_tensor(Uint8, size, stride_order=(0,), assumed_align=16) for _ in range(3)]
        return (*bytes_, Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True), target)

    return compiler.KernelSpec("encode_patterns", target.value, encode_patterns, arguments)


@pytest.fixture(scope="module")
def encode() -> Callable[..., Any]:
    return compiler.load(spec(Target.SM90))


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100], ids=str)
def test_compiles_without_a_gpu(target: Target) -> None:
    assert len(compiler.compile_kernel(spec(target)).cubin) > 0


@pytest.mark.gpu
def test_every_bit_pattern(encode: Callable[..., Any]) -> None:
    """2^32 patterns in 64 chunks: E2M1, E4M3, and the short E2M1 form on the magnitudes that it is for."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compiled for sm_90a")
    out = [torch.empty(CHUNK, dtype=torch.uint8, device="cuda") for _ in range(3)]
    wrong = torch.zeros(3, dtype=torch.int64, device="cuda")
    for first in range(-(1 << 31), 1 << 31, CHUNK):
        encode(*out, first)
        x = torch.arange(first, first + CHUNK, dtype=torch.int32, device="cuda").view(torch.float32)
        narrow = encode_e2m1(x)
        wrong[0] += (out[0] != narrow).sum()
        wrong[1] += (out[1] != encode_e4m3(x).view(torch.uint8)).sum()
        inside = (x >= 0) & (x < convert.BOUND) & ~torch.signbit(x)
        wrong[2] += (inside & (out[2] != narrow)).sum()
    assert wrong.tolist() == [0, 0, 0]
