"""How the decode kernel for values apart from the keys cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import NamedTuple

GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups
ROWS = 64  # queries times heads of a CTA
TILE = 64  # tokens
COLUMNS = 64  # of a block of shared memory
BLOCK_BYTES = TILE * COLUMNS * 2  # ROWS or TILE rows of 128 bytes
UNIT_BYTES = 32 + 4  # codes and scales of 64 values
SHARED_BYTES = 227 * 1024  # that a CTA may have
_SMALL = 1024  # masks, mbarriers, flags
_MOST_STAGES = 8


class Shape(NamedTuple):
    """A kernel; compile-time.

    Attributes:
        head_dim: D, a multiple of 64 up to 256.
        v_dim: Dv, likewise.
    """

    head_dim: int
    v_dim: int

    @property
    def shared(self) -> bool:
        """Whether the keys are the values; as `mqa_shape.Shape` has it."""
        return False

    @property
    def extra(self) -> bool:
        """Whether there is a second cache."""
        return False

    @property
    def paired(self) -> bool:
        """Whether CTAs work in pairs."""
        return False

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"decode_d{self.head_dim}_v{self.v_dim}"

    @property
    def key_blocks(self) -> int:
        """Blocks of 64 columns of a tile of keys."""
        return self.head_dim // COLUMNS

    @property
    def blocks(self) -> int:
        """Of keys and values."""
        return self.key_blocks + self.v_dim // COLUMNS

    @property
    def out_columns(self) -> int:
        """Columns of the output that a consumer holds."""
        return self.v_dim

    @property
    def producers(self) -> int:
        """Warpgroups that decode; a thread of them has a token and every so many of its blocks.

        One for head_dim 256: its consumers do not fit beside two.
        """
        return 2 if self.blocks > 2 and self.v_dim <= 128 else 1

    @property
    def producer_threads(self) -> int:
        """Of a CTA; the first ones."""
        return self.producers * GROUP

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.producer_threads + CONSUMERS * GROUP

    @property
    def threads_a_token(self) -> int:
        """Producers' threads that share a token."""
        return self.producer_threads // TILE

    @property
    def tokens_a_warp(self) -> int:
        """Of a tile, that a producer warp has."""
        return 32 // self.threads_a_token

    @property
    def units(self) -> int:
        """Blocks that a producer thread decodes; some have one less."""
        return -(-self.blocks // self.threads_a_token)

    @property
    def tile_bytes(self) -> int:
        """Of a decoded tile."""
        return self.blocks * BLOCK_BYTES

    @property
    def stage_bytes(self) -> int:
        """Of a tile as it lies in the cache."""
        return self.units * self.producer_threads * UNIT_BYTES

    @property
    def buffers(self) -> int:
        """Decoded tiles."""
        room = SHARED_BYTES - _SMALL - self.tiles_at - self.stage_bytes
        return 4 if room >= 4 * self.tile_bytes else 2

    @property
    def stages(self) -> int:
        """Tiles on their way, besides the decoded ones."""
        return min(_MOST_STAGES, (SHARED_BYTES - _SMALL - self.ring_at) // self.stage_bytes)

    @property
    def tiles_at(self) -> int:
        """Where the decoded tiles start, behind the queries."""
        return self.key_blocks * BLOCK_BYTES

    @property
    def ring_at(self) -> int:
        """Where the tiles on their way start."""
        return self.tiles_at + self.buffers * self.tile_bytes

    @property
    def masks_at(self) -> int:
        """Where the masks of the tokens that exist start, 8 bytes a tile."""
        return self.ring_at + self.stages * self.stage_bytes

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers start: a tile is full, a tile is empty."""
        return self.masks_at + 8 * self.buffers

    @property
    def flag_at(self) -> int:
        """Where it is said whether this CTA merges."""
        return self.barriers_at + 16 * self.buffers

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.flag_at + 16


SHAPES = (Shape(64, 64), Shape(128, 128), Shape(192, 128), Shape(256, 256))
