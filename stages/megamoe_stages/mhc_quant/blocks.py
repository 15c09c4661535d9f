"""Quantising a block of 16 normed values and writing it, for the kernels of mhc_quant."""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Boolean, Constexpr, Float32, Int32, Uint8, Uint32, cute

from megamoe.cute import arith, layout, recipe, strips
from megamoe.cute.arith import Target
from megamoe.cute.recipe import Block
from megamoe_stages.mhc_quant.tensors import Inputs, Outputs, Words


@cute.jit
def quantize(
    words: Constexpr[Words],
    row: Int32,
    col: Int32,
    cols: Int32 | int,
    here: Boolean,
    encode: Float32,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
    target: Constexpr[Target],
) -> None:
    """Writes codes and scale of a block of bf16 where it is `here`, at a scale column `col` of `cols`."""
    scale = recipe.regular_global_scale(encode, target)
    block = recipe.encode_block(words, BFloat16, scale, target)
    _store(block, row, col, cols, here, given, out)
    if cutlass.const_expr(not target.native_e2m1):  # noqa: SIM102, the inner condition is the GPU's
        if not (scale.regular & block.regular):  # rare: NaN, infinity or saturation
            exact = recipe.global_scale(encode, target)
            _store(recipe.encode_any_block(words, BFloat16, exact, target), row, col, cols, here, given, out)


@cute.jit
def _store(
    block: Constexpr[Block],
    row: Int32,
    col: Int32,
    cols: Int32 | int,
    here: Boolean,
    given: Constexpr[Inputs],
    out: Constexpr[Outputs],
) -> None:
    stored = layout.tiles(cols) * layout.TILE_COLS  # padding columns of a tile get 0
    at = layout.offset_128x4(row, col, cols)
    if given.tiled == 0:
        stored, at = cols, layout.offset_linear(row, col, cols)
    if here & (col < cols):
        pair = cute.make_rmem_tensor(2, Uint32)
        pair[0], pair[1] = block.low, block.high
        cute.autovec_copy(pair, strips.blocks_of(out.codes, 2)[row * cols + col, None])
    if here & (col < stored):
        strips.flat(out.scales)[at] = Uint8(arith.select(col < cols, block.scale, Uint32(0)))
