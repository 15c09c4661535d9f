"""Compares what a variant returned with what the reference returned, output by output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe.testing.cases import EXACT, Bound

Value = Tensor | NVFP4Tensor


@dataclass(frozen=True, slots=True)
class LeafResult:
    """How one output compares.

    Attributes:
        name: The output's name.
        error: Relative L2 of the values; for a bound of 0 the share of bytes that differ.
        bound: What it may be.
        passed: error <= bound, same dtype, shape and layout, non-finite values in the same places.
        reason: What is wrong, empty when passed.
    """

    name: str
    error: float
    bound: float
    passed: bool
    reason: str = ""


def leaves(result: Any, arguments: Mapping[str, Any] | None = None, mutates: tuple[str, ...] = ()) -> dict[str, Value]:
    """Names the outputs of an op: "out", or the fields of a NamedTuple; then the arguments that it wrote to."""
    named = dict(result._asdict()) if hasattr(result, "_asdict") else {"out": result}
    for name in mutates:
        if (value := (arguments or {}).get(name)) is not None:
            named[name] = value
    return named


def compare(
    outputs: Mapping[str, Value], expected: Mapping[str, Value], bounds: Mapping[str, Bound]
) -> list[LeafResult]:
    """One result for each output; an output without a bound must be equal byte for byte."""
    results = []
    for name, reference in expected.items():
        results.append(_leaf(name, outputs.get(name), reference, bounds.get(name, EXACT)))
    return results


def worst(results: list[LeafResult]) -> LeafResult:
    """The failed result, or else the one nearest to its bound."""
    return max(results, key=lambda r: (not r.passed, r.error / r.bound if r.bound else r.error))


def _leaf(name: str, value: Value | None, reference: Value, bound: Bound) -> LeafResult:
    if value is None or type(value) is not type(reference):
        got = type(value).__name__
        return LeafResult(name, torch.inf, bound.rel_l2, False, f"{name}: got {got}, not {type(reference).__name__}")
    if mismatch := _form(value, reference):
        return LeafResult(name, torch.inf, bound.rel_l2, False, f"{name}: {mismatch}")
    error = _unequal(value, reference) if bound.rel_l2 == 0 else _relative(value, reference)
    if error <= bound.rel_l2:
        return LeafResult(name, error, bound.rel_l2, True)
    what = f"{error:.3g} of the bytes differ" if bound.rel_l2 == 0 else f"relative L2 {error:.3g} > {bound.rel_l2:.3g}"
    return LeafResult(name, error, bound.rel_l2, False, f"{name}: {what}")


def _form(value: Value, reference: Value) -> str:
    """What differs in dtype, shape or layout, or ""."""
    if isinstance(value, NVFP4Tensor) and isinstance(reference, NVFP4Tensor):
        if value.scale_layout != reference.scale_layout:
            return f"scale layout {value.scale_layout}, not {reference.scale_layout}"
        pairs = zip(_parts(value).items(), _parts(reference).values(), strict=True)
        return "; ".join(filter(None, (f"{n}: {m}" if (m := _form(v, r)) else "" for (n, v), r in pairs)))
    if isinstance(value, Tensor) and isinstance(reference, Tensor):
        if value.dtype != reference.dtype:
            return f"dtype {value.dtype}, not {reference.dtype}"
        if value.shape != reference.shape:
            return f"shape {tuple(value.shape)}, not {tuple(reference.shape)}"
        if value.device != reference.device:
            return f"device {value.device}, not {reference.device}"
        if not value.is_contiguous():
            return f"strides {value.stride()}, not contiguous"
    return ""


def _parts(value: NVFP4Tensor) -> dict[str, Tensor]:
    return {"codes": value.codes, "scales": value.scales, "global_scale_dec": value.global_scale_dec}


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _unequal(value: Value, reference: Value) -> float:
    """Share of the bytes that differ."""
    mine = [value] if isinstance(value, Tensor) else list(_parts(value).values())
    theirs = [reference] if isinstance(reference, Tensor) else list(_parts(reference).values())
    total = sum(_bytes(t).numel() for t in theirs)
    unequal = sum(int((_bytes(m) != _bytes(t)).sum()) for m, t in zip(mine, theirs, strict=True))
    return unequal / total if total else 0.0


def _relative(value: Value, reference: Value) -> float:
    """||value - reference|| / ||reference|| in fp64 over the finite entries; inf where non-finite ones do not match."""
    a, b = _values(value), _values(reference)
    finite = b.isfinite()
    if finite.all() and a.isfinite().all():  # the usual case, without copies by mask
        return _ratio((a - b).norm().item(), b.norm().item())
    odd_a, odd_b = a[~finite], b[~finite]
    same_odd = torch.equal(odd_a.nan_to_num(nan=0.0), odd_b.nan_to_num(nan=0.0)) and torch.equal(
        odd_a.isnan(), odd_b.isnan()
    )
    if not same_odd or not a[finite].isfinite().all():
        return torch.inf
    return _ratio((a[finite] - b[finite]).norm().item(), b[finite].norm().item())


def _ratio(difference: float, scale: float) -> float:
    return difference / scale if scale else (0.0 if difference == 0 else torch.inf)


def _values(value: Value) -> Tensor:
    return dequantize(value).double() if isinstance(value, NVFP4Tensor) else value.double()
