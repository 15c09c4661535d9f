"""How the kernels for head_dim up to 256 cut their work and their shared memory: numbers only."""

from __future__ import annotations

import functools
from typing import NamedTuple

GROUP = 128  # threads of a warpgroup
ROWS = 64  # queries times heads of a consumer
COLUMNS = 64  # of a block of shared memory
ROW_BYTES = COLUMNS * 2
QUERY_WARPS = 2  # of the producers
TILE_RING_BYTES = 96
SHARED_BYTES = 227 * 1024  # that a CTA may have
_PAD = 16  # bytes between rows of the output, against bank conflicts
_ALIGNMENT = 1024


class Shape(NamedTuple):
    """A kernel; compile-time.

    Attributes:
        head_dim: D, a multiple of 64.
        v_dim: Dv, likewise.
        dtype: "bfloat16" or "float16".
        consumers: Warpgroups that attend, each to 64 rows.
        keys: Of a tile, a multiple of 16.
        late: Sums so far are scaled after the next scores were started, not before.
        masked: There is a mask of one's own.
        stages: Tiles of keys, and of values, in shared memory; a power of two.
    """

    head_dim: int
    v_dim: int
    dtype: str
    consumers: int
    keys: int
    late: bool = False
    masked: bool = False
    stages: int = 2

    @property
    def kind(self) -> str:
        """The dtype as PTX has it."""
        return {"bfloat16": "bf16", "float16": "f16"}[self.dtype]

    @property
    def threads(self) -> int:
        """Of a CTA; the first warpgroup produces."""
        return (1 + self.consumers) * GROUP

    @property
    def rows(self) -> int:
        """Of a CTA."""
        return self.consumers * ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's and of a consumer's thread."""
        return {2: (40, 232), 3: (32, 160)}[self.consumers]

    @property
    def out_row_bytes(self) -> int:
        """From one row of the output in shared memory to the next."""
        return self.v_dim * 2 + _PAD

    @property
    def part_bytes(self) -> int:
        """Of a consumer's queries, whose place its output takes when they are done with."""
        most = ROWS * max(self.head_dim * 2, self.out_row_bytes)
        return -(-most // _ALIGNMENT) * _ALIGNMENT

    @property
    def queries_bytes(self) -> int:
        """Of the queries of a tile."""
        return self.consumers * self.part_bytes

    @property
    def query_stages(self) -> int:
        """Tiles of queries in shared memory: two where there is room, so that the next ones come early."""
        tiles = self.stages * (self.keys_bytes + self.values_bytes)
        return 2 if 2 * self.queries_bytes + tiles + _ALIGNMENT <= SHARED_BYTES else 1

    @property
    def keys_bytes(self) -> int:
        """Of a tile of keys."""
        return self.keys * self.head_dim * 2

    @property
    def values_bytes(self) -> int:
        """Of a tile of values."""
        return self.keys * self.v_dim * 2

    @property
    def block_bytes(self) -> int:
        """Of 64 columns of a tile."""
        return self.keys * ROW_BYTES

    @property
    def keys_at(self) -> int:
        """Where the keys start, behind the queries."""
        return self.query_stages * self.queries_bytes

    @property
    def values_at(self) -> int:
        """Where the values start."""
        return self.keys_at + self.stages * self.keys_bytes

    @property
    def tile_ring_at(self) -> int:
        """Where the records of tiles start."""
        return self.values_at + self.stages * self.values_bytes

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers start: of each stage keys full and empty, values likewise; then queries likewise."""
        return self.tile_ring_at + TILE_RING_BYTES

    @property
    def shared_bytes(self) -> int:
        """Of a CTA."""
        return self.barriers_at + 32 * self.stages + 16 * self.query_stages


@functools.cache
def shape_of(head_dim: int, v_dim: int, dtype: str, masked: bool = False) -> Shape | None:
    """The kernel for a head, None where there is none."""
    cuts = {
        (64, 64): Shape(64, 64, dtype, consumers=3, keys=128),
        (128, 128): Shape(128, 128, dtype, consumers=2, keys=128),
        (192, 128): Shape(192, 128, dtype, consumers=2, keys=128, late=True),
        (256, 256): Shape(256, 256, dtype, consumers=2, keys=80, late=True),
    }
    cut = cuts.get((head_dim, v_dim))
    if cut is None or not masked:
        return cut
    return cut._replace(masked=True, keys=MASKED_KEYS.get((head_dim, v_dim), cut.keys))


DTYPES = ("bfloat16", "float16")
HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
MASKED_KEYS = {(192, 128): 96}  # of a tile with a mask of one's own: for more there are no registers
