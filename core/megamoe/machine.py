"""What this machine is, asked of the CUDA driver and of the installed distributions, without torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement

from megamoe.model import Arch, Machine, Stage

_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of the CUDA driver API
_CAPABILITY_MINOR = 76


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device as the driver shows it."""

    name: str
    arch: Arch


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The visible CUDA devices, in the driver's order; empty where there is no driver or no device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(cuda, index) for index in range(count.value))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, value = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    capability = 0
    for weight, attribute in ((10, _CAPABILITY_MAJOR), (1, _CAPABILITY_MINOR)):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability += weight * value.value
    return Gpu(name.value.decode(), Arch(capability))


def packages(stages: Iterable[Stage], also: Iterable[str] = ()) -> dict[str, str]:
    """Installed version of every distribution that some variant, or a requirement in `also`, needs."""
    needs = [need for stage in stages for variant in stage.variants for need in variant.needs]
    names = {Requirement(need).name for need in (*needs, *also)}
    return {name: version for name in sorted(names) if (version := installed(name)) is not None}


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def detect(stages: Iterable[Stage], index: int | None = 0, also: Iterable[str] = ()) -> Machine:
    """The machine whose device is GPU `index`; the CPU when `index` is None or there is no such GPU."""
    found = gpus()
    versions = packages(stages, also)
    if index is None or index >= len(found):
        return Machine(None, versions)
    return Machine(found[index].arch, versions, found[index].name)
