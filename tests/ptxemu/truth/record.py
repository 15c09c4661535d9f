"""Records on a Hopper GPU what the micro-kernels give: `python -m tests.ptxemu.truth.record FOLDER`.

FOLDER gets a file a group of kernels, to be put into `recordings` beside this.

Several processes run the kernels through the CUDA driver. One that fails ends its process, as its context may be lost;
it is listed in failed.json and the next process goes on behind it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptxemu.truth.catalogue import kernels
from tests.ptxemu.truth.micro import Map, Micro

_PROCESSES, _SECONDS = 8, 190.0
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_TYPES = (  # CUtensorMapDataType
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16", "f32_ftz", "tf32", "tf32_ftz"),
    *("16u4_align8b", "16u4_align16b", "16u6_align16b"),
)
_SWIZZLES = ("none", "32B", "64B", "128B", "128B_atom32B", "128B_atom32B_flip8B", "128B_atom64B")  # CUtensorMapSwizzle


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Driver:
    """The CUDA driver with one context."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)

    def __call__(self, function: str, *args: Any) -> None:
        if code := getattr(self.library, function)(*args):
            raise RuntimeError(f"{function}: CUDA error {code}")

    def run(self, micro: Micro) -> list[np.ndarray]:
        """The outputs of a kernel.

        Raises:
            RuntimeError: The driver refuses the module or the launch, or the kernel faults.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoadData", ctypes.byref(module), micro.ptx.encode() + b"\0")
        self("cuModuleGetFunction", ctypes.byref(function), module, b"k")
        arrays = micro.arguments()
        pointers = [ctypes.c_uint64() for _ in arrays]
        for array, pointer in zip(arrays, pointers, strict=True):
            self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(array.nbytes))
            self("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        maps = [self._encode(m, pointers[m.argument].value) for m in micro.maps]
        attribute = _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint * 16)(micro.cluster, 1, 1))
        config = _Config(micro.grid, 1, 1, micro.block, 1, 1, 0, None, ctypes.pointer(attribute), 1)
        given = [*maps, *pointers]
        parameters = (ctypes.c_void_p * len(given))(*(ctypes.addressof(p) for p in given))
        self("cuLaunchKernelEx", ctypes.byref(config), function, parameters, None)
        self("cuCtxSynchronize")
        for k in micro.outputs:
            self(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(arrays[k].ctypes.data),
                pointers[k],
                ctypes.c_size_t(arrays[k].nbytes),
            )
        for pointer in pointers:
            self("cuMemFree_v2", pointer)
        self("cuModuleUnload", module)
        return [*(arrays[k] for k in micro.outputs), *(np.frombuffer(m, np.uint8)[8:64].copy() for m in maps)]

    def _encode(self, tensor_map: Map, address: int) -> Any:
        """What cuTensorMapEncodeTiled makes of a map; 64-byte aligned."""
        m, rank = tensor_map, len(tensor_map.sizes)
        room = ctypes.create_string_buffer(192)
        out = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
        words, longs = ctypes.c_uint32 * rank, ctypes.c_uint64 * max(rank - 1, 1)
        self(
            "cuTensorMapEncodeTiled",
            ctypes.byref(out),
            *(_TYPES.index(m.kind), rank, ctypes.c_void_p(address)),
            *((ctypes.c_uint64 * rank)(*m.sizes), longs(*m.strides), words(*m.box), words(*(m.steps or (1,) * rank))),
            *(0, _SWIZZLES.index(m.swizzle), 0, int(m.nan)),
        )
        return out


def _work(folder: Path, names: list[str]) -> None:
    """Runs kernels and writes each result as soon as it is there."""
    driver, table = Driver(), kernels()
    for name in names:
        (folder / "current" / names[-1]).write_text(name)
        for k, array in enumerate(driver.run(table[name])):
            np.save(folder / "parts" / f"{name}#{k}.npy", array)
        (folder / "done" / name).touch()


def _supervise(folder: Path, names: list[str], end: float) -> dict[str, str]:
    """Runs worker processes until all names are done or have failed."""
    failed: dict[str, str] = {}
    last = names[-1]
    while names:
        command = [sys.executable, "-m", "tests.ptxemu.truth.record", str(folder), *names]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(0.1, end - time.monotonic()))
            reason = (done.stderr.strip().splitlines() or ["ended"])[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = "out of time"
        names = [name for name in names if not (folder / "done" / name).exists()]
        if not names:
            break
        if reason == "out of time":
            return failed | dict.fromkeys(names, reason)
        current = folder / "current" / last
        name = current.read_text() if current.exists() else names[0]
        failed[name] = reason
        names = [n for n in names if n != name]
        last = names[-1] if names else last
    return failed


def main() -> None:
    """Records everything into FOLDER/GROUP.npz and FOLDER/failed.json."""
    folder = Path(sys.argv[1])
    if sys.argv[2:]:
        _work(folder, sys.argv[2:])
        return
    for name in ("parts", "done", "current"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    table = kernels()
    names, end = list(table), time.monotonic() + _SECONDS
    shares = [names[k::_PROCESSES] for k in range(_PROCESSES)]
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(_PROCESSES) as pool:
        for found in pool.map(lambda share: _supervise(folder, share, end), shares):
            failed |= found
    groups: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted((folder / "parts").glob("*.npy")):
        if (name := path.stem.split("#")[0]) not in failed:
            groups.setdefault(table[name].group, {})[path.stem] = np.load(path)
    for group, arrays in groups.items():
        np.savez_compressed(folder / f"{group.replace(' ', '_')}.npz", allow_pickle=False, **arrays)
    (folder / "failed.json").write_text(json.dumps(failed, indent=1, sort_keys=True))
    sys.stdout.write(f"{len(names) - len(failed)} of {len(names)} recorded; failed: {json.dumps(failed)}\n")


if __name__ == "__main__":
    main()
