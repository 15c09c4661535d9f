"""Grouped GEMM, SwiGLU and NVFP4 for many rows an expert, on sm_90a: `cute.weight_gemm` with a quantising epilogue.

Weight rows are interleaved (8 gate, the 8 up), so a lane holds gate and up of the same outputs, and a warp's 32 weight
rows are one block of 16 outputs. A warp turns its results to lanes that own a token each by 2 KB of shared memory.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Boolean, Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
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
_STAGING = WARP * BLOCK * 4  # bytes of a warp: the results of 32 tokens
EXPERTS = (  # up to so many rows an expert on average: see `grouped_gemm.prefill.width_class`
    Shape((8, 16, 24, 32, 40), 6, CONSUMER_WARPS * _STAGING),
    Shape((32, 40, 48, 56, 64), 6, CONSUMER_WARPS * _STAGING, guarded=True),
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
    taken: cute.Tensor,  # (1,) int32 zeros: see `weight_pieces.Operands`
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
    inputs = (codes, scales, packed, offsets, alpha, dec, row_weight, enc, taken)
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
    taken: cute.Tensor,
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
        return [*alphas, gmem.ask(enc, Int32(0)), gmem.ask(dec if quantized else enc, Int32(0))]

    def finish(acc: cute.Tensor, piece: Piece, width: int, staging: Int32, asked: list[Float32]) -> None:
        factors = [decoded_factor(alpha, asked[3] if quantized else None) for alpha in asked[:2]]
        results = (row_weight, asked[2], weighted, out_codes, out_scales, tiled)
        encode(acc, piece, staging, limit, factors, *results, width)

    unused = (Int32(1), Int32(0), Int32(0))  # no piece is shared, and experts may be many
    weight_gemm.work(Operands(codes, scales, packed, offsets, alpha, taken, *unused), fetch, finish, shape)


@cute.jit
def encode(
    acc: cute.Tensor,
    piece: Constexpr[Piece],
    staging: Int32,
    limit: Float32,
    factors: Constexpr[list[Float32]],
    row_weight: cute.Tensor,
    enc: Float32,
    weighted: Constexpr[bool],
    codes: cute.Tensor,
    scales: cute.Tensor,
    tiled: Constexpr[bool],
    width: Constexpr[int],
) -> None:
    """Writes a piece, 32 tokens at a time; the next ones are activated while those before are encoded."""
    lane, warp = cute.arch.lane_idx(), warp_of_consumers()
    area = staging + warp * _STAGING
    block = piece.row_piece * CONSUMER_WARPS + warp
    if block < cute.size(codes, mode=[1]) // (BLOCK // 2):
        scale = recipe.regular_global_scale(enc, Target.SM90)
        results = (row_weight, enc, weighted, codes, scales, tiled)
        ready = _activated(acc, 0, width, limit, factors)
        for first in cutlass.range_constexpr(0, width, WARP):
            _stage(area, ready)
            cute.arch.sync_warp()
            row, left, columns = piece.start + piece.first + first, piece.valid - first, min(WARP, width - first)
            if cutlass.const_expr(columns <= WARP // 2):
                _quantize_by_halves(area, row, left, block, scale, *results)
            else:
                mine = cutlass.min(lane, columns - 1)  # a token that was written
                words = [word for i in range(4) for word in smem.load16(_place(area, mine, i))]
                cute.arch.sync_warp()
                if cutlass.const_expr(first + WARP < width):
                    ready = _activated(acc, first + WARP, width, limit, factors)
                if lane < left:
                    _quantize(words, row + lane, block, scale, *results)


def _activated(
    acc: cute.Tensor, first: int, width: int, limit: Float32, factors: list[Float32]
) -> list[list[list[Float32]]]:
    """Results of up to 32 tokens of a piece: of each 8 tokens those of a lane, two of each of two tokens."""
    target = Target.SM90

    def result(t: int, at: int) -> Float32:
        gate, up = (arith.mul(acc[t, at + i * 2], factors[i], target) for i in range(2))
        up = maximum_or_nan(minimum_or_nan(up, limit, target), -limit, target)
        return swiglu(minimum_or_nan(gate, limit, target), up, target)

    eights = range(first // 8, min(first + WARP, width) // 8)
    return [[[result(t, c * 4 + j) for t in range(_TILES)] for j in range(2)] for c in eights]


def _stage(area: Int32, results: list[list[list[Float32]]]) -> None:
    """Leaves a lane's results in the warp's shared memory."""
    lane = cute.arch.lane_idx()
    places = [[_place(area, lane % 4 * 2 + j, t * 2 + lane // 16) for t in range(_TILES)] for j in range(2)]
    for c, eight in enumerate(results):
        for j, t in ((j, t) for j in range(2) for t in range(_TILES)):
            smem.store4(places[j][t] + (c * 8 * BLOCK * 4 + lane // 4 % 4 * 4), eight[j][t])


def _place(area: Int32, token: Int32, quarter: Int32 | int) -> Int32:
    """Where four results of a token lie: swizzled, so that neither writing nor reading meets a bank twice."""
    pair, chunk = token // 2, token % 2 * 4 | quarter
    return area + pair * (2 * BLOCK * 4) + (chunk ^ (pair % 4 * 2 | pair % 4 // 2)) * 16


@cute.jit
def _quantize_by_halves(
    area: Int32,
    row: Int32,
    tokens: Int32,
    block: Int32,
    scale: Constexpr[GlobalScale],
    row_weight: cute.Tensor,
    enc: Float32,
    weighted: Constexpr[bool],
    codes: cute.Tensor,
    scales: cute.Tensor,
    tiled: Constexpr[bool],
) -> None:
    """Encodes and writes a block of each of up to 16 tokens, rows from `row` on: two lanes have half a block each."""
    target = Target.SM90
    lane = cute.arch.lane_idx()
    token, half = cutlass.min(lane % (WARP // 2), tokens - 1), lane // (WARP // 2)
    words = [word for i in range(2) for word in smem.load16(_place(area, token, half * 2 + i))]
    cute.arch.sync_warp()
    values = [arith.number(word) for word in words]
    if cutlass.const_expr(weighted):
        values = [arith.mul(value, row_weight[row + token], target) for value in values]
    nibbles, byte, regular = _encode_half(values, scale)
    if arith.any_lane(not regular, target):  # rare: NaN, infinity or saturation
        largest = _of_block(values, arith.maximum)
        byte, factor = recipe.block_scale(largest, recipe.global_scale(enc, target), target)
        nibbles = recipe.pack_codes([convert.encode_e2m1(arith.mul(v, factor, target), target) for v in values])
    if lane % (WARP // 2) < tokens:
        blocks = cute.size(codes, mode=[1]) // (BLOCK // 2)
        at = (Int64(row + token) * blocks + block) * (BLOCK // 2) + half * (BLOCK // 4)
        gmem.store4(asm.address(codes) + at, nibbles)
        if half == 0:
            flat = cute.make_tensor(scales.iterator, cute.make_layout(cute.size(scales)))
            flat[_scale_offset(row + token, block, blocks, tiled)] = Uint8(byte)


def _encode_half(values: list[Float32], scale: GlobalScale) -> tuple[Uint32, Uint32, Boolean]:
    """`recipe.encode_block` by two lanes: the codes of this one's half, the scale's byte, and whether to trust them."""
    target = Target.SM90
    largest = _of_block(values, maximum_or_nan)
    byte = convert.encode_e4m3(arith.mul(largest, scale.enc_sixth, target), target)
    decoded = arith.mul(convert.decode_e4m3(byte, target), scale.dec, target)
    factor = arith.select(byte == 0, Float32(0.0), arith.reciprocal_in_range(decoded, target))
    regular = scale.regular & (arith.mul(largest, factor, target) < Float32(convert.BOUND))
    scaled = [arith.mul(arith.magnitude(value, target), factor, target) for value in values]
    codes = recipe.pack_codes([convert.code_of_bounded(y, target) - convert.MAGIC_BITS for y in scaled])
    return codes | recipe.signs([arith.bits(value) for value in values], Float32, target), byte, regular


def _of_block(values: list[Float32], larger: Callable[[Float32, Float32, Target], Float32]) -> Float32:
    """The largest magnitude of a block that two lanes share; pair by pair, so that few operations wait for others."""
    target = Target.SM90
    values = [arith.magnitude(value, target) for value in values]
    while len(values) > 1:
        values = [larger(a, b, target) for a, b in zip(values[::2], values[1::2], strict=True)]
    return larger(values[0], from_lane(values[0], WARP // 2), target)


@cute.jit
def _quantize(
    words: Constexpr[list[Uint32]],
    row: Int32,
    block: Int32,
    scale: Constexpr[GlobalScale],
    row_weight: cute.Tensor,
    enc: Float32,
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
        exact = recipe.global_scale(enc, target)
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
        taken = _compact(Int32, (1,), 4)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        tensors = (codes, scales, packed, offsets, alpha, dec, row_weight, enc, taken, out_codes, out_scales, out_dec)
        numbers = (Int32(0), Float32(0.0), Int32(0))
        return (*tensors, *numbers, stream, quantized, weighted, tiled, shape)

    kind = "_".join(n for n, on in (("quantized", quantized), ("weighted", weighted), ("tiled", tiled)) if on)
    key = (quantized, weighted, tiled, *shape.widths, *shape[1:])
    return KernelSpec(f"swiglu_prefill_{shape.tokens}_{kind}", Target.SM90.value, launch, arguments, key)


def _compact(dtype: type, shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
