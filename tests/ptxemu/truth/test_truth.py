"""The micro-kernels in the emulator, against what an H200 gave: every byte, or within `bounds` where approximate."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptxemu
from ptxemu.lowering import TABLE
from ptxemu.parser import parse
from ptxemu.registry import OPERATIONS
from tests.ptxemu.truth import scalar
from tests.ptxemu.truth.bounds import too_far
from tests.ptxemu.truth.catalogue import kernels
from tests.ptxemu.truth.micro import Micro

DATA = Path(__file__).parent / "recordings"
KERNELS = kernels()
UNRECORDED_OPCODES = {
    **dict.fromkeys(("trap", "brkpt", "exit"), "ends the kernel"),
    **dict.fromkeys(("nanosleep", "pmevent", "setmaxnreg"), "no result"),
    **dict.fromkeys(("prefetch", "prefetchu", "discard", "applypriority", "createpolicy"), "a hint, no result"),
    **dict.fromkeys(("membar",), "orders only"),
}
UNRECORDED_OPERATIONS = {
    "tcgen05": "Blackwell only",
    "clusterlaunchcontrol": "Blackwell only",
    "cp.async.bulk.prefetch": "a hint, no result",
    "prefetch.tensormap": "a hint, no result",
    "griddepcontrol": "orders launches only",
}


@cache
def _recorded(group: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{group.replace(' ', '_')}.npz") as file:
        return {name: file[name] for name in file.files}


def test_every_opcode_has_a_kernel_or_a_reason() -> None:
    used = [i for m in KERNELS.values() for i in parse(m.ptx).kernel(None).instructions]
    opcodes, names = {i.opcode for i in used}, {i.name for i in used}
    assert set(TABLE) - opcodes == set(UNRECORDED_OPCODES)
    missing = {p for p in OPERATIONS if not any(n == p or n.startswith(p + ".") for n in names)}
    assert {p for p in missing if not any(p.startswith(known) for known in UNRECORDED_OPERATIONS)} == set()


def test_every_recording_has_its_kernel() -> None:
    recorded = {name for path in DATA.glob("*.npz") for name in np.load(path).files}
    assert recorded == {f"{m.name}#{k}" for m in KERNELS.values() for k in range(len(m.outputs) + len(m.maps))}


def _first_argument(row: str) -> Any:
    """Codes of the first operand of a row of one instruction."""
    width = int(row.split("{a")[1][:2])
    return scalar.pool(width)[0].astype(np.uint64)


def _approximate(micro: Micro, got: np.ndarray, recorded: np.ndarray) -> None:
    for row, ours, theirs in zip(micro.rows, got, recorded, strict=True):
        far = too_far(row, _first_argument(row), ours, theirs)
        assert not far.any(), f"{row}: {np.flatnonzero(far)}: {ours[far]}, recorded {theirs[far]}"


@pytest.mark.parametrize("name", KERNELS)
def test_replay(name: str) -> None:
    """Every kernel runs without a finding, and gives what was recorded; tensor maps are those of the driver."""
    micro = KERNELS[name]
    recorded = _recorded(micro.group)
    arrays = micro.arguments()
    given = micro.parameters(arrays)
    ptxemu.emulate(micro.ptx, micro.grid, given, block=micro.block, cluster=micro.cluster).raise_for_findings()
    for position, k in enumerate(micro.outputs):
        got, wanted = arrays[k], recorded[f"{name}#{position}"]
        if micro.group == "approximate":
            _approximate(micro, got, wanted)
        else:
            np.testing.assert_array_equal(got.reshape(-1).view("u1"), wanted.reshape(-1).view("u1"))
    for position, m in enumerate(micro.maps, len(micro.outputs)):
        assert m.encode(0)[8:64] == recorded[f"{name}#{position}"].tobytes()
