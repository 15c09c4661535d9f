"""How the decode kernel for keys that are the values, of 512, cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import Any, NamedTuple

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups
WARPS = GROUP // 32  # of a warpgroup
ROWS = 64  # queries times heads of a CTA
TILE = 64  # tokens
DIM = 512
BLOCK_BYTES = ROWS * 128  # 64 columns of 64 rows of 16 bits
TILE_BYTES = DIM // 64 * BLOCK_BYTES  # of a decoded tile
CODE_BYTES = DIM // 2
SCALE_BYTES = DIM // 16
QUARTERS = 4  # a tile's codes and scales are copied in so many pieces, each of all tokens
PIECE_CODES = CODE_BYTES // QUARTERS  # of a token
PIECE_SCALES = SCALE_BYTES // QUARTERS
PIECE_BYTES = TILE * (PIECE_CODES + PIECE_SCALES)
PIECES = 3  # places
MASKS = 4  # places, of tiles: producers are less than two tiles ahead of the softmax of the other consumer


class _Kind(NamedTuple):
    extra: bool = False
    paired: bool = False


class Shape(_Kind):
    """A kernel; compile-time.

    Attributes:
        extra: There is a second cache.
        paired: Two CTAs of a cluster share the tokens of some rows, and each ends with half of the columns.
    """

    __slots__ = ()
    shared = True
    head_dim = DIM
    v_dim = DIM
    out_columns = DIM // CONSUMERS  # of a consumer
    tokens_a_warp = 16  # of a producer's
    tiles_at = 0  # the queries, later what CTAs exchange and merge
    values_at = TILE_BYTES  # two decoded tiles
    weights_at = values_at + 2 * TILE_BYTES  # of two tiles
    own_at = weights_at  # at the end (consumers, warps, rows) fp32: sums of weights
    ring_at = weights_at + 2 * BLOCK_BYTES
    table_at = ring_at + PIECES * PIECE_BYTES  # (rows, 2) fp32: factor of a row's scores, what is subtracted
    shrink_at = table_at + ROWS * 8  # (2, rows) fp32: by what sums shrink before those of a tile
    tops_at = shrink_at + 2 * ROWS * 4  # (warps, rows) fp32: largest products of a warp's tokens
    next_at = tops_at + WARPS * ROWS * 4  # (rows,) fp32: what is subtracted from now on
    queries_at = next_at + ROWS * 4  # (rows,) int32: the query of a row
    facts_at = queries_at + ROWS * 4  # what masks and scales of a tile follow from, see `mqa.note`
    flags_at = facts_at + 32  # (2,) int32: 1 + the last tile that changed what is subtracted
    masks_at = flags_at + 16  # of the tokens that exist, 8 bytes a tile
    barriers_at = masks_at + 8 * MASKS  # full and empty of each piece, ready and free of each decoded tile
    totals_at = barriers_at + 8 * (CONSUMERS * QUARTERS + PIECES + 4)  # a barrier: the sums of weights of all warps
    flag_at = totals_at + 8
    shared_bytes = flag_at + 16
    threads = GROUP * (1 + CONSUMERS)

    @property
    def full_at(self) -> int:
        """Barriers that say that a piece is there: of each consumer's tiles, as it waits for no others."""
        return self.barriers_at

    @property
    def empty_at(self) -> int:
        """Barriers that say that a piece is in registers."""
        return self.full_at + 8 * CONSUMERS * QUARTERS

    @property
    def ready_at(self) -> int:
        """Barriers that say that a decoded tile and its weights are there."""
        return self.empty_at + 8 * PIECES

    @property
    def free_at(self) -> int:
        """Barriers that say that all sums of a tile are done."""
        return self.ready_at + 16

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"decode_d{DIM}_{'extra' if self.extra else 'shared'}" + ("_paired" if self.paired else "")


def buffer_of(number: Any) -> Any:
    """Where a tile is decoded to; tile -1, of zeros, lies in the first."""
    return (number + 1) % 2


def phase_of(number: Any) -> Any:
    """The parity of its barriers."""
    return (number + 1) // 2 % 2


SHAPES = tuple(Shape(extra, paired) for extra in (False, True) for paired in (False, True))
