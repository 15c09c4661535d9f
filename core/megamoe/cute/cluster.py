"""What CTAs of a cluster send each other: numbers and arrivals, at the same place of another one's shared memory."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Boolean, Float32, Int32, Uint32, cute

from megamoe.cute import arith, asm


def peer_address(at: Int32, rank: Int32) -> Int32:
    """The address, in the cluster's shared memory, of the same place in the CTA of a rank."""
    out: Int32 = arith.ptx(Int32, "mapa.shared::cluster.u32 $0, $1, $2;", at, rank)
    return out


def load4(at: Int32, rank: Int32) -> Int32:
    """A word of the CTA of a rank."""
    text = "{.reg .b32 there; mapa.shared::cluster.u32 there, $1, $2; ld.shared::cluster.b32 $0, [there];}"
    out: Int32 = asm.value(Int32, text, at, rank)
    return out


def store16(at: Int32, words: Sequence[Uint32]) -> None:
    """Four words to an address of `peer_address`; a barrier of the cluster shows them."""
    asm.effect("st.shared::cluster.v4.b32 [$0], {$1, $2, $3, $4};", at, *words)


def send(values: Sequence[Float32], slot: Int32, arrived: Int32, rank: Int32) -> None:
    """Writes 16 bytes at `slot` of another CTA's shared memory and counts them at its mbarrier `arrived`.

    Args:
        values: Four numbers to send.
        slot: Address in this CTA's shared memory of the same place, a multiple of 16.
        arrived: Address in this CTA of the same mbarrier; whoever waits there has told it how many bytes to expect.
        rank: Of the CTA in the cluster, the sender's own too.
    """
    text = (
        "{.reg .b32 to, bar; mapa.shared::cluster.u32 to, $0, $6; mapa.shared::cluster.u32 bar, $1, $6;"
        " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {$2, $3, $4, $5}, [bar];}"
    )
    asm.effect(text, slot, arrived, *map(arith.bits, values), rank)


def arrive_everywhere(barrier: Int32, ctas: int) -> None:
    """A warp's arrival at the same mbarrier of each CTA of the cluster; `ctas` is a power of two."""
    lane = cute.arch.lane_idx()
    if ctas == 1:
        text = "{.reg .pred p; setp.eq.s32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0];}"
    else:
        text = (  # a predicated mapa would keep a register for what `there` was before, at each place of a loop
            f"{{.reg .pred p; .reg .b32 there; setp.lt.s32 p, $1, {ctas}; and.b32 there, $1, {ctas - 1};"
            " mapa.shared::cluster.u32 there, $0, there; @p mbarrier.arrive.shared::cluster.b64 _, [there];}"
        )
    asm.effect(text, barrier, lane)


def arrive_at_if(barrier: Int32, rank: Int32, condition: Boolean | Int32) -> None:
    """Arrives at the same mbarrier of a CTA of the cluster, from the threads whose condition holds; no branch."""
    text = (
        "{.reg .pred p; .reg .b32 there; setp.ne.s32 p, $2, 0; mapa.shared::cluster.u32 there, $0, $1;"
        " @p mbarrier.arrive.shared::cluster.b64 _, [there];}"
    )
    asm.effect(text, barrier, rank, asm.flag(condition))
