"""Softmax of tiles of scores in registers, each tile after the ones before (sm_90a).

Scores lie as `wgmma` leaves them: of each 8 columns a lane has two of row g and two of row g + 8, in that order, so the
two rows of a lane are the pairs (4 i, 4 i + 1) and (4 i + 2, 4 i + 3). A lane keeps the largest score of each of its
rows, the same in four neighbouring lanes, and its own part of the sum. `factor` turns scores into base-2 logarithms; it
is positive, so the largest score stays the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, cute

from megamoe.cute import arith, asm, attention_mma
from megamoe.cute.arith import Target
from megamoe.cute.warp import sum_of_four

HIDDEN = float("-inf")
LN2 = math.log(2)
LOG2E = 1 / LN2
_CHAINS = 4  # of maxima and sums, so that they do not wait for each other


def own_rows(scores: list[Float32], half: int) -> list[Float32]:
    """The scores of one of a lane's two rows."""
    return [scores[i + j] for i in range(2 * half, len(scores), 4) for j in range(2)]


@cute.jit
def hide(
    scores: cute.Tensor,  # (n / 2,) fp32
    start: Int32,
    limits: Constexpr[list[Int32]],
    after: Constexpr[bool],
) -> None:
    """Makes the scores of keys that a row does not see HIDDEN.

    Args:
        scores: Of keys from `start` on.
        start: The first key.
        limits: For each of the lane's two rows the first key that it sees, or the first one that it does not.
        after: Which of the two.
    """
    column = start + 2 * (cute.arch.lane_idx() % 4)
    for half in cutlass.range_constexpr(2):
        limit = limits[half] - column
        for i in cutlass.range_constexpr(cute.size(scores) // 4):
            for j in cutlass.range_constexpr(2):
                at = 4 * i + 2 * half + j
                visible = 8 * i + j < limit if cutlass.const_expr(after) else 8 * i + j >= limit
                scores[at] = arith.select(visible, scores[at], Float32(HIDDEN))


@cute.jit
def hide_masked(
    scores: cute.Tensor,  # (n / 2,) fp32
    start: Int32,
    rows: Constexpr[list[Int64]],
    ends: Constexpr[list[Int32]],
) -> None:
    """Makes the scores of keys that a mask hides HIDDEN.

    Args:
        scores: Of keys from `start` on.
        start: The first key.
        rows: Where the bytes of the mask start for each of the lane's two rows, 0 for a hidden key.
        ends: The first key of each that has no byte, or is hidden anyway; nothing is read from there on.
    """
    column = start + 2 * (cute.arch.lane_idx() % 4)
    for half in cutlass.range_constexpr(2):
        at, limit = rows[half] + column, ends[half] - column
        for i in cutlass.range_constexpr(cute.size(scores) // 4):
            for j in cutlass.range_constexpr(2):
                place = 4 * i + 2 * half + j
                byte = _byte_if(at + (8 * i + j), 8 * i + j < limit)
                scores[place] = arith.select(byte != 0, scores[place], Float32(HIDDEN))


def _byte_if(at: Int64, condition: Boolean) -> Uint32:
    """A byte of global memory where the condition holds, else 0; no branch."""
    text = (
        "{.reg .pred p; .reg .b16 h; setp.ne.s32 p, $2, 0; mov.b16 h, 0;"
        " @p ld.global.nc.u8 h, [$1]; cvt.u32.u16 $0, h;}"
    )
    return Uint32(asm.value(Uint32, text, at, asm.flag(condition), effects=False))


def finite(top: Float32) -> Float32:
    """What to subtract from scores of which `top` is the largest, so that no score at all gives no NaN."""
    return Float32(arith.select(top == Float32(HIDDEN), Float32(0.0), top))


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """RN(a * b + c)."""
    return Float32(arith.ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", a, b, c))


def tops_of(scores: list[Float32], top: list[Float32]) -> list[Float32]:
    """The largest scores so far, of which `top` are those before these scores."""
    largest = []
    for half in range(2):
        own = _tree(own_rows(scores, half), lambda a, b: arith.maximum(a, b, Target.SM90))
        largest.append(attention_mma.max_of_four(arith.maximum(top[half], own, Target.SM90)))
    return largest


def step(
    scores: list[Float32], top: list[Float32], largest: list[Float32], total: list[Float32], factor: Float32
) -> tuple[list[Float32], list[Float32], list[Float32]]:
    """Takes in a tile of scores.

    Args:
        scores: (n / 2) values of a lane.
        top: What weights so far are relative to, for each row; HIDDEN at first.
        largest: What they are to be relative to from now on, such as `tops_of`.
        total: A lane's part of each row's sum so far.
        factor: Positive.

    Returns:
        The weights, placed as the scores; by what sums so far shrink, for each row; total.
    """
    weights = list(scores)
    shrink, totals = [], []
    for half in range(2):
        own = own_rows(scores, half)
        zero = arith.mul(finite(largest[half]), factor, Target.SM90)
        minus = arith.ptx(Float32, "neg.f32 $0, $1;", zero)
        before = arith.mul(top[half], factor, Target.SM90)  # rounded as `zero` was then: exactly 1 for the same top
        shrink.append(attention_mma.exp2(arith.add(before, minus, Target.SM90)))
        powers = [attention_mma.exp2(fma(score, factor, minus)) for score in own]
        added = _tree(powers, lambda a, b: arith.add(a, b, Target.SM90))
        totals.append(fma(total[half], shrink[half], added))
        for i, power in enumerate(powers):
            weights[i // 2 * 4 + 2 * half + i % 2] = power
    return weights, shrink, totals


def _tree(values: list[Float32], join: Callable[[Float32, Float32], Float32]) -> Float32:
    """All values joined, by a few chains."""
    chains = values[:_CHAINS]
    for i, value in enumerate(values[_CHAINS:]):
        chains[i % _CHAINS] = join(chains[i % _CHAINS], value)
    while len(chains) > 1:
        chains = [join(*chains[i : i + 2]) if i + 1 < len(chains) else chains[i] for i in range(0, len(chains), 2)]
    return chains[0]


def left_operands(weights: list[Float32], dtype: str) -> list[Uint32]:
    """Weights as left operands of products: four words for each 16 columns, rounded to "bf16" or "f16"."""
    text = f"cvt.rn.{dtype}x2.f32 $0, $2, $1;"
    return [Uint32(arith.ptx(Uint32, text, weights[i], weights[i + 1])) for i in range(0, len(weights), 2)]


def finish(top: Float32, total: Float32, factor: Float32, sink: Float32) -> tuple[Float32, Float32]:
    """By what a row's sums are to be multiplied, and its log-sum-exp, from a lane's largest score and part of the sum.

    Args:
        top: Largest score.
        total: This lane's part.
        factor: As in `step`.
        sink: A logit in natural units that takes part in the denominator only; HIDDEN for none.

    Returns:
        0 and -inf for a row that saw nothing.
    """
    whole = sum_of_four(total, Target.SM90)
    zero = arith.mul(finite(top), factor, Target.SM90)
    minus = arith.ptx(Float32, "neg.f32 $0, $1;", zero)
    with_sink = whole + attention_mma.exp2(fma(sink, Float32(LOG2E), minus))
    some = whole > Float32(0.0)
    scale = arith.select(some, arith.reciprocal(with_sink, Target.SM90), Float32(0.0))
    lse = arith.select(some, (zero + attention_mma.log2(whole)) * Float32(LN2), Float32(HIDDEN))
    return scale, lse
