"""NVFP4 weights as checkpoints hold them, and the way to an NVFP4Tensor: what formats do differently is written down.

ModelOpt stores the global scale as a number to multiply by, amax / 2688; compressed-tensors the number that values were
multiplied by, 2688 / amax, under other names. Codes and block scales are the same bytes in both (modelopt
export/quant_utils.py; compressed_tensors compressors/nvfp4, entrypoints/convert/converters/modelopt_nvfp4.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.contracts import check_multiple, check_tensor
from megamoe.errors import ArgumentError, UnknownNameError
from megamoe.numerics.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, NVFP4Tensor


@dataclass(frozen=True, slots=True)
class Convention:
    """How a format stores one NVFP4 matrix (N, K).

    Attributes:
        name: For people.
        codes: Field of the codes, uint8 (N, K/2).
        scales: Field of the block scales, float8_e4m3fn (N, K/16), linear.
        global_scale: Field of the global scale, fp32 () or (1,).
        input_scale: Field of the activations' global scale, fp32 () or (1,); a matrix may lack it.
        encodes: Both global scales are what values were multiplied by before rounding (2688 / amax), not what decoded
            values are to be multiplied by (amax / 2688).
    """

    name: str
    codes: str
    scales: str
    global_scale: str
    input_scale: str
    encodes: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields."""
        return self.codes, self.scales, self.global_scale, self.input_scale


MODELOPT = Convention("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", encodes=False)
COMPRESSED_TENSORS = Convention(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", encodes=True
)
CONVENTIONS: Mapping[str, Convention] = {c.name: c for c in (MODELOPT, COMPRESSED_TENSORS)}


def convention_named(name: str) -> Convention:
    """The convention of a format, by what config.json calls its quant_method.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in CONVENTIONS:
        raise UnknownNameError("convention of NVFP4 checkpoints", name, CONVENTIONS)
    return CONVENTIONS[name]


def matrix(fields: Mapping[str, Tensor], convention: Convention, shape: tuple[int, int] | None = None) -> NVFP4Tensor:
    """One stored matrix, with its codes and block scales as they are.

    Args:
        fields: By the convention's names; others are not looked at.
        convention: The source's.
        shape: N and K that it must have; None takes what comes.

    Returns:
        NVFP4Tensor (N, K), linear, with a decode scale (): the stored number, or its reciprocal rounded once to fp32.

    Raises:
        ArgumentError: A field is missing, or of another dtype or shape, or a global scale that is not a positive finite
            number.
    """
    for name in (convention.codes, convention.scales, convention.global_scale):
        if name not in fields:
            raise ArgumentError(name, "nothing", f"a tensor: {convention.name} stores one of that name")
    codes, scales = fields[convention.codes], fields[convention.scales]
    n, k = shape or ("N", None)
    check_tensor(convention.codes, codes, (n, k // 2 if k else "K/2"), [torch.uint8])
    check_multiple(convention.codes, codes.shape[1] * 2, BLOCK, "values along the last dim")
    check_tensor(
        convention.scales, scales, (codes.shape[0], codes.shape[1] * 2 // BLOCK), [torch.float8_e4m3fn], like=codes
    )
    dec = decode_scale(fields[convention.global_scale], convention)
    return NVFP4Tensor(codes, scales, dec.to(codes.device))


def decode_scale(stored: Tensor, convention: Convention, name: str | None = None) -> Tensor:
    """What decoded values are multiplied by, fp32 (), from a stored global scale.

    Args:
        stored: fp32 () or (1,).
        convention: The source's.
        name: Of the field, for the message; default the weights' global scale.

    Raises:
        ArgumentError: Another dtype or shape, or not a positive finite number.
    """
    name = name or convention.global_scale
    if stored.dtype != torch.float32 or stored.numel() != 1:
        raise ArgumentError(name, f"{stored.dtype} {tuple(stored.shape)}", "one number in float32, () or (1,)")
    number = stored.reshape(())
    dec = number.reciprocal() if convention.encodes else number
    if not (0 < float(number) < torch.inf and 0 < float(dec) < torch.inf):
        raise ArgumentError(name, float(number), "a positive finite number")
    return dec


def activation_amax(stored: Iterable[Tensor], convention: Convention) -> float | None:
    """The largest activation that some stored input scales stand for; None where there are none.

    Raises:
        ArgumentError: As `decode_scale`.
    """
    found = [float(decode_scale(one, convention, convention.input_scale)) for one in stored]
    return max(found) * E2M1_MAX * E4M3_MAX if found else None


def stack(matrices: Iterable[NVFP4Tensor]) -> NVFP4Tensor:
    """Matrices (N, K) of the experts, linear, as (E, N, K) with a decode scale (E,).

    Raises:
        ArgumentError: There are none, or they are not alike, or not linear.
    """
    found = list(matrices)
    if not found:
        raise ArgumentError("matrices", "none", "at least one")
    first = found[0]
    for e, one in enumerate(found):
        check_tensor(f"matrices[{e}].codes", one.codes, tuple(first.codes.shape), [torch.uint8], like=first.codes)
        _check_linear(f"matrices[{e}]", one)
    codes, scales, decs = zip(*((m.codes, m.scales, m.global_scale_dec) for m in found), strict=True)
    return NVFP4Tensor(torch.stack(codes), torch.stack(scales), torch.stack(decs))


def join_gate_up(gate: NVFP4Tensor, up: NVFP4Tensor, order: str = "gate_up") -> NVFP4Tensor:
    """Gate and up projections (E, I, K) as one (E, 2I, K), nothing rounded: each half keeps a global scale of its own.

    Args:
        gate: A checkpoint's w1 or gate_proj, linear, global scale (E,).
        up: Its w3 or up_proj, alike.
        order: "gate_up" puts the gate's rows first, "up_gate" the up projection's.

    Returns:
        NVFP4Tensor with a decode scale (E, 2) in the order of the rows.

    Raises:
        ArgumentError: An unknown order, or projections that are not alike, or not linear.
    """
    if order not in ("gate_up", "up_gate"):
        raise ArgumentError("order", repr(order), "'gate_up' or 'up_gate'")
    if up.shape != gate.shape or up.global_scale_dec.shape != gate.global_scale_dec.shape:
        expected = f"{tuple(gate.shape)} with a global scale {tuple(gate.global_scale_dec.shape)}, as gate"
        got = f"{tuple(up.shape)} with a global scale {tuple(up.global_scale_dec.shape)}"
        raise ArgumentError("up", got, expected)
    for name, projection in (("gate", gate), ("up", up)):
        _check_linear(name, projection)
    first, second = (gate, up) if order == "gate_up" else (up, gate)
    scales = torch.cat((first.scales.view(torch.uint8), second.scales.view(torch.uint8)), dim=-2)
    return NVFP4Tensor(
        torch.cat((first.codes, second.codes), dim=-2),
        scales.view(gate.scales.dtype),
        torch.stack((first.global_scale_dec, second.global_scale_dec), dim=-1),
    )


def _check_linear(name: str, weights: NVFP4Tensor) -> None:
    if weights.scale_layout != "linear":
        raise ArgumentError(f"{name}.scale_layout", repr(weights.scale_layout), "'linear'")
