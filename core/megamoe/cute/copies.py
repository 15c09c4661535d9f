"""Copies that nobody waits for at once: a thread's own, and those of the copy engine."""

from __future__ import annotations

from cutlass import Int32, Int64, Uint32

from megamoe.cute import asm


def copy16(slot: Int32, source: Int64, size: Int32) -> None:
    """Starts this thread's copy of 16 bytes into shared memory; bytes from `size` (0 or 16) on become 0."""
    asm.effect("cp.async.cg.shared.global [$0], [$1], 16, $2;", slot, source, size)


def copy4(slot: Int32, source: Int64, size: Int32) -> None:
    """Starts this thread's copy of 4 bytes into shared memory; bytes from `size` (0 or 4) on become 0."""
    asm.effect("cp.async.ca.shared.global [$0], [$1], 4, $2;", slot, source, size)


def commit() -> None:
    """Closes the group of this thread's copies since the last one."""
    asm.effect("cp.async.commit_group;")


def wait(groups: int) -> None:
    """Until at most so many groups of this thread are not done; a barrier then shows them to the other threads."""
    asm.effect(f"cp.async.wait_group {groups};")


def wait_all() -> None:
    """Until all copies of this thread are done, in groups or not."""
    asm.effect("cp.async.wait_all;")


def load_bulk(
    slot: Int32 | Uint32, source: Int64, size: Int32 | int, barrier: Int32 | Uint32, policy: Int64 | None = None
) -> None:
    """Starts a copy of `size` bytes, all multiples of 16, from global to shared memory; they count at the mbarrier."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    if policy is None:
        asm.effect(f"{text} [$0], [$1], $2, [$3];", slot, source, Int32(size), barrier)
    else:
        asm.effect(f"{text}.L2::cache_hint [$0], [$1], $2, [$3], $4;", slot, source, Int32(size), barrier, policy)


def prefetch_bulk(source: Int64, size: Int32 | int) -> None:
    """Asks for `size` bytes, all multiples of 16, to be brought from global memory into the L2."""
    asm.effect("cp.async.bulk.prefetch.L2.global [$0], $1;", source, Int32(size))


def evict_first() -> Int64:
    """The cache policy of data that is read once."""
    out: Int64 = asm.value(Int64, "createpolicy.fractional.L2::evict_first.b64 $0;")
    return out


def store_bulk(target: Int64, source: Int32, size: int) -> None:
    """Starts a copy of `size` bytes, a multiple of 16, from shared to global memory; this thread's, in its next group.

    What others wrote there must have been shown to the copy engine (`smem.proxy_fence`, by who wrote it).
    """
    asm.effect("cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;", target, source, Int32(size))


def commit_stores() -> None:
    """Closes the group of this thread's bulk stores since the last one."""
    asm.effect("cp.async.bulk.commit_group;")


def wait_stores() -> None:
    """Until this thread's bulk stores have read their shared memory."""
    asm.effect("cp.async.bulk.wait_group.read 0;")
