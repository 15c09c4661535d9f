"""Memory as the emulator sees it: regions of bytes, each with what is known about every byte."""

from __future__ import annotations

import bisect
import ctypes
import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Flag(enum.IntFlag):
    """What is known of a byte; the same numbers as in native/ptxemu.h."""

    INIT = 1
    IN_FLIGHT_WRITE = 2  # an asynchronous operation will write it
    IN_FLIGHT_READ = 4  # an asynchronous operation will read it
    MBARRIER = 8  # it belongs to an mbarrier object


@dataclass(eq=False)
class Region:
    """A range of addresses.

    Attributes:
        name: For people.
        base: First address.
        data: The bytes, (size,).
        flags: `Flag` of each byte, (size,).
        epoch: For each 4 bytes from the base on: the proxy epoch of the last write by a thread, 0 without one.
        writer: For each 4 bytes: serial of the warp that wrote.
        stamp: For each 4 bytes: that warp's clock then, see native/order.c; None for shared memory outside clusters.
        read_only: Threads must not write to it.
        readers: For each byte: reads in flight; made when the first one is.
        keep: What must live as long as this does.
        pointers: Addresses of data, flags, epoch, writer and stamp.
    """

    name: str
    base: int
    data: Bytes
    flags: Bytes
    epoch: NDArray[np.uint32]
    writer: NDArray[np.uint32]
    read_only: bool = False
    readers: NDArray[np.uint16] | None = None
    keep: object = field(default=None, repr=False)
    stamp: NDArray[np.uint32] | None = None
    pointers: tuple[int, int, int, int, int | None] = field(init=False, repr=False)
    _readers_pointer: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        stamp = None if self.stamp is None else self.stamp.ctypes.data
        arrays = (self.data, self.flags, self.epoch, self.writer)
        data, flags, epoch, writer = (array.ctypes.data for array in arrays)
        self.pointers = (data, flags, epoch, writer, stamp)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.data.size

    def forget_stores(self) -> None:
        """A launch begins: what wrote before is over."""
        for array in (self.epoch, self.writer, self.stamp):
            if array is not None:
                array.fill(0)

    def readers_pointer(self) -> int:
        """Where `readers` lies; it is made if need be."""
        if self.readers is None:
            self.readers = np.zeros(self.data.size, np.uint16)
            self._readers_pointer = self.readers.ctypes.data
        return self._readers_pointer


def region(
    name: str,
    base: int,
    data: Bytes,
    *,
    initialised: bool,
    read_only: bool = False,
    keep: object = None,
    stamped: bool = True,
) -> Region:
    """A region over bytes that lie somewhere; `stamped`: with a clock of each store."""
    words = data.size // 4 + 2
    flags = np.full(data.size, Flag.INIT if initialised else 0, np.uint8)
    epoch, writer = np.zeros(words, np.uint32), np.zeros(words, np.uint32)
    stamp = np.zeros(words, np.uint32) if stamped else None
    return Region(name, base, data, flags, epoch, writer, read_only, keep=keep, stamp=stamp)


def over(name: str, array: np.ndarray, *, initialised: bool = True, read_only: bool = False) -> Region:
    """A region of global memory over the bytes of a contiguous array, at its own address."""
    data = array.reshape(-1).view(np.uint8)
    return region(name, data.ctypes.data, data, initialised=initialised, read_only=read_only, keep=array)


class GlobalMemory:
    """The regions of global memory, by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._bases: list[int] = []

    def add(self, new: Region) -> None:
        """Adds a region; where it overlaps others (views of one storage), they become one."""
        if not new.size:
            return
        for old in [r for r in self.regions if new.base < r.base + r.size and r.base < new.base + new.size]:
            self.regions.remove(old)
            new = _union(old, new)
        self.regions.append(new)
        self.regions.sort(key=lambda r: r.base)
        self._bases = [r.base for r in self.regions]

    def find(self, address: int) -> Region | None:
        """The region that an address lies in."""
        k = bisect.bisect_right(self._bases, address) - 1
        if k >= 0 and address < self._bases[k] + self.regions[k].size:
            return self.regions[k]
        return None

    def nearest(self, address: int) -> str:
        """In words, where an address lies that is in no region."""
        if not self.regions:
            return "no global memory"
        near = min(self.regions, key=lambda r: min(abs(address - r.base), abs(address - r.base - r.size)))
        if address >= near.base + near.size:
            return f"{address - near.base - near.size} bytes after the end of {near.name} ({near.size} bytes)"
        return f"{near.base - address} bytes before {near.name} ({near.size} bytes)"


def _union(a: Region, b: Region) -> Region:
    """One region over two that overlap; a byte holds something when either says so."""
    base, end = min(a.base, b.base), max(a.base + a.size, b.base + b.size)
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - base)).from_address(base))
    both = region(f"{a.name}, {b.name}", base, data, initialised=False, keep=(a.keep, b.keep))
    for part in (a, b):
        both.flags[part.base - base : part.base - base + part.size] |= part.flags
    return both
