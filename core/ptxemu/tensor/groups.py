"""Groups of asynchronous copies that a thread commits and waits for, and the bytes that they keep in flight.

A source of a bulk store may be overwritten, and a destination of cp.async may be read, only after the wait of the
thread that issued the copy. So the bytes stay held until that wait, or until an mbarrier has been told
(cp.async.mbarrier.arrive), not until the copy happens to be complete: what is missing is found under every policy.
PTX ISA 9.7.9.25.3 (cp.async groups), 9.7.9.25.4.3 and .4 (bulk groups).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ptxemu.registry import at_cta_end

if TYPE_CHECKING:
    from ptxemu.context import Context, Hold
    from ptxemu.machine import CTA
    from ptxemu.policy import AsyncOp


@dataclass
class Copy:
    """A copy of a group.

    Attributes:
        op: The asynchronous operation.
        hold: Its bytes in flight.
        waiting: Lanes that issued it and have not waited for it; when none is left the bytes are released.
    """

    op: AsyncOp
    hold: Hold | None
    waiting: int

    def observed(self, lane: int) -> None:
        """A lane has waited for the copy."""
        self.waiting &= ~(1 << lane)
        if not self.waiting and self.hold is not None:
            self.hold.release()
            self.hold = None


@dataclass
class LaneGroups:
    """Groups of one thread.

    Attributes:
        open: Copies that are not yet committed.
        committed: Committed groups from oldest to newest; those that are complete and waited for are dropped.
        seen: How many of the oldest committed groups a wait_group.read has covered.
    """

    open: list[Copy] = field(default_factory=list)
    committed: deque[list[Copy]] = field(default_factory=deque)
    seen: int = 0

    def covered(self, old: int, *, read_only: bool) -> list[list[Copy]]:
        """The oldest `old` groups, less those that an earlier wait of the same kind has covered."""
        return list(self.committed)[self.seen if read_only else 0 : max(old, 0)]

    def observe(self, lane: int, old: int, *, read_only: bool) -> None:
        """The oldest `old` groups have been waited for."""
        for group in self.covered(old, read_only=read_only):
            for copy in group:
                copy.observed(lane)
        self.seen = max(self.seen, old)
        while self.seen and all(copy.op.done for copy in self.committed[0]):
            self.committed.popleft()
            self.seen -= 1


class Groups:
    """Groups of the threads of a warp, for one kind of copy.

    Args:
        what: As a deadlock is to name it, "cp.async.bulk".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.lanes: dict[int, LaneGroups] = {}

    def add(self, copy: Copy) -> None:
        """Adds a copy to the open group of the lanes that issued it."""
        left = copy.waiting
        while left:
            lane = (left & -left).bit_length() - 1
            left &= left - 1
            if lane not in self.lanes:
                self.lanes[lane] = LaneGroups()
            self.lanes[lane].open.append(copy)

    def commit(self, mask: int) -> None:
        """Closes the open group of each lane of a mask; empty groups count, so far as the lane ever had a copy."""
        for lane, groups in self.lanes.items():
            if mask >> lane & 1:
                groups.committed.append(groups.open)
                groups.open = []

    def wait(self, mask: int, keep: int, *, read_only: bool, everything: bool = False) -> str:
        """Waits until at most the `keep` newest groups of each lane are unfinished.

        Args:
            mask: Lanes that wait.
            keep: Groups that may be unfinished.
            read_only: `.read`: it is enough that the sources have been read (the first step of each copy).
            everything: `cp.async.wait_all`: also what has not been committed.

        Returns:
            Why it cannot go on, or "".
        """
        done: list[tuple[int, LaneGroups, int]] = []
        for lane, groups in self.lanes.items():
            if not mask >> lane & 1:
                continue
            if everything:
                groups.committed.append(groups.open)
                groups.open = []
            old = len(groups.committed) - keep
            for group in groups.covered(old, read_only=read_only):
                left = sum(not (copy.op.completed >= 1 if read_only else copy.op.done) for copy in group)
                if left:
                    return f"{self.what}: {left} copies of lane {lane} are not {'read' if read_only else 'complete'}"
            if old > 0:
                done.append((lane, groups, old))
        for lane, groups, old in done:
            groups.observe(lane, old, read_only=read_only)
        return ""

    def so_far(self, lane: int) -> list[Copy]:
        """The copies of a lane that it has not waited for."""
        own = self.lanes.get(lane, LaneGroups())
        return [copy for group in (*own.committed, own.open) for copy in group if copy.waiting >> lane & 1]

    def unread(self) -> list[Copy]:
        """Copies whose bytes nobody has waited for."""
        copies = [
            c for lane in self.lanes.values() for group in (*lane.committed, lane.open) for c in group if c.waiting
        ]
        return list({id(copy): copy for copy in copies}.values())


def of_warp(ctx: Context, what: str) -> Groups:
    """The groups of the executing warp; `what` is "cp.async" or "cp.async.bulk"."""
    state = ctx.warp.state
    if what not in state:
        state[what] = Groups(what)
    groups = state[what]
    assert isinstance(groups, Groups)
    return groups


@at_cta_end
def check_unread(cta: CTA) -> None:
    """Shared memory is gone when the CTA ends, so every bulk copy from it must have been waited for."""
    for warp in cta.warps:
        groups = warp.state.get("cp.async.bulk")
        if isinstance(groups, Groups) and (left := groups.unread()):
            text = f"warp {warp.index} exits without cp.async.bulk.wait_group for {len(left)} bulk stores"
            cta.machine.finding("async_race", f"{text}, the last of them: {left[-1].op.text}", cta=cta)
