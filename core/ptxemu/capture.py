"""Runs the host code of a compiled CuTe DSL launcher with no GPU, and captures what it launches.

The object file that the DSL exports (`--enable-tvm-ffi`, `export_to_c`) is linked with a CUDA runtime that only records
(native/runtime.c) and with the DSL's own dialect runtime from the installed wheel. So the real host code checks the
arguments and computes the grid, the cluster, shared memory and all parameters, tensor maps included. Tensors are handed
over as if they lay on device 0; they lie in host memory, where the emulator reads and writes them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptxemu import build, memory
from ptxemu.errors import ArgumentError, BuildError, CaptureError
from ptxemu.memory import Region

_NONE, _INT, _BOOL, _FLOAT, _POINTER, _TENSOR = 0, 1, 2, 3, 4, 7  # TVMFFITypeIndex
_CUDA = 2  # DLDeviceType
_DTYPES = {  # name: DLDataTypeCode, bits, lanes
    **{f"int{bits}": (0, bits, 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (1, bits, 1) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": (2, bits, 1) for bits in (16, 32, 64)},
    "bfloat16": (4, 16, 1),
    "bool": (6, 8, 1),
    "float8_e4m3fn": (10, 8, 1),
    "float8_e5m2": (12, 8, 1),
    "float8_e8m0fnu": (14, 8, 1),
    "float4_e2m1fn_x2": (17, 4, 2),
}
_GEOMETRY = 11


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Value(ctypes.Union):
    _fields_ = [("integer", ctypes.c_int64), ("real", ctypes.c_double), ("pointer", ctypes.c_void_p)]


class _Any(ctypes.Structure):
    _fields_ = [("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value)]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p)
)


@dataclass(frozen=True)
class Captured:
    """A launch that host code asked for.

    Attributes:
        kernel: Name of the entry.
        parameters: The bytes of each parameter.
        cooperative: All CTAs are resident at once.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int
    cooperative: bool
    parameters: tuple[bytes, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor in host memory, whatever library it came from.

    Attributes:
        source: The object; kept so that the memory stays.
        strides: In elements.
    """

    source: Any
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """From the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        _, bits, lanes = _DTYPES[self.dtype]
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))) * (bits * lanes // 8)

    def region(self, name: str, *, initialised: bool) -> Region:
        """The memory it lies in."""
        data = (
            np.ctypeslib.as_array((ctypes.c_uint8 * self.bytes).from_address(self.address))
            if self.bytes
            else np.empty(0, np.uint8)
        )
        return memory.region(name, self.address, data, initialised=initialised, keep=self.source)


def tensor(value: Any) -> Tensor | None:
    """What kind of tensor an argument is; None for one that is no tensor.

    Raises:
        ArgumentError: A tensor on a GPU, or of a dtype that DLPack has no name for.
    """
    if isinstance(value, np.ndarray):
        item = value.itemsize
        found = Tensor(value, value.ctypes.data, str(value.dtype), value.shape, tuple(s // item for s in value.strides))
    elif hasattr(value, "data_ptr") and hasattr(value, "stride"):  # torch
        if getattr(value.device, "type", "cpu") != "cpu":
            raise ArgumentError("args", f"a tensor on {value.device}", "tensors in host memory")
        found = Tensor(
            value, value.data_ptr(), str(value.dtype).removeprefix("torch."), tuple(value.shape), tuple(value.stride())
        )
    else:
        return None
    if found.dtype not in _DTYPES:
        raise ArgumentError("args", f"a tensor of {found.dtype}", f"one of {', '.join(_DTYPES)}")
    return found


class Launcher:
    """The host code of a launcher, linked so that it can be called."""

    def __init__(self, object_file: bytes, entry: str = "launch") -> None:
        """Links an exported object file.

        Args:
            object_file: Its bytes.
            entry: The `function_name` it was exported with.

        Raises:
            BuildError: No gcc, or no wheel to take the dialect runtime from.
            CaptureError: The object follows another calling convention.
        """
        self._library = ctypes.CDLL(str(_link(object_file)))
        try:
            self._call = self._library[f"__tvm_ffi_{entry}"]
        except AttributeError:
            raise CaptureError(
                f"no function __tvm_ffi_{entry} in the object file: compile with --enable-tvm-ffi"
            ) from None
        self._call.restype = ctypes.c_int
        self._call.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Any), ctypes.c_int32, ctypes.POINTER(_Any)]
        self._library.ptxemu_error.restype = ctypes.c_char_p

    def __call__(self, parameters: dict[str, Sequence[int]], args: Sequence[Any]) -> list[Captured]:
        """Calls the launcher.

        Args:
            parameters: The sizes of each kernel's parameters.
            args: Tensors and numbers, as the launcher takes them; the stream is not among them.

        Raises:
            CaptureError: The host code refused the arguments.
        """
        launches: list[Captured] = []
        failed: list[str] = []

        def on_launch(kernel: bytes, geometry: Any, arguments: Any) -> int:
            name = kernel.decode()
            if name not in parameters:
                failed.append(name)
                return 1
            g = [int(geometry[k]) for k in range(_GEOMETRY)]
            raw = tuple(ctypes.string_at(arguments[k], size) for k, size in enumerate(parameters[name]))
            grid, block, cluster = (g[0], g[1], g[2]), (g[3], g[4], g[5]), (g[7], g[8], g[9])
            launches.append(Captured(name, grid, block, cluster, g[6], bool(g[10]), raw))
            return 0

        callback = _CALLBACK(on_launch)
        self._library.ptxemu_on_launch(callback)
        packed, keep = _pack(args)
        result = _Any()
        status = self._call(None, packed, len(args), ctypes.byref(result))
        del keep
        if failed:
            raise CaptureError(f"kernel {failed[0]} is launched, but is not in the PTX")
        if status:
            raise CaptureError(f"the host code refused its arguments: {self._library.ptxemu_error().decode()}")
        return launches


def _pack(args: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Arguments as TVM-FFI values, and what must stay alive meanwhile."""
    packed = (_Any * max(len(args), 1))()
    keep: list[Any] = []
    for slot, value in zip(packed, args, strict=False):
        if (found := tensor(value)) is not None:
            dl = _dl_tensor(found)
            keep.append(dl)
            slot.type_index, slot.value.pointer = _TENSOR, ctypes.addressof(dl[0])
        elif value is None:
            slot.type_index = _NONE
        elif isinstance(value, bool):
            slot.type_index, slot.value.integer = _BOOL, value
        elif isinstance(value, int | np.integer):
            slot.type_index, slot.value.integer = _INT, int(value)
        elif isinstance(value, float | np.floating):
            slot.type_index, slot.value.real = _FLOAT, float(value)
        else:
            raise ArgumentError("args", type(value).__name__, "tensors, numbers or None")
    return packed, keep


def _dl_tensor(found: Tensor) -> tuple[_DLTensor, Any, Any]:
    n = len(found.shape)
    shape, strides = (ctypes.c_int64 * max(n, 1))(*found.shape), (ctypes.c_int64 * max(n, 1))(*found.strides)
    code, bits, lanes = _DTYPES[found.dtype]
    return _DLTensor(found.address, _CUDA, 0, n, code, bits, lanes, shape, strides, 0), shape, strides


def _link(object_file: bytes) -> Path:
    """Links an object file with the recording runtime; the result is kept by its hash."""
    flags = ("-Wl,-Bsymbolic", "-Wl,-z,noexecstack")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launch.o"
        path.write_bytes(object_file)
        sources = [build.NATIVE / "runtime.c", path]
        return build.library("launcher", sources, flags=flags, libraries=(str(_dialect_runtime()),))


@functools.cache
def _dialect_runtime() -> Path:
    """The static library of the installed wheel that DSL host code calls."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for root in roots for path in sorted(Path(root).rglob("libcuda_dialect_runtime_static.a"))]
    if not found:
        raise BuildError(
            "a launcher", "the wheel nvidia-cutlass-dsl is not installed, or has no libcuda_dialect_runtime_static.a"
        )
    return found[0]
