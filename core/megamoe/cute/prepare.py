"""Turns plain NVFP4 weights into the `hopper` layout of `numerics.fragments` on a GPU, in one launch.

A warp makes a unit, 16 rows x 128 k, at a time: 1024 bytes of codes and 128 of scales, written in a row. A lane reads
whole blocks of its two rows (so do the three lanes beside it: the first level cache has them) and keeps its nibbles.
Gate and up rows are interleaved on the way, as `numerics.gate_up` orders them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import cutlass
import torch
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, asm, compiler, convert, gmem
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import ALIGNMENT
from megamoe.cute.warp import WARP
from megamoe.errors import ArgumentError
from megamoe.numerics import fragments
from megamoe.numerics.fragments import GROUP_ROWS, UNIT_K
from megamoe.numerics.nvfp4 import BLOCK, NVFP4Tensor

THREADS = 256
_TILE_ROWS = 16
_TILE_CODES = _TILE_ROWS * UNIT_K // 2  # bytes of a unit
_LANE = _TILE_CODES // 2 // WARP  # bytes of codes that a lane writes for 64 k
_PAIR = 2 * BLOCK  # k of a group of two blocks
_PAIRS = UNIT_K // _PAIR
_BAD_SCALE, _BAD_CODE = 0, 1  # places in `status`


@cute.jit
def launch(
    codes: cute.Tensor,  # (experts, rows, K / 2) uint8
    scales: cute.Tensor,  # (experts, rows, K / 16) uint8, E4M3
    out_codes: cute.Tensor,  # (experts, padded rows, padded K / 2) uint8
    out_scales: cute.Tensor,  # (experts, padded rows, padded K / 16) uint8
    status: cute.Tensor,  # (2,) int32, gets a 1 for a scale, or a code, that has no form in the layout
    step: Int32,  # rows from a tile's first source row to the next tile's
    first: Int32,  # source row of the first tile's row 0
    second: Int32,  # and of its row 8
    stream: CUstream,
) -> None:
    """Launches a CTA for each tile of 16 rows."""
    experts, tiles = cute.size(out_codes, mode=[0]), cute.size(out_codes, mode=[1]) // _TILE_ROWS
    kernel(codes, scales, out_codes, out_scales, status, step, first, second).launch(
        grid=[tiles, experts, 1], block=[THREADS, 1, 1], stream=stream
    )


@cute.kernel
def kernel(
    codes: cute.Tensor,
    scales: cute.Tensor,
    out_codes: cute.Tensor,
    out_scales: cute.Tensor,
    status: cute.Tensor,
    step: Int32,
    first: Int32,
    second: Int32,
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    tile, expert, _ = cute.arch.block_idx()
    lane = thread % WARP
    rows, groups = cute.size(codes, mode=[1]), cute.size(codes, mode=[2]) // (_PAIR // 2)
    units = cute.size(out_codes, mode=[2]) // (UNIT_K // 2)
    g, t = lane // 4, lane % 4
    source = [tile * step + g + start for start in (first, second)]
    exists = [(tile * _TILE_ROWS + g + 8 * h < rows) for h in range(2)]
    flat = [Int64(expert) * rows + arith.select(exists[h], source[h], Int32(0)) for h in range(2)]
    slab = (Int64(expert) * (cute.size(out_codes, mode=[1]) // GROUP_ROWS) + tile // 4) * units
    for unit in cutlass.range(thread // WARP, units, THREADS // WARP, unroll=1):
        loaded = [
            [_codes(codes, flat[h], groups, unit * _PAIRS + q, exists[h]) for h in range(2)] for q in range(_PAIRS)
        ]
        bytes_ = [_scales(scales, flat[h], groups, unit * _PAIRS + t, exists[h]) for h in range(2)]
        at = (slab + unit) * 4 + tile % 4
        words = [word for q in range(_PAIRS) for word in _slots(loaded[q], t * 8)]
        for half in cutlass.range_constexpr(2):
            to = asm.address(out_codes) + at * _TILE_CODES + (half * WARP + lane) * _LANE
            gmem.store16(to, words[4 * half : 4 * half + 4])
        stored = cute.make_tensor(
            cute.recast_ptr(out_scales.iterator, dtype=Uint32), cute.make_layout(cute.size(out_scales) // 4)
        )
        stored[at * WARP + lane] = _scale_word(bytes_)
        both = bytes_[0] | bytes_[1] << 16
        if ((both & 0x7F7F7F7F) + 0x01010101 | both) & Uint32(0x80808080) != 0:
            status[_BAD_SCALE] = Int32(1)
        _check_zeros(status, loaded, both, lane)


@cute.jit
def _check_zeros(status: cute.Tensor, loaded: Constexpr[list[list[list[Uint32]]]], both: Uint32, lane: Int32) -> None:
    """Under a zero scale there must be zero codes; looks at them only where the warp has such a scale."""
    zero = (both - 0x01010101) & ~both & Uint32(0x80808080)  # not 0 exactly where some byte is
    if arith.any_lane(zero != 0, Target.SM90):
        for q in cutlass.range_constexpr(_PAIRS):
            theirs = cute.arch.shuffle_sync(both, lane // 4 * 4 + q)
            for h in cutlass.range_constexpr(2):
                for b in cutlass.range_constexpr(2):
                    magnitudes = (loaded[q][h][2 * b] | loaded[q][h][2 * b + 1]) & 0x77777777
                    if ((theirs >> (16 * h + 8 * b)) & 0xFF == 0) & (magnitudes != 0):
                        status[_BAD_CODE] = Int32(1)


def _codes(codes: cute.Tensor, row: Int64, groups: Int32, group: Int32, exists: object) -> list[Uint32]:
    """Two blocks of a row, zero where there is none."""
    inside = exists & (group < groups)
    place = row * groups + arith.select(inside, group, Int32(0))
    words = gmem.load16(asm.address(codes) + place * (_PAIR // 2))
    return [arith.select(inside, word, Uint32(0)) for word in words]


def _scales(scales: cute.Tensor, row: Int64, groups: Int32, group: Int32, exists: object) -> Uint32:
    """The two scale bytes of a group."""
    inside = exists & (group < groups)
    pairs = cute.make_tensor(
        cute.recast_ptr(scales.iterator, dtype=cutlass.Uint16), cute.make_layout(cute.size(scales) // 2)
    )
    return arith.select(inside, Uint32(pairs[row * groups + arith.select(inside, group, Int32(0))]), Uint32(0))


def _slots(rows: list[list[Uint32]], shift: Int32) -> list[Uint32]:
    """A lane's words x and y of a group, from the two blocks of its two rows."""
    pairs = []  # of a quarter of the k and a row half: neighbouring k in the halves of a word
    for q in range(4):
        both = [row[q] >> shift for row in rows]
        both = [(word & 0xF) | (word & 0xF0) << 12 for word in both]
        pairs.append([(word & 0x00070007) | (word & 0x00080008) << 6 for word in both])
    made = {}
    for name, forms in fragments._FORMS.items():
        rotated = [_rotate_left(pairs[q][h], r) for q, h, r in forms]
        made[name] = functools.reduce(lambda a, b: a | b, rotated)
    mask = Uint32(fragments._X_OF_Z)
    return [made["x"] | made["z"] & mask, made["y"] | made["z"] & ~mask]


def _rotate_left(word: Uint32, by: int) -> Uint32:
    return word << by | word >> (32 - by) if by else word


def _scale_word(rows: list[Uint32]) -> Uint32:
    """The word of scale codes of two rows, two blocks each."""
    words = []
    for pair in rows:
        low, high = (
            arith.bits(convert.decode_e4m3(byte, Target.SM90) * Float32(2.0**119)) >> 20 & 0xFF
            for byte in (pair & 0xFF, pair >> 8)
        )
        words.append(low << 4 | high << 20)
    return words[0] | _rotate_left(words[1], 24)


def prepare(weights: NVFP4Tensor, order: str | None = None) -> NVFP4Tensor:
    """Weights in the hopper layout, gate and up rows interleaved where they have an order.

    The same bytes as `gate_up.interleave` and `NVFP4Tensor.with_layout("hopper")` give. Waits for the device, to see
    whether the weights have that form.

    Args:
        weights: NVFP4 (..., rows, K) on a Hopper GPU; see `takes`.
        order: "gate_up" or "up_gate", of rows that are a multiple of 32; None leaves the rows in place.

    Raises:
        ArgumentError: A block scale is negative or NaN, or is zero for a block with a nonzero code.
    """
    *batch, rows, half = weights.codes.shape
    full_rows, full_k = fragments.padded_shape(rows, half * 2)
    codes = weights.codes.new_empty((*batch, full_rows, full_k // 2))
    scales = weights.codes.new_empty((*batch, full_rows, full_k // BLOCK))
    status = torch.zeros(2, dtype=torch.int32, device=weights.device)
    step, first, second = _TILE_ROWS, 0, 8
    if order is not None:
        step, first, second = 8, 0, rows // 2
        first, second = (second, first) if order == "up_gate" else (first, second)
    given = (weights.codes, weights.scales.view(torch.uint8), codes, scales)
    _launcher()(*(t.view(-1, *t.shape[-2:]) for t in given), status, step, first, second)
    bad_scale, bad_code = status.tolist()
    if bad_scale:
        raise ArgumentError("scales", "a negative or NaN block scale", "scales of 0 to 448 in the hopper layout")
    if bad_code:
        expected = "zero codes under a zero scale in the hopper layout (zero_guard='scale' quantises so)"
        raise ArgumentError("codes", "a nonzero code under a zero block scale", expected)
    dec = weights.global_scale_dec
    if order == "up_gate" and dec.ndim == len(batch) + 1 and dec.shape[-1] == 2:
        dec = dec.flip(-1)
    return NVFP4Tensor(codes, scales.view(weights.scales.dtype), dec, fragments.layout_name(rows, half * 2))


def takes(weights: NVFP4Tensor) -> bool:
    """Whether the kernel can read them: linear, contiguous, aligned to 16 bytes, K a multiple of 32, on Hopper."""
    codes, scales = weights.codes, weights.scales
    if not codes.is_cuda or weights.scale_layout != "linear" or codes.ndim < 2 or codes.numel() == 0:
        return False
    plain = codes.is_contiguous() and scales.is_contiguous() and codes.data_ptr() % ALIGNMENT == 0
    return plain and codes.shape[-1] % (_PAIR // 2) == 0 and torch.cuda.get_device_capability(codes.device)[0] == 9


@functools.cache
def _launcher() -> Callable[..., None]:
    return compiler.load(spec())


def spec() -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def compact(dtype: type, *dims: object, align: int) -> object:
            order = tuple(reversed(range(len(dims))))
            return make_fake_compact_tensor(dtype, dims, stride_order=order, assumed_align=align)

        experts, rows = size(), size()
        tensors = (
            compact(Uint8, experts, rows, size(divisibility=_PAIR // 2), align=16),
            compact(Uint8, experts, rows, size(divisibility=2), align=2),
            compact(Uint8, experts, size(divisibility=GROUP_ROWS), size(divisibility=UNIT_K // 2), align=16),
            compact(Uint8, experts, size(divisibility=GROUP_ROWS), size(divisibility=UNIT_K // BLOCK), align=16),
            compact(Int32, 2, align=4),
        )
        return (*tensors, Int32(0), Int32(0), Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))

    return KernelSpec("prepare", Target.SM90.value, launch, arguments)
