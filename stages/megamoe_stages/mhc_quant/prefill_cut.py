"""Who owns what in the mhc_quant kernel for many tokens: tokens, hidden dims and shared memory.

A cluster has a batch of some groups of 16 tokens at a time. In the first half each of its CTAs has a slice of the
hidden dims of all of them, and goes through it tile by tile: all tokens of the batch, some hidden dims. Where the new
streams are made, a warp has whole rows of the tile: 256 hidden dims in all, 8 a lane, of one token or of two, and
then those of its next tokens. Where they are multiplied with fn, a warp has CHUNK hidden dims of one group, and then
of the same group again: a lane (g, q) = (lane // 4, lane % 4) the eight number q of tokens g and g + 8.
In the second half each CTA owns some of the tokens, and a warp has whole tokens, one after the other, in runs of 256
hidden dims, 8 of each a lane.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute

from megamoe.cute import exchange, warp
from megamoe.cute.mhc import STREAMS
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant.places import CHUNK, FACTORS, GROUP, Inputs

PARTS = 6  # of a piece of fn, see `prefill_mix`
WORD = 4  # bytes
LINE = 16  # bytes that a thread moves at once
RUN = 256  # hidden dims of a warp in the second half, 8 a lane
AHEAD = 4  # runs that it loads at once
BARRIER = 8  # bytes
WARPS = 8  # of a CTA
MESSAGE = 28  # floats of a token's sums of a warp: LOGITS dots, the squares, padding
PIECE = PARTS * WARP * LINE  # bytes of fn for CHUNK hidden dims of a stream


class Cut(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        hidden: Hidden dims.
        ctas: Of a cluster.
        groups: Of GROUP tokens, in a batch.
        wide: Hidden dims of a tile: RUN, or half of it.
        stages: Tiles for which fn finds room in shared memory.
    """

    hidden: int
    ctas: int
    groups: int
    wide: int
    stages: int

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return WARPS * WARP

    @property
    def batch(self) -> int:
        """Tokens that a cluster has at a time."""
        return self.groups * GROUP

    @property
    def owned(self) -> int:
        """Of them a CTA's own in the second half."""
        return self.batch // self.ctas

    @property
    def across(self) -> int:
        """Warps that share a group when its streams are multiplied with fn."""
        return WARPS // self.groups

    @property
    def chunks(self) -> int:
        """That a warp multiplies with fn in a tile."""
        return self.wide // (CHUNK * self.across)

    @property
    def tiles(self) -> int:
        """Of a CTA's slice of the hidden dims."""
        return self.hidden // (self.ctas * self.wide)

    @property
    def lanes(self) -> int:
        """That share a token of a tile when its streams are made."""
        return self.wide // 8

    @property
    def steps(self) -> int:
        """In which a warp goes through its tokens of a tile then."""
        return self.batch * self.lanes // self.threads

    @property
    def fn_bytes(self) -> int:
        """Of fn for a tile."""
        return self.wide // CHUNK * STREAMS * PIECE

    @property
    def runs(self) -> int:
        """Of a token."""
        return self.hidden // RUN

    @property
    def factors_at(self) -> int:
        """Where post and comb of two batches lie, after fn."""
        return self.stages * self.fn_bytes

    @property
    def sums_at(self) -> int:
        """Where the sums of a CTA's own tokens arrive, of two batches: (owned, ctas, across, MESSAGE)."""
        return self.factors_at + 2 * self.batch * FACTORS * WORD

    @property
    def sums_bytes(self) -> int:
        """Of one batch."""
        return self.owned * self.ctas * self.across * MESSAGE * WORD

    @property
    def tile_at(self) -> int:
        """Where a tile of new streams lies: (STREAMS, batch, wide) bf16. In the second half y of each warp's token."""
        return self.sums_at + 2 * self.sums_bytes

    @property
    def barriers_at(self) -> int:
        """mbarriers: for each stage one for its arrival, then one for having been read."""
        return self.tile_at + max(STREAMS * self.batch * self.wide, WARPS * self.hidden) * 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.barriers_at + 2 * self.stages * BARRIER


class Spot(NamedTuple):
    """Where a thread stands.

    Attributes:
        rank: Of its CTA in the cluster.
        warp: Of its CTA.
        lane: Of its warp.
        group: First half: which group of the batch its warp multiplies with fn.
        member: First half: of the warps that share the group.
    """

    rank: Int32
    warp: Int32
    lane: Int32
    group: Int32
    member: Int32

    @property
    def row(self) -> Int32:
        """First half: its tokens in the group are row and row + 8."""
        return self.lane // 4

    @property
    def quad(self) -> Int32:
        """First half: 0..3, its place among the lanes of a row."""
        return self.lane % 4


def spot(cut: Cut) -> Spot:
    """The thread's spot, computed anew for every part of the work, so that nothing of it waits in registers.

    The whole warp comes here.
    """
    wide, thread = warp.warp_number(), warp.thread()
    return Spot(rank_of(cut), wide, thread % WARP, wide // cut.across, wide % cut.across)


def rank_of(cut: Cut) -> Int32:
    """Of the CTA in its cluster."""
    return cute.arch.block_idx()[0] % cut.ctas


def clusters(cut: Cut) -> Int32:
    """Of the launch: from one batch of a cluster to the next."""
    return cute.arch.grid_dim()[0] // cut.ctas


def tokens_of(given: Inputs) -> Int32:
    """Number of tokens."""
    return cute.size(given.f, mode=[0])


def place_of(step: Int32 | int, here: Spot, cut: Cut) -> Int32:
    """Which token of the batch a thread makes new streams of in a step."""
    return here.warp * (cut.batch // WARPS) + step * (WARP // cut.lanes) + here.lane // cut.lanes


def first_half(tensor: cute.Tensor, streams: int, row: Int32, tile: Int32, here: Spot, cut: Cut) -> Int64:
    """Address of a thread's line of a bf16 tensor (tokens, streams, H), in stream 0."""
    dims = (here.rank * cut.tiles + tile) * cut.wide + here.lane % cut.lanes * 8
    return exchange.global_address(tensor) + (Int64(row) * (streams * cut.hidden * 2) + Int64(dims * 2))


def second_half(tensor: cute.Tensor, streams: int, row: Int32, here: Spot, cut: Cut) -> Int64:
    """Address of a lane's line of a bf16 tensor (tokens, streams, H), in stream 0 and run 0."""
    return exchange.global_address(tensor) + (Int64(row) * (streams * cut.hidden * 2) + Int64(here.lane * LINE))


def in_tile(base: Int32, place: Int32, eight: Int32, cut: Cut) -> Int32:
    """Where a token's eight hidden dims of a tile lie in shared memory, in stream 0.

    Halves of 128 bytes are swapped for every other token, so that the lanes (g, q) find no bank twice.
    """
    return base + cut.tile_at + (place * cut.lanes + (eight ^ (place & 1) << 2)) * LINE


def sums_of(base: Int32, own: Int32 | int, parity: Int32, cut: Cut) -> Int32:
    """Where the sums of one of a CTA's own tokens arrive."""
    return base + (cut.sums_at + parity * cut.sums_bytes + own * (cut.ctas * cut.across * MESSAGE * WORD))


def factors_of(base: Int32, place: Int32, parity: Int32, cut: Cut) -> Int32:
    """Where post and comb of a batch's token lie."""
    return base + (cut.factors_at + (parity * cut.batch + place) * (FACTORS * WORD))


def clamped(row: Int32, given: Inputs) -> Int32:
    """A token that there is: the last one in place of those behind it."""
    return cutlass.min(row, tokens_of(given) - 1)
