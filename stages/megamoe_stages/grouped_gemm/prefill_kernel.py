"""The grouped GEMM for many rows an expert, on sm_90a: `cute.weight_gemm` with a bf16 epilogue."""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, bf16, multicast, peers, ring, tma, weight_gemm
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import proxy_fence
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP
from megamoe.cute.weight_gemm import DECODED_UNIT
from megamoe.cute.weight_pieces import CONSUMER_WARPS, CONSUMERS, THREADS, Operands, Piece, Shape, warp_of_consumers

_TURNED = 8 * 32 * 2  # bytes of 8 tokens by 32 columns, or of 16 by 16
_STAGING = CONSUMER_WARPS * 2 * _TURNED
_GROUP_WARPS = CONSUMER_WARPS // CONSUMERS
WIDE, NARROW, SPARSE = (
    Shape((96, 104, 128), 4, _STAGING),
    Shape((32, 40, 48, 56, 64), 6, _STAGING),
    Shape((16, 24, 32, 40, 48), 6, _STAGING),
)
DENSE = DENSE_NARROW, DENSE_MEDIUM, DENSE_WIDE = (  # for one expert, whose pieces may be too few for all SMs
    Shape((16, 32, 64), 8, _STAGING, tiles=1, experts=1, split=True, in_flight=3),
    Shape((96, 128), 5, _STAGING, tiles=1, experts=1, split=True, in_flight=3),
    Shape((96, 128), 3, 2 * 128 * 272, experts=1),
)


@cute.jit
def launch(
    codes: cute.Tensor,
    scales: cute.Tensor,
    packed: cute.Tensor,  # see `weight_pieces.Operands`; the activations (rows, K) themselves if `Shape.direct`
    offsets: cute.Tensor,
    alpha: cute.Tensor,  # (experts * parts,) fp32, or one for all
    dec: cute.Tensor,  # () fp32 of NVFP4 activations; not read for others
    out: cute.Tensor,  # (rows, N) bf16
    sums: cute.Tensor,  # fp32 workspace, and how many CTAs left sums there: see `weight_pieces.Operands`
    arrived: cute.Tensor,
    parts: Int32,  # of an expert's rows; 0: one alpha for all
    ctas: Int32,
    sharing: Int32,  # CTAs that share a piece; 1 unless `Shape.split`
    tiles: Int32,  # of tokens; not read unless `Shape.dense`
    stream: CUstream,
    quantized: Constexpr[bool],
    aligned: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """Launches so many CTAs."""
    tokens = packed
    if cutlass.const_expr(shape.direct):
        rows, k = packed.shape
        seen = cute.make_tensor(packed.iterator, cute.make_layout((rows, 1, k), stride=(k, k, 1)))
        tokens = multicast.boxes(seen, shape.box, 1, shape.cluster)
    tensors = (codes, scales, tokens, offsets, alpha, dec, out, sums, arrived)
    kernel(*tensors, parts, sharing, tiles, quantized, aligned, shape).launch(
        grid=[ctas, 1, 1],
        block=[THREADS, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        use_pdl=shape.late >= 0,
        stream=stream,
        **({"cluster": [shape.cluster, 1, 1]} if shape.cluster > 1 else {}),
    )


@cute.kernel
def kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    packed: cute.Tensor | Boxes,
    offsets: cute.Tensor,
    alpha: cute.Tensor,
    dec: cute.Tensor,
    out: cute.Tensor,
    sums: cute.Tensor,
    arrived: cute.Tensor,
    parts: Int32,
    sharing: Int32,
    tiles: Int32,
    quantized: Constexpr[bool],
    aligned: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""

    def fetch(piece: Piece) -> list[Float32]:
        columns = [_column(piece, shape) + i * 8 + cute.arch.lane_idx() // 4 for i in range(_chunks(shape))]
        entries = [piece.expert * parts + part_of(column, cute.size(out, mode=[1]), parts) for column in columns]
        return [factor_of(alpha, entry, dec, quantized) for entry in entries]

    def finish(acc: cute.Tensor, piece: Piece, width: int, staging: Int32, factors: list[Float32]) -> None:
        if cutlass.const_expr(aligned and shape.staging >= whole_staging(shape)):
            store_rows(acc, piece, staging, factors, out, width, shape)
        else:
            store(acc, piece, staging, factors, out, aligned, width, shape)

    rows = cute.size(out, mode=[0])
    operands = Operands(codes, scales, packed, offsets, sums, arrived, sharing, rows, tiles)
    weight_gemm.work(operands, fetch, finish, shape)


@cute.jit
def store(
    acc: cute.Tensor,
    piece: Constexpr[Piece],
    staging: Int32,
    factors: Constexpr[list[Float32]],
    out: cute.Tensor,
    aligned: Constexpr[bool],
    width: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Writes a piece, four (8, 8) of a warp at a time, turned by shared memory to 16 bytes a lane."""
    target = Target.SM90
    lane = cute.arch.lane_idx()
    n = cute.size(out, mode=[1])
    chunks = _chunks(shape)
    tokens = 4 // chunks * 8  # at a time
    buffers = shape.staging // (CONSUMER_WARPS * _TURNED)
    area = staging + warp_of_consumers() * (buffers * _TURNED)
    matrix = lane // 8
    write_at = area + _turned(lane % 8 + matrix // chunks * 8, matrix % chunks, chunks)
    token, chunk = lane // chunks, lane % chunks
    read_at = area + _turned(token, chunk, chunks)
    left = _column(piece, shape) + chunk * 8
    place = ring.address(out.iterator) + (Int64(piece.start + piece.first + token) * n + left) * 2
    cute.arch.sync_warp()  # the piece before has been read
    at_once = max(1, buffers // 2)  # then nobody waits for who reads the other half
    for start in cutlass.range_constexpr(0, width, tokens * at_once):
        if start < piece.valid:
            turn = start // (tokens * at_once) % 2 * at_once
            if cutlass.const_expr(buffers == 1):
                turn = 0
                cute.arch.sync_warp()
            firsts = range(start, min(start + tokens * at_once, width), tokens)
            for u, first in enumerate(firsts):
                words = []
                for i in cutlass.range_constexpr(4):
                    t, at = i % chunks // 2, (first // 8 + i // chunks) * 4 + i % 2 * 2
                    pair = [arith.mul(acc[t, at + j], factors[i % chunks], target) for j in range(2)]
                    words.append(bf16.pack(pair[0], pair[1], target))  # two tokens of a column
                ring.store_transposed(write_at + (turn + u) * _TURNED, words)
            cute.arch.sync_warp()
            turned = [ring.load16(read_at + (turn + u) * _TURNED) for u in range(len(firsts))]
            for u, first in enumerate(firsts):
                inside = first + token < piece.valid
                to = place + Int64(first) * n * 2
                if cutlass.const_expr(aligned):
                    ring.store_global16_if(to, turned[u], arith.select(inside & (left < n), Int32(1), Int32(0)))
                else:
                    for i in cutlass.range_constexpr(8):
                        half = turned[u][i // 2] >> (16 * (i % 2))
                        exists = inside & (left + i < n)
                        ring.store_global2_if(to + i * 2, half, arith.select(exists, Int32(1), Int32(0)))


@cute.jit
def store_rows(
    acc: cute.Tensor,
    piece: Constexpr[Piece],
    staging: Int32,
    factors: Constexpr[list[Float32]],
    out: cute.Tensor,
    width: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Writes a piece of an aligned result: a warpgroup leaves its columns in shared memory, a bulk copy takes each token's.

    The copies read while the next piece is multiplied.
    """
    target = Target.SM90
    lane, warp = cute.arch.lane_idx(), warp_of_consumers()
    group, n, chunks = warp // _GROUP_WARPS, cute.size(out, mode=[1]), _chunks(shape)
    pitch = _row_pitch(shape)
    area = staging + group * (shape.tokens * pitch)
    matrix = lane // 8
    token = lane % 8 + matrix // chunks * 8
    write_at = area + token * pitch + (warp % _GROUP_WARPS * chunks + matrix % chunks) * 16
    step = 4 // chunks * 8  # tokens at a time
    tma.wait_stores()
    peers.barrier(1 + group, _GROUP_WARPS * WARP)  # the piece before has been read
    for first in cutlass.range_constexpr(0, width, step):
        if first < piece.valid:
            words = []
            for i in cutlass.range_constexpr(4):
                t, at = i % chunks // 2, (first // 8 + i // chunks) * 4 + i % 2 * 2
                pair = [arith.mul(acc[t, at + j], factors[i % chunks], target) for j in range(2)]
                words.append(bf16.pack(pair[0], pair[1], target))  # two tokens of a column
            ring.store_transposed(write_at + first * pitch, words)
    proxy_fence()
    peers.barrier(1 + group, _GROUP_WARPS * WARP)
    left = piece.row_piece * shape.rows + group * (shape.rows // CONSUMERS)
    size = cutlass.min(n - left, shape.rows // CONSUMERS) * 2
    mine = warp % _GROUP_WARPS * WARP + lane
    if (mine < piece.valid) & (size > 0):
        to = ring.address(out.iterator) + (Int64(piece.start + piece.first + mine) * n + left) * 2
        tma.store_bulk(to, area + mine * pitch, size)
    tma.commit_stores()


def _row_pitch(shape: Shape) -> int:
    """Bytes from a token to the next in shared memory; 16 more than its columns, or eight tokens would meet in a bank."""
    return shape.rows // CONSUMERS * 2 + 16


def whole_staging(shape: Shape) -> int:
    """Bytes that `store_rows` needs."""
    return CONSUMERS * shape.tokens * _row_pitch(shape)


def _chunks(shape: Shape) -> int:
    """Of 8 columns of the result, that a warp owns of a piece."""
    return 2 * shape.tiles


def _column(piece: Piece, shape: Shape) -> Int32:
    """The first of them."""
    return piece.row_piece * shape.rows + warp_of_consumers() * (_chunks(shape) * 8)


def _turned(token: Int32, chunk: Int32, chunks: int) -> Int32:
    """Where 8 columns of a token lie; swizzled, or several tokens would meet in a bank."""
    return (token * chunks + (chunk ^ (token // (8 // chunks) % chunks))) * 16


@cute.jit
def part_of(column: Int32, n: Int32, parts: Int32) -> Int32:
    """Which of the parts of an expert's n rows a column of the result is of, the last one beyond them."""
    part = Int32(0)
    if parts > 1:  # or the division would cost hundreds of clocks for nothing
        part = cutlass.min(column, n - 1) * parts // n
    return part


def factor_of(alpha: cute.Tensor, i: Int32, dec: cute.Tensor, quantized: bool) -> Float32:
    """What sums of decoded values are multiplied by: alpha, times a power of two, times NVFP4's global scale."""
    return decoded_factor(alpha[i], dec[()] if quantized else None)


def decoded_factor(alpha: Float32, dec: Float32 | None) -> Float32:
    """The same from numbers; no `dec` for activations that are not NVFP4."""
    if dec is not None:
        return arith.mul(arith.mul(dec, alpha, Target.SM90), Float32(DECODED_UNIT * DECODED_UNIT), Target.SM90)
    return arith.mul(alpha, Float32(DECODED_UNIT), Target.SM90)


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
        packed = _compact(BFloat16, (size(), size(divisibility=64)) if shape.direct else (size(), size(), 64), 16)
        offsets, alpha = _compact(Int32, (size(),), 4), _compact(Float32, (size(),), 4)
        dec = make_fake_tensor(Float32, (), (), assumed_align=4)
        out = _compact(BFloat16, (size(), size(divisibility=8) if aligned else size()), 16 if aligned else 2)
        sums, arrived = _compact(Float32, (size(),), 16), _compact(Int32, (size(),), 4)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        numbers = (Int32(0), Int32(0), Int32(1), Int32(1))
        tensors = (codes, scales, packed, offsets, alpha, dec, out, sums, arrived)
        return (*tensors, *numbers, stream, quantized, aligned, shape)

    kind = f"dense_{shape.rows}" if shape.dense else "prefill"
    flags = {"quantized": quantized, "unaligned": not aligned, "direct": shape.direct, "cluster": shape.cluster > 1}
    name = "_".join([kind, str(shape.tokens), *(flag for flag, given in flags.items() if given)])
    return KernelSpec(name, Target.SM90.value, launch, arguments, (quantized, aligned, *shape.widths, *shape[1:]))


def _compact(dtype: type, shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
