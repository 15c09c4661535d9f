"""Matrix products as Hopper's tensor cores sum them, on the native core.

No document says how; `native/product.c` does what was measured on an H200 (tests/ptxemu/truth), where it gives every bit:
exact products are aligned to the largest exponent among them and the accumulator, cut towards zero `FRACTION` bits below
it, added, and the sum is cut to `KEPT` bits behind the leading one.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu import native
from ptxemu.tensor import formats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ptxemu.machine import Warp

Single = npt.NDArray[np.float32]
FRACTION, KEPT = 25, 23
FRACTION_8, KEPT_8 = 13, 13  # of wgmma with 8-bit floats
SMALLEST = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14}  # exponents of normal numbers
TARGETS = {"f32": 0, "f16": 1, "s32": 2}  # as in native/ptxemu.h


@cache
def _table(name: str) -> Single:
    """Value of every code of a format of at most 8 bits."""
    return formats.table(name).astype(np.float32)


def decode(name: str, data: npt.NDArray[np.uint8]) -> Single:
    """As `formats.decode_bytes`, in float32, which holds every value of the types of Hopper."""
    if name == "f16":
        return data.view(np.float16).astype(np.float32)
    if name in {"s8", "u8"}:
        return data.view(np.int8 if name == "s8" else np.uint8).astype(np.float32)
    if name in {"e4m3", "e5m2"}:
        return np.asarray(_table(name)[data])
    return formats.decode_bytes(name, data).astype(np.float32)


def _product(a: Single, bt: Single, types: tuple[str, str], target: int, *, wide: bool) -> native.Product:
    """What the native core takes; it keeps no reference to the arrays."""
    small = SMALLEST.get(types[0], 0), SMALLEST.get(types[1], 0)
    bits = (FRACTION, KEPT) if wide else (FRACTION_8, KEPT_8)
    return native.Product(a.ctypes.data, bt.ctypes.data, bt.shape[1], bt.shape[0], *bits, *small, target)


def product(a: Single, bt: Single, c: Single, types: tuple[str, str], d_type: str) -> npt.NDArray[np.uint32]:
    """Codes of A B + C, of finite factors.

    Args:
        a: (rows, depth).
        bt: (depth, n).
        c: (rows, n).
        types: Of the elements of A and B.
        d_type: "f32" or "f16".

    Returns:
        uint32 (rows, n).
    """
    a, bt, c = (np.ascontiguousarray(x, np.float32) for x in (a, bt, c))
    out = np.empty((len(a), bt.shape[1]), np.uint32)
    given = _product(a, bt, types, TARGETS[d_type], wide=True)
    native.core().emu_product(ctypes.byref(given), len(a), c.ctypes.data, out.ctypes.data)
    return out


def fma(x: float, y: float, z: float) -> float:
    """x y + z, rounded once."""
    return float(native.core().emu_fma(x, y, z))


def accumulate(
    a: Single, bt: Single, types: tuple[str, str], d_type: str, *, saturate: bool,
    warps: Sequence[Warp], places: npt.NDArray[Any], keep: Sequence[bool],
) -> None:  # fmt: skip
    """D = A B + D of a wgmma with finite factors, on the registers of its four warps.

    Args:
        a: (64, depth).
        bt: (depth, n).
        types: Of the elements of A and B.
        d_type: "f32", "f16" or "s32".
        saturate: Integers saturate.
        warps: In the order of their rows.
        places: Where each register of D starts in the register file, in words.
        keep: Of each warp: D is added to.
    """
    target = TARGETS[d_type] + saturate
    given = _product(a, bt, types, target, wide=types[0] not in {"e4m3", "e5m2"})
    files = (ctypes.c_void_p * 4)(*(warp.file_pointer for warp in warps))
    native.core().emu_wgmma(ctypes.byref(given), files, places.ctypes.data, bytes(keep))
