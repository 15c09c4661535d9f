"""Who owns what in the mhc_quant kernel for many tokens: tokens, hidden dims and shared memory.

In the first half a team of warps owns a slice of the hidden dims of 16 tokens, as in `places`: lane (g, q) =
(lane // 4, lane % 4) of a warp has tokens g and g + 8, and of the warp's 64 dims the eights q (chunk 0) and 4 + q (1).
In the second half a team owns whole tokens: a warp 1024 hidden dims of one, in four runs of 256, 8 dims of each a lane.
"""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Constexpr, Int32, Int64, cute

from megamoe.cute import exchange, ring, warp
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant.places import CHUNK, FACTORS, GROUP, PIECES, ROWS, UNIT, Inputs, Shape

PARTS = 6  # of a piece of fn, see `prefill_mix`
WORD = 4  # bytes
LINE = 16  # bytes that a thread moves at once
SHARE = 1024  # hidden dims of a warp in the second half
RUN = 256  # of them, 8 dims a lane
BARRIER = 8  # bytes
MOST_THREADS = 1024  # of a CTA
MESSAGE = 28  # floats from a CTA to a token's owner: 24 dots, the squares, padding


class Cut(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        ctas: That share the hidden dims of a group.
        teams: Of a CTA, each with a group of its own.
        warps: Of a team.
        roomy: There is room in shared memory for the norm's weights, and for both tokens of a thread ahead.
    """

    ctas: int
    teams: int
    warps: int
    roomy: bool

    @property
    def hidden(self) -> int:
        """Hidden dims: those of all CTAs."""
        return self.ctas * self.warps * UNIT

    @property
    def shape(self) -> Shape:
        """The cut of fn, which is the first half's."""
        return Shape(self.ctas, self.teams, self.warps, PARTS, whole=True)

    @property
    def team(self) -> int:
        """Threads of a team."""
        return self.warps * WARP

    @property
    def all_warps(self) -> int:
        """Warps of a CTA."""
        return self.teams * self.warps

    @property
    def owned(self) -> int:
        """Tokens of a group that a CTA finishes."""
        return GROUP // self.ctas

    @property
    def sharers(self) -> int:
        """Warps that finish a token."""
        return self.hidden // SHARE

    @property
    def weights_at(self) -> int:
        """Where the norm's weights begin, after fn."""
        return self.warps * PIECES * PARTS * WARP * LINE

    @property
    def stages(self) -> int:
        """Halves of a chunk, 8 tokens of every stream, that wait for a warp at once."""
        return 2 if self.roomy else 1

    @property
    def staged_at(self) -> int:
        """Where they do, after the norm's weights."""
        return self.weights_at + (self.hidden * WORD if self.roomy else 0)

    @property
    def staged_bytes(self) -> int:
        """Of one."""
        return STREAMS * ROWS * CHUNK * 2

    @property
    def teams_at(self) -> int:
        """Where the teams' areas begin."""
        return self.staged_at + self.all_warps * self.stages * self.staged_bytes

    @property
    def partial_at(self) -> int:
        """In a team's area, after post and comb of two groups: (warps, GROUP, LOGITS), dots of each warp's dims."""
        return 2 * GROUP * FACTORS * WORD

    @property
    def squares_at(self) -> int:
        """(warps, GROUP), squares of the streams, the same."""
        return self.partial_at + self.warps * GROUP * LOGITS * WORD

    @property
    def y_squares_at(self) -> int:
        """(warps), squares of y of each warp's share of its token."""
        return self.squares_at + self.warps * GROUP * WORD

    @property
    def exchange_words(self) -> int:
        """Of global memory for a team of all CTAs that share groups: messages of two turns, and a line of counters."""
        return 2 * GROUP * self.ctas * MESSAGE + LINE // WORD

    @property
    def team_bytes(self) -> int:
        """Of a team's area."""
        return -(-(self.y_squares_at + self.warps * WORD) // LINE) * LINE

    @property
    def turns_at(self) -> int:
        """The turn of every warp: a register less in the tightest places."""
        return self.teams_at + self.teams * self.team_bytes

    @property
    def barriers_at(self) -> int:
        """An mbarrier for everything that waits for a warp."""
        return -(-(self.turns_at + self.all_warps * WORD) // BARRIER) * BARRIER

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.barriers_at + self.all_warps * self.stages * BARRIER


class Spot(NamedTuple):
    """Where a thread stands.

    Attributes:
        rank: Of its CTA in the cluster.
        wide: Number of its warp in the CTA.
        team: Its team in the CTA.
        member: Of its warp in the team.
        lane: Of the thread in the warp.
    """

    rank: Int32
    wide: Int32
    team: Int32
    member: Int32
    lane: Int32

    @property
    def row(self) -> Int32:
        """First half: its tokens in a group are row and row + 8."""
        return self.lane // 4

    @property
    def quad(self) -> Int32:
        """First half: 0..3, its place among the lanes of a row."""
        return self.lane % 4


def spot(cut: Cut) -> Spot:
    """The thread's spot; where registers are few it is computed anew for every part of the work."""
    if cut.roomy:
        thread = cute.arch.thread_idx()[0] & (MOST_THREADS - 1)  # the range makes divisions shifts
        wide = thread // WARP
    else:
        wide, thread = warp.warp_number(), warp.thread()
    return Spot(cute.arch.block_idx()[0] % cut.ctas, wide, wide // cut.warps, wide % cut.warps, thread % WARP)


class Source(NamedTuple):
    """The streams as the copy engine reads them.

    Attributes:
        atom: The copy of 8 tokens of every stream, CHUNK dims.
        tensor: (H, tokens, STREAMS).
    """

    atom: cute.CopyAtom
    tensor: cute.Tensor


def staged_layout() -> cute.Layout:
    """How 8 tokens of every stream of a chunk wait: lines of a token side by side, so that lanes find no bank twice."""
    return cute.make_layout((CHUNK, ROWS, STREAMS), stride=(1, CHUNK, CHUNK * ROWS))


def staged(here: Spot, t: int, cut: Cut) -> Int32:
    """Where a thread's token number t of a chunk waits, from the beginning of shared memory on."""
    return cut.staged_at + (here.wide * cut.stages + t % cut.stages) * cut.staged_bytes


def arrived(base: Int32, here: Spot, t: int, cut: Cut) -> Int32:
    """Its mbarrier. It completes twice or four times a turn, so the parity is `parity_of` in all turns."""
    return base + (cut.barriers_at + (here.wide * cut.stages + t % cut.stages) * BARRIER)


def parity_of(chunk: int, t: int, cut: Cut) -> int:
    """Of the phase that a chunk's token completes."""
    return chunk if cut.stages == 2 else t


def area(base: Int32, here: Spot, cut: Cut) -> Int32:
    """Where the area of a thread's team begins; `base` is where the CTA's shared memory does."""
    return base + (cut.teams_at + here.team * cut.team_bytes)


def message(work: cute.Tensor, token: Int32, rank: Int32 | int, parity: Int32, here: Spot, cut: Cut) -> Int64:
    """Where a CTA's sums for a token of the group of this thread's team lie."""
    slot = (parity * GROUP + token) * cut.ctas + rank
    return _exchange(work, here, cut) + Int64(slot * (MESSAGE * WORD))


def counter(work: cute.Tensor, here: Spot, cut: Cut) -> Int64:
    """Where it is counted how often this team's CTAs have sent their sums; how many have ended comes next."""
    return _exchange(work, here, cut) + Int64(2 * GROUP * cut.ctas * MESSAGE * WORD)


def _exchange(work: cute.Tensor, here: Spot, cut: Cut) -> Int64:
    number = cute.arch.block_idx()[0] // cut.ctas * cut.teams + here.team
    return exchange.global_address(work) + Int64(number) * (cut.exchange_words * WORD)


class Turn(NamedTuple):
    """What a team works on.

    Attributes:
        group: Of 16 tokens.
        parity: Of the number of turns that the team has done.
    """

    group: Int32
    parity: Int32


def groups_of_a_turn(cut: Cut) -> Int32:
    """Groups that all teams of the launch have in a turn: from one of a team's groups to the next."""
    return cute.arch.grid_dim()[0] // cut.ctas * cut.teams


def first_turn(cut: Cut) -> Int32:
    """A team's turn as a number: twice its group, plus the parity."""
    return 2 * (cute.arch.block_idx()[0] // cut.ctas * cut.teams + spot(cut).team)


def turn_of(base: Int32, cut: Cut) -> Turn:
    """The turn of this thread's warp."""
    number = ring.load4(base + cut.turns_at + spot(cut).wide * WORD)
    return Turn(number >> 1, number & 1)


@cute.jit  # type: ignore[untyped-decorator]
def set_turn(base: Int32, number: Int32, cut: Constexpr[Cut]) -> None:
    """Its first lane writes the warp's next turn, once all lanes have read the last one."""
    here = spot(cut)
    cute.arch.sync_warp()
    if here.lane == 0:
        ring.store4(base + cut.turns_at + here.wide * WORD, number)
    cute.arch.sync_warp()


def tokens_of(given: Inputs) -> Int32:
    """Number of tokens."""
    return cute.size(given.f, mode=[0])


def first_half(tensor: cute.Tensor, streams: int, row: Int32, chunk: int, here: Spot, cut: Cut) -> Int64:
    """Address of a thread's line of a bf16 tensor (tokens, streams, H), in stream 0."""
    dims = (here.rank * cut.warps + here.member) * UNIT + here.quad * (LINE // 2)
    return exchange.global_address(tensor) + (
        Int64(row) * (streams * cut.hidden * 2) + Int64(dims * 2 + chunk * CHUNK * 2)
    )


def share(here: Spot, cut: Cut) -> Int32:
    """Second half: which SHARE of its token a warp has."""
    return here.member % cut.sharers


def owned_token(group: Int32, here: Spot, cut: Cut) -> Int32:
    """Second half: number of a warp's token."""
    return group * GROUP + here.rank * cut.owned + here.member // cut.sharers


def second_half(tensor: cute.Tensor, streams: int, row: Int32, here: Spot, cut: Cut) -> Int64:
    """Address of a lane's line of a bf16 tensor (tokens, streams, H), in stream 0 and run 0 of its warp's share."""
    at = share(here, cut) * (SHARE * 2) + here.lane * LINE
    return exchange.global_address(tensor) + (Int64(row) * (streams * cut.hidden * 2) + Int64(at))
