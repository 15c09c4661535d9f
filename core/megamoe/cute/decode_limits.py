"""Sizes of the main loop of `gemm_decode`, and what follows from them; no CuTe DSL and no torch here.

Bytes of shared memory: barriers and counts up to PASSES, the list of passes, two buffers of sums, the rows of a pass,
and the ring of slabs at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

GROUP_ROWS = 64  # weight rows of an item
SLAB_K = 128
SLAB_CODES = GROUP_ROWS * SLAB_K // 2
SLAB_BYTES = SLAB_CODES + GROUP_ROWS * SLAB_K // 16
COLUMNS = 8  # rows of activations that one `mma` takes
SLICES = 8  # pairs of consumer warps
PAIR_TILES = 2  # tiles of 16 weight rows that a consumer warp owns of a slab
CONSUMERS = 16
EPILOGUE = 2
PRODUCER = CONSUMERS + EPILOGUE
THREADS = (PRODUCER + 1) * 32
MAX_EXPERTS = THREADS
MAX_PASSES = 128  # of a CTA
MAX_STAGES = 60
# Barriers are not the stages' own: a slab's pair of them has the slab's number modulo BARRIERS, a multiple of SLICES,
# so that the same warps see every phase of a barrier. One that skips a phase would take the last for the next.
BARRIERS = 1 << 6

PASSES = 2048  # four words each: expert, first row, rows, unused
SUMS = PASSES + MAX_PASSES * 16
SUMS_ROW = (GROUP_ROWS + 4) * 4  # bytes of one column's sums, padded against bank conflicts
SUMS_SLICE = COLUMNS * SUMS_ROW
SUMS_BUFFER = SLICES * SUMS_SLICE
ROWS = SUMS + 2 * SUMS_BUFFER
SHARED_BYTES = 227 * 1024
ROWS_OF_EXPERT = 2  # from so many on, on average, the kernel for many rows is faster for Pro, for Flash within 1.5%
ROWS_OF_ALL = 64  # up to so many it has not the tiles to keep all SMs busy
MAX_N = 2**19  # with MAX_ROWS and 132 CTAs, items counted times CTAs fit 32 bits
MAX_ROWS = 4096  # with MAX_EXPERTS, an eighth of this makes fewer passes a CTA than MAX_PASSES from 10 CTAs on


def ring_stages(k: int, tiles: int) -> int:
    """Slabs that fit beside `8 * tiles` rows of (padded) K."""
    return min(MAX_STAGES, (SHARED_BYTES - ROWS - tiles * COLUMNS * k * 2) // SLAB_BYTES)


def takes(rows: int, experts: int, n: int, k: int) -> bool:
    """Whether few enough rows go to an expert, and they fit."""
    few = rows < ROWS_OF_EXPERT * experts or rows <= ROWS_OF_ALL
    return few and not refuses({"experts": experts, "rows": rows, "n": n, "k": k})


def busy(n: int, ctas: int) -> bool:
    """Whether the groups of rows of one expert, n in all, keep nearly all CTAs busy till the end."""
    groups = n // GROUP_ROWS
    return groups >= 0.9 * ctas * -(-groups // ctas)


def refuses(facts: Mapping[str, object]) -> list[str]:
    """Reasons why the main loop cannot do a problem of `grouped_gemm` or `swiglu_quant`."""
    experts, rows, n, k = (int(str(facts.get(name, 0))) for name in ("experts", "rows", "n", "k"))
    reasons = []
    if ring_stages(-(-k // SLAB_K) * SLAB_K, 1) < SLICES:
        reasons.append(f"K of {k}: eight rows of it leave no room for weights")
    if experts > MAX_EXPERTS or rows > MAX_ROWS or n > MAX_N:
        reasons.append(f"{experts} experts, {rows} rows, N of {n}: up to {MAX_EXPERTS}, {MAX_ROWS} and {MAX_N}")
    return reasons
