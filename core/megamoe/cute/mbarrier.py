"""mbarriers, by their addresses in shared memory, and named barriers: what warps of a CTA say to each other.

A ring of stages has two mbarriers a stage: full[s] counts the bytes that arrived, empty[s] the warps that have read
them.
"""

from __future__ import annotations

from cutlass import Boolean, Int32, Uint32

from megamoe.cute import asm

BARRIER_BYTES = 8


def init(barrier: Int32 | Uint32, arrivals: int) -> None:
    """Makes an mbarrier; `init_fence` shows it to the copy engine."""
    asm.effect("mbarrier.init.shared::cta.b64 [$0], $1;", barrier, Int32(arrivals))


def init_fence() -> None:
    """After `init`, before anyone uses the mbarriers."""
    asm.effect("fence.mbarrier_init.release.cluster;")


def expect(barrier: Int32 | Uint32, size: Int32 | int) -> None:
    """Arrives, and tells the mbarrier that `size` bytes of copies belong to its phase."""
    asm.effect("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", barrier, Int32(size))


def expect_if(barrier: Int32 | Uint32, size: Int32 | int, condition: Boolean | Int32) -> None:
    """`expect` of the thread whose condition holds; no branch."""
    text = "{.reg .pred p; setp.ne.s32 p, $2, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;}"
    asm.effect(text, barrier, Int32(size), asm.flag(condition))


def arrive(barrier: Int32 | Uint32) -> None:
    """Arrives; what this thread did before is seen by who waits."""
    asm.effect("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier)


def arrive_if(barrier: Int32 | Uint32, condition: Boolean | Int32) -> None:
    """`arrive` of the threads whose condition holds; no branch."""
    text = "{.reg .pred p; setp.ne.s32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0];}"
    asm.effect(text, barrier, asm.flag(condition))


def arrive_when_copied(barrier: Int32 | Uint32) -> None:
    """Arrives, for this thread, as soon as its copies so far (`copies.copy16`) are there."""
    asm.effect("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", barrier)


def wait(barrier: Int32 | Uint32, parity: Int32) -> None:
    """Until the phase of that parity is complete."""
    text = "{.reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra D; bra L; D: }"
    asm.effect(text, barrier, parity)


def wait_if(barrier: Int32 | Uint32, parity: Int32, condition: Int32) -> None:
    """`wait` where the condition is not 0, the same in all threads of a warp."""
    text = (
        "{.reg .pred p; setp.eq.s32 p, $2, 0; @p bra D;"
        " L: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra D; bra L; D: }"
    )
    asm.effect(text, barrier, parity, condition)


def named_barrier(number: Int32 | int, threads: int) -> None:
    """A barrier of some whole warps of the CTA."""
    _named("bar.sync", number, threads)


def arrive_at_named(number: Int32 | int, threads: int) -> None:
    """Counts this warp at a `named_barrier` of `threads`, where others wait."""
    _named("bar.arrive", number, threads)


def _named(what: str, number: Int32 | int, threads: int) -> None:
    if isinstance(number, int):
        asm.effect(f"{what} {number}, {threads};")
    else:
        asm.effect(f"{what} $0, {threads};", number)
