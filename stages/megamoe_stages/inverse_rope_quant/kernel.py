"""Inverse RoPE and NVFP4 in one kernel of CuTe DSL, one source for sm_90a and sm_100a: reads o once, writes codes once.

A thread owns blocks of 16 of one place in a head, for a few tokens. A warp owns rotated blocks only or others only (in
128x4 where a head and its rotated part are multiples of 64 dims), so that most warps run the short path of plain
quantisation, on the words as they were loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, Numeric, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, layout, recipe, strips
from megamoe.cute.arith import Target, number, ptx
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.recipe import BLOCK
from megamoe.cute.strips import DTYPES, WARP, Output, Shape, Strip, Tiles, Words

LARGE = {"linear": Shape(128, 4), "128x4": Shape(128, 4, 4)}  # the fastest of the cuts tried on an H200: see NOTES.md
SMALL = Shape(128, 1)  # more CTAs where there is little work, and the only one for fp16 and fp32
_LARGE_BLOCKS = 2**21  # 86 MB of bf16, where the cuts change places on an H200
PAIRS = BLOCK // 2  # of a block, with a cosine and a sine each


class Heads(NamedTuple):
    """What the kernel reads.

    Attributes:
        o: (tokens, heads, D).
        positions: int32 (tokens * step): the first of every `step` counts.
        cos: (P, R/2) fp32.
        sin: (P, R/2) fp32.
        groups: Of heads.
        cols: Blocks of a row of the result.
    """

    o: cute.Tensor
    positions: cute.Tensor
    cos: cute.Tensor
    sin: cute.Tensor
    groups: Int32
    cols: Int32

    @property
    def tokens(self) -> Int32:
        """Rows of the result."""
        return cute.size(self.o, mode=[0])

    @property
    def blocks(self) -> Int32:
        """Blocks of a head."""
        return cute.size(self.o, mode=[2]) // BLOCK

    @property
    def plain(self) -> Int32:
        """Blocks at the start of a head that are not rotated."""
        return self.blocks - cute.size(self.cos, mode=[1]) // PAIRS


def heads_of(o: cute.Tensor, positions: cute.Tensor, cos: cute.Tensor, sin: cute.Tensor, codes: cute.Tensor) -> Heads:
    """What the kernel reads; the sizes of the result come from `codes` (G, tokens, bytes), since division is slow."""
    return Heads(o, positions, cos, sin, cute.size(codes, mode=[0]), cute.size(codes, mode=[2]) // (BLOCK // 2))


@cute.jit
def launch_linear(
    o: cute.Tensor,  # (tokens, heads, D) bf16, fp16 or fp32
    positions: cute.Tensor,  # int32 (tokens,), or int64 seen as int32 (2 * tokens,)
    cos: cute.Tensor,  # (P, R/2) fp32
    sin: cute.Tensor,  # (P, R/2) fp32
    enc: cute.Tensor,  # () fp32
    codes: cute.Tensor,  # (G, tokens, heads/G * D/2) uint8
    scales: cute.Tensor,  # (G, tokens, heads/G * D/16) uint8
    dec: cute.Tensor,  # () fp32
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches for each strip of tokens whole warps of blocks that are not rotated, then of those that are."""
    heads = heads_of(o, positions, cos, sin, codes)
    divisors = linear_divisors(heads)
    rotate_linear(o, positions, cos, sin, enc, codes, scales, dec, *divisors, target, shape).launch(
        grid=linear_grid(heads, shape), block=[shape.threads, 1, 1], stream=stream, use_pdl=True
    )


@cute.jit
def launch_tiled(
    o: cute.Tensor,
    positions: cute.Tensor,
    cos: cute.Tensor,
    sin: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,  # (G, padded tokens, padded heads/G * D/16) uint8
    dec: cute.Tensor,
    stream: CUstream,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Launches over the 128x4 tiles of all groups."""
    heads = heads_of(o, positions, cos, sin, codes)
    tile_rows = cute.size(scales, mode=[1]) // layout.TILE_ROWS
    per_entry, by_blocks = cute.FastDivmodDivisorV2(tile_rows), cute.FastDivmodDivisorV2(heads.blocks)
    bits = strips.slice_bits(heads.tokens, shape)
    tiles = Tiles(heads.tokens, heads.cols, heads.groups * tile_rows, per_entry, bits)
    rotate_tiled(o, positions, cos, sin, enc, codes, scales, dec, per_entry, by_blocks, bits, target, shape).launch(
        grid=strips.tiled_grid(tiles, shape), block=[shape.threads, 1, 1], stream=stream, use_pdl=True
    )


@cute.kernel
def rotate_linear(
    o: cute.Tensor,
    positions: cute.Tensor,
    cos: cute.Tensor,
    sin: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    by_plain: cute.FastDivmodDivisorV2,
    by_rotated: cute.FastDivmodDivisorV2,
    by_group: cute.FastDivmodDivisorV2,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Linear scales."""
    strips.let_next_start()
    thread, _, _ = cute.arch.thread_idx()
    across, down = strips.place_in_grid()
    heads = heads_of(o, positions, cos, sin, codes)
    out = Output(codes, scales, enc, dec, False, across + down + thread == 0)
    strips.wait_for_previous()
    turn_linear(heads, across, down, thread, (by_plain, by_rotated, by_group), out, target, shape)


@cute.kernel
def rotate_tiled(
    o: cute.Tensor,
    positions: cute.Tensor,
    cos: cute.Tensor,
    sin: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    per_entry: cute.FastDivmodDivisorV2,
    by_blocks: cute.FastDivmodDivisorV2,
    bits: Int32,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """128x4 scales."""
    strips.let_next_start()
    thread, _, _ = cute.arch.thread_idx()
    across, down = strips.place_in_grid()
    heads = heads_of(o, positions, cos, sin, codes)
    out = Output(codes, scales, enc, dec, True, across + down + thread == 0)
    tile_rows = heads.groups * (cute.size(scales, mode=[1]) // layout.TILE_ROWS)
    strip = strips.tiled_strip(Tiles(heads.tokens, heads.cols, tile_rows, per_entry, bits), across, down, thread, shape)
    strips.wait_for_previous()
    turn_tiled(heads, strip, by_blocks, out, target, shape)
    strips.write_rest(strip, out, bits, shape)


def linear_divisors(heads: Heads) -> tuple[cute.FastDivmodDivisorV2, ...]:
    """What `turn_linear` divides by: blocks of a head that are not rotated (or 1), rotated ones, heads of a group."""
    rotated, count = heads.blocks - heads.plain, cute.size(heads.o, mode=[1])
    sizes = (cutlass.max(heads.plain, 1), rotated, count // heads.groups)
    return tuple(cute.FastDivmodDivisorV2(size) for size in sizes)


def linear_grid(heads: Heads, shape: Shape) -> list[Int32]:
    """The grid of a launch with linear scales: CTAs of a strip of tokens, and strips."""
    rotated = cute.size(heads.o, mode=[1]) * (heads.blocks - heads.plain)
    warps = plain_warps(heads) + cute.ceil_div(rotated, WARP)
    return strips.grid(cute.ceil_div(warps, shape.warps), cute.ceil_div(heads.tokens, shape.blocks))


def plain_warps(heads: Heads) -> Int32:
    """Warps that own the blocks of a strip of tokens that are not rotated; the next ones own those that are."""
    return cute.ceil_div(cute.size(heads.o, mode=[1]) * heads.plain, WARP)


@cute.jit
def turn_linear(
    heads: Constexpr[Heads],
    across: Int32,
    down: Int32,
    thread: Int32,
    divisors: Constexpr[tuple[cute.FastDivmodDivisorV2, ...]],
    out: Constexpr[Output],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """What a thread does with linear scales.

    Args:
        heads: What is read.
        across: Of the CTA in the grid.
        down: Of the CTA in the grid.
        thread: Of the CTA.
        divisors: From `linear_divisors`.
        out: What is written.
        target: What to compile for.
        shape: How the work is cut.
    """
    by_plain, by_rotated, by_group = divisors
    warp, lane, first = across * shape.warps + thread // WARP, thread % WARP, plain_warps(heads)

    row = down * shape.blocks
    if warp < first:
        head, block = divmod(warp * WARP + lane, by_plain)
        keep(heads, linear_strip(heads, row, head, block, by_group), out, target, shape.blocks)
    else:
        head, block = divmod((warp - first) * WARP + lane, by_rotated)
        strip = linear_strip(heads, row, head, heads.plain + block, by_group)
        turn(heads, strip, block, out, target, shape.blocks, False)


def linear_strip(heads: Heads, row: Int32, head: Int32, block: Int32, by_group: cute.FastDivmodDivisorV2) -> Strip:
    """The strip of a block of a head, from a token on; not active where there is no such head."""
    group, head_of_group = divmod(head, by_group)
    active = (head < cute.size(heads.o, mode=[1])) & (row < heads.tokens)
    col = head_of_group * heads.blocks + block
    return strips.linear_strip(cutlass.min(group, heads.groups - 1), row, col, heads.tokens, heads.cols, active)


@cute.jit
def turn_tiled(
    heads: Constexpr[Heads],
    strip: Constexpr[Strip],
    by_blocks: cute.FastDivmodDivisorV2,
    out: Constexpr[Output],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """What a thread does with 128x4 scales and its strip; `by_blocks` divides by the blocks of a head."""
    _, place = divmod(strip.col, by_blocks)
    block = place - heads.plain
    if arith.any_lane(strip.active & (block >= 0), target):
        turn(heads, strip._replace(stored=strip.active), block, out, target, shape.blocks, True)
    else:
        keep(heads, strip, out, target, shape.blocks)
    strips.write_padding(strip, out, shape.blocks)


def keep(heads: Heads, strip: Strip, out: Output, target: Target, blocks: int) -> None:
    """Encodes and writes a strip that is not rotated."""
    dtype = heads.o.element_type

    def as_they_are(words: Words, row: Int32) -> tuple[Words, type[Numeric]]:
        return words, dtype

    strips.write(strip, lambda row: load(heads, strip, row), as_they_are, out, target, blocks, anew=True)


@cute.jit
def turn(
    heads: Constexpr[Heads],
    strip: Constexpr[Strip],
    block: Int32,
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
    mixed: Constexpr[bool],
) -> None:
    """Turns, encodes and writes a strip.

    Args:
        heads: What is read.
        strip: The blocks.
        block: Counts from the first rotated one of a head.
        out: What is written.
        target: What to compile for.
        blocks: In the strip.
        mixed: Some lanes of the warp may have blocks that are not rotated, with a negative number.
    """
    dtype = heads.o.element_type
    first = cutlass.max(block, 0) if mixed else block

    def ask(row: Int32) -> tuple[Words, list[Float32], list[Float32]]:
        at = position(heads, row)
        return load(heads, strip, row), table_row(heads.cos, at, first), table_row(heads.sin, at, first)

    def turned(loaded: tuple[Words, list[Float32], list[Float32]], row: Int32) -> tuple[Words, type[Numeric]]:
        words, cosines, sines = loaded
        x = recipe.values(words, dtype)
        y = turn_back(x, cosines, sines, target)
        if mixed:
            y = [arith.select(block >= 0, new, old) for new, old in zip(y, x, strict=True)]
        return strips.as_bits(y), Float32

    if cutlass.const_expr(blocks == 1):
        strips.write(strip, ask, turned, out, target, 1, anew=True)
    else:
        for i in cutlass.range(blocks, unroll=1):  # one at a time, or the tables' rows would take the registers
            part = strip.part(i)
            strips.write(part, ask, turned, out, target, 1, anew=True)
            strips.write_padding(part, out, 1)  # a strip may end in padding


def load(heads: Heads, strip: Strip, row: Int32) -> Words:
    """The words of a strip's block in some row."""
    source = strips.blocks_of(heads.o, recipe.words_of_block(heads.o.element_type))
    return strips.load_words(source, Int64(row * heads.groups + strip.entry) * strip.cols + strip.col)


def position(heads: Heads, row: Int32) -> Int32:
    """Position of a token; one outside of the tables becomes the last one, so that nothing else is read."""
    wide = cute.size(heads.positions) > heads.tokens  # int64, seen as twice as many int32
    at, last = heads.positions[arith.select(wide, 2 * row, row)], cute.size(heads.cos, mode=[0]) - 1
    return arith.select((at < 0) | (at > last), last, at)


def table_row(table: cute.Tensor, at: Int32, block: Int32) -> list[Float32]:
    """The eight entries of a position that a rotated block takes."""
    per_row = cute.size(table, mode=[1]) // PAIRS
    return [number(word) for word in strips.load_words(strips.blocks_of(table, PAIRS), Int64(at) * per_row + block)]


def turn_back(x: list[Float32], cosines: list[Float32], sines: list[Float32], target: Target) -> list[Float32]:
    """Pairs (x0, x1) to (x0 cos + x1 sin, x1 cos - x0 sin), each product and each sum rounded by itself."""
    times: Callable[[Float32, Float32], Float32] = functools.partial(arith.mul, target=target)
    out = []
    for i, (c, s) in enumerate(zip(cosines, sines, strict=True)):
        x0, x1 = x[2 * i], x[2 * i + 1]
        out += [arith.add(times(x0, c), times(x1, s), target), subtract(times(x1, c), times(x0, s), target)]
    return out


def subtract(a: Float32, b: Float32, target: Target) -> Float32:
    """RN(a - b)."""
    return a - b if target.host else ptx(Float32, "sub.rn.f32 $0, $1, $2;", a, b)


def spec(dtype: str, scale_layout: str, shape: Shape, target: Target) -> KernelSpec:
    """The kernel for one dtype and layout, any sizes.

    Args:
        dtype: A key of DTYPES.
        scale_layout: "linear" or "128x4".
        shape: How the work is cut.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32
        table = (size(), size(divisibility=PAIRS))
        scalars = [make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(2)]
        o = _compact(DTYPES[dtype], (size(), size(), size(divisibility=BLOCK)), 16)
        positions = _compact(Int32, (size(),), 4)
        cos, sin = (_compact(Float32, table, 16) for _ in range(2))
        codes = _compact(Uint8, (size(), size(), size(divisibility=BLOCK // 2)), 8)
        scales = _compact(Uint8, (size(), size(), size()), 16 if scale_layout == "128x4" else 1)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (o, positions, cos, sin, scalars[0], codes, scales, scalars[1], stream, target, shape)

    function = launch_tiled if scale_layout == "128x4" else launch_linear
    name = f"{scale_layout}_{dtype}_{shape.threads}x{shape.blocks}x{shape.tall}"
    return KernelSpec(name, target.value, function, arguments, (dtype, scale_layout, *shape))


def _compact(dtype: type[Numeric], shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)


def shape_for(dtype: str, scale_layout: str, blocks: int) -> Shape:
    """How the work on so many blocks is cut."""
    return LARGE[scale_layout] if dtype == "bfloat16" and blocks >= _LARGE_BLOCKS else SMALL


def specs(target: Target) -> list[KernelSpec]:
    """Every kernel that `launch.inverse_rope_quant` may ask for."""
    small = [spec(dtype, scale_layout, SMALL, target) for dtype in DTYPES for scale_layout in LARGE]
    return [*small, *(spec("bfloat16", scale_layout, shape, target) for scale_layout, shape in LARGE.items())]
