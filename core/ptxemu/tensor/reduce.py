"""Element-wise reductions in memory, as cp.reduce.async.bulk, its tensor form and red.async do them.

Sources: PTX ISA 9.7.9.25.4.4 (cp.reduce.async.bulk), 9.7.9.25.5.3 (cp.reduce.async.bulk.tensor), 9.7.13.17 (red.async).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
INTEGERS: dict[str, type[np.generic]] = {
    "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32, "b64": np.uint64,
}  # fmt: skip
WIDTH = {
    "f32_ftz": 4,
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "u64": 8,
    "s64": 8,
    "b64": 8,
}
OPERATIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")


def _widen(name: str, data: npt.NDArray[np.uint8]) -> Array:
    """Elements as numbers in which one addition can be rounded correctly afterwards."""
    if name == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    kinds: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
    return np.asarray(data.view(kinds[name]))


NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def _narrow(name: str, values: Array) -> npt.NDArray[np.uint8]:
    """Codes of numbers, rounded to nearest even; every NaN is the canonical one, but of f64 it stays what it was."""
    codes = np.dtype(f"u{WIDTH[name]}")
    if name == "bf16":
        with np.errstate(over="ignore"):  # two bf16 add exactly in float64, nearly so in f32
            bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        out = ((bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(codes)
    else:
        kinds: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
        out = values.astype(kinds[name]).view(codes)
    if name == "f64":
        return np.ascontiguousarray(out).view(np.uint8)
    return np.ascontiguousarray(np.where(np.isnan(values), codes.type(NAN[name]), out)).view(np.uint8)


def apply(operation: str, name: str, old: npt.NDArray[np.uint8], new: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Combines elements in memory with those that arrive.

    Args:
        operation: One of `OPERATIONS`.
        name: Type of the elements, a key of `WIDTH`.
        old: Bytes in memory, uint8, whole elements.
        new: Bytes that arrive, of the same shape.

    Returns:
        The bytes to store.

    Raises:
        ValueError: The operation does not exist for the type.
    """
    shape = old.shape
    old, new = np.ascontiguousarray(old).reshape(-1), np.ascontiguousarray(new).reshape(-1)
    if name in INTEGERS:
        a, b = old.view(INTEGERS[name]), new.view(INTEGERS[name])
        result = _integer(operation, a, b)
        return np.ascontiguousarray(result.astype(a.dtype)).view(np.uint8).reshape(shape)
    if operation not in ("add", "min", "max"):
        raise ValueError(f"{operation} of type {name}")
    flushes, name = name == "f32_ftz", name.removesuffix("_ftz")
    x, y = _widen(name, old), _widen(name, new)
    if flushes:  # subnormals, of the operands and of the sum
        x, y = _flushed(x), _flushed(y)
    with np.errstate(all="ignore"):
        total = x + y if operation == "add" else np.fmin(x, y) if operation == "min" else np.fmax(x, y)
    if name == "f64":  # as atomics in global memory: what arrives first
        total = np.where(np.isnan(y), y, np.where(np.isnan(x), x, total))
    if operation != "add":  # -0 is less than +0
        total = np.where((x == 0) & (y == 0), np.copysign(0.0, _sign(operation, x, y)), total)
    if flushes:
        total = _flushed(total)
    return _narrow(name, total).reshape(shape)


def _flushed(x: Array) -> Array:
    """f32 numbers with zeros for subnormals."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(x.dtype.type(0), x), x)


def _sign(operation: str, x: Array, y: Array) -> Array:
    """-1 where the smaller (min) or larger (max) of two zeros is negative, else 1."""
    a, b = np.signbit(x), np.signbit(y)
    return np.where(a | b if operation == "min" else a & b, -1.0, 1.0)


def _integer(operation: str, a: Array, b: Array) -> Array:
    one = a.dtype.type(1)
    zero = a.dtype.type(0)
    with np.errstate(over="ignore"):
        if operation == "add":
            return np.asarray(a + b)
        if operation == "inc":
            return np.asarray(np.where(a >= b, zero, a + one))
        if operation == "dec":
            return np.asarray(np.where((a == zero) | (a > b), b, a - one))
    functions = {
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if operation not in functions:
        raise ValueError(f"reduction {operation}")
    return np.asarray(functions[operation](a, b))
