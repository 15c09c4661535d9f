"""Who owns what in the mhc_quant kernel whose streams stay on the chip: tokens, hidden dims and shared memory.

A cluster has a group of 16 or 8 tokens at a time, each of its CTAs some hidden dims of all of them: a stage of shared
memory. Half of a CTA's warps make new streams and multiply them with fn; the others finish tokens: collapse, norm,
quantisation.

A stage holds tiles of (group, TILE) values of every stream, as the copy engine brings them: rows of 128 bytes whose
eights (16 bytes) are swizzled by the token. A lane that makes is (g, q) = (lane // 4, lane % 4) and has eights
4 * side + q, so that four lanes read 128 bytes of fn in a row: of two tokens 8 apart, one side; or, of 8 tokens, both.
Its token of an eight is `token_of(g)`: neighbours g are 4 apart, so that eight lanes find no bank twice. A warp that
finishes has a tile of 8 tokens, each lane a block of 16 values: eights 2q and 2q + 1 of token g.

Where tiles leave a warp of either kind over, it is the clerk of the others: that of those that make has the new streams
written and asks for F; that of those that finish computes weights of the collapse and asks for streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cutlass import Float32, Int32, Int64, cute

from megamoe.cute import asm, cluster, warp
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant.tensors import FACTORS, MATRIX, Inputs

WORD = 4  # bytes
LINE = 16  # bytes that a thread moves at once
BARRIER = 8  # bytes
BARS = 6  # of a stage
PARTS = 3  # of fn, by which half an eight of a stream is multiplied, see `wide_mix`
TILE = 64  # hidden dims of a tile
ROW_BYTES = 2 * TILE
WARPS = 8  # that make, and as many that finish
THREADS = 2 * WARPS * WARP
EIGHT = 8  # tokens of an `mma`
PASSES = 2  # in which a warp makes: of both eights of tokens, or of both sides of its tile
SUMS = LOGITS + 1  # of a token: the dots and the squares of its streams
MESSAGE = 28  # floats that they take
F_AHEAD = 2  # groups for whose F there is room: it is needed for a short time only
MAKING, FINISHING, STARTED, FN_ASKED = 1, 2, 3, 4  # named barriers
SQUARES = 4  # groups whose squares of y may be on their way


class Cut(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        ctas: Of a cluster.
        tiles: Of a CTA's hidden dims.
        group: Tokens that a cluster has at a time: EIGHT, or twice as many.
        stages: Groups whose streams a CTA has room for.
        kept: Of a lane's parts of fn, how many are in registers; the others are in shared memory.
    """

    ctas: int
    tiles: int
    group: int
    stages: int
    kept: int

    @property
    def hidden(self) -> int:
        """Hidden dims."""
        return self.ctas * self.dims

    @property
    def dims(self) -> int:
        """Hidden dims of a CTA."""
        return self.tiles * TILE

    @property
    def halves(self) -> int:
        """Eights of tokens in a group."""
        return self.group // EIGHT

    @property
    def busy(self) -> int:
        """Warps that make, and as many that finish."""
        return self.tiles * self.halves

    @property
    def clerks(self) -> bool:
        """Whether there is a clerk of either kind: the warp behind the busy ones."""
        return self.busy < WARPS

    @property
    def asking(self) -> int:
        """Threads that ask for fn, and those that ask for streams."""
        return (self.busy + (1 if self.clerks else WARPS)) * WARP

    @property
    def owned(self) -> int:
        """Tokens of a group whose post and comb a CTA computes, if there are any for it."""
        return max(self.group // self.ctas, 1)

    @property
    def sides(self) -> int:
        """Of a tile that a warp makes."""
        return PASSES // self.halves

    @property
    def halves_of_eights(self) -> int:
        """Of all streams, that a lane multiplies with its own parts of fn."""
        return 2 * STREAMS * self.sides

    def held(self, number: int) -> int:
        """Of the PARTS of a half of an eight, how many are in registers."""
        return sum(part * self.halves_of_eights + number < self.kept for part in range(PARTS))

    @property
    def tile_bytes(self) -> int:
        """Of a tile of a stream."""
        return self.group * ROW_BYTES

    @property
    def stream_bytes(self) -> int:
        """Of a stream of a group, in a CTA; F takes as much."""
        return self.tiles * self.tile_bytes

    @property
    def stage_bytes(self) -> int:
        """Of a group's streams."""
        return STREAMS * self.stream_bytes

    @property
    def factor_bytes(self) -> int:
        """comb of all tokens of a group, then post."""
        return self.group * FACTORS * WORD

    @property
    def fn_slots(self) -> int:
        """Parts of fn of a lane that are in shared memory."""
        return PARTS * self.halves_of_eights - self.kept

    @property
    def partial_bytes(self) -> int:
        """Of a warp's sums of a group."""
        return SUMS * self.group * WORD

    @property
    def f_at(self) -> int:
        """Where F of F_AHEAD groups lies."""
        return self.stages * self.stage_bytes

    @property
    def factors_at(self) -> int:
        """Where post and comb of each stage's tokens lie."""
        return self.f_at + F_AHEAD * self.stream_bytes

    @property
    def fn_at(self) -> int:
        """Where the parts of fn lie that are not in registers."""
        return self.factors_at + self.stages * self.factor_bytes

    @property
    def partial_at(self) -> int:
        """Where each warp's sums of a group lie: (busy, SUMS, group), see `place_of`."""
        return self.fn_at + self.busy * self.fn_slots * WARP * LINE

    @property
    def sums_at(self) -> int:
        """Where the CTA's sums of a group lie: (group, MESSAGE)."""
        return self.partial_at + self.busy * self.partial_bytes

    @property
    def arrived_at(self) -> int:
        """Where the sums of its own tokens arrive from all CTAs, for each stage: (owned, ctas, MESSAGE)."""
        return self.sums_at + self.group * MESSAGE * WORD

    @property
    def arrived_bytes(self) -> int:
        """Of one stage."""
        return self.owned * self.ctas * MESSAGE * WORD

    @property
    def pre_at(self) -> int:
        """Where the weights of the collapse arrive, for each stage: (group, STREAMS)."""
        return self.arrived_at + self.stages * self.arrived_bytes

    @property
    def pre_bytes(self) -> int:
        """Of one stage."""
        return self.group * STREAMS * WORD

    @property
    def tile_squares_at(self) -> int:
        """Where the squares of y of each tile lie, of two groups: (tiles, group)."""
        return self.pre_at + self.stages * self.pre_bytes

    @property
    def squares_at(self) -> int:
        """Where the squares of y arrive from all CTAs, of SQUARES groups: (ctas, group)."""
        return self.tile_squares_at + 2 * self.tiles * self.group * WORD

    @property
    def squares_bytes(self) -> int:
        """Of one group."""
        return self.ctas * self.group * WORD

    @property
    def norm_at(self) -> int:
        """Where the norm's weights of this CTA's dims lie."""
        return self.squares_at + SQUARES * self.squares_bytes

    @property
    def barriers_at(self) -> int:
        """mbarriers: those of each stage, one of each group whose squares may be on their way, that of all logits."""
        return self.norm_at + self.dims * WORD

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.barriers_at + (BARS * self.stages + SQUARES + 1) * BARRIER


def cut(hidden: int) -> Cut:
    """The cut for H of `limits.WIDE`: fn of 448 hidden dims a CTA leaves room for fewer tokens."""
    if hidden > 4096:
        return Cut(16, 7, 8, 4, 28)
    return Cut(hidden // 256, 4, 16, 4, 24 if hidden == 4096 else 22)  # else sm_100a spills at 2048


def clerk_or(other: int, cut: Cut) -> int:
    """The clerk, or who does its work where there is none."""
    return cut.busy if cut.clerks else other


class Bars(NamedTuple):
    """mbarriers of a stage.

    Attributes:
        full: Streams, F, post and comb have come.
        made: The new streams are there.
        stored: They have been read by the copy engine.
        sums: Those of this CTA's own tokens have come from all CTAs.
        pre: So have the weights of the collapse.
        collapsed: The new streams have been read for the last time; for the clerk.
    """

    full: Int32
    made: Int32
    stored: Int32
    sums: Int32
    pre: Int32
    collapsed: Int32


def bars(base: Int32, stage: Int32 | int, cut: Cut) -> Bars:
    """The mbarriers of a stage."""
    at = base + (cut.barriers_at + stage * (BARS * BARRIER))
    return Bars(*(at + i * BARRIER for i in range(BARS)))


def squares_bar(base: Int32, turn: Int32 | int, cut: Cut) -> Int32:
    """mbarrier: the squares of y of a turn's group have come from all CTAs."""
    return base + (cut.barriers_at + (BARS * cut.stages + turn % SQUARES) * BARRIER)


def logits_bar(base: Int32, cut: Cut) -> Int32:
    """mbarrier: the logits of comb of all this CTA's own tokens have been written."""
    return base + (cut.barriers_at + (BARS * cut.stages + SQUARES) * BARRIER)


class Spot(NamedTuple):
    """Where a thread stands.

    Attributes:
        rank: Of its CTA in the cluster.
        warp: Of those that do the same.
        lane: Of its warp.
        tile: Whose hidden dims it has.
        half: Of the group's tokens, when it finishes; the side of its tile, when it makes all tokens.
    """

    rank: Int32
    warp: Int32
    lane: Int32
    tile: Int32
    half: Int32

    @property
    def row(self) -> Int32:
        """Its token of an eight."""
        return self.lane // 4

    @property
    def quad(self) -> Int32:
        """Its place among the lanes of a row."""
        return self.lane % 4

    @property
    def token(self) -> Int32:
        """When it finishes: its token of the group."""
        return self.lane // 4 + EIGHT * self.half

    def made(self, number: int, cut: Cut) -> tuple[Int32, Int32]:
        """When it makes: the token and the eight of its tile in a pass."""
        if cut.sides == 1:
            return token_of(self.row) + EIGHT * number, 4 * self.half + self.quad
        return token_of(self.row), 4 * number + self.quad


def spot(cut: Cut) -> Spot:
    """The thread's spot; the whole warp comes here."""
    wide, thread = warp.warp_number() % WARPS, warp.thread()
    rank = cute.arch.block_idx()[0] % cut.ctas
    return Spot(rank, wide, thread % WARP, wide // cut.halves, wide % cut.halves)


def tokens_of(given: Inputs) -> Int32:
    """Number of tokens."""
    return cute.size(given.f, mode=[0])


def first_of(turn: Int32, cut: Cut) -> Int32:
    """The first token of this cluster's turn."""
    group = cute.arch.block_idx()[0] // cut.ctas + turn * (cute.arch.grid_dim()[0] // cut.ctas)
    return group * cut.group


def in_stage(base: Int32, stage: Int32, tile: Int32, token: Int32, eight: Int32, cut: Cut) -> Int32:
    """Where an eight of a token lies, of stream 0; the next ones are `stream_bytes` further."""
    return base + stage * cut.stage_bytes + _in_tiles(tile, token, eight, cut)


def in_f(base: Int32, turn: Int32, tile: Int32, token: Int32, eight: Int32, cut: Cut) -> Int32:
    """Where an eight of F of a turn's token lies."""
    return f_of(base, turn, cut) + _in_tiles(tile, token, eight, cut)


def f_of(base: Int32, turn: Int32, cut: Cut) -> Int32:
    """Where F of a turn lies."""
    return base + (cut.f_at + turn % F_AHEAD * cut.stream_bytes)


def _in_tiles(tile: Int32, token: Int32, eight: Int32, cut: Cut) -> Int32:
    return tile * cut.tile_bytes + (token * ROW_BYTES + (eight ^ token & 7) * LINE)


def factors_of(base: Int32, stage: Int32, token: Int32, row: int, cut: Cut) -> Int32:
    """Where post (row 0) or a row of comb of a token of a stage lies."""
    at = base + (cut.factors_at + stage * cut.factor_bytes)
    if row == 0:
        return at + (cut.group * MATRIX * WORD + token * LINE)
    return at + (token * (MATRIX * WORD) + (row - 1) * LINE)


def token_of(column: Int32) -> Int32:
    """The token of a column of `mma`: columns 2i and 2i + 1 are tokens i and i + 4."""
    return column // 2 + column % 2 * 4


def place_of(column: Int32, half: int, cut: Cut) -> Int32:
    """Where a column's sums lie among those of the group: a lane's side by side, 2q, 2q + 1 of the first half first."""
    return column if cut.halves == 1 else column // 2 * 4 + half * 2 + column % 2


def token_at(quarter: Int32, i: int, cut: Cut) -> Int32:
    """The token of place 4 * quarter + i."""
    if cut.halves == 1:
        return 2 * quarter + i // 2 + i % 2 * 4
    return quarter + i % 2 * 4 + i // 2 * EIGHT


def arrived_of(base: Int32, stage: Int32, own: Int32 | int, sender: Int32 | int, cut: Cut) -> Int32:
    """Where a CTA's sums of one of this CTA's own tokens arrive."""
    at = base + (cut.arrived_at + stage * cut.arrived_bytes)
    return at + (own * cut.ctas + sender) * (MESSAGE * WORD)


def send(values: Sequence[Float32], to: Int32, barrier: Int32, rank: Int32) -> None:
    """`cluster.send`; by way of pointers, or H = 7168 takes 1% longer."""
    slot = cute.make_ptr(Float32, to, cute.AddressSpace.smem, assumed_align=LINE)
    arrived = cute.make_ptr(Int64, barrier, cute.AddressSpace.smem, assumed_align=BARRIER)
    cluster.send(values, asm.address(slot), asm.address(arrived), rank)
