"""What the mhc_quant kernels are given, on the device and when they are compiled, and what all of them write alike."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import BFloat16, Constexpr, Float32, Int32, Numeric, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import layout
from megamoe.cute.arith import Target
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.recipe import BLOCK

ROWS = 8  # of fn in a group: rows of a left operand of `mma` are two groups
MATRIX = STREAMS * STREAMS
FACTORS = STREAMS + MATRIX  # of a token: post, comb
NORM_DTYPES = {"float32": Float32, "bfloat16": BFloat16}
Words = list[Uint32]


class Inputs(NamedTuple):
    """What is read, all compact, and the numbers of the call."""

    x: cute.Tensor  # (tokens, STREAMS, H) bf16
    f: cute.Tensor  # (tokens, H) bf16
    post: cute.Tensor  # (tokens, STREAMS) fp32
    comb: cute.Tensor  # (tokens, STREAMS, STREAMS) fp32
    fn: cute.Tensor  # (LOGITS, STREAMS * H) fp32
    base: cute.Tensor  # (LOGITS,) fp32
    scale: cute.Tensor  # (3,) fp32
    norm_weight: cute.Tensor  # (H,) fp32 or bf16
    enc: cute.Tensor  # () fp32
    iters: Int32
    hc_eps: Float32
    norm_eps: Float32
    tiled: Int32  # 1: scales in 128x4 tiles


class Outputs(NamedTuple):
    """What is written, all compact."""

    residual: cute.Tensor  # (tokens, STREAMS, H) bf16
    normed: cute.Tensor  # (tokens, H) bf16
    codes: cute.Tensor  # (tokens, H / 2) uint8
    scales: cute.Tensor  # (rows, columns) uint8
    dec: cute.Tensor  # () fp32
    post: cute.Tensor  # (tokens, STREAMS) fp32
    comb: cute.Tensor  # (tokens, STREAMS, STREAMS) fp32


@cute.jit
def zero_padding(out: Constexpr[Outputs], tokens: Int32, tiled: Int32, thread: Int32, threads: Int32) -> None:
    """Writes the scales of the rows that fill up the last 128x4 tiles."""
    rows, tiles = cute.size(out.scales, mode=[0]), cute.size(out.scales, mode=[1]) // layout.TILE_COLS
    if tiled == 1:
        words = cute.recast_ptr(out.scales.iterator, dtype=Uint32)
        view = cute.make_tensor(words, cute.make_layout(rows * tiles))
        for i in cutlass.range(thread, (rows - tokens) * tiles, threads, unroll=1):
            row, tile = tokens + i // tiles, i % tiles
            at = layout.offset_128x4(row, tile * layout.TILE_COLS, tiles * layout.TILE_COLS)
            view[at // layout.TILE_COLS] = Uint32(0)


def rows_of_streams(tensor: cute.Tensor) -> cute.Tensor:
    """A compact fp32 tensor as rows of STREAMS."""
    return cute.make_tensor(
        tensor.iterator, cute.make_layout((cute.size(tensor) // STREAMS, STREAMS), stride=(STREAMS, 1))
    )


def arguments(norm_weight: type[Numeric], target: Target, cut: object) -> tuple[object, ...]:
    """What `launch` is compiled for: any number of tokens and hidden dims."""
    tokens, hidden, wide, half = (
        cute.sym_int32(),
        cute.sym_int32(divisibility=BLOCK),
        cute.sym_int32(divisibility=BLOCK * STREAMS),
        cute.sym_int32(divisibility=BLOCK // 2),
    )

    def compact(dtype: type, *dims: object, align: int = 16) -> object:
        order = tuple(range(len(dims) - 1, -1, -1))
        return make_fake_compact_tensor(dtype, dims, stride_order=order, assumed_align=align)

    def scalar() -> object:
        return make_fake_tensor(Float32, (), (), assumed_align=4)

    streams, vector = compact(BFloat16, tokens, STREAMS, hidden), compact(BFloat16, tokens, hidden)
    per_stream, mixing = compact(Float32, tokens, STREAMS), compact(Float32, tokens, STREAMS, STREAMS)
    read = (
        streams,
        vector,
        per_stream,
        mixing,
        compact(Float32, LOGITS, wide),
        compact(Float32, LOGITS, align=4),
        compact(Float32, 3, align=4),
        compact(norm_weight, hidden),
        scalar(),
    )
    scales = compact(Uint8, cute.sym_int32(), cute.sym_int32(), align=4)
    written = (streams, vector, compact(Uint8, tokens, half, align=8), scales, scalar(), per_stream, mixing)
    numbers = (Int32(1), Float32(0.0), Float32(0.0), Int32(0), Int32(1))
    return (*read, *written, *numbers, make_fake_stream(use_tvm_ffi_env_stream=True), target, cut)
