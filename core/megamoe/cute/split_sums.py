"""Adds up the sums of the CTAs that share the k of a piece of `weight_gemm`, through global memory.

A warp of consumers leaves its sums there and counts itself; the last of those with the same weight rows adds all up, in
the order of k. No CTA waits for another, and the counters are zeros again afterwards.
"""

from __future__ import annotations

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, asm, gmem
from megamoe.cute.arith import Target
from megamoe.cute.warp import WARP
from megamoe.cute.weight_pieces import CONSUMER_WARPS, Operands, Shape, share_of, warp_of_consumers

_ASKED = 16  # times 16 bytes of others' sums that a thread asks for before it waits


def sums_bytes(shape: Shape) -> int:
    """Of one CTA's sums of a piece, of any width."""
    return CONSUMER_WARPS * WARP * shape.tiles * shape.tokens * 2


@cute.jit
def gather(
    acc: cute.Tensor,
    number: Int32,
    valid: Int32,
    width: Constexpr[int],
    operands: Constexpr[Operands],
    shape: Constexpr[Shape],
) -> Boolean:
    """Leaves a warp's sums in global memory; if those of all parts are there, adds them up in the order of k.

    Returns:
        Whether acc holds the sums of all k now.
    """
    lane, warp = cute.arch.lane_idx(), warp_of_consumers()
    part, parts = share_of(shape, operands)
    groups, run = width // 8, CONSUMER_WARPS * WARP * 16  # bytes of four sums of each thread
    size = Int64(sums_bytes(shape))
    first = asm.address(operands.sums) + Int64(number * parts) * size + (warp * WARP + lane) * 16
    mine = first + part * size
    for c in cutlass.range_constexpr(groups):
        for t in cutlass.range_constexpr(shape.tiles):
            words = [arith.bits(acc[t, c * 4 + i]) for i in range(4)]
            there = asm.flag(c * 8 < valid)
            gmem.store16_if(mine + (c * shape.tiles + t) * run, words, there)
    cute.arch.sync_warp()
    before = Int32(0)
    if lane == 0:
        place = asm.address(operands.arrived) + (number * CONSUMER_WARPS + warp) * 4
        before = gmem.count_round(place, parts - 1)
    last = cute.arch.shuffle_sync(before, 0) == parts - 1
    cute.arch.sync_warp()
    if last:
        if parts == 2:
            _add_other(acc, first + (1 - part) * size, valid, width, run, shape)
        else:
            _add_all(acc, first, parts, size, valid, width, run, shape)
    return last


def _chunks(width: int, shape: Shape) -> list[list[tuple[int, int]]]:
    """(tile, group of 8 tokens) of all sums, in runs that are asked for together."""
    step = max(1, _ASKED // 2 // shape.tiles)
    groups = range(width // 8)
    return [[(t, g) for g in groups[c : c + step] for t in range(shape.tiles)] for c in range(0, len(groups), step)]


@cute.jit
def _add_other(
    acc: cute.Tensor,
    other: Int64,
    valid: Int32,
    width: Constexpr[int],
    run: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Adds the sums of the other of two parts: a + b is b + a."""
    for here in _chunks(width, shape):
        if here[0][1] * 8 < valid:
            found = _sums_at(other, here, run, shape)
            for j, (t, g) in enumerate(here):
                for i in cutlass.range_constexpr(4):
                    acc[t, g * 4 + i] = arith.add(acc[t, g * 4 + i], found[j][i], Target.SM90)


@cute.jit
def _add_all(
    acc: cute.Tensor,
    first: Int64,
    parts: Int32,
    size: Int64,
    valid: Int32,
    width: Constexpr[int],
    run: Constexpr[int],
    shape: Constexpr[Shape],
) -> None:
    """Replaces the sums by those of all parts, added up in the order of k."""
    for here in _chunks(width, shape):
        for t, g in here:
            for i in cutlass.range_constexpr(4):
                acc[t, g * 4 + i] = Float32(0.0)  # not needed any more, whoever is valid
        if here[0][1] * 8 < valid:
            at_once = max(1, _ASKED // len(here))  # parts
            total = cute.make_rmem_tensor((len(here), 4), Float32)
            total.fill(0.0)
            for start in cutlass.range(0, parts, at_once, unroll=1):
                found = [
                    _sums_at(first + cutlass.min(start + p, parts - 1) * size, here, run, shape) for p in range(at_once)
                ]
                for p in cutlass.range_constexpr(at_once):
                    for j in cutlass.range_constexpr(len(here)):
                        for i in cutlass.range_constexpr(4):
                            more = arith.add(total[j, i], found[p][j][i], Target.SM90)
                            total[j, i] = arith.select(start + p < parts, more, total[j, i])
            for j, (t, g) in enumerate(here):
                for i in cutlass.range_constexpr(4):
                    acc[t, g * 4 + i] = total[j, i]


def _sums_at(at: Int64, here: list[tuple[int, int]], run: int, shape: Shape) -> list[list[Float32]]:
    """A part's sums of some tiles and groups of tokens."""
    words = [gmem.load16(at + (g * shape.tiles + t) * run) for t, g in here]
    return [[arith.number(word) for word in four] for four in words]
