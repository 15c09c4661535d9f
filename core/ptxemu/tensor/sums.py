"""Matrix products as Hopper's tensor cores sum them, on the native core.

No document says how; `native/product.c` does what was measured on an H200 (tests/ptxemu/truth), where it gives every
bit: exact products are aligned to the largest exponent among them and the accumulator, cut towards zero `FRACTION` bits
below it, added, and the sum is cut to `KEPT` bits behind the leading one.
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
    """Codes of A B + C.

    Args:
        a: (rows, depth).
        bt: (depth, n).
        c: (rows, n).
        types: Of the elements of A and B.
        d_type: "f32" or "f16".

    Returns:
        uint32 (rows, n).
    """
    (a, bt, special), c = finite(a, bt), np.ascontiguousarray(c, np.float32)
    out = np.empty((len(a), bt.shape[1]), np.uint32)
    given = _product(a, bt, types, TARGETS[d_type], wide=True)
    native.core().emu_product(ctypes.byref(given), len(a), c.ctypes.data, out.ctypes.data)
    return out if special is None else override(out, special, c, d_type)


def finite(a: Single, bt: Single) -> tuple[Single, Single, Single | None]:
    """Contiguous factors without infinities and NaNs, and what those make of the product: NaN or infinite, else 0."""
    a, bt = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(bt, np.float32)
    if np.isfinite(a).all() and np.isfinite(bt).all():
        return a, bt, None
    with np.errstate(all="ignore"):
        total = a.astype(np.float64) @ bt.astype(np.float64)
    special = np.where(np.isfinite(total), 0.0, total).astype(np.float32)
    return np.where(np.isfinite(a), a, np.float32(0)), np.where(np.isfinite(bt), bt, np.float32(0)), special


def override(
    codes: npt.NDArray[np.uint32], special: Single, c: Single, d_type: str
) -> npt.NDArray[np.uint32]:  # fmt: skip
    """Codes of sums with the infinities and NaNs of `finite` put in, all of one shape; c is what was added."""
    with np.errstate(all="ignore"):
        total = special + c
    nan, one = {"f16": (0x7FFF, 0x7C00), "f32": (0x7FFFFFFF, 0x7F800000)}[d_type]
    sign = np.where(total < 0, 0x8000 if d_type == "f16" else 0x80000000, 0).astype(np.uint32)
    infinite = np.where(np.isnan(total), np.uint32(nan), np.uint32(one) | sign)
    return np.where(special == 0, codes, infinite).astype(np.uint32)


def fma(x: float, y: float, z: float) -> float:
    """x y + z, rounded once."""
    return float(native.core().emu_fma(x, y, z))


def accumulate(
    a: Single, bt: Single, types: tuple[str, str], d_type: str, *, saturate: bool,
    warps: Sequence[Warp], places: npt.NDArray[Any], keep: Sequence[bool],
) -> None:  # fmt: skip
    """D = A B + D of a wgmma, on the registers of its four warps.

    Args:
        a: (64, depth), finite and contiguous, as bt.
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
