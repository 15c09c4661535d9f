"""How far the emulator may be from a GPU where a function is approximate: what the PTX ISA allows, and rounding.

The GPU is within the ISA's bound of the exact value, the emulator within half a unit in the last place of its format.
Infinities, NaNs and zeros are the same in both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Bound = Callable[[Reals, Reals], Reals]  # of arguments and results


def _relative(bits: float) -> Bound:
    return lambda x, y: np.abs(y) * 2.0**-bits


def _absolute(bits: float) -> Bound:
    return lambda x, y: np.full(x.shape, 2.0**-bits)


def _circular(x: Reals, y: Reals) -> Reals:
    """sin and cos: absolute, and nothing is said of arguments beyond 100 pi."""
    size = np.abs(x)
    return np.where(size <= 2 * math.pi, 2.0**-20.5, np.where(size <= 100 * math.pi, 2.0**-14.7, 2.0))


def _logarithm(x: Reals, y: Reals) -> Reals:
    """lg2: absolute where the result is small."""
    return np.where((x > 0.5) & (x < 2), 2.0**-22, np.abs(y) * 2.0**-22)


# By opcode and type; sections 9.7.3.8 to 9.7.3.22, 9.7.4.9, 9.7.4.10 of the PTX ISA 8.8.
BOUNDS: dict[str, Bound] = {
    "ex2 f32": _relative(22), "lg2 f32": _logarithm, "rcp f32": _relative(23), "rsqrt f32": _relative(22.9),
    "sqrt f32": _relative(23), "tanh f32": _relative(11), "sin f32": _circular, "cos f32": _circular,
    "div f32": _relative(22),  # 2 units in the last place
    "rcp f64": _relative(20), "rsqrt f64": _relative(20),  # .ftz: of 20 bits of significand
    "ex2 f16": _relative(9.9), "tanh f16": _absolute(10.987), "ex2 bf16": _relative(7), "tanh bf16": _absolute(8),
}  # fmt: skip
SIGNIFICAND = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}
SMALLEST = {"f16": 2.0**-24, "bf16": 2.0**-133, "f32": 2.0**-149, "f64": 2.0**-1074}


def values(codes: NDArray[Any], kind: str) -> Reals:
    """Numbers of codes that lie in the low bits of integers."""
    if kind == "bf16":
        return (codes.astype(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    width = {"f16": 16, "f32": 32, "f64": 64}[kind]
    return codes.astype(f"u{width // 8}").view(f"f{width // 8}").astype(np.float64)


def too_far(row: str, argument: NDArray[Any], got: NDArray[Any], recorded: NDArray[Any]) -> NDArray[np.bool_]:
    """Which results of a row are further from the recording than allowed; all arrays are codes, (lanes,)."""
    found = re.search(r"(\w+)\.\S*?\.?(f16|bf16|f32|f64)(x2)? ", row)
    assert found is not None
    opcode, kind, pair = found.groups()
    if pair:
        halves = [
            [codes >> np.uint64(shift) & np.uint64(0xFFFF) for codes in (argument, got, recorded)] for shift in (0, 16)
        ]
        low, high = (too_far(row.replace("x2 ", " "), *part) for part in halves)
        return low | high
    x, y, z = (values(codes, kind) for codes in (argument, got, recorded))
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = BOUNDS[f"{opcode} {kind}"](x, z) + np.abs(z) * 2.0 ** -(SIGNIFICAND[kind] + 1) + SMALLEST[kind]
        far = ~(np.abs(y - z) <= allowed)
    exact = ~(np.isfinite(y) & np.isfinite(z))
    return np.asarray(np.where(exact, got != recorded, far))
