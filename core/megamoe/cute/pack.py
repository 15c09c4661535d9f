"""Packs activations for `weight_gemm`: gathers rows and decodes NVFP4.

    packed  (k / 64, capacity, 64) bf16: a row of 64 k is 128 bytes, whose 16-byte chunks are swizzled as shared
            memory is for wgmma, so that one bulk copy brings any run of rows of a block of k. Rows of an expert are
            neighbours and start at a multiple of 8. NVFP4 comes out as 2^-7 of its value, without its global scale.

A warp or several a row; a lane makes a chunk, 8 lanes write 128 bytes in a row.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Constexpr, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, asm, fragments, gmem, weight_pieces
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.layout import offset_128x4, offset_linear
from megamoe.cute.recipe import BLOCK
from megamoe.cute.warp import WARP

THREADS = 256
CHUNKS = 8  # of 16 bytes, of a row of 64 k
AT_ONCE = 4  # chunks that a lane asks for before it waits
ENOUGH_ROWS = 8192  # for a warp each, 62 an SM; fewer are shared, or too few bytes would be on their way
KINDS = ("bfloat16", "linear", "128x4")  # plain activations, or NVFP4 by the layout of its scales


@cute.jit
def launch(
    values: cute.Tensor,  # (tokens, K) bf16, or (tokens, K / 2) uint8
    scales: cute.Tensor,  # (tokens, K / 16) uint8, or padded; not read for bf16
    index: cute.Tensor,  # (rows,) int32, not read unless `indexed`
    offsets: cute.Tensor,  # (experts + 1,) int32
    packed: cute.Tensor,  # (padded K / 64, capacity, 64) bf16
    rows: Int32,
    parts: Int32,  # warps that share a row
    stream: CUstream,
    kind: Constexpr[str],
    indexed: Constexpr[bool],
) -> None:
    """Launches `parts` warps for each row."""
    kernel(values, scales, index, offsets, packed, rows, kind, indexed).launch(
        grid=[cute.ceil_div(rows, THREADS // WARP), parts, 1], block=[THREADS, 1, 1], use_pdl=True, stream=stream
    )


@cute.kernel
def kernel(
    values: cute.Tensor,
    scales: cute.Tensor,
    index: cute.Tensor,
    offsets: cute.Tensor,
    packed: cute.Tensor,
    rows: Int32,
    kind: Constexpr[str],
    indexed: Constexpr[bool],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, part, _ = cute.arch.block_idx()
    _, parts, _ = cute.arch.grid_dim()
    cute.arch.griddepcontrol_wait()  # what came before in the stream is done; up to here it may still have run
    cute.arch.griddepcontrol_launch_dependents()
    row = cta * (THREADS // WARP) + thread // WARP
    if row < rows:
        lane = thread % WARP
        pack_row(values, scales, index, offsets, packed, row, lane, part, parts, kind, indexed)


@cute.jit
def pack_row(
    values: cute.Tensor,
    scales: cute.Tensor,
    index: cute.Tensor,
    offsets: cute.Tensor,
    packed: cute.Tensor,
    row: Int32,
    lane: Int32,
    part: Int32,
    parts: Int32,
    kind: Constexpr[str],
    indexed: Constexpr[bool],
) -> None:
    """A warp's part of a row."""
    target = Target.SM90
    expert = _expert_of(row, lane, offsets)
    start = offsets[expert]
    place = weight_pieces.packed_start(start, expert) + row - start
    source = row
    if cutlass.const_expr(indexed):
        source = index[row]
    capacity = Int64(cute.size(packed, mode=[1]))
    to = asm.address(packed) + Int64(place) * (CHUNKS * 16)
    chunks = cute.size(packed, mode=[0]) * CHUNKS
    for first in cutlass.range(lane + part * (WARP * AT_ONCE), chunks, parts * (WARP * AT_ONCE), unroll=1):
        mine = [first + i * WARP for i in range(AT_ONCE)]
        loaded = [_load(values, scales, source, cutlass.min(chunk, chunks - 1), kind) for chunk in mine]
        for i in cutlass.range_constexpr(AT_ONCE):
            if mine[i] < chunks:
                at = to + Int64(mine[i] // CHUNKS) * capacity * (CHUNKS * 16)
                words = _words(loaded[i], kind, target)
                gmem.store16(at + ((mine[i] ^ place) % CHUNKS) * 16, words)


@cute.jit
def _expert_of(row: Int32, lane: Int32, offsets: cute.Tensor) -> Int32:
    """Whose a row is: as many experts end at or before it; the whole warp counts."""
    experts = cute.size(offsets) - 1
    expert = Int32(0)
    for first in cutlass.range(1, experts, WARP * 8, unroll=1):
        behind = Int32(0)
        for i in cutlass.range_constexpr(8):
            e = first + i * WARP + lane
            passed = (e < experts) & (offsets[cutlass.min(e, experts)] <= row)
            behind = behind + asm.flag(passed)
        expert = expert + cute.arch.warp_redux_sync(behind, "add")
    return expert


def _load(values: cute.Tensor, scales: cute.Tensor, source: Int32, chunk: Int32, kind: str) -> list[Uint32]:
    """What a chunk, half a block, is made of: its bf16, or its codes and their scale; zeros beyond k."""
    plain = kind == "bfloat16"
    blocks = cute.size(values, mode=[1]) // (BLOCK if plain else BLOCK // 2)
    exists = chunk // 2 < blocks
    number = cutlass.min(chunk, 2 * blocks - 1)
    place = Int64(source) * (2 * blocks) + number
    if plain:
        words = gmem.load16(asm.address(values) + place * 16)
    else:
        codes = cute.make_tensor(
            cute.recast_ptr(values.iterator, dtype=Uint32), cute.make_layout(cute.size(values) // 4)
        )
        bytes_ = cute.make_tensor(scales.iterator, cute.make_layout(cute.size(scales)))
        offset = (offset_128x4 if kind == "128x4" else offset_linear)(source, number // 2, blocks)
        words = [Uint32(codes[place]), Uint32(bytes_[offset])]
    return [arith.select(exists, word, Uint32(0)) for word in words]


def _words(loaded: list[Uint32], kind: str, target: Target) -> list[Uint32]:
    if kind == "bfloat16":
        return loaded
    return fragments.activation_pairs(loaded[:1], loaded[1], target)


def parts_of(rows: int, k: int) -> int:
    """How many warps should share a row: up to one for each round of loads."""
    return max(1, min(ENOUGH_ROWS // rows, k // (CHUNKS * WARP * AT_ONCE)))


def spec(kind: str, indexed: bool) -> KernelSpec:
    """The kernel for any sizes.

    Args:
        kind: One of KINDS.
        indexed: Rows are gathered.
    """

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32
        if kind == "bfloat16":
            values = _compact(BFloat16, (size(), size(divisibility=BLOCK)), 16)
        else:
            values = _compact(Uint8, (size(), size(divisibility=BLOCK // 2)), 8)
        scales = _compact(Uint8, (size(), size()), 1)
        index, offsets = (_compact(Int32, (size(),), 4) for _ in range(2))
        packed = _compact(BFloat16, (size(), size(), 64), 16)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (values, scales, index, offsets, packed, Int32(0), Int32(1), stream, kind, indexed)

    name = f"pack_{kind}{'_indexed' if indexed else ''}"
    return KernelSpec(name, Target.SM90.value, launch, arguments, (kind, indexed))


def _compact(dtype: type, shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)
