"""A warp and a tile of 64 tokens: tokens are the rows of the products, queries times heads their columns.

Scores are K Q^T: every word of a key, eight values, becomes the left operand of two products in the lane that read it.
Sums are V^T P^T: the words of two tokens are interleaved, so that a register has two tokens of one dimension. Each
value is decoded once, in registers. The weights, placed as sums are, turn into right operands by transposing 8x8.

Products j = 0 to 3 have 16 tokens each, two and two of them in turn from the same 32, so that what the lanes of a warp
read at a time lies in different banks (values: in two rounds). A lane is (g, t) = (lane // 4, lane % 4). Scores are in
base 2.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, f16, smem
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.warp import WARP, mma
from megamoe_stages.fp4_kv_decode.gqa_shape import COLUMNS, STEP, STEPS, TILE, Shape

INFINITY = float("inf")
LOWEST = -3.0e38  # finite, so that no difference of two is NaN
_SLACK = 8.0  # weights grow to 2^8 before the sums are brought to a larger score; fp16 holds 2^15


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
    """The token of row 2 * pair + odd of the first product, pair from 0 to 3."""
    return pair // 2 * STEP + ((pair % 2) ^ odd) + 2 * odd


def behind(j: int, h: int) -> int:
    """By how many tokens row r + 8h of product j is behind row r of the first."""
    return j // 2 * 2 * STEP + j % 2 * 8 + 4 * h


def load_keys(slot: Uint32, j: int, shape: Shape) -> tuple[list[list[Uint32]], list[list[Uint32]]]:
    """Codes and scale bytes of this lane's blocks of its two tokens."""
    g, t = lanes()
    token = token_of(g // 2, g % 2)
    code_bytes, scale_bytes = shape.key_bytes
    codes_at = slot + token * code_bytes + t * (8 * shape.key_blocks)
    scales_at = slot + TILE * code_bytes + token * scale_bytes + t * shape.key_blocks
    wide, pair = (4, 2) if shape.key_blocks % 2 == 0 else (2, 1)
    codes, scales = [], []
    for h in range(2):
        at = codes_at + behind(j, h) * code_bytes
        codes.append([w for i in range(0, 2 * shape.key_blocks, wide) for w in smem.load_words(at + 4 * i, wide)])
        at = scales_at + behind(j, h) * scale_bytes
        scales.append([smem.load_bytes(at + i, pair) for i in range(0, shape.key_blocks, pair)])
    return codes, scales


def scores(
    codes: list[list[Uint32]], scales: list[list[Uint32]], queries: cute.Tensor, shape: Shape
) -> list[list[Float32]]:
    """One product's tokens against all columns: column block, four values."""
    wide = 2 if shape.key_blocks % 2 == 0 else 1
    sums = [[Float32(0.0)] * 4 for _ in range(shape.column_blocks)]
    pairs = [[f16.scale_pair(s) for s in scales[h]] for h in range(2)]
    for block in range(shape.key_blocks):
        factors = [f16.both_halves(pairs[h][block // wide], upper=block % wide == 1) for h in range(2)]
        for word in range(2):
            rows = [[f16.widen(half) for half in f16.spread(codes[h][2 * block + word])] for h in range(2)]
            for step in range(2):
                a = [f16.multiply(rows[h][step][i], factors[h]) for i in range(2) for h in range(2)]
                for n in range(shape.column_blocks):
                    at = (((n * shape.key_blocks + block) * 2 + word) * 2 + step) * 2
                    sums[n] = mma(a, [queries[at], queries[at + 1]], sums[n], "f16")
    return sums


def load_values(slot: Uint32, j: int, shape: Shape) -> tuple[list[list[Uint32]], list[Uint32]]:
    """Codes and scale bytes of this lane's dimensions of its four tokens, rows 2t, 2t + 1, 2t + 8, 2t + 9."""
    g, t = lanes()
    code_bytes, scale_bytes = shape.value_bytes
    codes_at = slot + g * (4 * shape.value_words)
    scales_at = slot + TILE * code_bytes + g * shape.value_words // 2
    codes, scales = [], []
    for h in range(2):
        for odd in range(2):
            token = token_of(t, odd)
            at = codes_at + token * code_bytes + behind(j, h) * code_bytes
            codes.append(smem.load_words(at, shape.value_words))
            at = scales_at + token * scale_bytes + behind(j, h) * scale_bytes
            scales.append(smem.load_bytes(at, max(1, shape.value_words // 2)))
    return codes, scales


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
                    sums = mma(a, weights[n], [acc[at + k] for k in range(4)], "f16")
                    for k in range(4):
                        acc[at + k] = sums[k]


def exists(pages: Uint32, j: int, half: Int32, shift: Int32) -> cutlass.Boolean:
    """Whether the 16 tokens of a lane in product j lie on a page; `pages` has bit 2i for run i of the tile."""
    place = (j // 2 * 2 + half) >> shift
    return (pages >> Uint32(2 * place) & 1) != 0


@cute.jit
def hide(
    x: cute.Tensor,
    tile: Int32,
    pages: Uint32,
    shift: Int32,
    factor: cute.Tensor,
    limits: Constexpr[Limits],
    shape: Constexpr[Shape],
) -> None:
    """Scores of what a column does not see become -inf, once multiplied."""
    g, t = lanes()
    first = tile * TILE + token_of(g // 2, g % 2)
    for n in cutlass.range_constexpr(shape.column_blocks):
        for c in cutlass.range_constexpr(2):
            last = limits.position + (n * COLUMNS + 2 * t + c) // limits.group
            none = arith.select(factor[2 * n + c] > Float32(0.0), Float32(-INFINITY), Float32(INFINITY))
            for j in cutlass.range_constexpr(STEPS):
                for h in cutlass.range_constexpr(2):
                    token = first + behind(j, h)
                    seen = exists(pages, j, g // 4, shift) & (token <= last) & (token < limits.end)
                    seen = seen & ((limits.window == 0) | (token > last - limits.window))
                    at = (j * shape.column_blocks + n) * 4 + 2 * h + c
                    x[at] = arith.select(seen, x[at], none)


@cute.jit
def clear(
    slot: Uint32, tile: Int32, pages: Uint32, shift: Int32, limits: Constexpr[Limits], shape: Constexpr[Shape]
) -> None:
    """Scales of values that nobody sees, which may be NaN, become 0 in shared memory."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr(TILE // WARP):
        token = i * WARP + lane
        there = pages >> (token // STEP >> shift << 1).to(Uint32) & 1
        place = tile * TILE + token
        if (there == 0) | (place < limits.start) | (place >= limits.end):
            at = slot + TILE * shape.value_bytes[0] + token * shape.value_bytes[1]
            for k in cutlass.range_constexpr(shape.value_bytes[1] // 4):
                smem.store4(Int32(at) + 4 * k, Uint32(0))
    smem.proxy_fence()  # the next copy to this place comes behind
    cute.arch.sync_warp()


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
    above = cute.make_rmem_tensor((4 * STEPS * count,), Float32)
    highest = Int32(0)  # as integers, positive numbers keep their order, and three of them go into one instruction
    for at in cutlass.range_constexpr(4 * STEPS * count):
        column = at // 4 % count * 2 + at % 2
        above[at] = _minus(x[at], factor[column], top[column])
        highest = cutlass.max(highest, above[at].bitcast(Int32))
    if arith.any_lane(highest > Float32(_SLACK).bitcast(Int32), target):
        for column in cutlass.range_constexpr(2 * count):
            n, c = column // 2, column % 2
            most = top[column]
            for j in cutlass.range_constexpr(STEPS):
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
        for at in cutlass.range_constexpr(4 * STEPS * count):
            column = at // 4 % count * 2 + at % 2
            above[at] = _minus(x[at], factor[column], top[column])
    for at in cutlass.range_constexpr(4 * STEPS * count):
        column = at // 4 % count * 2 + at % 2
        x[at] = exp2(above[at])
        total[column] = total[column] + x[at]


def _minus(x: Float32, factor: Float32, top: Float32) -> Float32:
    """x * factor - top, rounded once."""
    minus = arith.ptx(Float32, "neg.f32 $0, $1;", top)
    out: Float32 = arith.ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", x, factor, minus)
    return out


def operands(x: cute.Tensor, j: int, shape: Shape) -> list[list[Uint32]]:
    """The weights of one product's tokens as right operands, of each column block."""
    count = shape.column_blocks
    return [
        [f16.transpose(f16.pack(x[(j * count + n) * 4 + 2 * h], x[(j * count + n) * 4 + 2 * h + 1])) for h in range(2)]
        for n in range(count)
    ]
