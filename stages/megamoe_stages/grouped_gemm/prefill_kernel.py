"""The grouped GEMM for many rows an expert, on sm_90a: `cute.weight_gemm` with a bf16 epilogue."""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, bf16, ring, weight_gemm
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.warp import WARP
from megamoe.cute.weight_gemm import DECODED_UNIT, TILE_ROWS, TILES, Operands, Piece, Shape, Share

_WARPS = weight_gemm.CONSUMERS * weight_gemm.GROUP // WARP
_TURNED = 8 * 32 * 2  # bytes of 8 tokens by 32 columns
WIDE, NARROW, SPARSE = (
    Shape((96, 104, 128), 4, _WARPS * 2 * _TURNED),
    Shape((32, 40, 48, 56, 64), 6, _WARPS * 2 * _TURNED),
    Shape((16, 24, 32, 40, 48), 6, _WARPS * 2 * _TURNED),
)
DENSE = (  # for one expert, whose pieces are too few for all SMs
    Shape((16, 32, 64), 6, _WARPS * 2 * _TURNED, shared=True),
    Shape((96, 128), 4, _WARPS * 2 * _TURNED, shared=True),
)


@cute.jit
def launch(
    codes: cute.Tensor,
    scales: cute.Tensor,
    packed: cute.Tensor,
    offsets: cute.Tensor,
    alpha: cute.Tensor,  # (experts * parts,) fp32, or one for all
    dec: cute.Tensor,  # () fp32 of NVFP4 activations; not read for others
    out: cute.Tensor,  # (rows, N) bf16
    parts: Int32,  # of an expert's rows; 0: one alpha for all
    ctas: Int32,
    cluster: Int32,  # CTAs that share a piece; 1 unless `Shape.shared`
    stream: CUstream,
    quantized: Constexpr[bool],
    aligned: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """Launches so many CTAs."""
    kernel(codes, scales, packed, offsets, alpha, dec, out, parts, quantized, aligned, shape).launch(
        grid=[ctas, 1, 1],
        cluster=[cluster, 1, 1] if shape.shared else None,
        block=[weight_gemm.THREADS, 1, 1],
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
    out: cute.Tensor,
    parts: Int32,
    quantized: Constexpr[bool],
    aligned: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""

    def finish(acc: cute.Tensor, piece: Piece, width: int, staging: Int32, part: Share) -> None:
        store(acc, piece, staging, part, alpha, dec, out, parts, quantized, aligned, width)

    weight_gemm.work(Operands(codes, scales, packed, offsets), finish, shape)


@cute.jit
def store(
    acc: cute.Tensor,
    piece: Constexpr[Piece],
    staging: Int32,
    part: Constexpr[Share],
    alpha: cute.Tensor,
    dec: cute.Tensor,
    out: cute.Tensor,
    parts: Int32,
    quantized: Constexpr[bool],
    aligned: Constexpr[bool],
    width: Constexpr[int],
) -> None:
    """Writes a piece, 8 tokens by 32 columns of a warp at a time, turned by shared memory to 16 bytes a lane."""
    target = Target.SM90
    lane = cute.arch.lane_idx()
    n = cute.size(out, mode=[1])
    column = piece.row_piece * weight_gemm.ROWS + weight_gemm.warp_of_consumers() * (TILES * TILE_ROWS)
    factors = []
    for i in cutlass.range_constexpr(4):
        row = cutlass.min(column + i * 8 + lane // 4, n - 1)
        factors.append(factor_of(alpha, piece.expert * parts + row * parts // n, dec, quantized))
    area = staging + weight_gemm.warp_of_consumers() * (2 * _TURNED)
    write_at, read_at = area + _turned(lane % 8, lane // 8), area + _turned(lane // 4, lane % 4)
    left = column + lane % 4 * 8
    place = ring.address(out.iterator) + (Int64(piece.start + piece.first + lane // 4) * n + left) * 2
    cute.arch.sync_warp()  # the piece before has been read
    for c in cutlass.range_constexpr(width // 8):
        if part.holds(c) & (c * 8 < piece.valid):
            words = []
            for i in cutlass.range_constexpr(4):
                pair = [arith.mul(acc[i // 2, c * 4 + i % 2 * 2 + j], factors[i], target) for j in range(2)]
                words.append(bf16.pack(pair[0], pair[1], target))  # two tokens of a column
            ring.store_transposed(write_at + c % 2 * _TURNED, words)
            cute.arch.sync_warp()
            turned = ring.load16(read_at + c % 2 * _TURNED)
            inside = c * 8 + lane // 4 < piece.valid
            at = place + Int64(c * 8) * n * 2
            if cutlass.const_expr(aligned):
                ring.store_global16_if(at, turned, arith.select(inside & (left < n), Int32(1), Int32(0)))
            else:
                for i in cutlass.range_constexpr(8):
                    half = turned[i // 2] >> (16 * (i % 2))
                    ring.store_global2_if(at + i * 2, half, arith.select(inside & (left + i < n), Int32(1), Int32(0)))


def _turned(token: Int32, chunk: Int32) -> Int32:
    """Where 8 columns of a token lie; swizzled, or four tokens would meet in a bank."""
    return token * 64 + (chunk ^ (token // 2)) * 16


def factor_of(alpha: cute.Tensor, i: Int32, dec: cute.Tensor, quantized: bool) -> Float32:
    """What sums of decoded values are multiplied by: alpha, times a power of two, times NVFP4's global scale."""
    if quantized:
        factor = arith.mul(dec[()], alpha[i], Target.SM90)
        return arith.mul(factor, Float32(DECODED_UNIT * DECODED_UNIT), Target.SM90)
    return arith.mul(alpha[i], Float32(DECODED_UNIT), Target.SM90)


def spec(quantized: bool, aligned: bool, shape: Shape) -> KernelSpec:
    """The kernel for any sizes.

    Args:
        quantized: The activations are NVFP4.
        aligned: N is a multiple of 8.
        shape: How the work is cut.
    """

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32
        codes = _compact(Uint8, (size(), size(divisibility=64), size(divisibility=64)), 16)
        scales = _compact(Uint8, (size(), size(divisibility=64), size(divisibility=8)), 16)
        packed = _compact(BFloat16, (size(), size(), 64), 16)
        offsets, alpha = _compact(Int32, (size(),), 4), _compact(Float32, (size(),), 4)
        dec = make_fake_tensor(Float32, (), (), assumed_align=4)
        out = _compact(BFloat16, (size(), size(divisibility=8) if aligned else size()), 16 if aligned else 2)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        numbers = (Int32(0), Int32(0), Int32(1))
        return (codes, scales, packed, offsets, alpha, dec, out, *numbers, stream, quantized, aligned, shape)

    kind = "dense" if shape.shared else "prefill"
    name = f"{kind}_{shape.tokens}{'_quantized' if quantized else ''}{'' if aligned else '_unaligned'}"
    return KernelSpec(name, Target.SM90.value, launch, arguments, (quantized, aligned, *shape.widths, *shape[1:]))


def _compact(dtype: type, shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
