"""Checked access to memory by whole arrays of addresses, for operations that Python executes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptxemu import native
from ptxemu.memory import Flag, Region

if TYPE_CHECKING:
    from ptxemu.instruction import Instruction
    from ptxemu.machine import Machine, Warp

Offsets = NDArray[np.int64]
SHARED_WINDOW = 0x53 << 56  # top byte of a generic address of shared memory, as in native/ptxemu.h
WINDOW_MASK = 0xFF << 56
_OUTSIDE = 2  # as in native/access.c


@dataclass(eq=False)
class Hold:
    """Bytes in flight: regions and, in each, addresses of runs of `width` bytes."""

    access: str
    width: int
    parts: list[tuple[Region, Offsets]] = field(default_factory=list)

    def release(self) -> None:
        """They are no longer."""
        for region, at in self.parts:
            readers = region.readers_pointer() if self.access == "read" else None
            native.core().emu_release(region.pointers[1], readers, region.base, at.ctypes.data, at.size, self.width)
        self.parts = []


@dataclass(frozen=True)
class Accessor:
    """Memory as one execution of an instruction may touch it."""

    machine: Machine
    warp: Warp
    instruction: Instruction
    mask: int

    def finding(self, kind: str, text: str, address: int, *, stop: bool = False) -> None:
        """Reports what is wrong with an access."""
        self.machine.finding(
            kind, text, instruction=self.instruction, warp=self.warp, lanes=self.mask, address=address, stop=stop
        )

    def find(self, address: int, space: str) -> Region | None:
        """The region that an address lies in; shared memory of a CTA that has exited is gone."""
        if space == "generic":
            space = "shared" if address & WINDOW_MASK == SHARED_WINDOW else "global"
            address &= ~WINDOW_MASK if space == "shared" else -1
        if space == "global":
            return self.machine.memory.find(address)
        ctas = self.warp.cta.cluster.ctas
        rank = address >> 24
        if not 0 <= rank < len(ctas) or not ctas[rank].running:
            return None
        shared = ctas[rank].shared
        return shared if shared.base <= address < shared.base + shared.size else None

    def _parts(
        self, addresses: Offsets, width: int, space: str
    ) -> Iterator[tuple[Region, Offsets, NDArray[np.bool_] | None]]:
        """Region by region: addresses without the bits of a window, and which of the given ones they are (None: all).

        Out of bounds ends the launch.
        """
        left: NDArray[np.bool_] | None = None
        while True:
            first = int(addresses[0] if left is None else addresses[np.argmax(left)])
            region = self.find(first, space)
            window = first & WINDOW_MASK if space == "generic" and first >= 1 << 56 else 0
            plain = addresses - window if window else addresses
            if region is not None:
                offsets = plain - region.base
                inside = (offsets >= 0) & (offsets <= region.size - width)
            if region is None or not inside[0 if left is None else int(np.argmax(left))]:
                self.finding("out_of_bounds", f"{width} bytes{self._where(first, space)}", first, stop=True)
                return
            if left is None and inside.all():
                yield region, plain, None
                return
            here = inside if left is None else inside & left
            yield region, plain[here], here
            left = ~inside if left is None else left & ~inside
            if not left.any():
                return

    def _whole(self, addresses: Offsets, space: str) -> Region | None:
        """The region of the first address, in which the others most often lie too."""
        return None if space == "generic" else self.find(int(addresses[0]), space)

    def _where(self, address: int, space: str) -> str:
        return f", {self.machine.memory.nearest(address)}" if space == "global" else ""

    def load(self, addresses: NDArray[np.generic], width: int, space: str, proxy: str) -> NDArray[np.uint8]:
        """See `Context.load`."""
        flat = np.ascontiguousarray(addresses.reshape(-1), np.int64)
        out = np.empty((flat.size, width), np.uint8)
        if flat.size:
            region = self._whole(flat, space)
            if region is None or not self._gather(region, flat, out, proxy):
                for part, at, which in self._parts(flat, width, space):
                    rows = out if which is None else np.empty((at.size, width), np.uint8)
                    self._gather(part, np.ascontiguousarray(at), rows, proxy)
                    if which is not None:
                        out[which] = rows
        return out.reshape(*addresses.shape, width)

    def store(
        self, addresses: NDArray[np.generic], data: NDArray[np.uint8], space: str, proxy: str, *, own: bool = False
    ) -> None:
        """See `Context.store`; `own`: the bytes are in flight because of this very operation."""
        flat = np.ascontiguousarray(addresses.reshape(-1), np.int64)
        width = data.shape[-1]
        rows = np.ascontiguousarray(data.reshape(-1, width))
        if not flat.size:
            return
        region = self._whole(flat, space)
        if region is not None and self._scatter(region, flat, rows, proxy, own):
            return
        for part, at, which in self._parts(flat, width, space):
            chosen = rows if which is None else np.ascontiguousarray(rows[which])
            self._scatter(part, np.ascontiguousarray(at), chosen, proxy, own)

    def _scatter(self, region: Region, at: Offsets, rows: NDArray[np.uint8], proxy: str, own: bool) -> bool:
        """Copies rows of bytes into a region, and checks that they may be written; False: some lie outside."""
        if region.read_only:
            self.finding("read_only", f"a store to {region.name}", int(at[0]), stop=True)
        before = ctypes.c_uint32()
        source = (at.ctypes.data, at.size, rows.shape[1], rows.ctypes.data)
        now = (self.machine.epoch if proxy == "generic" else 0, self.warp.serial, ctypes.addressof(before))
        if native.core().emu_scatter(*region.pointers, region.base, region.size, *source, *now):
            return False
        if proxy == "generic" and not own and before.value & (Flag.IN_FLIGHT_READ | Flag.IN_FLIGHT_WRITE):
            self.finding("async_race", "a store to bytes in flight", int(at[0]))
        if before.value & Flag.MBARRIER:
            self.finding("mbarrier", "a store over an mbarrier object", int(at[0]))
        return True

    def _gather(self, region: Region, at: Offsets, out: NDArray[np.uint8], proxy: str) -> bool:
        """Copies rows of bytes out of a region, and checks that they may be read; False: some lie outside."""
        width = out.shape[1]
        newest = ctypes.c_uint32()
        target = (out.ctypes.data, ctypes.addressof(newest))
        place = (region.base, region.data.size, at.ctypes.data, at.size, width)
        if code := native.core().emu_gather(*region.pointers[:3], *place, *target):
            if code == _OUTSIDE:
                return False
            self._blame(region, at - region.base, width)
        if proxy == "async" and newest.value >= max(self.warp.fence_epoch, 1):
            self._check_fenced(region, at - region.base, width)
        return True

    def _blame(self, region: Region, offsets: Offsets, width: int) -> None:
        """Says why bytes may not be read."""
        flags = region.flags[offsets[:, None] + np.arange(width)]
        bad = (flags & np.uint8(~Flag.IN_FLIGHT_READ & 255)) != Flag.INIT
        row, column = divmod(int(np.argmax(bad)), width)
        flag, address = int(flags[row, column]), region.base + int(offsets[row]) + column
        if flag & Flag.MBARRIER:
            self.finding("mbarrier", "an mbarrier object read as data", address)
        elif flag & Flag.IN_FLIGHT_WRITE:
            self.finding("async_race", "bytes read that an operation in flight will write", address)
        else:
            self.finding("uninitialised", f"{int(bad.sum())} of {bad.size} bytes were never written", address)

    def _check_fenced(self, region: Region, offsets: Offsets, width: int) -> None:
        """Bytes that threads wrote need fence.proxy.async, by the writer or later by who issues the operation."""
        words = _words(offsets, width)
        epochs = region.epoch[words]
        writers = region.writer[words]
        for serial in np.unique(writers[epochs > 0]):
            last = int(epochs[writers == serial].max())
            if self.warp.fence_epoch <= last and self.machine.fence_epoch_of(int(serial)) <= last:
                where = int(words.reshape(-1)[np.argmax((writers == serial).reshape(-1))]) * 4
                writer_name = self.machine.name_of(int(serial))
                text = f"{region.name} was written by warp {writer_name}, and no fence.proxy.async followed"
                self.finding("missing_proxy_fence", text, region.base + where)

    def hold(self, addresses: NDArray[np.generic], width: int, access: str, space: str) -> Hold:
        """See `Context.hold`. Two operations in flight that conflict are a finding."""
        held = Hold(access, width)
        if self.machine.asynchronous.policy == "eager" or not addresses.size:  # nothing is ever in flight
            return held
        flat = np.ascontiguousarray(addresses.reshape(-1), np.int64)
        region = self._whole(flat, space)
        if region is None or not self._mark(held, region, flat):
            for part, at, _ in self._parts(flat, width, space):
                self._mark(held, part, np.ascontiguousarray(at))
        return held

    def _mark(self, held: Hold, region: Region, at: Offsets) -> bool:
        """Marks bytes of a region; False: some lie outside."""
        readers = region.readers_pointer() if held.access == "read" else None
        conflict = ctypes.c_int64()
        place = (region.base, region.size, at.ctypes.data, at.size, held.width, ctypes.addressof(conflict))
        if code := native.core().emu_hold(region.pointers[1], readers, *place):
            if code == _OUTSIDE:
                return False
            where = conflict.value
            other = "write" if int(region.flags[where - region.base]) & Flag.IN_FLIGHT_WRITE else "read"
            text = f"a {held.access} is started while a {other} of the same bytes is in flight"
            self.finding("async_race", text, where)
        held.parts.append((region, at))
        return True


def _words(offsets: Offsets, width: int) -> NDArray[np.int64]:
    """Numbers of the 4-byte words that hold the bytes at some offsets."""
    first = offsets >> 2
    return first if width <= 4 else first[:, None] + np.arange((width + 3) // 4)
