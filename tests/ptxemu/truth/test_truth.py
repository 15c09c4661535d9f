"""The micro-kernels in the emulator, against what an H200 gave where a recording exists.

No recording exists yet. Until one has been looked at, approximate functions and floating-point MMA are held to equality
too: no bound is stated before there is a measurement to state it from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ptxemu
from ptxemu.lowering import TABLE
from ptxemu.parser import parse
from ptxemu.registry import OPERATIONS
from tests.ptxemu.truth.catalogue import kernels

DATA = Path(__file__).parent / "recordings.npz"
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


def test_every_opcode_has_a_kernel_or_a_reason() -> None:
    used = [i for m in KERNELS.values() for i in parse(m.ptx).kernel(None).instructions]
    opcodes, names = {i.opcode for i in used}, {i.name for i in used}
    assert set(TABLE) - opcodes == set(UNRECORDED_OPCODES)
    missing = {p for p in OPERATIONS if not any(n == p or n.startswith(p + ".") for n in names)}
    assert {p for p in missing if not any(p.startswith(known) for known in UNRECORDED_OPERATIONS)} == set()


@pytest.mark.parametrize("name", KERNELS)
def test_replay(name: str) -> None:
    """Every kernel runs without a finding; its result is the recording, byte for byte, if there is one."""
    micro = KERNELS[name]
    arrays = micro.arguments()
    before = [arrays[k].tobytes() for k in micro.outputs]
    ptxemu.emulate(micro.ptx, micro.grid, micro.parameters(arrays), block=micro.block, cluster=micro.cluster).raise_for_findings()
    assert before != [arrays[k].tobytes() for k in micro.outputs]
    if not DATA.exists():
        return
    failed = json.loads((DATA.parent / "failed.json").read_text())
    if name in failed:
        pytest.skip(f"not recorded: {failed[name]}")
    with np.load(DATA) as recorded:
        for position, k in enumerate(micro.outputs):
            np.testing.assert_array_equal(arrays[k].view("u1"), recorded[f"{name}#{position}"].view("u1"))
        for position, m in enumerate(micro.maps, len(micro.outputs)):
            assert m.encode(0)[8:64] == recorded[f"{name}#{position}"].tobytes()
