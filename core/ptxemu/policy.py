"""Asynchronous operations, and the policies that decide when they complete."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from ptxemu.errors import ArgumentError

Step = Callable[[], None]
DEFERRED = {
    "eager": frozenset[str](),
    "tma_lazy": frozenset({"load", "store"}),
    "mma_lazy": frozenset({"mma"}),
    "lazy": frozenset({"load", "store", "mma"}),
    "random": frozenset({"load", "store", "mma"}),
}
POLICIES = tuple(DEFERRED)


@dataclass(eq=False)
class AsyncOp:
    """An operation that completes later, in steps.

    Attributes:
        kind: "load" (into shared memory), "store" (out of it) or "mma".
        steps: What is done, one after the other.
        text: For reports.
        completed: How many steps are done.
        owner: The cluster that issued it.
    """

    kind: str
    steps: Sequence[Step]
    text: str
    completed: int = 0
    owner: object = None

    @property
    def done(self) -> bool:
        """All steps are."""
        return self.completed == len(self.steps)

    def advance(self) -> None:
        """Does the next step."""
        step = self.steps[self.completed]
        self.completed += 1
        step()


class Asynchronous:
    """The operations that are under way. Those of one queue complete in the order of issue, others in any."""

    def __init__(self, policy: str, seed: int) -> None:
        """Starts with nothing under way.

        Raises:
            ArgumentError: No such policy.
        """
        if policy not in DEFERRED:
            raise ArgumentError("policy", repr(policy), f"one of {', '.join(POLICIES)}")
        self.policy = policy
        self.random = random.Random(seed)
        self.queues: dict[Hashable, deque[AsyncOp]] = {}

    def start(self, op: AsyncOp, queue: Hashable | None) -> None:
        """Takes an operation on, and completes it at once where the policy says so and nothing is before it."""
        key = id(op) if queue is None else queue
        waiting = self.queues.get(key)
        if op.kind not in DEFERRED[self.policy] and not waiting:
            while not op.done:
                op.advance()
            return
        self.queues.setdefault(key, deque()).append(op)

    @property
    def busy(self) -> bool:
        """Something is under way."""
        return bool(self.queues)

    def advance(self) -> bool:
        """Does one step of some operation: the oldest, or any under the random policy. False when there is none."""
        if not self.queues:
            return False
        key = self.random.choice(list(self.queues)) if self.policy == "random" else next(iter(self.queues))
        op = self.queues[key][0]
        op.advance()
        if op.done:
            queue = self.queues[key]
            queue.popleft()
            if not queue:
                del self.queues[key]
        return True

    def texts(self) -> list[str]:
        """What is under way, for reports."""
        return [op.text for queue in self.queues.values() for op in queue]


@dataclass
class CommitGroups:
    """The groups of asynchronous operations of one thread: what commit_group and wait_group speak of.

    Attributes:
        open: Operations since the last commit.
        groups: Committed groups, oldest first; complete ones are dropped from the front.
    """

    open: list[AsyncOp] = field(default_factory=list)
    groups: list[list[AsyncOp]] = field(default_factory=list)

    def add(self, op: AsyncOp) -> None:
        """Adds an operation to the open group."""
        self.open.append(op)

    def commit(self) -> None:
        """Closes the open group."""
        self.groups.append(self.open)
        self.open = []

    def outstanding(self, steps: int | None = None) -> int:
        """How many committed groups, from the oldest unfinished one on, are not complete.

        Args:
            steps: Only so many steps of each operation count; all by default.
        """
        while self.groups and all(op.done for op in self.groups[0]):
            self.groups.pop(0)
        need = [
            all(op.completed >= min(steps, len(op.steps)) if steps is not None else op.done for op in g)
            for g in self.groups
        ]
        return next((len(need) - k for k, complete in enumerate(need) if not complete), 0)
