"""An mbarrier as operations that Python executes see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptxemu import native

if TYPE_CHECKING:
    from ptxemu.access import Accessor
    from ptxemu.machine import Machine

# why the native core refuses an update, as in native/mbarrier.c
WHY = {
    1: "it is not initialised",
    2: "it is not an aligned address of shared memory",
    3: "a count that is 0 or more than 2^20 - 1",
    4: "more arrivals than are pending in this phase",
    5: "a transaction count beyond 2^20 - 1",
    6: "it is initialised already, and was not invalidated",
}


@dataclass(frozen=True)
class MBarrier:
    """The state lives in the native core; what is asked is always current.

    Attributes:
        address: shared::cluster address.
    """

    machine: Machine
    accessor: Accessor
    address: int
    _state: Any

    @property
    def expected(self) -> int:
        """Arrivals that a phase takes."""
        return int(self._state.contents.expected)

    @property
    def pending(self) -> int:
        """Arrivals that are missing in this phase."""
        return int(self._state.contents.pending)

    @property
    def tx(self) -> int:
        """Bytes that are still expected in this phase; negative when more have come than were announced."""
        return int(self._state.contents.tx)

    @property
    def phase(self) -> int:
        """How many phases are complete."""
        return int(self._state.contents.phase)

    def fenced(self) -> bool:
        """Whether the warp that initialised it has made that visible to the asynchronous proxy since."""
        state = self._state.contents
        warp = self.machine.warps.get(state.init_warp)
        return warp is None or int(warp.state_struct.init_fence_epoch) > state.init_epoch

    def arrive(self, count: int = 1) -> None:
        """Arrives so many times; more than are pending ends the launch."""
        self._update(count, 0)

    def add_pending(self, count: int) -> None:
        """Raises the arrivals that are missing in this phase."""
        self._state.contents.pending += count

    def expect_tx(self, count: int) -> None:
        """Announces bytes."""
        self._update(0, count)

    def complete_tx(self, count: int) -> None:
        """Counts bytes that have come."""
        self._update(0, -count)

    def _update(self, arrivals: int, tx: int) -> None:
        warp = self.accessor.warp.struct
        if why := native.core().emu_mbarrier_update(self.machine.native, warp, self._state, arrivals, tx):
            text = f"mbarrier {self.address:#x}: {WHY[why]} ({self.describe()})"
            self.accessor.finding("mbarrier", text, self.address, stop=True)

    def describe(self) -> str:
        """Its state in words."""
        return f"phase {self.phase}, {self.pending} of {self.expected} arrivals and {self.tx} bytes outstanding"
