"""The `hopper` layout of NVFP4 weights: codes and scales in the order in which a tensor core's left operand wants them.

A lane of a warp reads 16 bytes and has its part of m16k16 fragments for 64 k, bit-interleaved so that a shift, a mask
and one multiplication by a pair of scales decode two values (measured: 18 instructions per 8 values, where nibbles in
order take 29). A k32 group is two scale blocks, a k16 step each, so k is in order, and so are activations; the pair of
scales of a row serves both steps, since a multiplication takes either half of a register for both of its values.

    unit    16 rows x 128 k: 2 halves of 64 k, 32 lanes, 4 words (x, y of two k32 groups); 8 scale words x 4 k32 groups
    slab    4 units, 64 rows x 128 k: 4096 bytes of codes, 512 bytes of scales
    memory  (expert, 64 rows, 128 k) slabs, one after another; rows and k are padded with zeros

A register, two neighbouring k, in T(r) form has its magnitude at bits r..r+2 and its sign at bit r + 9 of each 16-bit
half, modulo 32. Word x holds T(0), T(4), T(10), word y T(2), T(6), T(12), and the bits that these leave
free, x's `_X_OF_Z` and y's others, are the word z with T(8), T(14).

A scale is a byte S0E5M3, the bits 4 to 11 of bf16(scale * 2^119): 104 to 246, and 0 for zero.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor
from torch.nn.functional import pad

from megamoe.errors import ArgumentError

HOPPER = "hopper"
VERSION = 2  # of the order of the bytes: 1 had k in another one
GROUP_ROWS = 64  # rows of a slab
UNIT_K = 128  # k of a slab
_BLOCK = 16
_TILES = GROUP_ROWS // 16
_AT_ONCE = 1 << 24  # values; bounds the temporary memory
_X_OF_Z = 0xC180C180
# (quarter of the group's 32 k, row half) of each T(r), with its word: they name the operand register
_FORMS = {
    "x": ((0, 0, 0), (0, 1, 4), (1, 0, 10)),
    "y": ((1, 1, 2), (2, 0, 6), (2, 1, 12)),
    "z": ((3, 0, 8), (3, 1, 14)),
}
_PADDED = re.compile(rf"{HOPPER}:(\d+)x(\d+)")


def is_fragments(scale_layout: str) -> bool:
    """Whether a layout is `hopper`, padded or not."""
    return scale_layout == HOPPER or _PADDED.fullmatch(scale_layout) is not None


def padded_shape(rows: int, k: int) -> tuple[int, int]:
    """Rows and k after padding to whole slabs."""
    return -(-rows // GROUP_ROWS) * GROUP_ROWS, -(-k // UNIT_K) * UNIT_K


def layout_name(rows: int, k: int) -> str:
    """`hopper`, or `hopper:{rows}x{k}` where padding hides the logical size."""
    return HOPPER if padded_shape(rows, k) == (rows, k) else f"{HOPPER}:{rows}x{k}"


def logical_size(scale_layout: str, rows: int, k: int) -> tuple[int, int]:
    """Logical rows and k of a tensor in a hopper layout whose stored rows and k are given."""
    found = _PADDED.fullmatch(scale_layout)
    return (int(found[1]), int(found[2])) if found else (rows, k)


def to_fragments(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Rearranges linear codes and scales.

    Args:
        codes: uint8 (..., rows, K/2), the low nibble first.
        scales: float8_e4m3fn (..., rows, K/16).

    Returns:
        uint8 (..., padded rows, padded K/2) and float8_e4m3fn (..., padded rows, padded K/16), bytes in hopper order:
        an index into them means nothing.

    Raises:
        ArgumentError: A scale is negative or NaN, or is zero for a block with a code of nonzero magnitude: neither has
            a form in this layout.
    """
    *batch, rows, half = codes.shape
    full_rows, full_k = padded_shape(rows, half * 2)
    out_codes = codes.new_empty((*batch, full_rows, full_k // 2))
    out_scales = codes.new_empty((*batch, full_rows, full_k // _BLOCK))
    size = (full_rows, full_k)
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (codes, scales.view(torch.uint8), out_codes, out_scales)]
    step = max(1, _AT_ONCE // (full_rows * full_k))
    for first in range(0, flat[0].shape[0], step):
        some_codes, some_scales, put_codes, put_scales = (t[first : first + step] for t in flat)
        _check(some_codes, some_scales)
        put_codes.copy_(_pack(_padded(some_codes, full_rows, full_k // 2), size))
        put_scales.copy_(_pack_scales(_padded(some_scales, full_rows, full_k // _BLOCK), size))
    return out_codes, out_scales.view(scales.dtype)


def from_fragments(codes: Tensor, scales: Tensor, rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The inverse of `to_fragments`: linear codes (..., rows, K/2) and scales (..., rows, K/16), bit for bit."""
    *batch, full_rows, half = codes.shape
    out_codes = codes.new_empty((*batch, rows, k // 2))
    out_scales = codes.new_empty((*batch, rows, k // _BLOCK))
    size = (full_rows, half * 2)
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (codes, scales.view(torch.uint8), out_codes, out_scales)]
    step = max(1, _AT_ONCE // (full_rows * half * 2))
    for first in range(0, flat[0].shape[0], step):
        some_codes, some_scales, put_codes, put_scales = (t[first : first + step] for t in flat)
        put_codes.copy_(_unpack(some_codes, size)[:, :rows, : k // 2])
        put_scales.copy_(_unpack_scales(some_scales, size)[:, :rows, : k // _BLOCK])
    return out_codes, out_scales.view(scales.dtype)


def scales_to_fragments(scales: Tensor) -> Tensor:
    """The scales of `to_fragments` alone, unchecked, for rows and k that need no padding; e4m3 (..., rows, K/16)."""
    *_, rows, cols = scales.shape
    flat = scales.view(torch.uint8).reshape(-1, rows, cols)
    out = torch.empty_like(flat)
    step = max(1, _AT_ONCE // (rows * cols * _BLOCK))
    for first in range(0, flat.shape[0], step):
        out[first : first + step] = _pack_scales(flat[first : first + step], (rows, cols * _BLOCK))
    return out.view(scales.dtype).view(scales.shape)


def _padded(bytes_: Tensor, rows: int, cols: int) -> Tensor:
    return pad(bytes_, (0, cols - bytes_.shape[-1], 0, rows - bytes_.shape[-2]))


def _check(codes: Tensor, scales: Tensor) -> None:
    if bool((scales >= 0x7F).any()):
        raise ArgumentError("scales", "a negative or NaN block scale", "scales of 0 to 448 in the hopper layout")
    zero = scales == 0
    if bool(zero.any()):
        magnitudes = codes.reshape(*scales.shape, _BLOCK // 2)[zero] & 0x77
        if bool(magnitudes.any()):
            expected = "zero codes under a zero scale in the hopper layout (zero_guard='scale' quantises so)"
            raise ArgumentError("codes", "a nonzero code under a zero block scale", expected)


def _pack(codes: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (B, rows, K/2) to the same bytes in hopper order, of the same shape."""
    rows, k = size
    # nibble 8 h + 2 t + e of a block goes to lane t, half h of its step, element e of a pair; word >> 4 i leaves i,
    # i + 4, ... in 16-bit fields, so i = 2 (t % 2) + e and the field is 2 h + t // 2
    words = codes.contiguous().view(torch.int64)  # (B, rows, K/16)
    turned = torch.stack([_shift_right(words, 4 * i) for i in range(4)], dim=-1)  # (B, rows, K/16, i)
    spread = (turned & 0x0007000700070007) | (turned & 0x0008000800080008) << 6
    parts = spread.view(torch.int16).view(
        -1, rows // 64, _TILES, 2, 8, k // UNIT_K, 2, 2, 2, 2, 2, 2, 2
    )  # (B, group, tile, row half, g, unit, k64, k32, block, t % 2, e, h, t // 2)
    # -> (block, h, row half, B, group, unit, tile, k64, g, t // 2, t % 2, k32, e): a register's pair is one 32-bit word
    pairs = parts.permute(8, 11, 3, 0, 1, 5, 2, 6, 4, 12, 9, 7, 10).contiguous().view(torch.int32)
    pairs = pairs.view(4, 2, -1, rows // 64, k // UNIT_K, _TILES, 2, 8, 4, 2)  # block and h are a quarter
    x, y, z = (
        functools.reduce(torch.bitwise_or, (_rotate_left(pairs[quarter, half], r) for quarter, half, r in _FORMS[word]))
        for word in "xyz"
    )  # each (B, group, unit, tile, k64, g, t, k32)
    mask = _signed(_X_OF_Z)
    out = torch.stack((x | (z & mask), y | (z & ~mask)), dim=-1)
    return out.view(torch.uint8).view(-1, rows, k // 2)


def _unpack(codes: Tensor, size: tuple[int, int]) -> Tensor:
    rows, k = size
    words = codes.contiguous().view(torch.int32).view(-1, rows // 64, k // UNIT_K, _TILES, 2, 8, 4, 2, 2)
    x, y = words.unbind(-1)
    mask = _signed(_X_OF_Z)
    source = {"x": x, "y": y, "z": (x & mask) | (y & ~mask)}
    pairs = x.new_empty((4, 2, *x.shape, 1))
    for word, forms in _FORMS.items():
        for quarter, half, r in forms:
            pairs[quarter, half, ..., 0] = _rotate_left(source[word], 32 - r)
    # undoes the permutation of `_pack`
    parts = pairs.view(torch.int16).view(2, 2, 2, -1, rows // 64, k // UNIT_K, _TILES, 2, 8, 2, 2, 2, 2)
    parts = parts.permute(3, 4, 6, 2, 8, 5, 7, 11, 0, 10, 12, 1, 9).contiguous().view(-1, 4, 4).view(torch.int64)
    nibbles = ((parts & 0x0007000700070007) | (_shift_right(parts, 6) & 0x0008000800080008))[..., 0]
    shifted = (nibbles[:, i] << 4 * i for i in range(4))
    return functools.reduce(torch.bitwise_or, shifted).contiguous().view(torch.uint8).view(-1, rows, k // 2)


def _pack_scales(scales: Tensor, size: tuple[int, int]) -> Tensor:
    """E4M3 bytes (B, rows, K/16) to scale words, as bytes of the same shape."""
    rows, k = size
    table = _codes_of_scales(scales.device)
    stored = table[scales.int()].view(-1, rows // 64, _TILES, 2, 8, k // UNIT_K, 4, 2)
    low, high = (stored[..., i] for i in range(2))  # of block 0 and 1: (B, group, tile, row half, g, unit, q)
    both = low << 4 | high << 20
    word = both[:, :, :, 0] | _rotate_left(both[:, :, :, 1], 24)  # (B, group, tile, g, unit, q)
    return word.permute(0, 1, 4, 2, 3, 5).contiguous().view(torch.uint8).view(-1, rows, k // _BLOCK)


def _unpack_scales(scales: Tensor, size: tuple[int, int]) -> Tensor:
    rows, k = size
    word = scales.contiguous().view(torch.int32).view(-1, rows // 64, k // UNIT_K, _TILES, 8, 4)
    both = torch.stack((word, _rotate_left(word, 8)), dim=3)  # (B, group, unit, row half, tile, g, q)
    stored = torch.stack((both >> 4 & 0xFF, both >> 20 & 0xFF), dim=-1)
    table = torch.zeros(256, dtype=torch.uint8, device=scales.device)
    codes = _codes_of_scales(scales.device)
    table[codes[:0x7F].long()] = torch.arange(0x7F, dtype=torch.uint8, device=scales.device)
    linear = table[stored].permute(0, 1, 4, 3, 5, 2, 6, 7)  # (B, group, tile, row half, g, unit, q, block)
    return linear.reshape(-1, rows, k // _BLOCK)


def _codes_of_scales(device: torch.device) -> Tensor:
    """int32 (256,): the S0E5M3 code of each E4M3 byte below NaN, 0 for the others."""
    byte = torch.arange(256, dtype=torch.uint8)
    value = byte.view(torch.float8_e4m3fn).float() * 2.0**119
    code = value.view(torch.int32) >> 20 & 0xFF
    return torch.where((byte == 0) | (byte >= 0x7F), 0, code).to(device)


def _rotate_left(words: Tensor, by: int) -> Tensor:
    """Rotates int32 words."""
    by %= 32
    if by == 0:
        return words
    return words << by | (words >> (32 - by) & ((1 << by) - 1))


def _shift_right(words: Tensor, by: int) -> Tensor:
    """Logical shift of int64 words."""
    return words >> by & ((1 << (64 - by)) - 1) if by else words


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
