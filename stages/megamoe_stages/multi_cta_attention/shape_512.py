"""How the head_dim 512 kernel cuts its work and its shared memory: numbers only."""

from __future__ import annotations

from typing import NamedTuple

DIM = 512
DTYPES = ("bfloat16", "float16")
GROUP = 128  # threads of a warpgroup
CONSUMERS = 2  # warpgroups, each with half of the columns of the output
ROWS = 64  # queries times heads of a CTA
TILE = 64  # keys whose scores a consumer makes at a time
COLUMNS = 64  # of a block of shared memory
HALF = DIM // CONSUMERS
ROW_BYTES = 2 * COLUMNS  # of a block
BLOCK_BYTES = ROWS * ROW_BYTES
BLOCKS = DIM // COLUMNS
THREADS = (1 + CONSUMERS) * GROUP
SHARED_BYTES = 227 * 1024  # that a CTA may have
ANGLES_PITCH = 128  # bytes of a row's 32 cosines or sines
ANGLES_BYTES = 2 * ROWS * ANGLES_PITCH
TOTALS_BYTES = CONSUMERS * ROWS * 4
_SMALL = 2048  # mbarriers, largest scores, sums


class Shape(NamedTuple):
    """A kernel; compile-time.

    Attributes:
        ctas: Of a cluster: they work on neighbouring rows and share what they load; 1 or 2.
        chunk: Pieces of 8 KB that are loaded, waited for and given back together; 1, 2 or 4. Of keys a piece has 64
            columns of a tile, of values 16 rows of a consumer's half of the columns.
        masked: There is a mask of one's own.
        angles: There is room for an epilogue's cosines and sines.
        dtype: "bfloat16" or "float16".
    """

    ctas: int = 2
    chunk: int = 1
    masked: bool = False
    angles: bool = False
    dtype: str = DTYPES[0]

    @property
    def kind(self) -> str:
        """The dtype as PTX has it."""
        return {"bfloat16": "bf16", "float16": "f16"}[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk."""
        return self.chunk * BLOCK_BYTES

    @property
    def key_chunks(self) -> int:
        """Of a tile of keys."""
        return BLOCKS // self.chunk

    @property
    def value_chunks(self) -> int:
        """Of a tile of a consumer's half of the values."""
        return TILE // self.value_rows

    @property
    def value_rows(self) -> int:
        """Of a chunk of values."""
        return 16 * self.chunk

    @property
    def weights_at(self) -> int:
        """Where the weights that the consumers show each other start, behind the queries."""
        return BLOCKS * BLOCK_BYTES

    @property
    def ring_at(self) -> int:
        """Where the rings start, one for each consumer."""
        return self.weights_at + CONSUMERS * BLOCK_BYTES

    @property
    def slots(self) -> int:
        """Of a ring, in chunks."""
        return (SHARED_BYTES - _SMALL - self.angles_bytes - self.ring_at) // (CONSUMERS * self.chunk_bytes)

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
        """Where the sums of the weights start: of one piece of rows, then of the next."""
        return self.tops_at + CONSUMERS * ROWS * 4

    @property
    def fetched_at(self) -> int:
        """The mbarrier of what an epilogue fetches, a word behind it among that."""
        return self.totals_at + 2 * TOTALS_BYTES

    @property
    def word_at(self) -> int:
        """A word for the epilogue."""
        return self.fetched_at + 8

    @property
    def queries_read_at(self) -> int:
        """The mbarrier of queries that were read."""
        return self.word_at + 8

    @property
    def queries_there_at(self) -> int:
        """The next queries are there."""
        return self.queries_read_at + 8

    @property
    def turned_at(self) -> int:
        """The epilogue has read what it fetched."""
        return self.queries_there_at + 8

    @property
    def record_at(self) -> int:
        """Where consumers find which rows are theirs."""
        return -(-(self.turned_at + 8) // 16) * 16

    @property
    def angles_at(self) -> int:
        """Where an epilogue's cosines and sines start."""
        return self.barriers_at + _SMALL

    @property
    def angles_bytes(self) -> int:
        """Of them."""
        return ANGLES_BYTES if self.angles else 0

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.angles_at + self.angles_bytes


WIDE = Shape()
MASKED = Shape(masked=True)
NARROW = Shape(ctas=1, chunk=2)  # two CTAs' windows together are longer than each
MASKED_NARROW = NARROW._replace(masked=True)
SHAPES = (WIDE, NARROW, MASKED, MASKED_NARROW)  # of bfloat16
_NARROW_WINDOW = 512


def shape_for(window: int | None, *, masked: bool = False, dtype: str = DTYPES[0]) -> Shape:
    """The kernel for a window and, besides, a mask of one's own."""
    narrow, wide = (MASKED_NARROW, MASKED) if masked else (NARROW, WIDE)
    return (narrow if is_narrow(window) else wide)._replace(dtype=dtype)


def is_narrow(window: int | None) -> bool:
    """Whether the windows of two CTAs together are much longer than each."""
    return window is not None and window <= _NARROW_WINDOW
