"""How the decode kernel for grouped queries cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import NamedTuple

WARPS = 8  # of a CTA
TILE = 32  # tokens that a warp takes at a time
HALF = TILE // 2  # tokens of one product, and the least page
COLUMNS = 8  # queries times heads of one product
MOST_COLUMN_BLOCKS = 2
_SHARED_BYTES = 227 * 1024  # of an SM
_CTA_BYTES = 1024  # that the system takes of each CTA's
_OUT_BYTES = 16 * 1024  # at least, for the sums of all warps
_PADDING = {64: 64, 128: 32, 256: 64}  # between the halves of a tile's values, so that banks do not collide
_MOST_STAGES = 4


class Shape(NamedTuple):
    """A kernel; compile-time.

    Attributes:
        head_dim: D, a multiple of 64.
        v_dim: Dv, 64, 128 or 256.
        column_blocks: Times 8, how many rows (queries times heads of a kv head) it takes.
    """

    head_dim: int
    v_dim: int
    column_blocks: int

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
        """Products of a tile's values, and groups of four sums that a lane has."""
        return 4 * self.value_words * self.column_blocks

    @property
    def ctas_an_sm(self) -> int:
        """Two where the registers allow it."""
        return 2 if self.column_blocks == 1 and self.head_dim <= 192 and self.v_dim <= 128 else 1

    @property
    def key_codes(self) -> int:
        """Bytes of a token, as are the next three."""
        return self.head_dim // 2

    @property
    def key_scales(self) -> int:
        """E4M3."""
        return self.head_dim // 16

    @property
    def value_codes(self) -> int:
        """E2M1."""
        return self.v_dim // 2

    @property
    def value_scales(self) -> int:
        """E4M3."""
        return self.v_dim // 16

    @property
    def padding(self) -> int:
        """Bytes between the two halves of the codes of values."""
        return _PADDING[self.v_dim]

    @property
    def regions(self) -> tuple[int, int, int, int]:
        """Where in a stage key codes, key scales, value codes and value scales start."""
        codes = TILE * (self.key_codes + self.key_scales)
        return (0, TILE * self.key_codes, codes, codes + TILE * self.value_codes + self.padding)

    @property
    def stage_bytes(self) -> int:
        """Of a tile."""
        return self.regions[3] + TILE * self.value_scales

    @property
    def cta_bytes(self) -> int:
        """Shared memory that a CTA may have."""
        return _SHARED_BYTES // self.ctas_an_sm - _CTA_BYTES

    @property
    def stages(self) -> int:
        """Tiles on their way, of each warp."""
        room = self.cta_bytes - _OUT_BYTES - self.small_bytes
        return min(_MOST_STAGES, room // (self.stage_bytes * WARPS))

    @property
    def out_at(self) -> int:
        """Where the sums of all warps are joined."""
        return self.stages * self.stage_bytes * WARPS

    @property
    def out_quads(self) -> int:
        """Of each warp, that are joined at a time."""
        room = self.cta_bytes - self.small_bytes - self.out_at
        return min(self.quads, 1 << (room // (WARPS * 512)).bit_length() - 1)

    @property
    def small_bytes(self) -> int:
        """Largest scores and sums of all warps, mbarriers, a flag."""
        return WARPS * self.columns * 8 + WARPS * _MOST_STAGES * 16 + 16

    @property
    def stats_at(self) -> int:
        """Where the largest scores and sums start: 8 bytes a column, of all warps."""
        return self.out_at + self.out_quads * WARPS * 512

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers start: two a stage, of all warps."""
        return self.stats_at + WARPS * self.columns * 8

    @property
    def flag_at(self) -> int:
        """Where it is said whether this CTA merges."""
        return self.barriers_at + WARPS * self.stages * 16

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.flag_at + 16

    @property
    def part_floats(self) -> int:
        """Sums of a part."""
        return self.quads * 32 * 4


SHAPES = tuple(
    Shape(head_dim, v_dim, blocks)
    for head_dim, v_dim in ((64, 64), (128, 128), (192, 128), (256, 256))
    for blocks in range(1, MOST_COLUMN_BLOCKS + 1)
)
