"""How the head_dim 512 kernel cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import NamedTuple

DIM = 512
DTYPE = "bfloat16"
GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups, each with half of the columns of the output
ROWS = 64  # queries times heads of a CTA
COLUMNS = 64  # of a block of shared memory
HALF = DIM // CONSUMERS
ROW_BYTES = 2 * COLUMNS  # of a block
BLOCK_BYTES = ROWS * ROW_BYTES
BLOCKS = DIM // COLUMNS
THREADS = (1 + CONSUMERS) * GROUP
SHARED_BYTES = 227 * 1024  # that a CTA may have
OUT_PITCH = 2 * HALF + 16  # bytes from a staged row of the output to the next: no two of eight in the same banks
_SMALL = 1024  # mbarriers, largest scores


class Shape(NamedTuple):
    """A kernel; compile-time.

    Attributes:
        ctas: Of a cluster: they work on neighbouring rows and share what they load; 1 or 2.
        chunk: Pieces of 8 KB that are loaded, waited for and given back together; 1, 2 or 4.
        keys: Of a tile, whose scores a consumer makes at a time.
        lazy: Weights stay relative to an older largest score while they do not grow too large; sums are rarely scaled.
        persistent: A cluster works on one piece of rows after another, and loads the next one's keys meanwhile.
        masked: There is a mask of one's own.
    """

    ctas: int = 2
    chunk: int = 1
    keys: int = 64
    lazy: bool = False
    persistent: bool = False
    masked: bool = False

    @property
    def staging_bytes(self) -> int:
        """Of a consumer's part of the output, over the queries."""
        return ROWS * OUT_PITCH

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk."""
        return self.chunk * BLOCK_BYTES

    @property
    def key_block_bytes(self) -> int:
        """Of 64 columns of a tile of keys."""
        return self.keys * ROW_BYTES

    @property
    def key_blocks(self) -> int:
        """Of 64 columns, in a chunk of keys."""
        return self.chunk_bytes // self.key_block_bytes

    @property
    def key_chunks(self) -> int:
        """Of a tile of keys."""
        return BLOCKS // self.key_blocks

    @property
    def value_chunks(self) -> int:
        """Of a tile of a consumer's half of the values: 16 * `chunk` rows each."""
        return self.keys // self.value_rows

    @property
    def value_rows(self) -> int:
        """Of a chunk of values."""
        return 16 * self.chunk

    @property
    def weights_bytes(self) -> int:
        """Of the weights of a tile."""
        return self.keys // COLUMNS * BLOCK_BYTES

    @property
    def weights_at(self) -> int:
        """Where the weights that the consumers show each other start, behind the queries."""
        return BLOCKS * BLOCK_BYTES

    @property
    def ring_at(self) -> int:
        """Where the rings start, one for each consumer."""
        return self.weights_at + CONSUMERS * self.weights_bytes

    @property
    def slots(self) -> int:
        """Of a ring, in chunks."""
        return (SHARED_BYTES - _SMALL - self.ring_at) // (CONSUMERS * self.chunk_bytes)

    @property
    def ring_bytes(self) -> int:
        """Of a ring."""
        return self.slots * self.chunk_bytes

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers of the rings start: a slot is full, a slot is empty."""
        return self.ring_at + CONSUMERS * self.ring_bytes

    @property
    def ready_at(self) -> int:
        """The mbarriers of the weights: they are there, they were read."""
        return self.barriers_at + CONSUMERS * self.slots * 16

    @property
    def tops_at(self) -> int:
        """Where the largest scores start."""
        return self.ready_at + CONSUMERS * 16

    @property
    def totals_at(self) -> int:
        """Where the consumers exchange sums: over the weights of the second one."""
        return self.weights_at + self.weights_bytes

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.tops_at + CONSUMERS * ROWS * 4


WIDE = Shape(lazy=True)
NARROW = Shape(ctas=1, lazy=True, persistent=True)  # two CTAs' windows together are longer than each
SHAPES = (WIDE, NARROW, WIDE._replace(masked=True))
_NARROW_WINDOW = 512


def shape_for(window: int | None, *, masked: bool = False) -> Shape:
    """The kernel for a window."""
    if masked:
        return WIDE._replace(masked=True)
    return NARROW if window is not None and window <= _NARROW_WINDOW else WIDE
