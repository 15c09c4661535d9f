"""Grouped GEMM, SwiGLU and NVFP4 for many rows an expert, on sm_90a: `cute.weight_gemm` with a quantising epilogue.

Weight rows are interleaved (8 gate, the 8 up), so a lane holds gate and up of the same outputs, and a warp's 32 weight
rows are one block of 16 outputs. A warp turns its sums to lanes that own a token each by 2560 bytes of shared memory.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, asm, convert, gmem, recipe, smem, weight_gemm
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.layout import offset_128x4, offset_linear
from megamoe.cute.recipe import BLOCK, Block, GlobalScale
from megamoe.cute.warp import WARP, from_lane
from megamoe.cute.weight_pieces import CONSUMER_WARPS, THREADS, Operands, Piece, Shape, warp_of_consumers
from megamoe_stages.grouped_gemm.prefill_kernel import decoded_factor
from megamoe_stages.swiglu_quant.kernel import maximum_or_nan, minimum_or_nan, swiglu

_TILES = 2  # of a warp: 16 gates and the 16 ups are a block
_STRIDE = BLOCK + 4  # floats from token to token: then neither writing nor reading meets a bank twice
_STAGING = WARP * _STRIDE * 4  # bytes of a warp
SPARSE, NARROW, WIDE = EXPERTS = (
    Shape((8, 16, 24, 32, 40), 6, CONSUMER_WARPS * _STAGING),
    Shape((32, 40, 48, 56, 64), 5, CONSUMER_WARPS * _STAGING, guarded=True),
    Shape((96, 104, 128), 4, CONSUMER_WARPS * _STAGING),
)


@cute.jit
def launch(
    codes: cute.Tensor,
    scales: cute.Tensor,
    packed: cute.Tensor,
    offsets: cute.Tensor,
    alpha: cute.Tensor,  # (experts * parts,) fp32, or one for all
    dec: cute.Tensor,  # () fp32 of NVFP4 activations; not read for others
    row_weight: cute.Tensor,  # (rows,) fp32; not read unless `weighted`
    enc: cute.Tensor,  # () fp32
    out_codes: cute.Tensor,  # (rows, I / 2) uint8
    out_scales: cute.Tensor,  # (rows, I / 16) uint8, or padded to 128x4 tiles
    out_dec: cute.Tensor,  # () fp32, gets 1 / enc
    parts: Int32,  # alphas of an expert: 2 gate and up, 1 one for both, 0 one for all
    limit: Float32,
    ctas: Int32,
    stream: CUstream,
    quantized: Constexpr[bool],
    weighted: Constexpr[bool],
    tiled: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """Launches one CTA for each SM."""
    inputs = (codes, scales, packed, offsets, alpha, dec, row_weight, enc)
    outputs = (out_codes, out_scales, out_dec)
    kernel(*inputs, *outputs, parts, limit, quantized, weighted, tiled, shape).launch(
        grid=[ctas, 1, 1],
        block=[THREADS, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        use_pdl=True,
        stream=stream,
    )


@cute.kernel
def kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    packed: cute.Tensor,
    offsets: cute.Tensor,
    alpha: cute.Tensor,
    dec: cute.Tensor,
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    out_dec: cute.Tensor,
    parts: Int32,
    limit: Float32,
    quantized: Constexpr[bool],
    weighted: Constexpr[bool],
    tiled: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    if cta + thread == 0:
        out_dec[()] = recipe.global_scale(enc[()], Target.SM90).dec

    def fetch(piece: Piece) -> list[Float32]:
        first = piece.expert * parts  # multiplied only when the sums are there: the loads are not waited for before
        alphas = [gmem.ask(alpha, first + i * (parts // 2)) for i in range(2)]  # of gate and up
        return [*alphas, gmem.ask(dec, Int32(0))] if quantized else alphas

    def finish(acc: cute.Tensor, piece: Piece, width: int, staging: Int32, asked: list[Float32]) -> None:
        factors = [decoded_factor(alpha, asked[2] if quantized else None) for alpha in asked[:2]]
        given = (row_weight, enc, limit, factors, weighted)
        encode(acc, piece, staging, *given, out_codes, out_scales, tiled, width)

    unused = (alpha, offsets, Int32(1), Int32(0), Int32(0))  # no piece is shared, and experts may be many
    weight_gemm.work(Operands(codes, scales, packed, offsets, *unused), fetch, finish, shape)


@cute.jit
def encode(
    acc: cute.Tensor,
    piece: Constexpr[Piece],
    staging: Int32,
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    limit: Float32,
    factors: Constexpr[list[Float32]],
    weighted: Constexpr[bool],
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    tiled: Constexpr[bool],
    width: Constexpr[int],
) -> None:
    """Writes a piece, 32 tokens at a time."""
    target = Target.SM90
    lane = cute.arch.lane_idx()
    warp = warp_of_consumers()
    area = staging + warp * _STAGING
    block = piece.row_piece * CONSUMER_WARPS + warp
    blocks = cute.size(out_codes, mode=[1]) // (BLOCK // 2)
    to = area + (lane % 4 * 2 * _STRIDE + lane // 4) * 4
    scale = recipe.regular_global_scale(enc[()], target)
    for first in cutlass.range_constexpr(0, width, WARP):
        if (first < piece.valid) & (block < blocks):
            for c in cutlass.range_constexpr(first // 8, min(first + WARP, width) // 8):
                for t, j in ((t, j) for t in range(_TILES) for j in range(2)):
                    gate, up = (arith.mul(acc[t, c * 4 + i * 2 + j], factors[i], target) for i in range(2))
                    up = maximum_or_nan(minimum_or_nan(up, limit, target), -limit, target)
                    y = swiglu(minimum_or_nan(gate, limit, target), up, target)
                    smem.store4(to + ((c * 8 - first + j) * _STRIDE + t * 8) * 4, y)
            cute.arch.sync_warp()
            row, left = piece.start + piece.first + first, piece.valid - first
            given = (row_weight, enc, weighted, out_codes, out_scales, tiled)
            if cutlass.const_expr(width - first <= WARP // 2):
                _quantize_by_halves(area, row, left, block, *given)
            else:
                mine = cutlass.min(lane, min(WARP, width - first) - 1)  # a token that was written
                words = [word for i in range(4) for word in smem.load16(area + (mine * _STRIDE + i * 4) * 4)]
                cute.arch.sync_warp()
                if lane < left:
                    _quantize(words, row + lane, block, scale, *given)


@cute.jit
def _quantize_by_halves(
    area: Int32,
    row: Int32,
    tokens: Int32,
    block: Int32,
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    weighted: Constexpr[bool],
    codes: cute.Tensor,
    scales: cute.Tensor,
    tiled: Constexpr[bool],
) -> None:
    """Encodes and writes a block of each of up to 16 tokens, rows from `row` on: two lanes have half a block each."""
    target = Target.SM90
    lane = cute.arch.lane_idx()
    token, half = cutlass.min(lane % (WARP // 2), tokens - 1), lane // (WARP // 2)
    at = area + (token * _STRIDE + half * (BLOCK // 2)) * 4
    values = [arith.number(word) for i in range(2) for word in smem.load16(at + i * 16)]
    cute.arch.sync_warp()
    if cutlass.const_expr(weighted):
        values = [arith.mul(value, row_weight[row + token], target) for value in values]
    largest = _largest(values, target)
    largest = arith.maximum(largest, from_lane(largest, WARP // 2), target)
    byte, factor = recipe.block_scale(largest, recipe.global_scale(enc[()], target), target)
    nibbles = recipe.pack_codes([convert.encode_e2m1(arith.mul(value, factor, target), target) for value in values])
    if lane % (WARP // 2) < tokens:
        blocks = cute.size(codes, mode=[1]) // (BLOCK // 2)
        words = cute.make_tensor(cute.recast_ptr(codes.iterator, dtype=Uint32), cute.make_layout(cute.size(codes) // 4))
        words[(Int64(row + token) * blocks + block) * 2 + half] = nibbles
        if half == 0:
            flat = cute.make_tensor(scales.iterator, cute.make_layout(cute.size(scales)))
            flat[_scale_offset(row + token, block, blocks, tiled)] = Uint8(byte)


def _largest(values: list[Float32], target: Target) -> Float32:
    """The largest magnitude, NaN left out; pair by pair, so that few operations wait for each other."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [arith.maximum(arith.magnitude(a, target), arith.magnitude(b, target), target) for a, b in pairs]
    return values[0]


@cute.jit
def _quantize(
    words: Constexpr[list[Uint32]],
    row: Int32,
    block: Int32,
    scale: Constexpr[GlobalScale],
    row_weight: cute.Tensor,
    enc: cute.Tensor,
    weighted: Constexpr[bool],
    codes: cute.Tensor,
    scales: cute.Tensor,
    tiled: Constexpr[bool],
) -> None:
    """Encodes and writes a block of 16 fp32 results."""
    target = Target.SM90
    weight = row_weight[row] if weighted else Float32(1.0)
    values = [arith.bits(arith.mul(arith.number(w), weight, target)) for w in words] if weighted else words
    encoded = recipe.encode_block(values, Float32, scale, target)
    _store(encoded, row, block, codes, scales, tiled)
    if not (scale.regular & encoded.regular):  # rare: NaN, infinity or saturation
        exact = recipe.global_scale(enc[()], target)
        _store(recipe.encode_any_block(values, Float32, exact, target), row, block, codes, scales, tiled)


def _store(encoded: Block, row: Int32, block: Int32, codes: cute.Tensor, scales: cute.Tensor, tiled: bool) -> None:
    blocks = cute.size(codes, mode=[1]) // (BLOCK // 2)
    at = asm.address(codes) + (Int64(row) * blocks + block) * (BLOCK // 2)
    gmem.store8(at, [encoded.low, encoded.high])
    flat = cute.make_tensor(scales.iterator, cute.make_layout(cute.size(scales)))
    flat[_scale_offset(row, block, blocks, tiled)] = Uint8(encoded.scale)


def _scale_offset(row: Int32, block: Int32, blocks: Int32, tiled: bool) -> Int32:
    return (offset_128x4 if tiled else offset_linear)(row, block, blocks)


def spec(quantized: bool, weighted: bool, tiled: bool, shape: Shape) -> KernelSpec:
    """The kernel for any sizes.

    Args:
        quantized: The activations are NVFP4.
        weighted: Rows have a weight.
        tiled: The scales of the result lie in 128x4 tiles.
        shape: How the work is cut.
    """

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32
        codes = _compact(Uint8, (size(), size(divisibility=64), size(divisibility=64)), 16)
        scales = _compact(Uint8, (size(), size(divisibility=64), size(divisibility=8)), 16)
        packed = _compact(BFloat16, (size(), size(), 64), 16)
        offsets, alpha, row_weight = (_compact(dtype, (size(),), 4) for dtype in (Int32, Float32, Float32))
        dec, enc, out_dec = (make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(3))
        out_codes = _compact(Uint8, (size(), size(divisibility=8)), 8)
        out_scales = _compact(Uint8, (size(), size()), 1)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        tensors = (codes, scales, packed, offsets, alpha, dec, row_weight, enc, out_codes, out_scales, out_dec)
        numbers = (Int32(0), Float32(0.0), Int32(0))
        return (*tensors, *numbers, stream, quantized, weighted, tiled, shape)

    kind = "_".join(n for n, on in (("quantized", quantized), ("weighted", weighted), ("tiled", tiled)) if on)
    key = (quantized, weighted, tiled, *shape.widths, *shape[1:])
    return KernelSpec(f"swiglu_prefill_{shape.tokens}_{kind}", Target.SM90.value, launch, arguments, key)


def _compact(dtype: type, shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
