"""The projection of mHC's mix: fn in shared memory for good, and its dots with the streams that a warp holds.

fn is the left operand of `mma`, the streams are the right one, whose pairs of registers are the pairs that 16-byte
stores want: with the streams on the left two thirds of the instructions would be moves. fn lies in shared memory in
pieces, CHUNK dims of a stream by all rows, and a piece in parts of 16 bytes a lane, each the left operand of one step:
rows in groups of 8, each split into three terms of bf16 (hi, mid, lo).

    for each half of the dims:  hi0 hi1 | hi2 mid2 | mid0 mid1 | lo0 lo1 | 0 lo2

The tensor core cuts off what it adds. So it sums leading terms over CHUNK dims only, and fp32 additions do the rest;
the other terms are so small that it may sum them to the end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import cutlass
from cutlass import Constexpr, Float32, Int32, Uint32, cute

from megamoe.cute import arith, strips, warp
from megamoe.cute.arith import Target
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.warp import WARP, mma
from megamoe_stages.mhc_quant import narrow_places as places
from megamoe_stages.mhc_quant.narrow_places import CHUNK, GROUP, PARTS, PIECES, UNIT, Place, Shape
from megamoe_stages.mhc_quant.tensors import ROWS, Inputs, Words

BATCH = 2  # pieces that a warp fetches at once: so many loads are in flight
Quads = list[list[Float32]]
Parts = Sequence[Callable[[], Words]]


@cute.jit
def fetch_fn(
    floats: cute.Pointer, given: Constexpr[Inputs], target: Constexpr[Target], shape: Constexpr[Shape]
) -> None:
    """Brings this CTA's slice of fn to shared memory; `places.fn_here` tells when it has come.

    Where only the first team has a group, the others do this while that one reads its streams.
    """
    (cta, _, _), (ctas, _, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    groups = (cute.size(given.f, mode=[0]) + GROUP - 1) // GROUP
    busy = arith.select(groups <= ctas // shape.ctas, Int32(shape.warps), Int32(0))
    wide, lane = warp.warp_number(), warp.thread() % WARP
    step = shape.all_warps - busy
    start = arith.select(wide >= busy, wide - busy, Int32(shape.warps * PIECES))
    for first in cutlass.range(start, shape.warps * PIECES, step * BATCH, unroll=1):
        _fetch_pieces([first + i * step for i in range(BATCH)], floats, lane, cta % shape.ctas, given, target, shape)
    cute.arch.mbarrier_arrive(places.fn_here(floats, shape))  # every thread: racecheck sees no lane speak for others


@cute.jit
def _fetch_pieces(
    pieces: Constexpr[list[Int32]],
    floats: cute.Pointer,
    lane: Int32,
    rank: Int32,
    given: Constexpr[Inputs],
    target: Constexpr[Target],
    shape: Constexpr[Shape],
) -> None:
    loaded = [load_piece(piece, lane, rank, given, shape) for piece in pieces]
    slots = places.rows_of_words(floats, shape.fn_words // 4)
    for i in cutlass.range_constexpr(BATCH):
        if pieces[i] < shape.warps * PIECES:
            for part, words in enumerate(parts_of(loaded[i], target)):
                four = cute.make_rmem_tensor(4, Uint32)
                for k in cutlass.range_constexpr(4):
                    four[k] = words[k]
                cute.autovec_copy(four, slots[slot_of(pieces[i], part, lane), None])


def load_piece(piece: Int32, lane: Int32, rank: Int32, given: Inputs, shape: Shape) -> list[Words]:
    """8 fp32 values of each of a lane's three rows."""
    safe, groups = cutlass.min(piece, shape.warps * PIECES - 1), []
    for group in range(LOGITS // ROWS):
        at, valid = source_of(safe, group, lane, rank, given, shape)
        words = strips.load_words(strips.blocks_of(given.fn, 8), at // 8)
        groups.append(words if shape.whole else [arith.select(valid, word, Uint32(0)) for word in words])
    return groups


def source_of(
    piece: Int32, group: int, lane: Int32, rank: Int32, given: Inputs, shape: Shape
) -> tuple[Int32, cutlass.Boolean]:
    """Where in fn the 8 values of a lane of a row group of a piece lie, and whether there are any; if not, anywhere."""
    hidden = places.hidden_of(given, shape)
    unit, stream, chunk = piece // PIECES, piece // 2 % STREAMS, piece % 2
    h = (rank * shape.warps + unit) * UNIT + chunk * CHUNK + lane % 4 * 8
    valid = h < hidden
    row = group * ROWS + lane // 4
    return row * (STREAMS * hidden) + stream * hidden + arith.select(valid, h, Int32(0)), valid


def slot_of(piece: Int32, part: int, lane: Int32) -> Int32:
    """Which 16 bytes of shared memory hold a lane's part of a piece."""
    return (piece * PARTS + part) * WARP + lane


def parts_of(groups: Sequence[Words], target: Target) -> list[Words]:
    """A lane's parts of a piece, from 8 fp32 values of each of its three rows."""
    terms = []  # [group][term][word]
    for words in groups:
        values = [arith.number(word) for word in words]
        split = [warp.split_bf16(values[i], values[i + 1], target) for i in range(0, 8, 2)]
        terms.append([[pair[term] for pair in split] for term in range(3)])
    nothing = [Uint32(0)] * 4
    rows = [
        (terms[0][0], terms[1][0]),
        (terms[2][0], terms[2][1]),
        (terms[0][1], terms[1][1]),
        (terms[0][2], terms[1][2]),
        (nothing, terms[2][2]),
    ]
    return [[a[i], b[i], a[i + 1], b[i + 1]] for i in (0, 2) for a, b in rows]


def dots(
    streams: list[list[Words]], place: Place, floats: cute.Pointer, target: Target, shape: Shape
) -> list[list[Float32]]:
    """This warp's dots, summed over its lanes.

    Returns:
        For each half of the tokens six sums of a lane (g, q): fn's rows g, g + 8, g + 16 with tokens 2q and 2q + 1.
    """
    zero = Float32(0.0)
    leading, small = [[zero] * 6 for _ in range(2)], [[zero] * 4 for _ in range(2)]
    mixed = [[zero] * 4 for _ in range(2)]  # of row group 2: leading terms over a chunk, then all small ones so far
    slots = places.rows_of_words(floats, shape.fn_words // 4)
    for stream, chunk in itertools.product(range(STREAMS), range(2)):
        cute.arch.sync_warp()  # else the compiler loads more parts ahead than there are registers for
        piece = place.member * PIECES + (stream * 2 + chunk)
        rows = [slots[slot_of(piece, part, place.lane), None] for part in range(PARTS)]
        parts = [functools.partial(_load, row, late=not shape.whole) for row in rows]
        words = [streams[t][stream][chunk * 4 : chunk * 4 + 4] for t in range(2)]
        short, small, mixed = _chunk(parts, words, small, mixed)
        for t in range(2):
            leading[t] = _added(leading[t], [*short[t], *mixed[t][:2]], target)
            mixed[t] = [zero, zero, *mixed[t][2:]]
    return [_added(leading[t], [*small[t], *mixed[t][2:]], target) for t in range(2)]


def _chunk(parts: Parts, words: list[Words], small: Quads, mixed: Quads) -> tuple[Quads, Quads, Quads]:
    """Leading sums of row groups 0 and 1 over a chunk; `small` and `mixed` with the chunk's added."""
    short = [[Float32(0.0)] * 4 for _ in range(2)]
    for half in range(2):
        right = [words[t][half * 2 : half * 2 + 2] for t in range(2)]
        hi, last, mid, lo, last_lo = parts[half * 5 : half * 5 + 5]
        small = _multiplied(lo, right, small)
        mixed = _multiplied(last_lo, right, mixed)
        small = _multiplied(mid, right, small)
        mixed = _multiplied(last, right, mixed)
        short = _multiplied(hi, right, short)
    return short, small, mixed


def _multiplied(part: Callable[[], Words], right: list[Words], sums: Quads) -> Quads:
    left = part()
    return [mma(left, right[t], sums[t]) for t in range(2)]


def squares(streams: list[list[Words]], target: Target) -> list[list[Float32]]:
    """The squares of this warp's two tokens summed over its dims.

    They are a diagonal of the streams times themselves. A token's four words as left operand are words 0 and 2 in rows
    below 8 and words 1 and 3 in the others; so each pair is the right operand once.

    Returns:
        Two values of each token: in a lane (g, q) with g = 2q + i the i-th is the sum, the others are nothing.
    """
    zero = [Float32(0.0)] * 4
    sums = [[zero, zero], [zero, zero]]
    for t, stream, chunk, pair in itertools.product(range(2), range(STREAMS), range(2), range(2)):
        words = streams[t][stream][chunk * 4 : chunk * 4 + 4]
        sums[t][pair] = mma(words, [words[pair], words[pair + 2]], sums[t][pair])
    return [_added(sums[t][0][:2], sums[t][1][2:], target) for t in range(2)]


def _load(row: cute.Tensor, *, late: bool) -> Words:
    if late:
        cute.arch.sync_warp()
    four = cute.make_rmem_tensor(4, Uint32)
    cute.autovec_copy(row, four)
    return [four[i] for i in range(4)]


def _added(a: Sequence[Float32], b: Sequence[Float32], target: Target) -> list[Float32]:
    return [arith.add(*pair, target) for pair in zip(a, b, strict=True)]
