"""Who owns what in the mhc_quant kernel for few hidden dims: tokens, hidden dims, registers and shared memory.

A turn of a team is a group of 16 tokens. A warp owns 64 hidden dims of all of them: lane (g, q) = (lane // 4, lane % 4)
has tokens g and g + 8, and of the 64 dims the eights q and 4 + q: two chunks. So four lanes read and write 64 bytes in
a row, and the words of a chunk are in pairs, as they are, what `mma` takes as its right operand.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Constexpr, Int32, Uint32, cute

from megamoe.cute import arith, asm, gmem, strips, warp
from megamoe.cute.mhc import LOGITS, STREAMS
from megamoe.cute.warp import WARP
from megamoe_stages.mhc_quant import limits
from megamoe_stages.mhc_quant.tensors import FACTORS, Inputs, Words

GROUP = 16  # tokens: columns of two mmas
UNIT = 64  # hidden dims of a warp: 4 lanes with two chunks of 8
CHUNK = 32  # hidden dims that 4 lanes load at once, 16 bytes each
PIECES = STREAMS * (UNIT // CHUNK)  # of fn that a warp multiplies with: all rows by CHUNK dims of a stream each
PARTS = 10  # 16 bytes of each lane that a piece takes, see `narrow_mix`
OWN_SUMS = LOGITS - STREAMS  # what the owner of a token needs besides the dots of pre: those of post and comb


class Shape(NamedTuple):
    """How the work is cut; compile-time.

    Attributes:
        ctas: Of a cluster, a power of two up to 16.
        teams: Of a CTA, each with a group of its own.
        warps: Of a team: UNIT hidden dims each.
        whole: The slices cover the hidden dims exactly.
    """

    ctas: int
    teams: int
    warps: int
    whole: bool

    @property
    def group(self) -> int:
        """Tokens that a team has at a time."""
        return GROUP

    @property
    def team(self) -> int:
        """Threads of a team."""
        return self.warps * WARP

    @property
    def all_warps(self) -> int:
        """Warps of a CTA."""
        return self.teams * self.warps

    @property
    def covers(self) -> int:
        """Hidden dims of a cluster."""
        return self.ctas * self.warps * UNIT

    @property
    def owned(self) -> int:
        """Tokens of a group whose post and comb a CTA computes."""
        return GROUP // self.ctas

    @property
    def fn_words(self) -> int:
        """Words of shared memory for fn."""
        return self.warps * PIECES * PARTS * WARP * 4

    @property
    def team_words(self) -> int:
        """Words of shared memory of a team."""
        return sum(rows * cols * depth for depth, rows, cols in self.matrices)

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """Sizes of what a team's area holds, in the order of `Area`; `own` twice."""
        own = (self.ctas, self.owned, OWN_SUMS)
        return [
            (1, GROUP, FACTORS),
            (self.warps, GROUP, LOGITS),
            (self.warps, 1, GROUP),
            (self.warps, 1, GROUP),
            (self.ctas, GROUP, STREAMS),
            (self.ctas, 1, GROUP),
            own,
            own,
            (self.ctas, 1, GROUP),
        ]

    @property
    def bars(self) -> int:
        """Number of mbarriers: three a team, and that of fn."""
        return 3 * self.teams + 1

    @property
    def sends(self) -> tuple[int, int]:
        """Arrivals that the sums and the squares of y make, where a CTA has no other to send them to."""
        if self.ctas > 1:
            return 0, 0
        return GROUP + GROUP * OWN_SUMS // 4 + GROUP // 4, GROUP // 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA: fn, the teams' areas, 8-byte mbarriers, a turn a warp."""
        return 4 * (self.fn_words + self.teams * (self.team_words + self.warps)) + self.bars * 8


def cut(hidden: int) -> Shape:
    """The shape for H up to the last of `limits.NARROW`."""
    ctas = next(i for i, covered in enumerate(limits.NARROW, start=1) if hidden <= covered)
    return Shape(ctas, teams=4, warps=4, whole=hidden == limits.NARROW[ctas - 1])


class Place(NamedTuple):
    """Where a thread stands.

    Attributes:
        rank: Of its CTA in the cluster.
        member: Of its warp in the team.
        seat: Of the thread in the team.
        lane: Of the thread in the warp.
        row: Its tokens in a group are row and row + 8.
        quad: 0..3, its place among the lanes of a row.
        dims: First hidden dim of its two chunks; 0 where there is none.
        valid: Whether the chunks exist.
        team: Its team in the CTA.
        turn: Of the team, see `first_turn`.
    """

    rank: Int32
    member: Int32
    seat: Int32
    lane: Int32
    row: Int32
    quad: Int32
    dims: tuple[Int32, Int32]
    valid: tuple[Boolean, Boolean]
    team: Int32
    turn: Int32


class Area(NamedTuple):
    """A team's shared memory.

    Attributes:
        factors: (GROUP, FACTORS), post and comb of the group's tokens.
        partial: (warps, GROUP, LOGITS), dots of each warp's dims.
        partial_streams: (warps, GROUP), squares of the streams, the same.
        partial_y: (warps, GROUP), squares of y, the same.
        pre: (ctas, GROUP, STREAMS), dots of pre of the slice of each CTA.
        streams: (ctas, GROUP), squares of the streams, the same.
        own: (ctas, owned, OWN_SUMS), dots of post and comb of this CTA's tokens, the same; two that take turns.
        y: (ctas, GROUP), squares of y, the same.
        sums_here: mbarrier: `pre`, `streams` and `own` are complete.
        squares_here: mbarrier: `y` is complete.
        all_logits: mbarrier: the logits of comb of all the team's tokens have been written.
    """

    factors: cute.Tensor
    partial: cute.Tensor
    partial_streams: cute.Tensor
    partial_y: cute.Tensor
    pre: cute.Tensor
    streams: cute.Tensor
    own: cute.Tensor
    y: cute.Tensor
    sums_here: cute.Pointer
    squares_here: cute.Pointer
    all_logits: cute.Pointer


def first_turn(shape: Shape) -> Int32:
    """A team's turn: twice the number of its group, plus the parity of its turns.

    Few groups go to the first teams of many clusters.
    """
    (cta, _, _), (ctas, _, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    return 2 * (cta // shape.ctas + warp.warp_number() // shape.warps * (ctas // shape.ctas))


def next_turn(turn: Int32, shape: Shape) -> Int32:
    """The turn after this one: the next group of the team, the other parity."""
    return (turn ^ 1) + warp.ctas() // shape.ctas * (2 * shape.teams)


def turns(floats: cute.Pointer, shape: Shape) -> cute.Tensor:
    """The turn of every warp, in shared memory: a register less in the tightest places."""
    words = cute.recast_ptr(floats + (shape.shared_bytes // 4 - shape.all_warps), dtype=Int32)
    return cute.make_tensor(words, cute.make_layout(shape.all_warps))


def turn_of(floats: cute.Pointer, shape: Shape) -> Int32:
    """The turn of this thread's warp."""
    return turns(floats, shape)[warp.warp_number()]


@cute.jit
def set_turn(floats: cute.Pointer, leader: Boolean, turn: Int32, shape: Constexpr[Shape]) -> None:
    """The warp's `leader` writes its next turn, once all lanes have read the last one."""
    cute.arch.sync_warp()
    words = turns(floats, shape)
    if leader:
        words[warp.thread() // WARP] = turn
    cute.arch.sync_warp()


def place_of(floats: cute.Pointer, given: Inputs, shape: Shape) -> Place:
    """Computed anew for every part of the work, which is cheaper than to keep it in registers."""
    thread, (cta, _, _) = warp.thread(), cute.arch.block_idx()
    wide = warp.warp_number()
    team, member, lane, rank = wide // shape.warps, wide % shape.warps, thread % WARP, cta % shape.ctas
    seat = member * WARP + lane
    quad = lane % 4
    hidden = hidden_of(given, shape)
    first = (rank * shape.warps + member) * UNIT + quad * 8
    dims, valid = [first, first + CHUNK], [Boolean(True), Boolean(True)]
    if not shape.whole:
        valid = [d < hidden for d in dims]
        dims = [arith.select(ok, d, Int32(0)) for ok, d in zip(valid, dims, strict=True)]
    return Place(
        rank,
        member,
        seat,
        lane,
        lane // 4,
        quad,
        (dims[0], dims[1]),
        (valid[0], valid[1]),
        team,
        turns(floats, shape)[wide],
    )


def area_of(floats: cute.Pointer, team: Int32, shape: Shape, turn: Int32 | int = 0) -> Area:
    """The shared memory of a team in a turn; `floats` is where the CTA's begins."""
    at = floats + (shape.fn_words + team * shape.team_words)
    matrices = []
    for sizes in shape.matrices:
        matrices.append(_matrices(at, sizes))
        at = at + cute.size(matrices[-1])
    factors, partial, partial_streams, partial_y, pre, streams, own, other, y = matrices
    own = _matrices(own.iterator + (turn & 1) * cute.size(other), (shape.ctas, shape.owned, OWN_SUMS))
    bars = cute.recast_ptr(floats + (shape.fn_words + shape.teams * shape.team_words), dtype=cutlass.Int64) + team * 3
    return Area(
        factors[0, None, None],
        partial,
        partial_streams[None, 0, None],
        partial_y[None, 0, None],
        pre,
        streams[None, 0, None],
        own,
        y[None, 0, None],
        bars,
        bars + 1,
        bars + 2,
    )


def fn_here(floats: cute.Pointer, shape: Shape) -> cute.Pointer:
    """mbarrier: fn is in shared memory."""
    bars = cute.recast_ptr(floats + (shape.fn_words + shape.teams * shape.team_words), dtype=cutlass.Int64)
    return bars + 3 * shape.teams


def _matrices(at: cute.Pointer, sizes: tuple[int, int, int]) -> cute.Tensor:
    _, rows, cols = sizes
    return cute.make_tensor(at, cute.make_layout(sizes, stride=(rows * cols, cols, 1)))


def hidden_of(given: Inputs, shape: Shape) -> Int32 | int:
    """Hidden dims; known to the compiler where the slices cover them exactly, which saves address arithmetic."""
    return shape.covers if shape.whole else cute.size(given.f, mode=[1])


def token_of(t: int, place: Place) -> Int32:
    """A thread's token number t, 0 or 1, of its team's group."""
    return (place.turn >> 1) * GROUP + place.row + 8 * t


def chunks_of(tensor: cute.Tensor, token: Int32, place: Place, given: Inputs, shape: Shape) -> list[cute.Tensor]:
    """This thread's two chunks of bf16 of a token: each (streams, words)."""
    hidden = hidden_of(given, shape)
    streams = cute.size(tensor, mode=[1]) if cute.rank(tensor) == 3 else 1
    eights, row = strips.blocks_of(tensor, 4), cutlass.Int64(token) * (streams * hidden // 8)
    if shape.whole:  # one address and constant offsets
        first = eights[row + place.dims[0] // 8, None].iterator
        starts = [first, first + CHUNK // 2]
    else:
        starts = [eights[row + dims // 8, None].iterator for dims in place.dims]
    return [cute.make_tensor(at, cute.make_layout((streams, 4), stride=(hidden // 2, 1))) for at in starts]


def load_chunk(chunk: cute.Tensor, stream: int) -> Words:
    """The four words of a stream of a chunk from `chunks_of`."""
    four = cute.make_rmem_tensor(4, Uint32)
    cute.autovec_copy(chunk[stream, None], four)
    return [four[i] for i in range(4)]


def store_chunk(
    tensor: cute.Tensor,
    t: int,
    chunk: int,
    words: list[Words],
    place: Place,
    given: Inputs,
    shape: Shape,
) -> None:
    """Writes one of this thread's chunks of its token number t of the group, `words` by stream."""
    token = token_of(t, place)
    here = (token < cute.size(given.f, mode=[0])) & place.valid[chunk]
    rows = chunks_of(tensor, token, place, given, shape)[chunk]
    for stream, four in enumerate(words):
        gmem.store16_if(asm.address(rows[stream, None].iterator), four, here)


def rows_of_words(floats: cute.Pointer, rows: int) -> cute.Tensor:
    """Shared memory as rows of 16 bytes."""
    words = cute.recast_ptr(floats, dtype=Uint32)
    return cute.make_tensor(words, cute.make_layout((rows, 4), stride=(4, 1)))


def pointer_to(tensor: cute.Tensor, *place: Int32 | int) -> cute.Pointer:
    """Address of an element."""
    return tensor.iterator + cute.crd2idx(place, tensor.layout)
