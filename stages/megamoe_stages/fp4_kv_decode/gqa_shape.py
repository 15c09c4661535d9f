"""How the decode kernel for grouped queries cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import NamedTuple

from megamoe.cute.warp import WARP

TILE = 64  # tokens that a warp takes at a time
STEP = 16  # tokens of one product, and the least page
STEPS = TILE // STEP
COLUMNS = 8  # queries times heads of one product
SHARED_BYTES = 227 * 1024  # that a CTA may have


class Shape(NamedTuple):
    """A kernel; compile-time.

    Attributes:
        head_dim: D, a multiple of 64.
        v_dim: Dv, 64, 128 or 256.
        column_blocks: Times 8, how many rows (queries times heads of a kv head) it takes.
        warps: Of a CTA.
    """

    head_dim: int
    v_dim: int
    column_blocks: int
    warps: int

    @property
    def columns(self) -> int:
        """Rows that there is room for."""
        return self.column_blocks * COLUMNS

    @property
    def key_blocks(self) -> int:
        """Scale blocks of a key that a lane decodes."""
        return self.head_dim // 64

    @property
    def value_words(self) -> int:
        """Words of eight values that a lane decodes of a token's value."""
        return self.v_dim // 64

    @property
    def quads(self) -> int:
        """Groups of four sums that a lane has."""
        return 4 * self.value_words * self.column_blocks

    @property
    def key_bytes(self) -> tuple[int, int]:
        """Of a token: codes, scales."""
        return self.head_dim // 2, self.head_dim // 16

    @property
    def value_bytes(self) -> tuple[int, int]:
        """Of a token: codes, scales."""
        return self.v_dim // 2, self.v_dim // 16

    @property
    def values_at(self) -> int:
        """Where in a warp's ring the values of a tile start, behind its keys."""
        return TILE * sum(self.key_bytes)

    @property
    def ring_bytes(self) -> int:
        """A tile's keys and values, of each warp; in the end it holds the sums of the warp's last problem."""
        return self.values_at + TILE * sum(self.value_bytes)

    @property
    def sums_bytes(self) -> int:
        """Of a warp."""
        return self.quads * WARP * 16

    @property
    def sums_at(self) -> int:
        """Where the sums of the warps' first problems start."""
        return self.ring_bytes * self.warps

    @property
    def stats_at(self) -> int:
        """Where the largest scores and sums start: 8 bytes a column, of all warps' first problems, then last ones."""
        return self.sums_at + self.sums_bytes * self.warps

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers start: of keys and of values, of all warps."""
        return self.stats_at + 2 * self.warps * self.columns * 8

    @property
    def flags_at(self) -> int:
        """Where it is said which of its two shared problems this CTA merges."""
        return self.barriers_at + self.warps * 16

    @property
    def sides_at(self) -> int:
        """Where the addresses of the cache start: of codes, then of scales, 8 bytes for keys and 8 for values."""
        return self.flags_at + 16

    @property
    def state_at(self) -> int:
        """Where what only matters between problems starts: 32 bytes of each warp."""
        return self.sides_at + 32

    @property
    def records_at(self) -> int:
        """Where it is said whose sums wait to be joined: 16 bytes of all warps' first problems, then last ones."""
        return self.state_at + self.warps * 32

    @property
    def share_at(self) -> int:
        """Where it is said how the line is cut."""
        return self.records_at + self.warps * 32

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.share_at + 16

    @property
    def part_floats(self) -> int:
        """Sums of a part."""
        return self.quads * WARP * 4


SHAPES = (
    Shape(64, 64, 1, 16),
    Shape(64, 64, 2, 8),
    Shape(128, 128, 1, 16),
    Shape(128, 128, 2, 8),
    Shape(192, 128, 1, 12),
    Shape(192, 128, 2, 8),
    Shape(256, 256, 1, 8),
)


def shape_of(head_dim: int, v_dim: int, rows: int, page: int) -> Shape | None:
    """The kernel for so many rows (queries times heads of a kv head); None where there is none.

    With more rows than it takes at once the keys and values would be read several times.
    """
    blocks = -(-rows // COLUMNS)
    fit = [s for s in SHAPES if s[:3] == (head_dim, v_dim, blocks)]
    return fit[0] if fit and page % STEP == 0 else None
