"""How the decode kernel for keys that are the values, of 512, cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import NamedTuple

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups
WARPS = CONSUMERS * GROUP // 32  # that consume
ROWS = 64  # queries times heads of a CTA
TILE = 64  # tokens of a warpgroup's scores
DIM = 512
BLOCK_BYTES = ROWS * 128  # 64 columns of 64 rows of 16 bits
CODE_BYTES = DIM // 2
SCALE_BYTES = DIM // 16
PITCH = CODE_BYTES + 16  # from a token's codes to the next one's: banks that differ
STAGE_BYTES = TILE * (PITCH + SCALE_BYTES)
STAGES = 6  # tiles; two make a turn
TURNS = STAGES // CONSUMERS


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
    weights_at = DIM // 64 * BLOCK_BYTES  # of two turns
    ring_at = weights_at + 2 * CONSUMERS * BLOCK_BYTES
    table_at = ring_at + STAGES * STAGE_BYTES  # (rows, 2) fp32: factor of a row's scores, what is subtracted
    own_at = table_at + ROWS * 8  # (warps, rows) fp32: what a warp subtracted instead
    final_at = own_at + WARPS * ROWS * 4  # (rows, 2) fp32: what is subtracted from now on, by what sums shrink
    ends_at = final_at + ROWS * 8  # (rows, 2) fp32: of the end, what was subtracted and the sum
    peer_at = ends_at + ROWS * 8  # the same of the other CTA
    last_at = peer_at + ROWS * 8  # (consumers, rows, 2): scale and place of a row of the result
    queries_at = last_at + CONSUMERS * ROWS * 8  # (rows,) int32: the query of a row
    facts_at = queries_at + ROWS * 4  # what masks and scales of a tile follow from, see `mqa.note`
    flags_at = facts_at + 32  # (2, warps) int32: turn in which a warp subtracted something else
    masks_at = flags_at + 2 * WARPS * 4  # of the tokens that exist, 8 bytes a stage
    barriers_at = masks_at + 8 * STAGES  # full of each stage, empty of each turn, weights of two turns
    flag_at = barriers_at + 8 * (STAGES + TURNS + 2)
    shared_bytes = flag_at + 16
    threads = GROUP * (1 + CONSUMERS)

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"decode_d{DIM}_{'extra' if self.extra else 'shared'}" + ("_paired" if self.paired else "")


SHAPES = tuple(Shape(extra, paired) for extra in (False, True) for paired in (False, True))
