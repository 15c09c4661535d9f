"""NVFP4: E2M1 values, one E4M3 scale per 16 of them, one fp32 scale per tensor.

A value is `E2M1 * E4M3 * global_scale_dec`. All arithmetic is fp32, rounded to nearest even, one operation at a time,
so that a kernel which does the same operations gives the same bytes. The recipe is TransformerEngine's
(core_nvfp4.cuh, quantize_transpose_nvfp4.cuh), with zero codes where the block scale rounds to zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megamoe.errors import ArgumentError
from megamoe.numerics import fragments
from megamoe.numerics.layout import SCALE_LAYOUTS, from_128x4, to_128x4

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX_FOUR_OVER_SIX = 256.0  # leaves room for the scale that is 1.5 times larger
FLT_MAX = torch.finfo(torch.float32).max
_SIXTH = torch.tensor(1.0 / 6.0, dtype=torch.float32).item()
# Between code c and c + 1 lies this magnitude; an exact tie goes to the even code.
_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

ZeroGuard = Literal["scale", "amax"]
FourOverSix = Literal["mae", "mse"]
ZERO_GUARDS: tuple[str, ...] = get_args(ZeroGuard)
FOUR_OVER_SIX: tuple[str, ...] = get_args(FourOverSix)


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A quantised tensor of logical shape (..., rows, K).

    Attributes:
        codes: uint8 (..., rows, K/2); the low nibble is the even element.
        scales: float8_e4m3fn; (..., rows, K/16) when linear, tiles of `layout.to_128x4` otherwise.
        global_scale_dec: fp32, what a decoded value is multiplied by: (), or one per batch entry (...), or one per
            batch entry and equal part of the rows (..., parts), as for fused gate and up weights.
        scale_layout: "linear", "128x4", or for weights of the Hopper GEMMs "hopper" or "hopper:{rows}x{K}", where the
            codes are rearranged too and both are padded: see `fragments`.
    """

    codes: Tensor
    scales: Tensor
    global_scale_dec: Tensor
    scale_layout: str = "linear"

    @property
    def shape(self) -> torch.Size:
        """Logical shape, (..., rows, K)."""
        if self.codes.ndim < 2:
            return torch.Size((self.codes.shape[-1] * 2,))
        *batch, rows, half = self.codes.shape
        return torch.Size((*batch, *fragments.logical_size(self.scale_layout, rows, half * 2)))

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.codes.device

    def linear_scales(self) -> Tensor:
        """The block scales as float8_e4m3fn (..., rows, K/16)."""
        if self.scale_layout == "linear":
            return self.scales
        if fragments.is_fragments(self.scale_layout):
            return self._linear().scales
        rows = self.codes.shape[-2] if self.codes.ndim > 1 else 1
        linear = from_128x4(self.scales, rows, self.codes.shape[-1] * 2 // BLOCK)
        return linear if self.codes.ndim > 1 else linear[0]

    def with_layout(self, scale_layout: str) -> NVFP4Tensor:
        """The same values with their scales, and for "hopper" their codes, in another layout; bit for bit reversible.

        Raises:
            ArgumentError: An unknown layout, or for "hopper" what `fragments.to_fragments` refuses, or no rows.
        """
        if scale_layout == self.scale_layout:
            return self
        if scale_layout == fragments.HOPPER:
            return self if fragments.is_fragments(self.scale_layout) else self._hopper()
        check_scale_layout(scale_layout)
        plain = self._linear() if fragments.is_fragments(self.scale_layout) else self
        linear = plain.linear_scales()
        scales = linear if scale_layout == "linear" else to_128x4(linear if linear.ndim > 1 else linear[None])
        return replace(plain, scales=scales, scale_layout=scale_layout)

    def _hopper(self) -> NVFP4Tensor:
        if self.codes.ndim < 2:
            raise ArgumentError("codes", f"shape {tuple(self.codes.shape)}", "(..., rows, K/2) for the hopper layout")
        codes, scales = fragments.to_fragments(self.codes, self.linear_scales())
        return NVFP4Tensor(codes, scales, self.global_scale_dec, fragments.layout_name(*self.shape[-2:]))

    def _linear(self) -> NVFP4Tensor:
        codes, scales = fragments.from_fragments(self.codes, self.scales, *self.shape[-2:])
        return NVFP4Tensor(codes, scales, self.global_scale_dec)

    def to(self, device: torch.device | str) -> NVFP4Tensor:
        """The same tensor on another device."""
        codes, scales, dec = (t.to(device) for t in (self.codes, self.scales, self.global_scale_dec))
        return NVFP4Tensor(codes, scales, dec, self.scale_layout)


def _unflatten(leaves: Iterable[Any], scale_layout: str) -> NVFP4Tensor:
    codes, scales, dec = leaves
    return NVFP4Tensor(codes, scales, dec, scale_layout)


pytree.register_pytree_node(
    NVFP4Tensor,
    lambda t: ([t.codes, t.scales, t.global_scale_dec], t.scale_layout),
    _unflatten,
    serialized_type_name="megamoe.NVFP4Tensor",
)


def check_scale_layout(scale_layout: str, name: str = "scale_layout") -> None:
    """Raises ArgumentError unless `scale_layout` is a known one."""
    if scale_layout not in SCALE_LAYOUTS:
        raise ArgumentError(name, repr(scale_layout), f"one of {', '.join(map(repr, SCALE_LAYOUTS))}")


def check_zero_guard(zero_guard: str) -> None:
    """Raises ArgumentError unless `zero_guard` is a known one."""
    if zero_guard not in ZERO_GUARDS:
        raise ArgumentError("zero_guard", repr(zero_guard), f"one of {', '.join(map(repr, ZERO_GUARDS))}")


def check_four_over_six(four_over_six: str | None) -> None:
    """Raises ArgumentError unless `four_over_six` is None or a known error measure."""
    if four_over_six is not None and four_over_six not in FOUR_OVER_SIX:
        raise ArgumentError("four_over_six", repr(four_over_six), f"None or one of {', '.join(FOUR_OVER_SIX)}")


def encode_e2m1(x: Tensor) -> Tensor:
    """Rounds once, to nearest even, to E2M1 codes: PTX `cvt.rn.satfinite.e2m1x2.f32` for one value.

    Args:
        x: Any float dtype and shape; taken as fp32.

    Returns:
        uint8 codes 0..15, same shape. Beyond 6 saturates, NaN gives 0x7, the sign of zero is kept.
    """
    x = x.float()
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for below, threshold in enumerate(_THRESHOLDS):
        code += (magnitude >= threshold) if below % 2 else (magnitude > threshold)
    nan = x.isnan()
    code = torch.where(nan, 7, code)
    return code | (torch.signbit(x) & ~nan).to(torch.uint8) << 3


def decode_e2m1(codes: Tensor) -> Tensor:
    """E2M1 codes 0..15 (uint8) to fp32, same shape; 0x8 is -0."""
    bits = (codes & 7).to(torch.int16) << 9 | (codes & 8).to(torch.int16) << 12
    return bits.view(torch.float16).float() * 2.0**14  # fp16's bias is 14 above E2M1's; no table to copy to a GPU


def encode_e4m3(x: Tensor) -> Tensor:
    """Rounds to nearest even to float8_e4m3fn, saturating: PTX `cvt.rn.satfinite.e4m3x2.f32`.

    Args:
        x: Any float dtype and shape; taken as fp32. NaN of either sign gives 0x7f.
    """
    x = x.float().clamp(-E4M3_MAX, E4M3_MAX)  # torch before 2.12 turns an overflow into NaN
    return torch.where(x.isnan(), torch.nan, x).to(torch.float8_e4m3fn)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes (..., K) to bytes (..., K/2), the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes (..., K/2) to uint8 codes (..., K)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of a tensor as fp32 (), NaN ignored; 0 for an empty tensor."""
    magnitude = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
    return magnitude.max() if magnitude.numel() else magnitude.new_zeros(())


def global_scale_enc(amax: Tensor, *, e4m3_max: float = E4M3_MAX) -> Tensor:
    """The encode scale 6 * e4m3_max / amax that puts the largest block scale at `e4m3_max`.

    Args:
        amax: fp32, any shape.
        e4m3_max: 448, or 256 for four-over-six.

    Returns:
        fp32, same shape; at most FLT_MAX; 1 where amax is 0 or not finite (TransformerEngine's choice).
    """
    amax = amax.float()
    enc = torch.full_like(amax, E2M1_MAX * e4m3_max) / amax  # number / tensor would be a reciprocal and a product
    enc = enc.clamp(max=FLT_MAX)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, enc)


def blocks_of(x: Tensor) -> Tensor:
    """Any float tensor (..., K) as fp32 blocks (..., K/16, 16).

    Raises:
        ArgumentError: K is not a multiple of 16.
    """
    if x.shape[-1] % BLOCK:
        raise ArgumentError("x", f"{x.shape[-1]} values along the last dim", f"a multiple of {BLOCK}")
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of every 16 elements along the last dim, fp32 (..., K/16), NaN ignored."""
    return blocks_of(x).abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)


def block_scale(
    v: Tensor, enc: Tensor, *, fast: bool = False, zero_guard: str = "scale", times: float = 1.0
) -> tuple[Tensor, Tensor]:
    """E4M3 scale of a block and the multiplier that its elements are encoded with.

    Args:
        v: fp32, amax of each block; may be inf, not NaN.
        enc: fp32, positive and finite, broadcastable with `v`.
        fast: Associate as the rcp.approx kernels of FlashInfer and vLLM do.
        zero_guard: "scale": zero codes where the scale rounds to zero; "amax": only where the block is all zero.
        times: 1, or 1.5 for the map-to-4 candidate of four-over-six.

    Returns:
        (float8_e4m3fn scales, fp32 multipliers), both of v's shape. A scale is never NaN, whatever `enc`.
    """
    wanted = (enc * (v * _SIXTH) if fast else v * (enc * _SIXTH)) * times
    scale = encode_e4m3(wanted.fmax(wanted.new_zeros(())))  # fmax drops a NaN that a senseless enc may cause
    decoded = scale.float()
    o = (1.0 / (decoded * (1.0 / enc))).clamp(max=FLT_MAX)
    return scale, torch.where((v == 0) if zero_guard == "amax" else (decoded == 0), 0.0, o)


def quantize(
    x: Tensor,
    global_scale_enc: Tensor,
    *,
    scale_layout: str = "linear",
    fast: bool = False,
    zero_guard: str = "scale",
    four_over_six: str | None = None,
) -> NVFP4Tensor:
    """Quantises along the last dim by the recipe of this module.

    Args:
        x: bf16, fp16 or fp32 (..., rows, K), K a multiple of 16.
        global_scale_enc: fp32 (), or (...), or (..., parts): see NVFP4Tensor.global_scale_dec.
        scale_layout: Layout of the returned scales.
        fast: Recipe of the rcp.approx kernels, with correctly rounded reciprocals.
        zero_guard: See `block_scale`.
        four_over_six: Let each block map its maximum to 4 instead of 6 where that lowers the error of this kind; the
            global scale should come from `global_scale_enc(amax, e4m3_max=256)`. A tie, and a block with a NaN or an
            infinity, keeps 6.

    Returns:
        NVFP4Tensor of x's shape with `global_scale_dec = 1 / global_scale_enc`. A NaN becomes code 0x7 and takes no
        part in its block's scale.

    Raises:
        ArgumentError: An unknown option, K not a multiple of 16, or a global scale of another shape.
    """
    check_scale_layout(scale_layout)
    check_zero_guard(zero_guard)
    check_four_over_six(four_over_six)
    enc = per_row(global_scale_enc.float(), x.shape)  # broadcasts against (..., rows, K/16)
    v = block_amax(x)
    blocks = blocks_of(x)
    scale, o = block_scale(v, enc, fast=fast, zero_guard=zero_guard)
    codes = encode_e2m1(blocks * o[..., None])
    if four_over_six is not None:
        scale4, o4 = block_scale(v, enc, fast=fast, zero_guard=zero_guard, times=1.5)
        codes4 = encode_e2m1(blocks * o4[..., None])
        error6 = _block_error(blocks, codes, scale, enc, four_over_six)
        error4 = _block_error(blocks, codes4, scale4, enc, four_over_six)
        four = error4 < error6  # false where an error is NaN or both are infinite
        codes = torch.where(four[..., None], codes4, codes)
        scale = torch.where(four, scale4.view(torch.uint8), scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    if scale_layout == "128x4":
        scale = to_128x4(scale if scale.ndim > 1 else scale[None])
    return NVFP4Tensor(pack_nibbles(codes.flatten(-2)), scale, 1.0 / global_scale_enc.float(), scale_layout)


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.float32, *, apply_global: bool = True) -> Tensor:
    """Decodes to `dtype`, (..., rows, K).

    Args:
        tensor: What to decode.
        dtype: Float dtype of the result; E2M1 * E4M3 is exact in bf16, fp16 and fp32.
        apply_global: False leaves `global_scale_dec` out, which keeps the result exact.
    """
    linear = tensor.with_layout("linear")
    values = decode_e2m1(unpack_nibbles(linear.codes))
    out = values * linear.scales.float().repeat_interleave(BLOCK, dim=-1)
    return (out * per_row(tensor.global_scale_dec, out.shape) if apply_global else out).to(dtype)


def per_row(scale: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Makes a per-tensor, per-batch or per-part scale broadcastable to a tensor of `shape` (..., rows, K).

    Raises:
        ArgumentError: `scale` is none of (), (...) and (..., parts) with parts dividing the rows.
    """
    batch = tuple(shape[:-2])
    if scale.ndim == 0:
        return scale
    if tuple(scale.shape) == batch:
        return scale[..., None, None]
    parts = scale.shape[-1]
    if tuple(scale.shape[:-1]) == batch and parts > 0 and shape[-2] % parts == 0:
        return scale.repeat_interleave(shape[-2] // parts, dim=-1)[..., None]
    expected = f"(), {batch} or {(*batch, 'parts')} for a tensor of shape {tuple(shape)}"
    raise ArgumentError("global_scale", f"shape {tuple(scale.shape)}", expected)


def _block_error(blocks: Tensor, codes: Tensor, scale: Tensor, enc: Tensor, kind: str) -> Tensor:
    decoded = decode_e2m1(codes) * scale.float()[..., None] * (1.0 / enc)[..., None]
    error = (blocks - decoded).abs() if kind == "mae" else (blocks - decoded).square()
    total = error[..., 0]
    for i in range(1, BLOCK):  # one order of addition, so that a kernel can match it
        total = total + error[..., i]
    return total
