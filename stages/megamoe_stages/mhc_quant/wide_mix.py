"""The projection of mHC's mix in the kernel for many hidden dims: fn as two terms of bf16, on the left of `mma`.

The two terms keep 16 significant bits of fn (TF32 keeps 11), in the 4 bytes that fp32 takes. A lane's share of a
stream's eights is six parts, each the left operand of one step (rows of fn in groups of 8):

    for each half of the eight:  hi0 hi1 | hi2 lo2 | lo0 lo1

The streams are the right operand: the words of a thread's eight, in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32

from megamoe.cute import arith, warp
from megamoe.cute.arith import Target
from megamoe_stages.mhc_quant.tensors import Words

Quads = list[list[Float32]]


def parts_of(groups: Sequence[Words], target: Target) -> list[Words]:
    """A lane's parts of a piece, from 8 fp32 values of each of its three rows."""
    terms = []  # [group][term][word]
    for words in groups:
        values = [arith.number(word) for word in words]
        split = [warp.split_bf16(values[i], values[i + 1], target)[:2] for i in range(0, 8, 2)]
        terms.append([[pair[term] for pair in split] for term in range(2)])
    rows = [(terms[0][0], terms[1][0]), (terms[2][0], terms[2][1]), (terms[0][1], terms[1][1])]
    return [[a[i], b[i], a[i + 1], b[i + 1]] for i in (0, 2) for a, b in rows]


def dots(sums: list[Quads], target: Target) -> list[list[Float32]]:
    """This warp's dots: for each half of the tokens six, rows g, g + 8, g + 16 of fn with tokens 2q and 2q + 1."""
    found = []
    for leading, mixed, small in sums:
        found.append([*_added(leading, small, target), *_added(mixed[:2], mixed[2:], target)])
    return found


def squares(streams: list[Words], row: Int32, target: Target) -> Float32:
    """The squares of a token's streams over a chunk, in the lane with q = g // 2 of its four.

    They are a diagonal of each word times itself: even words in the upper half of a product, odd ones in the lower.
    """
    even, odd = [Float32(0.0)] * 4, [Float32(0.0)] * 4
    for words in streams:
        for i in (0, 2):
            even = warp.mma_k8(words[i : i + 2], words[i], even)
            odd = warp.mma_k8(words[i : i + 2], words[i + 1], odd)
    first, second = _added(even[:2], odd[2:], target)
    return arith.select(row % 2 == 0, first, second)


def _added(a: Sequence[Float32], b: Sequence[Float32], target: Target) -> list[Float32]:
    return [arith.add(*pair, target) for pair in zip(a, b, strict=True)]
