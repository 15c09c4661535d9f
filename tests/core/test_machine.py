from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest

from megamoe import machine
from megamoe.model import Arch, Machine, Role
from megamoe.plugins import Plugins
from megamoe.runtime import Runtime
from tests.core.builders import SM90, SM100, Plugin, items, stage, variant


class FakeDriver:
    """As much of libcuda as is asked, with CUdevice handles that are not the indices."""

    def __init__(self, *devices: tuple[str, int, int], init: int = 0, count: int = 0) -> None:
        self.devices, self.init, self.count = devices, init, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = len(self.devices)
        return self.count

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = 100 + index
        return 0

    def cuDeviceGetName(self, buffer: Any, length: int, device: ctypes.c_int) -> int:  # noqa: N802
        assert length == len(buffer)
        buffer.value = self.devices[device.value - 100][0].encode()
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        _, major, minor = self.devices[device.value - 100]
        out._obj.value = {75: major, 76: minor}[attribute]
        return 0


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    machine.gpus.cache_clear()
    yield
    machine.gpus.cache_clear()


def _with(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    def load(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_devices_in_the_drivers_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, FakeDriver(("NVIDIA H200", 9, 0), ("NVIDIA B300", 10, 3)))
    assert machine.gpus() == (machine.Gpu("NVIDIA H200", SM90), machine.Gpu("NVIDIA B300", Arch(103)))
    assert machine.detect([]) == Machine(SM90, {}, "NVIDIA H200")
    assert machine.detect([], 1) == Machine(Arch(103), {}, "NVIDIA B300")
    assert machine.detect([], 2) == machine.detect([], None) == Machine(None, {}, "CPU")


@pytest.mark.parametrize(
    "driver", [None, FakeDriver(), FakeDriver(("H200", 9, 0), init=100), FakeDriver(("H200", 9, 0), count=3)]
)
def test_no_driver_no_device_or_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    _with(monkeypatch, driver)
    assert machine.gpus() == ()
    assert machine.detect([]).arch is None


def test_packages_are_those_that_variants_need() -> None:
    made = stage(variant("a", Role.FUSED, needs=("pluggy>=1", "no-such-distribution>=2")))
    version = importlib.metadata.version("pluggy")
    assert machine.packages([made]) == {"pluggy": version}
    assert machine.packages([], also=["pluggy>=99"]) == {"pluggy": version}
    assert machine.installed("no-such-distribution") is None


def test_runtime_knows_what_blockers_wait_for(monkeypatch: pytest.MonkeyPatch, no_stages: str) -> None:
    """A blocker may wait for a distribution that no variant names."""
    _with(monkeypatch, FakeDriver(("H200", 9, 0)))
    blocker = {"id": "b", "kind": "upstream", "summary": "s", "until": "pluggy>=1"}
    runtime = Runtime(Plugins(no_stages, extra=[Plugin(stage())]), items(A={"stage": "mul", "blocker": [blocker]}))
    for on in (runtime.machine(), runtime.machine(None), runtime.machine(SM100)):
        assert runtime.registry.item["A"].blocker[0].cleared_by(on.packages)


def test_machine_of_an_architecture(monkeypatch: pytest.MonkeyPatch, no_stages: str) -> None:
    _with(monkeypatch, FakeDriver(("H200", 9, 0)))
    runtime = Runtime(Plugins(no_stages), items())
    assert runtime.machine() == runtime.machine(SM90) == Machine(SM90, {}, "H200")
    assert runtime.machine(SM100) == Machine(SM100, {}, "a sm_100")
    assert runtime.machine(None) == Machine(None, {}, "CPU")


@pytest.mark.parametrize("text", ["sm_9", "sm90", "sm_90x", "SM_90", "sm_1000", ""])
def test_what_is_no_architecture(text: str) -> None:
    with pytest.raises(ValueError, match="not an architecture"):
        Arch.parse(text)


def test_architectures_are_ordered_and_lose_their_suffix() -> None:
    assert Arch.parse("sm_90a") == SM90 < Arch.parse("sm_100f") == SM100
    assert str(Arch.parse("sm_103a")) == "sm_103"
