"""Runs a launch: clusters of CTAs of warps, with the native core for threads and Python for what is asynchronous."""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ptxemu import explain, memory, native, registry
from ptxemu.access import Accessor
from ptxemu.context import Context
from ptxemu.errors import ArgumentError
from ptxemu.instruction import Instruction, Register, Symbol
from ptxemu.lowering import SHARED_BASE
from ptxemu.mbarrier import WHY, MBarrier
from ptxemu.memory import GlobalMemory, Region
from ptxemu.policy import Asynchronous
from ptxemu.program import Program
from ptxemu.registry import Blocked
from ptxemu.report import Finding, FindingKind, LaunchFacts
from ptxemu.special import special_value

Dim3 = tuple[int, int, int]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF  # of registers and shared memory: NaN in every floating-point format, -1 as an integer
MOST_SHARED = 227 * 1024
IDLE_ROUNDS = 2000  # of warps that only poll, before that counts as a deadlock
BUDGET = 200_000_000  # warp instructions, a minute or two


class Stop(Exception):  # noqa: N818  (it is not an error of the emulator)
    """Ends a launch after a finding that stops it."""


@dataclass(frozen=True)
class Launch:
    """What a kernel is launched with."""

    grid: Dim3
    block: Dim3
    cluster: Dim3 = (1, 1, 1)
    shared_bytes: int = 0  # dynamic

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.block[0] * self.block[1] * self.block[2]


@dataclass(eq=False)
class Warp:
    """A warp.

    Attributes:
        number: Among all warps that are resident.
        serial: Among all warps of the launch.
        index: In its CTA.
        state: For operations that Python executes, to keep what they want.
    """

    number: int
    serial: int
    index: int
    cta: CTA
    struct: Any
    file: NDArray[np.uint8]
    specials: NDArray[np.uint8]
    offsets: Sequence[int]
    pending_bytes: NDArray[np.uint8]
    file_pointer: int
    state: dict[Hashable, Any] = field(default_factory=dict)
    blocked: dict[int, str] = field(default_factory=dict)
    views: dict[int, NDArray[Any]] = field(default_factory=dict)
    tokens: dict[Hashable, tuple[list[tuple[Sequence[Register], NDArray[np.int64]]], str]] = field(default_factory=dict)

    @property
    def state_struct(self) -> Any:
        """The native structure."""
        return self.struct.contents

    @property
    def fence_epoch(self) -> int:
        """Of the last fence.proxy.async."""
        return int(self.struct.contents.fence_epoch)

    def registers(self, register: Register) -> NDArray[Any]:
        """The 32 lanes of a register: a view."""
        view = self.views.get(register.index)
        if view is None:
            start = self.offsets[register.index]
            view = self.file[start : start + 32 * register.width].view(_WORDS[register.width])
            self.views[register.index] = view
        return view

    def wide(self, register: Register) -> NDArray[np.uint64]:
        """A 128-bit register, (2, 32): a view."""
        start = self.offsets[register.index]
        return self.file[start : start + 512].view(np.uint64).reshape(2, 32)

    def predicate(self, register: Register) -> NDArray[np.bool_]:
        """The 32 lanes of a predicate."""
        return (self.predicate_word(register) >> np.arange(32) & 1).astype(np.bool_)

    def predicate_word(self, register: Register) -> int:
        """A predicate, one bit a lane."""
        start = self.offsets[register.index]
        return int.from_bytes(self.file[start : start + 4].tobytes(), "little")

    def same_in_all_lanes(self, register: Register) -> int | None:
        """The value of a register that is the same in all lanes, or None."""
        start = self.offsets[register.index]
        raw = self.file[start : start + 32 * register.width].tobytes()
        first = raw[: register.width]
        return int.from_bytes(first, "little") if raw == first * 32 else None

    def write(self, register: Register, values: object, mask: int = 0xFFFFFFFF) -> None:
        """Writes lanes of a register: (32,) values of its width, or one for all."""
        lanes = (mask >> np.arange(32) & 1).astype(np.bool_)
        if not register.width:
            bits = np.broadcast_to(np.asarray(values, np.bool_), (32,))
            start = self.offsets[register.index]
            word = self.file[start : start + 4].view(np.uint32)
            word[0] = np.uint32((int(word[0]) & ~mask) | sum(1 << int(k) for k in np.flatnonzero(bits & lanes)))
            return
        target = self.registers(register)
        given = np.asarray(values)
        if given.dtype.kind == "f" or given.dtype.itemsize == register.width:
            bits = np.ascontiguousarray(np.broadcast_to(given, (32,))).view(target.dtype)
        else:
            bits = np.broadcast_to(given, (32,)).astype(target.dtype)
        np.copyto(target, bits, where=lanes)

    def special(self, name: str) -> NDArray[np.uint64]:
        """A special register, (32,)."""
        found = special_value(name, self.cta.machine.launch, self.cta, self.index)
        if found is None:
            raise ArgumentError("kernel", f"special register {name}", "one that the emulator knows")
        return found

    def matrix(self, numbers: tuple[int, ...]) -> NDArray[np.uint32]:
        """Many 32-bit registers by their numbers, unchecked: a copy, uint32 (registers, 32)."""
        return self._words()[self._places(numbers)]

    def set_matrix(self, numbers: tuple[int, ...], values: NDArray[np.uint32]) -> None:
        """Writes all lanes of many 32-bit registers, unchecked: uint32 (registers, 32)."""
        self._words()[self._places(numbers)] = values

    def _words(self) -> NDArray[np.uint32]:
        return self.file[: self.file.size // 4 * 4].view(np.uint32)

    def _places(self, numbers: tuple[int, ...]) -> NDArray[np.int64]:
        """Where in the register file: (registers, 32); the same for all warps of a launch."""
        known = self.cta.machine.register_places
        if (found := known.get(numbers)) is None:
            first = np.array([self.offsets[k] >> 2 for k in numbers])
            found = known[numbers] = first[:, None] + np.arange(32)
        return found

    def pend(self, registers: Sequence[Register], token: Hashable, why: str) -> None:
        """See `Context.pend`. A token may be used again; a register may be pending for several, once for each."""
        slots = self.slots(tuple([r.index for r in registers]))
        self.tokens.setdefault(token, ([], why))[0].append((registers, slots))
        self.pending_bytes[slots] += 1
        self.struct.contents.pending_count += len(registers)

    def unpend(self, token: Hashable) -> None:
        """Gives registers back."""
        for _, slots in self.tokens.pop(token, ([], ""))[0]:
            self.pending_bytes[slots] -= 1
            self.struct.contents.pending_count -= len(slots)

    def slots(self, numbers: tuple[int, ...]) -> NDArray[np.int64]:
        """Where registers start in the file, in words, by their numbers; the same for all warps of a launch."""
        known = self.cta.machine.register_slots
        if (found := known.get(numbers)) is None:
            found = known[numbers] = np.array([self.offsets[k] >> 2 for k in numbers])
        return found

    def pending_reason(self, register: Register) -> str:
        """What a register waits for; nothing for one that may be touched."""
        slot = self.offsets[register.index] >> 2
        if not self.tokens or not self.pending_bytes[slot]:
            return ""
        return next(
            (why for parts, why in self.tokens.values() if any((slots == slot).any() for _, slots in parts)), ""
        )


@dataclass(eq=False)
class CTA:
    """A CTA; `state` is for operations that Python executes."""

    machine: Machine
    cluster: Cluster
    index: Dim3
    rank: int
    shared: Region
    struct: Any = None
    warps: list[Warp] = field(default_factory=list)
    state: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Some warp has not exited."""
        return bool(self.struct.contents.live_warps)


@dataclass(eq=False)
class Cluster:
    """A cluster of CTAs."""

    number: int
    origin: Dim3
    shape: Dim3
    struct: Any
    ctas: list[CTA] = field(default_factory=list)


class Machine:
    """One launch of one kernel."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        global_memory: GlobalMemory,
        *,
        policy: str = "eager",
        seed: int = 0,
        number: int = 0,
        budget: int = BUDGET,
        trace: Any = None,
    ) -> None:
        """Prepares a launch; the parameters are set already.

        Raises:
            ArgumentError: A geometry that no GPU takes.
        """
        _check(program, launch)
        self.program = program
        self.launch = launch
        self.memory = global_memory
        self.number = number
        self.asynchronous = Asynchronous(policy, seed)
        self.findings: list[Finding] = []
        self.warps: dict[int, Warp] = {}
        self.by_serial: dict[int, Warp] = {}  # the same ones
        self.register_places: dict[tuple[int, ...], NDArray[np.int64]] = {}
        self.register_slots: dict[tuple[int, ...], NDArray[np.int64]] = {}
        self.clusters: dict[int, Cluster] = {}
        self.shared_bytes = -(-max(program.static_shared + launch.shared_bytes, 16) // 16) * 16
        for region in (program.parameters, *program.regions):
            region.forget_stores()
            global_memory.add(region)
        self.resident_at_once = False  # all CTAs run together, as in a cooperative launch
        self.stopped = False  # by a finding
        self._origins = self._all_origins()
        self._started: list[Dim3] = []  # origins of clusters, by number
        self._warps_per_cta = -(-launch.threads // 32)
        self._pool: dict[int, list[NDArray[np.uint8]]] = {}
        self._free_numbers: list[int] = []
        self._core = native.core()
        self.native = self._core.emu_machine_new(len(program.code))
        self._setup(seed, budget, trace)

    def _setup(self, seed: int, budget: int, trace: Any) -> None:
        m = self.native.contents
        m.code = self.program.code.ctypes.data
        m.params = self.program.parameters.base
        regions = self.memory.regions
        self._regions = (native.Region * max(len(regions), 1))(*map(_native_region, regions))
        m.regions = ctypes.cast(self._regions, ctypes.POINTER(native.Region))
        m.region_count = len(regions)
        m.random = self.asynchronous.policy == "random"
        m.rng = (seed * 0x9E3779B97F4A7C15 + 0x1234567) & ((1 << 64) - 1) or 1
        m.budget = budget
        m.block_threads = self.launch.threads
        if self.program.touch_start.size:
            m.touched, m.touch_start = self.program.touched.ctypes.data, self.program.touch_start.ctypes.data
        m.register_words = self.program.places.register_bytes // 4 + 1
        if trace is not None:
            self._trace = native.TRACE(lambda warp, pc, mask: trace(self, self.warps[warp], pc, mask))
            m.trace = self._trace

    @property
    def epoch(self) -> int:
        """Proxy fences executed so far, plus one."""
        return int(self.native.contents.epoch)

    def fence_epoch_of(self, serial: int) -> int:
        """Of the last fence.proxy.async of a warp; one that has exited no longer counts against anybody."""
        return self.by_serial[serial].fence_epoch if serial in self.by_serial else 1 << 62

    def name_of(self, serial: int) -> str:
        """A warp, in words; it may have exited."""
        cta, index = divmod(serial, self._warps_per_cta)
        number, rank = divmod(cta, math.prod(self.launch.cluster))
        return f"{index} of CTA {self._place(self._started[number], rank)}"

    def address_of(self, symbol: Symbol, warp: Warp) -> int:
        """The address of a variable or parameter, as this warp sees it."""
        space, address = self.program.symbols[symbol.name]
        base = warp.cta.rank << 24 if space == "shared" else 0
        return base + address + symbol.offset

    def mbarrier(self, address: int, ctx: Context) -> MBarrier:
        """See `Context.mbarrier`."""
        accessor = Accessor(self, ctx.warp, ctx.instruction, ctx.mask)
        found = self._core.emu_mbarrier(ctx.cluster.struct, address & 0xFFFFFFFF)
        if not found:
            accessor.finding("mbarrier", f"mbarrier {address:#x}: {WHY[1]}", address, stop=True)
        return MBarrier(self, accessor, address, found)

    def finding(
        self,
        kind: str,
        text: str,
        *,
        instruction: Instruction | None = None,
        warp: Warp | None = None,
        cta: CTA | None = None,
        lanes: int = 0,
        address: int | None = None,
        region: str = "",
        stop: bool = False,
    ) -> None:
        """Adds a finding, unless this line has one of its kind; `stop` ends the launch."""
        line = instruction.line if instruction else 0
        where = warp.cta if warp else cta
        known = any(f.kind == kind and f.line == line and (line or f.detail == text) for f in self.findings)
        if not known or stop:
            self.findings.append(
                Finding(
                    kind=FindingKind(kind),
                    line=line,
                    text=instruction.text if instruction else "",
                    detail=text,
                    launch=self.number,
                    cta=where.index if where else (0, 0, 0),
                    warp=warp.index if warp else 0,
                    lanes=lanes,
                    address=address,
                    region=region,
                )
            )
        if stop:
            raise Stop

    # clusters
    def _all_origins(self) -> Iterator[Dim3]:
        (gx, gy, gz), (cx, cy, cz) = self.launch.grid, self.launch.cluster
        return ((x, y, z) for z in range(0, gz, cz) for y in range(0, gy, cy) for x in range(0, gx, cx))

    def cancel_next(self) -> Dim3 | None:
        """Takes the next cluster that has not been started, so that it never will be."""
        return next(self._origins, None)

    def _admit(self) -> bool:
        """Starts the next cluster."""
        origin = next(self._origins, None)
        if origin is None:
            return False
        number, count = len(self._started), math.prod(self.launch.cluster)
        struct = self._core.emu_cluster_new(count, self._warps_per_cta, self.launch.threads, number)
        self._started.append(origin)
        self.clusters[number] = cluster = Cluster(number, origin, self.launch.cluster, struct)
        for rank in range(count):
            self._add_cta(cluster, rank)
        return True

    def _place(self, origin: Dim3, rank: int) -> Dim3:
        """Index of a CTA of a cluster."""
        cx, cy, _ = self.launch.cluster
        return origin[0] + rank % cx, origin[1] + rank // cx % cy, origin[2] + rank // (cx * cy)

    def _add_cta(self, cluster: Cluster, rank: int) -> None:
        index, warps = self._place(cluster.origin, rank), self._warps_per_cta
        data = self._room(self.shared_bytes)
        name, base = f"shared memory of CTA {index}", (rank << 24) + SHARED_BASE
        shared = memory.region(name, base, data, initialised=False, stamped=math.prod(self.launch.cluster) > 1)
        cta = CTA(self, cluster, index, rank, shared)
        cta.struct = self._core.emu_cta_new(cluster.struct, rank, warps, *shared.pointers, self.shared_bytes)
        cluster.ctas.append(cta)
        for k in range(warps):
            self._add_warp(cta, k)

    def _room(self, size: int) -> NDArray[np.uint8]:
        """Poisoned bytes, aligned to 1024; kept for the next cluster where they fit."""
        if kept := self._pool.get(size):
            old = kept.pop()
            old.fill(POISON)
            return old
        room = np.full(size + 1024, POISON, np.uint8)
        start = -room.ctypes.data % 1024
        return room[start : start + size]

    def _keep(self, room: NDArray[np.uint8]) -> None:
        self._pool.setdefault(room.size, []).append(room)

    def _add_warp(self, cta: CTA, index: int) -> None:
        places = self.program.places
        number = self._free_numbers.pop(0) if self._free_numbers else len(self.warps)
        live = min(32, self.launch.threads - 32 * index)
        file, specials = self._room(max(places.register_bytes, 64)), np.zeros(places.special_bytes, np.uint8)
        pending = np.zeros(places.register_bytes // 4 + 1, np.uint8)
        for (name, added, width), start in places.special.items():
            if name == "shared address":
                specials[start : start + 32 * width].view(_WORDS[width]).fill((cta.rank << 24) + added)
            elif (shown := special_value(name, self.launch, cta, index)) is None:
                raise ArgumentError("kernel", f"special register {name}", "one that the emulator knows")
            elif width:
                specials[start : start + 32 * width].view(_WORDS[width])[:] = shown
            else:
                specials[start : start + 4].view(np.uint32)[0] = 0xFFFFFFFF if shown[0] else 0
        pointers = (file.ctypes.data, self.program.constants.ctypes.data, specials.ctypes.data, pending.ctypes.data)
        struct = self._core.emu_warp_new(self.native, cta.struct, number, index, (1 << live) - 1, *pointers)
        serial = int(struct.contents.serial)
        warp = Warp(number, serial, index, cta, struct, file, specials, places.register_offsets, pending, pointers[0])
        if self.program.local:
            data, flags = self._room(32 * self.program.local), np.zeros(32 * self.program.local, np.uint8)
            warp.state["local memory"] = (data, flags)
            self._core.emu_warp_local(struct, data.ctypes.data, flags.ctypes.data, self.program.local)
        self.warps[number] = self.by_serial[serial] = warp
        cta.warps.append(warp)

    def _end_cluster(self, cluster: Cluster) -> None:
        """Checks what a cluster leaves behind, and forgets it."""
        self._collect_notes()  # while its warps are known
        for op in [op for queue in self.asynchronous.queues.values() for op in queue if op.owner is cluster]:
            if op.kind != "store" or not op.completed:
                self.finding("async_race", f"a CTA exited with an operation in flight: {op.text}", cta=cluster.ctas[0])
            self._finish(op)
        for cta in cluster.ctas:
            for check in registry.CTA_END:
                check(cta)
        for cta in cluster.ctas:
            self._keep(cta.shared.data)
            for warp in cta.warps:
                self._keep(warp.file)
                self._core.emu_warp_free(self.native, warp.struct)
                self._free_numbers.append(warp.number)
                del self.warps[warp.number], self.by_serial[warp.serial]
        self._core.emu_cluster_free(cluster.struct)
        del self.clusters[cluster.number]

    def _finish(self, op: Any) -> None:
        while not op.done and self.asynchronous.advance():
            pass

    # running
    def run(self) -> LaunchFacts:
        """Runs the launch to its end, or to the first finding that ends it."""
        with _blas().limit(
            limits=1, user_api="blas"
        ):  # products of tiles are small: threads would only wait for each other
            return self._run()

    def _run(self) -> LaunchFacts:
        start = time.perf_counter()
        try:
            try:
                while self._admit() and self.resident_at_once:
                    pass
                while self.clusters:
                    self._step()
            except Stop:
                self.stopped = True
            self._collect_notes()
            return self._facts(time.perf_counter() - start)
        finally:
            self._release()

    def _facts(self, seconds: float) -> LaunchFacts:
        m = self.native.contents
        return LaunchFacts(
            kernel=self.program.kernel.name,
            grid=self.launch.grid,
            block=self.launch.block,
            cluster=self.launch.cluster,
            shared=self.shared_bytes,
            instructions=int(m.executed),
            seconds=seconds,
            hits=np.ctypeslib.as_array(m.hits, (len(self.program.code),)).copy(),
        )

    def _release(self) -> None:
        for cluster in self.clusters.values():
            for cta in cluster.ctas:
                for warp in cta.warps:
                    self._core.emu_warp_free(self.native, warp.struct)
            self._core.emu_cluster_free(cluster.struct)
        self._core.emu_machine_free(self.native)

    def _step(self) -> None:
        m, pending = self.native.contents, self.asynchronous
        m.poll = m.random and pending.busy
        event = self._core.emu_run(self.native)
        if event == native.Event.CALLBACK:
            self._callback()
        elif event == native.Event.CLUSTER_END:
            self._end_cluster(self.clusters[m.event_cluster])
            if not self.clusters:
                self._admit()
        elif event == native.Event.STUCK:
            self._stuck()
        elif event == native.Event.ROUND:
            self._maybe_advance()
        elif event == native.Event.FAULT:
            self._fault()
        else:
            self.finding("livelock", f"{m.executed} instructions, and no end: {explain.waiting(self)}", stop=True)

    def _maybe_advance(self) -> None:
        """Under the random policy, something asynchronous makes progress now and then."""
        if self.asynchronous.policy == "random" and self.asynchronous.random.random() < 0.3:
            self.native.contents.progress += self.asynchronous.advance()

    def _callback(self) -> None:
        m = self.native.contents
        warp = self.warps[m.event_warp]
        operation = self.program.operations[m.event_pc]
        ctx = Context(self, warp, self.program.kernel.instructions[m.event_pc], m.event_mask)
        result = operation.execute(ctx)
        if isinstance(result, Blocked):
            warp.blocked[m.event_pc] = result.reason
        self._core.emu_resume(self.native, isinstance(result, Blocked))
        if m.random:
            self._maybe_advance()

    def _stuck(self) -> None:
        """Nobody can go on: something asynchronous completes, another cluster starts, or it is a deadlock."""
        m = self.native.contents
        if self.asynchronous.advance():
            m.progress += 1
            self._idle = 0
        elif self._admit():
            self._idle = 0
        elif m.idle_spin and self._idle < IDLE_ROUNDS:
            self._idle += 1
        else:
            self.finding("deadlock", explain.waiting(self), stop=True)

    _idle = 0

    def _fault(self) -> None:
        note = self.native.contents.fault
        self._note(note, stop=True)

    def _collect_notes(self) -> None:
        m = self.native.contents
        for note in m.notes[: m.note_count]:
            self._note(note, stop=False)
        m.note_count = 0

    def _note(self, note: Any, *, stop: bool) -> None:
        kind = native.KINDS[note.kind]
        assert kind is not None
        instructions = self.program.kernel.instructions
        instruction = instructions[note.pc] if note.pc < len(instructions) else None
        warp = self.warps.get(note.warp)
        detail, region = explain.note(self, note, kind, instruction)
        self.finding(
            kind,
            detail,
            instruction=instruction,
            warp=warp,
            lanes=note.lanes,
            address=note.address,
            region=region,
            stop=stop,
        )


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _native_region(region: Region) -> native.Region:
    return native.Region(region.base, region.size, *region.pointers, region.read_only, 0)


def _check(program: Program, launch: Launch) -> None:
    if not 1 <= launch.threads <= 1024:
        raise ArgumentError("block", launch.block, "1 to 1024 threads")
    if program.kernel.block is not None and program.kernel.block != launch.block:
        raise ArgumentError("block", launch.block, f"{program.kernel.block}, as .reqntid says")
    if any(g % c or not g for g, c in zip(launch.grid, launch.cluster, strict=True)):
        raise ArgumentError("grid", launch.grid, f"whole clusters of {launch.cluster}")
    shared = program.static_shared + launch.shared_bytes
    if shared > MOST_SHARED:
        raise ArgumentError("shared", f"{shared} bytes", f"at most {MOST_SHARED}")
