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
Words = list[Uint32]


def fma(a: Float32, b: Float32, c: Float32, target: Target) -> Float32:
    """a * b + c, on a GPU rounded once."""
    return a * b + c if target.host else ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def post_mix(x: Sequence[Uint32], f: Uint32, post: Sequence[Float32], comb: Sequence[Float32], target: Target) -> Words:
    """The new streams of two neighbouring hidden dims, x'_j = post_j f + sum_i comb_ij x_i, rounded to bf16.

    Args:
        x: A word of two bf16 of every stream.
        f: The word of the sublayer's output.
        post: STREAMS values.
        comb: STREAMS * STREAMS values, from stream (row) to stream (column).
        target: What to compile for.

    Returns:
        A word of every new stream.
    """
    old, added = [bf16.unpack(word) for word in x], bf16.unpack(f)

    def mixed(j: int, half: int) -> Float32:
        start = arith.mul(post[j], added[half], target)
        return functools.reduce(
            lambda acc, i: fma(comb[i * STREAMS + j], old[i][half], acc, target), range(STREAMS), start
        )

    return [bf16.pack(mixed(j, 0), mixed(j, 1), target) for j in range(STREAMS)]


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
def sinkhorn(
    comb: cute.Tensor,
    iters: Int32,
    eps: Float32,
    over_lanes: Constexpr[Callable[[Float32], Float32]],
    target: Constexpr[Target],
) -> None:
    """Replaces logits by the nearly doubly stochastic matrix of `numerics.mhc.sinkhorn`.

    Args:
        comb: Registers (rows, STREAMS), the rows of the matrix that this thread holds.
        iters: Number of column normalisations, at least 1.
        eps: Added to the softmax and to every sum.
        over_lanes: Sums a value over the threads that hold the other rows, to the same bits in each.
        target: What to compile for.
    """
    rows = comb.shape[0]
    for r in cutlass.range_constexpr(rows):
        _softmax_row(comb, r, eps, target)
    _normalise_columns(comb, eps, over_lanes, target)
    for _ in cutlass.range(iters - 1, unroll=1):
        for r in cutlass.range_constexpr(rows):
            _scale_row(comb, r, _inverse([comb[r, c] for c in range(STREAMS)], eps, target), target)
        _normalise_columns(comb, eps, over_lanes, target)


def _softmax_row(comb: cute.Tensor, r: int, eps: Float32, target: Target) -> None:
    row = [comb[r, c] for c in range(STREAMS)]
    top = functools.reduce(lambda a, b: arith.select((b > a) | arith.is_nan(b), b, a), row)
    powers = [cute.math.exp(value - top) for value in row]
    inverse = arith.reciprocal(_sum(powers, target), target)
    for c in range(STREAMS):
        comb[r, c] = arith.add(arith.mul(powers[c], inverse, target), eps, target)


def _normalise_columns(
    comb: cute.Tensor, eps: Float32, over_lanes: Callable[[Float32], Float32], target: Target
) -> None:
    rows = range(comb.shape[0])
    sums = [over_lanes(_sum([comb[r, c] for r in rows], target)) for c in range(STREAMS)]
    for c in range(STREAMS):
        inverse = _inverse([sums[c]], eps, target)
        for r in rows:
            comb[r, c] = arith.mul(comb[r, c], inverse, target)


def _scale_row(comb: cute.Tensor, r: int, factor: Float32, target: Target) -> None:
    for c in range(STREAMS):
        comb[r, c] = arith.mul(comb[r, c], factor, target)


def _inverse(values: Sequence[Float32], eps: Float32, target: Target) -> Float32:
    return arith.reciprocal(arith.add(_sum(values, target), eps, target), target)


def _sum(values: Sequence[Float32], target: Target) -> Float32:
    """In pairs, so that the longest chain is short."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return arith.add(_sum(values[:half], target), _sum(values[half:], target), target)
