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
from megamoe.cute.strips import DTYPES, WARP, Output, Shape, Strip, Words

LARGE = Shape(128, 4)  # of the cuts tried on an H200 the fastest: more CTAs hide the issue-bound tail of each
SMALL = Shape(128, 1)  # more CTAs where there is little work, and the only one for fp16 and fp32
PAIRS = BLOCK // 2  # of a block, with a cosine and a sine each


class Heads(NamedTuple):
    """What the kernel reads.

    Attributes:
        o: (tokens, heads, D).
        positions: int32 (tokens * step): the first of every `step` counts.
        cos: (P, R/2) fp32.
        sin: (P, R/2) fp32.
        groups: Of heads.
    """

    o: cute.Tensor
    positions: cute.Tensor
    cos: cute.Tensor
    sin: cute.Tensor
    groups: Int32

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

    @property
    def cols(self) -> Int32:
        """Blocks of a row of the result."""
        return cute.size(self.o, mode=[1]) // self.groups * self.blocks


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
    """Launches a warp for every 32 strips, of 32 heads: first what is not rotated, then what is."""
    heads = Heads(o, positions, cos, sin, cute.size(codes, mode=[0]))
    divisors = linear_divisors(heads)
    rotate_linear(o, positions, cos, sin, enc, codes, scales, dec, *divisors, target, shape).launch(
        grid=[linear_grid(heads, shape), 1, 1], block=[shape.threads, 1, 1], stream=stream
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
    heads = Heads(o, positions, cos, sin, cute.size(codes, mode=[0]))
    tile_rows = cute.size(scales, mode=[1]) // layout.TILE_ROWS
    divisors = (
        cute.FastDivmodDivisorV2(tile_rows),
        cute.FastDivmodDivisorV2(strips.tiled_across(heads.cols, shape)),
        cute.FastDivmodDivisorV2(heads.blocks),
    )
    grid = strips.tiled_grid(heads.groups * tile_rows, heads.cols, shape)
    rotate_tiled(o, positions, cos, sin, enc, codes, scales, dec, *divisors, target, shape).launch(
        grid=[grid, 1, 1], block=[shape.threads, 1, 1], stream=stream
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
    by_blocks: cute.FastDivmodDivisorV2,
    by_plain: cute.FastDivmodDivisorV2,
    by_rotated: cute.FastDivmodDivisorV2,
    by_heads: cute.FastDivmodDivisorV2,
    by_group: cute.FastDivmodDivisorV2,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """Linear scales."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    heads = Heads(o, positions, cos, sin, cute.size(codes, mode=[0]))
    out = Output(codes, scales, enc, dec, False)
    divisors = (by_blocks, by_plain, by_rotated, by_heads, by_group)
    rotate(heads, *linear_place(heads, cta, thread, divisors, shape), out, target, shape.blocks)
    strips.write_dec(out, cta + thread == 0, target)


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
    across: cute.FastDivmodDivisorV2,
    by_blocks: cute.FastDivmodDivisorV2,
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    """128x4 scales."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    heads = Heads(o, positions, cos, sin, cute.size(codes, mode=[0]))
    out = Output(codes, scales, enc, dec, True)
    divisors = (per_entry, across, by_blocks)
    rotate(heads, *tiled_place(heads, cta, thread, divisors, shape), out, target, shape.blocks)
    strips.write_dec(out, cta + thread == 0, target)


def linear_divisors(heads: Heads) -> tuple[cute.FastDivmodDivisorV2, ...]:
    """What `linear_place` divides by: blocks of a head, those not rotated (or 1), those rotated, heads, of a group."""
    count = cute.size(heads.o, mode=[1])
    sizes = (heads.blocks, cutlass.max(heads.plain, 1), heads.blocks - heads.plain, count, count // heads.groups)
    return tuple(cute.FastDivmodDivisorV2(size) for size in sizes)


def linear_grid(heads: Heads, shape: Shape) -> Int32:
    """CTAs of a launch with linear scales: for 32 heads as many warps as a head has blocks."""
    return cute.ceil_div(cute.ceil_div(head_rows(heads, shape), WARP) * heads.blocks, shape.warps)


def head_rows(heads: Heads, shape: Shape) -> Int32:
    """Heads of all strips of tokens."""
    return cute.ceil_div(heads.tokens, shape.blocks) * cute.size(heads.o, mode=[1])


def linear_place(
    heads: Heads, cta: Int32, thread: Int32, divisors: tuple[cute.FastDivmodDivisorV2, ...], shape: Shape
) -> tuple[Strip, Int32]:
    """A thread's strip, and its block's number among the rotated ones of the head, negative where it is not one.

    As many warps as a head has blocks own 32 heads: the first ones all blocks that are not rotated, the last ones the
    others.

    Args:
        heads: What is read.
        cta: Of the grid.
        thread: Of the CTA.
        divisors: From `linear_divisors`.
        shape: How the work is cut.
    """
    by_blocks, by_plain, by_rotated, by_heads, by_group = divisors
    many, warp = divmod(cta * shape.warps + thread // WARP, by_blocks)
    rotated = warp >= heads.plain
    place = arith.select(rotated, warp - heads.plain, warp) * WARP + thread % WARP
    plain_head, plain_block = divmod(place, by_plain)
    rotated_head, rotated_block = divmod(place, by_rotated)
    head_row = many * WARP + arith.select(rotated, rotated_head, plain_head)
    block = arith.select(rotated, rotated_block, plain_block - heads.plain)  # counted from the first rotated one
    strip_row, head = divmod(head_row, by_heads)
    group, head_of_group = divmod(head, by_group)
    col = head_of_group * heads.blocks + heads.plain + block
    active = head_row < head_rows(heads, shape)
    return strips.linear_strip(group, strip_row * shape.blocks, col, heads.tokens, heads.cols, active), block


def tiled_place(
    heads: Heads, cta: Int32, thread: Int32, divisors: tuple[cute.FastDivmodDivisorV2, ...], shape: Shape
) -> tuple[Strip, Int32]:
    """The same for 128x4 scales.

    Args:
        heads: What is read.
        cta: Of the grid.
        thread: Of the CTA.
        divisors: Tile rows of a group, CTAs side by side on a tile row, blocks of a head.
        shape: How the work is cut.
    """
    per_entry, across, by_blocks = divisors
    strip = strips.tiled_strip(cta, thread, heads.tokens, heads.cols, per_entry, across, shape)
    _, block = divmod(strip.col, by_blocks)
    return strip, block - heads.plain


@cute.jit
def rotate(
    heads: Constexpr[Heads],
    strip: Constexpr[Strip],
    block: Int32,
    out: Constexpr[Output],
    target: Constexpr[Target],
    blocks: Constexpr[int],
) -> None:
    """Turns (where `block` is not negative), encodes and writes one strip."""
    dtype = heads.o.element_type
    source = strips.blocks_of(heads.o, recipe.words_of_block(dtype))

    def load(row: Int32) -> Words:
        of_group = Int64(row * heads.groups + strip.entry) * strip.cols + strip.col
        return strips.load_words(source, of_group)

    def load_with_position(row: Int32) -> tuple[Words, Int32]:
        return load(row), position(heads, row)

    def as_they_are(words: Words, row: Int32) -> tuple[Words, type[Numeric]]:
        return words, dtype

    def turned(loaded: tuple[Words, Int32], row: Int32) -> tuple[Words, type[Numeric]]:
        words, at = loaded
        cosines, sines = (table_row(table, at, block) for table in (heads.cos, heads.sin))
        return strips.as_bits(turn_back(recipe.values(words, dtype), cosines, sines, target)), Float32

    if block < 0:
        strips.write(strip, load, as_they_are, out, target, blocks)
    else:
        for i in cutlass.range(blocks, unroll=1):  # one at a time, or the tables' rows would take the registers
            strips.write(strip.part(i), load_with_position, turned, out, target, 1)


def position(heads: Heads, row: Int32) -> Int32:
    """Position of a token; one outside of the tables becomes the last one, so that nothing else is read."""
    step = cute.size(heads.positions) // heads.tokens
    at, last = heads.positions[row * step], cute.size(heads.cos, mode=[0]) - 1
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
        scales = _compact(Uint8, (size(), size(), size()), 1)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (o, positions, cos, sin, scalars[0], codes, scales, scalars[1], stream, target, shape)

    function = launch_tiled if scale_layout == "128x4" else launch_linear
    name = f"{scale_layout}_{dtype}_{shape.threads}x{shape.blocks}"
    return KernelSpec(name, target.value, function, arguments, (dtype, scale_layout, *shape))


def _compact(dtype: type[Numeric], shape: tuple[object, ...], align: int) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)


def shape_for(dtype: str, blocks: int) -> Shape:
    """How the work on so many blocks is cut: four a thread only where every SM of an H200 still gets four CTAs."""
    return LARGE if dtype == "bfloat16" and blocks >= 132 * 4 * LARGE.threads * LARGE.blocks else SMALL


def specs(target: Target) -> list[KernelSpec]:
    """Every kernel that `launch.inverse_rope_quant` may ask for."""
    layouts = ("linear", "128x4")
    small = [spec(dtype, scale_layout, SMALL, target) for dtype in DTYPES for scale_layout in layouts]
    return [*small, *(spec("bfloat16", scale_layout, LARGE, target) for scale_layout in layouts)]
