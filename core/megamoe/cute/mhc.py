"""The arithmetic of mHC for kernels, as `megamoe.numerics.mhc` defines it, on what one thread holds.

Sums are fused multiply-adds; the bits differ from the definition's by the order of the sums only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import cutlass
from cutlass import Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, bf16
from megamoe.cute.arith import Target, ptx

STREAMS = 4
LOGITS = STREAMS * (STREAMS + 2)
POST_MULTIPLIER = 2.0
_ROWS = [[(r, c) for c in range(STREAMS)] for r in range(STREAMS)]
_COLUMNS = [[(r, c) for r in range(STREAMS)] for c in range(STREAMS)]
_LEAST = (
    2.0**-126
)  # sums that have a normal reciprocal; beside an eps that is smaller no other sum shows the difference
Words = list[Uint32]


def fma(a: Float32, b: Float32, c: Float32, target: Target) -> Float32:
    """a * b + c, on a GPU rounded once."""
    return a * b + c if target.host else ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def post_mix(
    sources: Sequence[Sequence[Uint32]], factors: Callable[[int], Sequence[Float32]], target: Target
) -> list[Words]:
    """The new streams of some hidden dims, x'_j = post_j f + sum_i comb_ij x_i, rounded to bf16.

    Args:
        sources: Words of two bf16: those of the sublayer's output, then those of every stream.
        factors: Gives STREAMS values, what a source is multiplied by in each new stream: row 0 is post, the others are
            comb's, from stream (row) to stream (column). Asked for one row ahead.
        target: What to compile for.

    Returns:
        Words of every new stream.
    """
    sums: list[list[list[Float32]]] = []  # [new stream][word][half]
    ahead = factors(0)
    for i, words in enumerate(sources):
        row, values = ahead, [bf16.unpack(word) for word in words]
        ahead = factors(i + 1) if i < STREAMS else ()
        if not i:
            sums = [[[arith.mul(factor, value, target) for value in pair] for pair in values] for factor in row]
        else:
            sums = [
                [
                    [fma(factor, *at, target) for at in zip(*pairs, strict=True)]
                    for pairs in zip(values, old, strict=True)
                ]
                for factor, old in zip(row, sums, strict=True)
            ]
    return [[bf16.pack(low, high, target) for low, high in stream] for stream in sums]


def collapse(x: Sequence[Uint32], pre: Sequence[Float32], target: Target) -> Uint32:
    """A sublayer's input before its norm, sum_i pre_i x_i, of two neighbouring hidden dims, rounded to bf16."""
    streams = [bf16.unpack(word) for word in x]

    def summed(half: int) -> Float32:
        start = arith.mul(pre[0], streams[0][half], target)
        return functools.reduce(lambda acc, i: fma(pre[i], streams[i][half], acc, target), range(1, STREAMS), start)

    return bf16.pack(summed(0), summed(1), target)


def add_squares(word: Uint32, total: Float32, target: Target) -> Float32:
    """`total` plus the squares of a word's two values."""
    low, high = bf16.unpack(word)
    return fma(high, high, fma(low, low, total, target), target)


def normalise(word: Uint32, factor: Float32, weights: Sequence[Float32], target: Target) -> Uint32:
    """A word of y times 1 / rms(y), times the weights, rounded to bf16."""
    low, high = (arith.mul(value, factor, target) for value in bf16.unpack(word))
    return bf16.pack(arith.mul(low, weights[0], target), arith.mul(high, weights[1], target), target)


def inverse_rms(squares: Float32, count: Int32 | int, eps: Float32, target: Target) -> Float32:
    """1 / sqrt(squares / count + eps)."""
    inverse = Float32(1 / count) if isinstance(count, int) else arith.reciprocal_in_range(Float32(count), target)
    mean = arith.add(arith.mul(squares, inverse, target), eps, target)
    return cute.math.rsqrt(mean)


def logit(dot: Float32, factor: Float32, scale: Float32, base: Float32, target: Target) -> Float32:
    """dot * factor * scale + base."""
    return arith.add(arith.mul(arith.mul(dot, factor, target), scale, target), base, target)


def sigmoid(x: Float32, target: Target) -> Float32:
    """1 / (1 + exp(-x))."""
    return arith.reciprocal(arith.add(cute.math.exp(Float32(0.0) - x), Float32(1.0), target), target)


@cute.jit
def sinkhorn(comb: cute.Tensor, iters: Int32, eps: Float32, target: Constexpr[Target]) -> None:
    """Replaces logits by the nearly doubly stochastic matrix of `numerics.mhc.sinkhorn`.

    One thread does it: its sums need no exchange, and their chain is short.

    Args:
        comb: Registers (STREAMS, STREAMS), the whole matrix.
        iters: Number of column normalisations, at least 1.
        eps: Added to the softmax and to every sum.
        target: What to compile for.
    """
    rows = [[comb[r, c] for c in range(STREAMS)] for r in range(STREAMS)]
    for r, row in enumerate(rows):
        for c, value in enumerate(_softmax(row, eps, target)):
            comb[r, c] = value
    least = arith.maximum(eps, Float32(_LEAST), target)
    _normalise(comb, _COLUMNS, least, target)
    for _ in cutlass.range(iters - 1, unroll=1):
        _normalise(comb, _ROWS, least, target)
        _normalise(comb, _COLUMNS, least, target)


def _softmax(row: Sequence[Float32], eps: Float32, target: Target) -> list[Float32]:
    top = functools.reduce(lambda a, b: arith.select((b > a) | arith.is_nan(b), b, a), row)
    powers = [cute.math.exp(value - top) for value in row]
    inverse = arith.reciprocal_in_range(_sum(powers, target), target)  # of 1 to STREAMS, or NaN
    return [arith.add(arith.mul(power, inverse, target), eps, target) for power in powers]


def _normalise(
    comb: cute.Tensor,
    lines: Sequence[Sequence[tuple[int, int]]],
    eps: Float32,
    target: Target,
) -> None:
    """Divides the values of each line, a row or a column, by their sum plus eps."""
    sums = [_sum([comb[at] for at in line], target) for line in lines]
    factors = [arith.reciprocal_in_range(arith.add(total, eps, target), target) for total in sums]
    for line, factor in zip(lines, factors, strict=True):
        for at in line:
            comb[at] = arith.mul(comb[at], factor, target)


def _sum(values: Sequence[Float32], target: Target) -> Float32:
    """In pairs, so that the longest chain is short."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return arith.add(_sum(values[:half], target), _sum(values[half:], target), target)
