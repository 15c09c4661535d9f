"""A warp and a tile of 32 tokens: tokens are the rows of the products, queries times heads their columns.

Scores are K Q^T: every word of a key, eight values, becomes the left operand of two products in the lane that read it. Sums
are V^T P^T: the words of two tokens are interleaved, so that a register has two tokens of one dimension. Each value
is decoded once, in registers. The weights, placed as sums of scores, turn into right operands by a transposition of 8x8.

Row r of product j is token `token_of(r)` + 8j: within a row's four lanes, and for the four tokens of a lane, they are
spread over all banks. A lane is (g, t) = (lane // 4, lane % 4). Scores are in base 2.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, attention_mma, f16
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, HALF, TILE, Shape

LOWEST = -3.0e38  # finite, so that no difference of two is NaN
_SLACK = 8.0  # weights grow to 2^8 before the sums are brought to a larger score; fp16 holds 2^15
_PRODUCTS = TILE // HALF


class Limits(NamedTuple):
    """What the queries of a segment see.

    Attributes:
        start: First token that some query sees.
        end: Tokens that exist, unless on a page that does not.
        position: Token that query 0 is at.
        window: Tokens that a query sees; 0 for all before it.
        group: Heads that share a kv head.
    """

    start: Int32
    end: Int32
    position: Int32
    window: Int32
    group: Int32


def lanes() -> tuple[Int32, Int32]:
    """(g, t)."""
    lane = cute.arch.lane_idx()
    return lane // 4, lane % 4


def token_of(pair: Int32, odd: Int32 | int) -> Int32:
    """The token of row 2 * pair + odd, pair from 0 to 3; row 8 more is 4 tokens more."""
    return pair // 2 * HALF + ((pair % 2) ^ odd) + 2 * odd


def key_words(stage: Uint32, j: int, shape: Shape) -> list[list[list[Uint32]]]:
    """Codes of this lane's blocks of its two tokens: token, block, word."""
    g, t = lanes()
    at = stage + token_of(g // 2, g % 2) * shape.key_codes + t * (8 * shape.key_blocks)
    tokens = []
    wide = 4 if shape.key_blocks % 2 == 0 else 2
    for h in range(2):
        there = at + (4 * h + 8 * j) * shape.key_codes
        words = [w for i in range(0, 2 * shape.key_blocks, wide) for w in f16.load_words(there + 4 * i, wide)]
        tokens.append([words[2 * i : 2 * i + 2] for i in range(shape.key_blocks)])
    return tokens


def key_scales(stage: Uint32, j: int, shape: Shape) -> list[list[Uint32]]:
    """Their scales, two fp16 a word: token, pair of blocks."""
    g, t = lanes()
    at = stage + shape.regions[1] + token_of(g // 2, g % 2) * shape.key_scales + t * shape.key_blocks
    wide = 2 if shape.key_blocks % 2 == 0 else 1
    return [
        [
            f16.scale_pair(f16.load_bytes(at + (4 * h + 8 * j) * shape.key_scales + i, wide))
            for i in range(0, shape.key_blocks, wide)
        ]
        for h in range(2)
    ]


def scores(
    words: list[list[list[Uint32]]], scales: list[list[Uint32]], queries: cute.Tensor, shape: Shape
) -> list[list[Float32]]:
    """One product's tokens against all columns: column block, four values."""
    wide = 2 if shape.key_blocks % 2 == 0 else 1
    sums = [[Float32(0.0)] * 4 for _ in range(shape.column_blocks)]
    for block in range(shape.key_blocks):
        part = (0x1010, 0x3232)[block % wide]
        factors = [arith.permute(scales[h][block // wide], Uint32(0), part, Target.SM90) for h in range(2)]
        for word in range(2):
            rows = [[f16.widen(half) for half in f16.spread(words[h][block][word])] for h in range(2)]
            for step in range(2):
                a = [f16.multiply(rows[h][step][i], factors[h]) for i in range(2) for h in range(2)]
                for n in range(shape.column_blocks):
                    at = (((n * shape.key_blocks + block) * 2 + word) * 2 + step) * 2
                    sums[n] = f16.mma(a, [queries[at], queries[at + 1]], sums[n])
    return sums


def value_words(stage: Uint32, j: int, shape: Shape) -> list[list[Uint32]]:
    """Codes of this lane's dimensions of its four tokens, those of rows 2t, 2t + 1, 2t + 8, 2t + 9: token, word."""
    g, t = lanes()
    tokens = []
    for h in range(2):
        for odd in range(2):
            token = token_of(t, odd) + 4 * h + 8 * j
            at = stage + shape.regions[2] + token * shape.value_codes + t // 2 * shape.padding
            tokens.append(f16.load_words(at + g * (4 * shape.value_words), shape.value_words))
    return tokens


def value_scales(stage: Uint32, j: int, shape: Shape) -> list[Uint32]:
    """Their scales as bytes, of one or two blocks."""
    g, t = lanes()
    at = stage + shape.regions[3] + g * shape.value_words // 2
    count = max(1, shape.value_words // 2)
    return [
        f16.load_bytes(at + (token_of(t, odd) + 4 * h + 8 * j) * shape.value_scales, count)
        for h in range(2)
        for odd in range(2)
    ]


def add_values(
    acc: cute.Tensor,
    words: list[list[Uint32]],
    scales: list[Uint32],
    weights: list[list[Uint32]],
    shape: Shape,
) -> None:
    """Adds one product's tokens to the sums; `weights` are its right operands, of each column block."""
    target = Target.SM90
    factors = [
        [
            f16.scale_pair(arith.permute(scales[2 * h], scales[2 * h + 1], (0x4040, 0x5151)[block], target))
            for h in range(2)
        ]
        for block in range(max(1, shape.value_words // 2))
    ]
    for word in range(shape.value_words):
        factor = factors[word // 2]
        for half, part in enumerate((0x5140, 0x7362)):  # bytes of two tokens in turn
            mixed = [arith.permute(words[2 * h][word], words[2 * h + 1][word], part, target) for h in range(2)]
            pairs = [[f16.widen(upper) for upper in f16.spread(mixed[h])] for h in range(2)]  # even, odd dimensions
            for i in range(2):
                a = [f16.multiply(pairs[h][odd][i], factor[h]) for h in range(2) for odd in range(2)]
                for n in range(shape.column_blocks):
                    at = (((word * 2 + half) * 2 + i) * shape.column_blocks + n) * 4
                    sums = f16.mma(a, weights[n], [acc[at + k] for k in range(4)])
                    for k in range(4):
                        acc[at + k] = sums[k]


@cute.jit
def hide(x: cute.Tensor, tile: Int32, exist: Uint32, factor: cute.Tensor, limits: Constexpr[Limits], shape: Constexpr[Shape]) -> None:
    """Scores of what a column does not see become -inf, once multiplied."""
    g, t = lanes()
    first = tile * TILE + token_of(g // 2, g % 2)
    there = (exist >> Uint32(g // 4) & 1) != 0
    for n in cutlass.range_constexpr(shape.column_blocks):
        for c in cutlass.range_constexpr(2):
            last = limits.position + (n * COLUMNS + 2 * t + c) // limits.group
            none = arith.select(factor[2 * n + c] > Float32(0.0), Float32(-cutlass.Float32.inf), Float32(cutlass.Float32.inf))
            for j in cutlass.range_constexpr(_PRODUCTS):
                for h in cutlass.range_constexpr(2):
                    token = first + 4 * h + 8 * j
                    seen = there & (token <= last) & (token < limits.end)
                    seen = seen & ((limits.window == 0) | (token > last - limits.window))
                    at = (j * shape.column_blocks + n) * 4 + 2 * h + c
                    x[at] = arith.select(seen, x[at], none)


@cute.jit
def clear(scales: cute.Tensor, tile: Int32, exist: Uint32, limits: Constexpr[Limits]) -> None:
    """Scales of values that nobody sees, which may be NaN, become 0."""
    _, t = lanes()
    there = (exist >> Uint32(t // 2) & 1) != 0
    for j in cutlass.range_constexpr(_PRODUCTS):
        for h in cutlass.range_constexpr(2):
            for odd in cutlass.range_constexpr(2):
                token = tile * TILE + token_of(t, odd) + 4 * h + 8 * j
                seen = there & (token >= limits.start) & (token < limits.end)
                at = 4 * j + 2 * h + odd
                scales[at] = arith.select(seen, scales[at], Uint32(0))


@cute.jit
def weigh(
    x: cute.Tensor,
    acc: cute.Tensor,
    top: cute.Tensor,
    total: cute.Tensor,
    factor: cute.Tensor,
    shape: Constexpr[Shape],
) -> None:
    """Scores to weights, in place. Only scores far above the largest so far make the sums follow."""
    target = Target.SM90
    count = shape.column_blocks
    highest = Float32(LOWEST)
    for at in cutlass.range_constexpr(4 * _PRODUCTS * count):
        column = at // 4 % count * 2 + at % 2
        highest = arith.maximum(highest, x[at] * factor[column] - top[column], target)
    if arith.any_lane(highest > Float32(_SLACK), target):
        for column in cutlass.range_constexpr(2 * count):
            n, c = column // 2, column % 2
            most = top[column]
            for j in cutlass.range_constexpr(_PRODUCTS):
                for h in cutlass.range_constexpr(2):
                    most = arith.maximum(most, x[(j * count + n) * 4 + 2 * h + c] * factor[column], target)
            for step in (4, 8, 16):
                most = arith.maximum(most, cute.arch.shuffle_sync_bfly(most, offset=step), target)
            scale = exp2(top[column] - most)
            top[column] = most
            total[column] = total[column] * scale
            for m in cutlass.range_constexpr(4 * shape.value_words):
                for row in cutlass.range_constexpr(2):
                    at = (m * count + n) * 4 + 2 * row + c
                    acc[at] = acc[at] * scale
    for at in cutlass.range_constexpr(4 * _PRODUCTS * count):
        column = at // 4 % count * 2 + at % 2
        x[at] = exp2(x[at] * factor[column] - top[column])
        total[column] = total[column] + x[at]


def operands(x: cute.Tensor, j: int, shape: Shape) -> list[list[Uint32]]:
    """The weights of one product's tokens as right operands, of each column block."""
    count = shape.column_blocks
    return [
        [
            f16.transpose(f16.pack(x[(j * count + n) * 4 + 2 * h], x[(j * count + n) * 4 + 2 * h + 1]))
            for h in range(2)
        ]
        for n in range(count)
    ]
