"""Addresses in the shared memory of a cluster, and where asynchronous copies signal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptxemu.context import Context, MBarrier

OFFSET = 0xFFFFFF
RANK_SHIFT = 24


def rank_of(ctx: Context, address: int) -> int:
    """Rank in the cluster of the CTA whose shared memory an address lies in."""
    rank = address >> RANK_SHIFT
    if rank >= len(ctx.cluster.ctas):
        ctx.finding(
            "out_of_bounds",
            f"shared address {address:#x} in CTA {rank} of {len(ctx.cluster.ctas)}",
            address=address,
            stop=True,
        )
    return rank


def destinations(ctx: Context, mask: int) -> list[int]:
    """Ranks of the CTAs that a multicast mask names; a finding for those that are not there."""
    count = len(ctx.cluster.ctas)
    mask &= 0xFFFF
    if mask >> count or not mask:
        ctx.finding("out_of_bounds", f"multicast to CTAs {mask:#b} of a cluster of {count}", stop=True)
    return [rank for rank in range(count) if mask >> rank & 1]


def completion_barrier(ctx: Context, address: int, rank: int, *, multicast: bool, pair: bool) -> MBarrier:
    """The barrier that a copy to the shared memory of CTA `rank` signals.

    A multicast signals at the same offset in each destination; with cta_group::2 in that CTA of the destination's
    pair whose rank has the parity of the barrier's CTA. Without multicast the address itself says which. PTX ISA
    9.7.9.25.5.2.
    """
    own = rank_of(ctx, address)
    if multicast:
        own = rank & ~1 | own & 1 if pair else rank
    return async_barrier(ctx, own << RANK_SHIFT | address & OFFSET)


def async_barrier(ctx: Context, address: int) -> MBarrier:
    """A barrier that the asynchronous proxy will signal; a finding when its initialisation was not fenced."""
    bar = ctx.mbarrier(address)
    if not bar.fenced():
        ctx.finding(
            "missing_fence",
            f"mbarrier {address:#x} was initialised without fence.mbarrier_init or fence.proxy.async",
            address=address,
        )
    return bar
