"""The grouped GEMM for many rows an expert, on sm_90a: `cute.weight_gemm` with a bf16 epilogue."""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, asm, bf16, gmem, mbarrier, multicast, smem, weight_gemm
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.multicast import Boxes
from megamoe.cute.warp import WARP
from megamoe.cute.weight_gemm import DECODED_UNIT
from megamoe.cute.weight_pieces import CONSUMER_WARPS, GROUP, THREADS, Operands, Piece, Shape, warp_of_consumers

_TURNED = 8 * 32 * 2  # bytes of 8 tokens by 32 columns, or of 16 by 16
_STAGING = CONSUMER_WARPS * 2 * _TURNED
EXPERTS = (  # for few rows an expert, some and many: see `prefill.width_class`
    Shape((8, 16, 24, 32, 40), 6, _STAGING),
    Shape((32, 40, 48, 56, 64), 6, _STAGING, guarded=True),
    Shape((96, 104, 128), 4, _STAGING),
)
_NARROW, _MEDIUM = (  # for one expert, whose pieces may be too few for all SMs
    Shape((16, 32, 64), 8, _STAGING, tiles=1, experts=1, split=True, in_flight=3),
    Shape((96, 128), 5, _STAGING, tiles=1, experts=1, split=True, in_flight=3),
)
_LONG = Shape((152,), 4, _STAGING, tiles=1, experts=1, in_flight=3, guarded=True)
_LONGEST = Shape((256,), 3, _STAGING // 2, tiles=1, experts=1, guarded=True, halves=True)
_WIDE = Shape((152,), 3, _STAGING, experts=1, guarded=True)
DENSE = (
    _NARROW,
    _MEDIUM,
    _LONG,
    _LONG._replace(widths=(192,), stages=3),
    _LONGEST._replace(ahead=True),
    _LONGEST._replace(cluster=2),
    _WIDE._replace(widths=(144,), stages=4, cluster=2),
    _WIDE,
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
        use_pdl=True,
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
        columns = [_column(piece, shape) + i * 8 + cute.arch.lane_idx() // 4 for i in range(2 * shape.tiles)]
        entries = [piece.expert * parts + part_of(column, cute.size(out, mode=[1]), parts) for column in columns]
        return [factor_of(alpha, entry, dec, quantized) for entry in entries]

    def finish(acc: cute.Tensor, piece: Piece, width: int, staging: Int32, factors: list[Float32]) -> None:
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
    """Writes a piece, four (8, 8) of each warp at a time, turned by shared memory to 16 bytes a lane.

    The warps of a team share it, so that more neighbouring columns of a token leave at once.
    """
    target = Target.SM90
    team, lane, warp = team_of(shape), cute.arch.lane_idx(), warp_of_consumers()
    place, n = warp % team, cute.size(out, mode=[1])
    own, chunks = 2 * shape.tiles, 2 * shape.tiles * team  # of 8 columns: of a warp, of a team
    tokens = 4 // own * 8  # at a time
    buffers = shape.staging // (CONSUMER_WARPS * _TURNED)
    area = staging + warp // team * (buffers * team * _TURNED)
    matrix = lane // 8
    write_at = area + _turned(lane % 8 + matrix // own * 8, place * own + matrix % own, chunks)
    token, chunk = (place * WARP + lane) // chunks, (place * WARP + lane) % chunks
    read_at = area + _turned(token, chunk, chunks)
    left = piece.row_piece * shape.rows + warp // team * (chunks * 8) + chunk * 8
    to = asm.address(out) + (Int64(piece.start + piece.first + token) * n + left) * 2
    _meet(team)  # the piece before has been read
    for first in cutlass.range_constexpr(0, width, tokens):
        if first < piece.valid:
            words = []
            for i in cutlass.range_constexpr(4):
                t, at = i % own // 2, (first // 8 + i // own) * 4 + i % 2 * 2
                pair = [arith.mul(acc[t, at + j], factors[i % own], target) for j in range(2)]
                words.append(bf16.pack(pair[0], pair[1], target))  # two tokens of a column
            turn = first // tokens % buffers * (team * _TURNED)
            if cutlass.const_expr(buffers == 1):
                _meet(team)
            smem.store_transposed(write_at + turn, words)
            _meet(team)
            turned = smem.load16(read_at + turn)
            inside = first + token < piece.valid
            if cutlass.const_expr(aligned):
                gmem.store16_if(to, turned, inside & (left < n))
            else:
                for i in cutlass.range_constexpr(8):
                    half = turned[i // 2] >> (16 * (i % 2))
                    gmem.store2_if(to + i * 2, half, inside & (left + i < n))
        to = to + Int64(tokens * 2) * n


def team_of(shape: Shape) -> int:
    """Warps that store together: one, or those of a warpgroup where that was faster."""
    return GROUP // WARP if shape.dense and not shape.split else 1


def _meet(team: int) -> None:
    """All warps of a team are here."""
    if team == 1:
        cute.arch.sync_warp()
    else:
        mbarrier.named_barrier(1 + warp_of_consumers() // team, team * WARP)


def _column(piece: Piece, shape: Shape) -> Int32:
    """The first column of the result that a warp owns of a piece."""
    return piece.row_piece * shape.rows + warp_of_consumers() * (16 * shape.tiles)


def _turned(token: Int32, chunk: Int32, chunks: int) -> Int32:
    """Where 8 columns of a token lie; swizzled, or several tokens would meet in a bank."""
    swizzle = token // (8 // chunks) % chunks if chunks < 8 else token % 8
    return (token * chunks + (chunk ^ swizzle)) * 16


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
    flags = {"quantized": quantized, "unaligned": not aligned, "cluster": shape.cluster > 1}
    name = "_".join([kind, str(shape.tokens), *(flag for flag, on in flags.items() if on)])
    return KernelSpec(name, Target.SM90.value, launch, arguments, (quantized, aligned, *shape.widths, *shape[1:]))


def _compact(dtype: type, shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
