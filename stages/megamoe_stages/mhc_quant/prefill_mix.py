"""The projection of mHC's mix for many tokens: fn as two terms of bf16, on the left of `mma`.

The two terms keep 16 significant bits of fn (TF32 keeps 11), in the 4 bytes that fp32 takes. A kernel of its own brings
fn into the order in which the other kernel's warps read it: pieces, CHUNK hidden dims of a stream by all rows, one
stream after the other for each CHUNK, and a piece in parts of 16 bytes a lane:

    for each half of the dims:  hi0 hi1 | hi2 lo2 | lo0 lo1     (rows in groups of 8)

The streams are the right operand: the words of a thread's line, in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, bulk, exchange, ring, warp
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.fragments import mma
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant.places import CHUNK, ROWS, Words
from megamoe_stages.mhc_quant.prefill_cut import LINE, PARTS, PIECE

THREADS = 256  # of the kernel that brings fn in order
_MMA_K8 = "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};"
Quads = list[list[Float32]]


@cute.jit  # type: ignore[untyped-decorator]
def launch(
    fn: cute.Tensor,  # (LOGITS, STREAMS * H) fp32
    pieces: cute.Tensor,  # (H / CHUNK * STREAMS * PIECE,) uint8
    stream: CUstream,
    target: Constexpr[Target],
) -> None:
    """Launches a warp for each piece."""
    count = cute.size(pieces) // PIECE
    order_fn(fn, pieces, target).launch(
        grid=[cute.ceil_div(count, THREADS // WARP), 1, 1], block=[THREADS, 1, 1], stream=stream
    )


@cute.kernel  # type: ignore[untyped-decorator]
def order_fn(fn: cute.Tensor, pieces: cute.Tensor, target: Constexpr[Target]) -> None:
    """Splits fn into two terms of bf16 and brings it in the order that the other kernel reads."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    cute.arch.griddepcontrol_launch_dependents()
    piece, lane = cta * (THREADS // WARP) + thread // WARP, thread % WARP
    if piece < cute.size(pieces) // PIECE:
        parts = parts_of(_rows_of(piece, lane, fn), target)
        to = exchange.global_address(pieces) + Int64(piece * PIECE + lane * LINE)
        for part in cutlass.range_constexpr(PARTS):
            bulk.store_global4(to + part * (WARP * LINE), parts[part])


def _rows_of(piece: Int32, lane: Int32, fn: cute.Tensor) -> list[Words]:
    """A lane's 8 fp32 values of each of its three rows of a piece."""
    at, wide = exchange.global_address(fn), cute.size(fn, mode=[1])
    starts = [at + source_of(piece, group, lane, wide) * 4 for group in range(LOGITS // ROWS)]
    return [[*exchange.load16(start), *exchange.load16(start + LINE)] for start in starts]


def source_of(piece: Int32, group: int, lane: Int32, wide: Int32) -> Int64:
    """Where in fn, whose rows are `wide`, the 8 values of a lane of a row group of a piece begin."""
    chunk, stream = piece // STREAMS, piece % STREAMS
    row = group * ROWS + lane // 4
    return Int64(row * wide + stream * (wide // STREAMS) + chunk * CHUNK + lane % 4 * 8)


def parts_of(groups: Sequence[Words], target: Target) -> list[Words]:
    """A lane's parts of a piece, from 8 fp32 values of each of its three rows."""
    terms = []  # [group][term][word]
    for words in groups:
        values = [arith.number(word) for word in words]
        split = [warp.split_bf16(values[i], values[i + 1], target)[:2] for i in range(0, 8, 2)]
        terms.append([[pair[term] for pair in split] for term in range(2)])
    rows = [(terms[0][0], terms[1][0]), (terms[2][0], terms[2][1]), (terms[0][1], terms[1][1])]
    return [[a[i], b[i], a[i + 1], b[i + 1]] for i in (0, 2) for a, b in rows]


def add_dots(streams: list[list[Words]], sums: list[Quads], at: Int32) -> list[Quads]:
    """Adds the products of fn with the streams of a chunk, [token][stream][word]: those of each part to a quad.

    Args:
        streams: A lane's words of its two tokens.
        sums: For each of the two, three quads.
        at: Where this lane's first part of the first stream's piece lies in shared memory.
    """
    for s in range(STREAMS):
        cute.arch.sync_warp()  # else the compiler loads more parts ahead than there are registers for
        for half in range(2):
            for part in range(3):
                left = ring.load16(at + (s * PIECE + (half * 3 + part) * (WARP * LINE)))
                for t in range(2):
                    right = streams[t][s][half * 2 : half * 2 + 2]
                    sums[t] = [mma(left, right, quad) if i == part else quad for i, quad in enumerate(sums[t])]
    return sums


def dots(sums: list[Quads], target: Target) -> list[list[Float32]]:
    """This warp's dots: for each half of the tokens six, rows g, g + 8, g + 16 of fn with tokens 2q and 2q + 1."""
    found = []
    for leading, mixed, small in sums:
        found.append([*_added(leading, small, target), *_added(mixed[:2], mixed[2:], target)])
    return found


def squares(streams: list[Words], row: Int32, target: Target) -> Float32:
    """The squares of a token's streams over a chunk, in the lane with q = g // 2 of its four.

    They are a diagonal of each word times itself: even words in the upper half of a product, odd ones in the lower.
    """
    even, odd = [Float32(0.0)] * 4, [Float32(0.0)] * 4
    for words in streams:
        for i in (0, 2):
            even = _mma_k8(words[i : i + 2], words[i], even)
            odd = _mma_k8(words[i : i + 2], words[i + 1], odd)
    first, second = _added(even[:2], odd[2:], target)
    return arith.select(row % 2 == 0, first, second)


def _mma_k8(a: Sequence[Uint32], b: Uint32, c: Sequence[Float32]) -> list[Float32]:
    """c + a b, one warp, of bf16 a (16, 8) and b (8, 8); placed as in `fragments.mma`."""
    out = llvm.inline_asm(
        llvm.StructType.get_literal([Float32.mlir_type] * 4),
        [operand.ir_value() for operand in (*a, b, *c)],
        _MMA_K8,
        ",".join(["=f"] * 4 + ["r"] * 3 + ["f"] * 4),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return [Float32(llvm.extractvalue(Float32.mlir_type, out, ir.DenseI64ArrayAttr.get([i]))) for i in range(4)]


def _added(a: Sequence[Float32], b: Sequence[Float32], target: Target) -> list[Float32]:
    return [arith.add(*pair, target) for pair in zip(a, b, strict=True)]


def piece_bytes(hidden: int) -> int:
    """What `launch` writes for H hidden dims."""
    return hidden // CHUNK * STREAMS * PIECE


def spec(target: Target) -> KernelSpec:
    """The kernel that brings fn in order, for any number of hidden dims that is a multiple of CHUNK."""

    def make() -> tuple[object, ...]:
        fn = make_fake_compact_tensor(
            Float32, (LOGITS, cute.sym_int32(divisibility=STREAMS * CHUNK)), stride_order=(1, 0), assumed_align=LINE
        )
        pieces = make_fake_compact_tensor(Uint8, (cute.sym_int32(divisibility=PIECE),), assumed_align=LINE)
        return (fn, pieces, make_fake_stream(use_tvm_ffi_env_stream=True), target)

    return KernelSpec("mhc_quant_order_fn", target.value, launch, make, (PARTS,))
