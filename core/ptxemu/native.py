"""The interface to the native core: its structures, as ctypes sees them, and its functions."""

from __future__ import annotations

import ctypes
import enum
import functools
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p

import numpy as np

from ptxemu.build import core_library
from ptxemu.errors import PtxemuError
from ptxemu.report import FindingKind

OPERANDS = 12
INSTRUCTION = np.dtype(
    [
        ("op", np.uint16),
        ("negated", np.uint8),
        ("count", np.uint8),
        ("guard", np.uint32),
        ("operands", np.uint32, OPERANDS),
        ("offset", np.int64),
        ("aux", np.uint32),
        ("target", np.uint32),
    ]
)
NOTES = 256
KINDS = (  # as the enumeration in ptxemu.h
    None,
    FindingKind.OUT_OF_BOUNDS,
    FindingKind.MISALIGNED,
    FindingKind.READ_ONLY,
    FindingKind.MBARRIER,
    FindingKind.BARRIER,
    FindingKind.DIVERGENCE,
    FindingKind.TRAP,
    FindingKind.UNINITIALISED,
    FindingKind.ASYNC_RACE,
    FindingKind.PENDING_REGISTER,
    FindingKind.PENDING_LOAD,
    FindingKind.UNORDERED_READ,
)


class Event(enum.IntEnum):
    """Why `emu_run` returned."""

    CALLBACK = 0
    FAULT = 1
    STUCK = 2
    CLUSTER_END = 3
    ROUND = 4
    BUDGET = 5


class Region(ctypes.Structure):
    """An address range."""

    _fields_ = [
        ("base", c_uint64),
        ("size", c_uint64),
        ("data", c_void_p),
        ("flags", c_void_p),
        ("epoch", c_void_p),
        ("writer", c_void_p),
        ("stamp", c_void_p),
        ("read_only", c_uint32),
        ("author", c_uint32),
    ]


class Mbarrier(ctypes.Structure):
    """The state of an mbarrier."""

    _fields_ = [
        ("address", c_uint32),
        ("expected", c_uint32),
        ("pending", c_uint32),
        ("valid", c_uint32),
        ("tx", c_int64),
        ("phase", c_uint64),
        ("init_warp", c_uint32),
        ("init_epoch", c_uint32),
        ("clock", c_void_p),
    ]


class NamedBarrier(ctypes.Structure):
    """A barrier of a CTA."""

    _fields_ = [
        ("arrived", c_uint32),
        ("needed", c_uint32),
        ("reduced", c_uint32),
        ("phase", c_uint64),
        ("result", c_uint32),
        ("clock", c_void_p),
        ("done", c_void_p),
    ]


class Cta(ctypes.Structure):
    """A CTA."""

    _fields_ = [
        ("shared", Region),
        ("bars", POINTER(Mbarrier)),
        ("rank", c_uint32),
        ("live_warps", c_uint32),
        ("named", NamedBarrier * 16),
        ("cluster", c_void_p),
        ("first", c_uint32),
        ("warps", c_uint32),
        ("author", c_uint32),
    ]


class Cluster(ctypes.Structure):
    """A cluster."""

    _fields_ = [
        ("ctas", c_void_p),
        ("cta_count", c_uint32),
        ("live_warps", c_uint32),
        ("id", c_uint32),
        ("barrier_pending", c_uint32),
        ("live_lanes", c_uint32),
        ("barrier_phase", c_uint64),
        ("warp_count", c_uint32),
        ("warps", c_void_p),
        ("clocks", c_void_p),
        ("barrier_clock", c_void_p),
        ("flag_clock", c_void_p),
    ]


class Group(ctypes.Structure):
    """Lanes that share a program counter."""

    _fields_ = [
        ("pc", c_uint32),
        ("mask", c_uint32),
        ("blocked", c_uint8),
        ("arrived", c_uint8),
        ("wait_phase", c_uint64),
        ("python_epoch", c_uint64),
    ]


class Warp(ctypes.Structure):
    """A warp."""

    _fields_ = [
        ("base", c_void_p * 4),
        ("cta", POINTER(Cta)),
        ("groups", Group * 32),
        ("group_count", c_uint32),
        ("live", c_uint32),
        ("exited", c_uint32),
        ("index", c_uint32),
        ("id", c_uint32),
        ("running", c_uint32),
        ("carry", c_uint32),
        ("spin_pc", c_uint32),
        ("spin_count", c_uint32),
        ("fence_epoch", c_uint32),
        ("init_fence_epoch", c_uint32),
        ("pending_count", c_uint32),
        ("pending", c_void_p),
        ("loads", c_void_p),
        ("cluster_phase", c_uint64),
        ("cluster_arrived", c_uint32),
        ("cluster_waiting", c_uint32),
        ("local", Region),
        ("executed", c_uint64),
        ("place", c_uint32),
        ("serial", c_uint32),
        ("clock", c_void_p),
        ("fenced", c_void_p),
        ("seen", c_void_p),
        ("fenced_far", c_void_p),
        ("seen_far", c_void_p),
    ]


class Note(ctypes.Structure):
    """A finding of the native core."""

    _fields_ = [
        ("kind", c_uint32),
        ("pc", c_uint32),
        ("warp", c_uint32),
        ("lanes", c_uint32),
        ("address", c_uint64),
        ("detail", c_int64),
    ]


class Product(ctypes.Structure):
    """Factors of a matrix product, and how it is summed."""

    _fields_ = [
        ("a", c_void_p),
        ("bt", c_void_p),
        ("n", c_uint32),
        ("depth", c_uint32),
        ("fraction", c_int32),
        ("kept", c_int32),
        ("smallest_a", c_int32),
        ("smallest_b", c_int32),
        ("to", c_uint32),
    ]


TRACE = ctypes.CFUNCTYPE(None, c_uint32, c_uint32, c_uint32)


class Machine(ctypes.Structure):
    """All of a launch."""

    _fields_ = [
        ("code", c_void_p),
        ("code_count", c_uint32),
        ("flags", c_uint32),
        ("params", c_void_p),
        ("regions", POINTER(Region)),
        ("region_count", c_uint32),
        ("last_region", c_uint32),
        ("warps", c_void_p),
        ("warp_count", c_uint32),
        ("warp_room", c_uint32),
        ("order", c_void_p),
        ("cursor", c_uint32),
        ("progressed", c_uint32),
        ("spinning", c_uint32),
        ("idle_spin", c_uint32),
        ("random", c_uint32),
        ("poll", c_uint32),
        ("rng", c_uint64),
        ("executed", c_uint64),
        ("budget", c_uint64),
        ("progress", c_uint64),
        ("epoch", c_uint32),
        ("block_threads", c_uint32),
        ("hits", POINTER(c_uint32)),
        ("noted", POINTER(c_uint32)),
        ("notes", Note * NOTES),
        ("note_count", c_uint32),
        ("fault", Note),
        ("event_warp", c_uint32),
        ("event_group", c_uint32),
        ("event_pc", c_uint32),
        ("event_mask", c_uint32),
        ("event_cluster", c_uint32),
        ("trace", TRACE),
        ("lag", c_uint32),
        ("lag_rounds", c_uint32),
        ("lag_warp", c_uint32),
        ("lag_cta", c_void_p),
        ("touched", c_void_p),
        ("touch_start", c_void_p),
        ("register_words", c_uint32),
        ("flag_table", c_void_p),
        ("fences", c_void_p),
        ("flag_room", c_uint32),
        ("flag_count", c_uint32),
    ]


_FUNCTIONS = {
    "emu_op_count": (c_uint32, []),
    "emu_op_name": (ctypes.c_char_p, [c_uint32]),
    "emu_size": (c_uint32, [c_uint32]),
    "emu_run": (ctypes.c_int, [POINTER(Machine)]),
    "emu_resume": (None, [POINTER(Machine), ctypes.c_int]),
    "emu_machine_new": (POINTER(Machine), [c_uint32]),
    "emu_machine_free": (None, [POINTER(Machine)]),
    "emu_cluster_new": (POINTER(Cluster), [c_uint32] * 4),
    "emu_cluster_free": (None, [POINTER(Cluster)]),
    "emu_cta_new": (
        POINTER(Cta),
        [POINTER(Cluster), c_uint32, c_uint32, *[c_void_p] * 5, c_uint64],
    ),
    "emu_warp_new": (
        POINTER(Warp),
        [POINTER(Machine), POINTER(Cta), c_uint32, c_uint32, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p],
    ),
    "emu_warp_local": (None, [POINTER(Warp), c_void_p, c_void_p, c_uint64]),
    "emu_warp_free": (None, [POINTER(Machine), POINTER(Warp)]),
    "emu_mbarrier": (POINTER(Mbarrier), [POINTER(Cluster), c_uint32]),
    "emu_gather": (c_uint32, [*[c_void_p] * 3, c_uint64, c_uint64, c_void_p, c_uint64, c_uint32, c_void_p, c_void_p]),
    "emu_scatter": (
        c_uint32,
        [*[c_void_p] * 5, c_uint64, c_uint64, c_void_p, c_uint64, c_uint32, c_void_p, c_uint32, c_uint32, c_void_p],
    ),
    "emu_hold": (c_uint32, [c_void_p, c_void_p, c_uint64, c_uint64, c_void_p, c_uint64, c_uint32, c_void_p]),
    "emu_release": (None, [c_void_p, c_void_p, c_uint64, c_void_p, c_uint64, c_uint32]),
    "emu_product": (None, [POINTER(Product), c_uint32, c_void_p, c_void_p]),
    "emu_fma": (ctypes.c_double, [ctypes.c_double] * 3),
    "emu_wgmma": (None, [POINTER(Product), c_void_p, c_void_p, c_void_p]),
    "emu_mbarrier_update": (ctypes.c_int, [POINTER(Machine), POINTER(Warp), POINTER(Mbarrier), c_uint32, c_int64]),
    "emu_load_issued": (
        None,
        [POINTER(Machine), POINTER(Warp), c_uint32, c_uint32, c_void_p, c_uint32, c_void_p, c_uint32],
    ),
    "emu_overwrite": (None, [POINTER(Machine), POINTER(Warp), c_uint32, c_void_p, c_uint64, c_uint32]),
}


@functools.cache
def core() -> ctypes.CDLL:
    """The native core, built on first use.

    Raises:
        BuildError: It cannot be built.
    """
    library = ctypes.CDLL(str(core_library()))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    ours = [
        ctypes.sizeof(s) for s in (Region, Mbarrier, NamedBarrier, Cta, Cluster, Group, Warp, Note, Machine, Product)
    ] + [INSTRUCTION.itemsize]
    theirs = [library.emu_size(k) for k in range(len(ours))]
    if ours != theirs:
        raise PtxemuError(f"the structures of the native core have sizes {theirs}, expected {ours}")
    return library


@functools.cache
def operations() -> dict[str, int]:
    """Number of each native operation, by name."""
    library = core()
    return {library.emu_op_name(k).decode(): k for k in range(library.emu_op_count())}
