"""The NVFP4 recipe of one block of 16 values, bit for bit `megamoe.numerics.nvfp4.quantize` with zero_guard "scale".

A block comes as the words that were loaded: 8 of two bf16 or fp16, or 16 fp32. `encode_block` is short and right for
regular blocks, which it tells apart; `encode_any_block` is right for all. A kernel runs the first on every block and
repairs the rare others with the second. Where E2M1 is native the first is right for all blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cutlass import BFloat16, Boolean, Float16, Float32, Numeric, Uint16, Uint32

from megamoe.cute import arith, convert
from megamoe.cute.arith import Target, bits, number, ptx

BLOCK = 16
_SIXTH = 0x3E2AAAAB  # bits of fl(1/6)
_FLT_MAX = 0x7F7FFFFF
_REGULAR = 2.0**117  # global scales within 1/this and this leave sf * dec and its reciprocal normal: 2^-9 <= sf <= 448


@dataclass(frozen=True)
class GlobalScale:
    """What a block needs of the tensor's encode scale.

    Attributes:
        enc_sixth: RN(enc * fl(1/6)).
        dec: RN(1 / enc).
        regular: Whether this can be trusted, and blocks encoded with it.
    """

    enc_sixth: Float32
    dec: Float32
    regular: Boolean


@dataclass(frozen=True)
class Block:
    """An encoded block.

    Attributes:
        low: Codes of the first eight values, the first in the lowest nibble.
        high: Codes of the other eight.
        scale: The E4M3 byte.
        regular: Whether the rest of this can be trusted.
    """

    low: Uint32
    high: Uint32
    scale: Uint32
    regular: Boolean


def global_scale(enc: Float32, target: Target) -> GlobalScale:
    """Prepares any encode scale, once a thread."""
    return GlobalScale(_sixth(enc, target), arith.reciprocal(enc, target), Boolean(True))


def regular_global_scale(enc: Float32, target: Target) -> GlobalScale:
    """The same without a branch, for `encode_block`: right where its `regular` comes out true."""
    if target.native_e2m1:
        return global_scale(enc, target)
    regular = (enc >= Float32(1 / _REGULAR)) & (enc <= Float32(_REGULAR))
    return GlobalScale(_sixth(enc, target), arith.reciprocal_in_range(enc, target), regular)


def words_of_block(dtype: type[Numeric]) -> int:
    """32-bit words that a block of 16 `dtype` takes."""
    return BLOCK * int(dtype.width) // 32


def values(words: Sequence[Uint32], dtype: type[Numeric]) -> list[Float32]:
    """The values of a block's words as fp32, exact."""
    if dtype is Float32:
        return [number(w) for w in words]
    if dtype is BFloat16:
        return [number(v) for w in words for v in (w << 16, w & Uint32(0xFFFF0000))]
    return [Float32(Uint16(v).bitcast(Float16)) for w in words for v in (w & 0xFFFF, w >> 16)]


def signs(words: Sequence[Uint32], dtype: type[Numeric], target: Target) -> Uint32:
    """The sign bits of eight values (4 or 8 words), each on top of its value's nibble."""

    def pick(a: Uint32, b: Uint32, selector: int) -> Uint32:
        return arith.permute(a, b, selector, target)

    if dtype is Float32:
        even, odd = (
            pick(pick(words[i], words[i + 2], 0x0073), pick(words[i + 4], words[i + 6], 0x0073), 0x5410) for i in (0, 1)
        )
    else:
        first, second = (pick(words[i], words[i + 1], 0x7351) for i in (0, 2))  # top bytes of values 0, 2, 1, 3
        even, odd = pick(first, second, 0x5410), pick(first, second, 0x7632)
    return (even >> 4 & 0x08080808) | (odd & Uint32(0x80808080))


def encode_block(words: Sequence[Uint32], dtype: type[Numeric], scale: GlobalScale, target: Target) -> Block:
    """Encodes a block; right where `regular` comes out true: no NaN, no infinity, nothing beyond E2M1's largest."""
    if target.native_e2m1:
        return encode_any_block(words, dtype, scale, target)
    v = _largest(words, dtype, target)
    byte = convert.encode_e4m3(arith.mul(v, scale.enc_sixth, target), target)
    sf = convert.decode_e4m3(byte, target)
    o = arith.reciprocal_in_range(arith.mul(sf, scale.dec, target), target)
    o = arith.select(byte == 0, Float32(0.0), o)
    regular = scale.regular & (arith.mul(v, o, target) < Float32(convert.BOUND))
    y = [arith.mul(arith.magnitude(value, target), o, target) for value in values(words, dtype)]
    codes = [convert.code_of_bounded(a, target) - convert.MAGIC_BITS for a in y]
    half = len(words) // 2
    low = pack_codes(codes[:8]) | signs(words[:half], dtype, target)
    high = pack_codes(codes[8:]) | signs(words[half:], dtype, target)
    return Block(low, high, byte, regular)


def encode_any_block(words: Sequence[Uint32], dtype: type[Numeric], scale: GlobalScale, target: Target) -> Block:
    """Encodes a block: the recipe as it is written, for any values and any scale."""
    x = values(words, dtype)
    v = _largest_number(words, x, dtype, target)
    byte, o = block_scale(v, scale, target)
    y = [arith.mul(value, o, target) for value in x]
    if target.native_e2m1:
        pairs = [convert.encode_e2m1_pair(y[i], y[i + 1], target) for i in range(0, BLOCK, 2)]
        low, high = (_join_bytes(pairs[i : i + 4], target) for i in (0, 4))
    else:
        codes = [convert.encode_e2m1(value, target) for value in y]
        low, high = pack_codes(codes[:8]), pack_codes(codes[8:])
    return Block(low, high, byte, Boolean(True))


def block_scale(v: Float32, scale: GlobalScale, target: Target) -> tuple[Uint32, Float32]:
    """The E4M3 byte of a block with largest magnitude v (no NaN), and the multiplier o of its values."""
    wanted = arith.maximum(arith.mul(v, scale.enc_sixth, target), Float32(0.0), target)
    byte = convert.encode_e4m3(wanted, target)
    o = arith.reciprocal(arith.mul(convert.decode_e4m3(byte, target), scale.dec, target), target)
    o = arith.minimum(o, number(Uint32(_FLT_MAX)), target)
    return byte, arith.select(byte == 0, Float32(0.0), o)


def pack_codes(codes: Sequence[Uint32]) -> Uint32:
    """Eight codes, one per nibble, the first lowest."""
    return functools.reduce(lambda word, code: (word << 4) + code, reversed(codes))


def _sixth(enc: Float32, target: Target) -> Float32:
    return arith.mul(enc, number(Uint32(_SIXTH)), target)


def _join_bytes(pairs: Sequence[Uint32], target: Target) -> Uint32:
    low, high = (arith.permute(pairs[i], pairs[i + 1], 0x0040, target) for i in (0, 2))
    return arith.permute(low, high, 0x5410, target)


def _largest(words: Sequence[Uint32], dtype: type[Numeric], target: Target) -> Float32:
    """The largest magnitude, or NaN where there is one; on the CPU by bit patterns, where NaN is above infinity."""
    if target.host:
        magnitudes = [w & (0x7FFFFFFF if dtype is Float32 else 0x7FFF7FFF) for w in words]
        if dtype is Float32:
            return number(functools.reduce(lambda a, b: arith.select(a > b, a, b), magnitudes))
        both = functools.reduce(lambda a, b: arith.umax_halves(a, b, target), magnitudes)
        return values([arith.umax_halves(both, both >> 16, target)], dtype)[0]
    if dtype is Float32:
        text = "{.reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b;}"
        return _tree(lambda a, b: ptx(Float32, text, a, b), [number(w) for w in words])
    kind = "bf16x2" if dtype is BFloat16 else "f16x2"
    text = f"max.NaN.xorsign.abs.{kind} $0, $1, $2;"  # of magnitudes, with some sign
    pair = _tree(lambda a, b: ptx(Uint32, text, a, b), words)
    one = ptx(Uint32, text, pair, pair >> 16)
    return values([one & 0x7FFF], dtype)[0]


def _tree(function: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
    """Combines a power of two of values pair by pair, so that few operations wait for each other."""
    while len(values) > 1:
        values = [function(values[i], values[i + 1]) for i in range(0, len(values), 2)]
    return values[0]


def _largest_number(words: Sequence[Uint32], x: Sequence[Float32], dtype: type[Numeric], target: Target) -> Float32:
    """The largest magnitude, NaN left out; 0 where there is nothing else."""
    if target.host or dtype is Float32:
        magnitudes = [number(bits(value) & 0x7FFFFFFF) for value in x]
        return functools.reduce(lambda a, b: arith.maximum(a, b, target), magnitudes, Float32(0.0))
    kind = "bf16x2" if dtype is BFloat16 else "f16x2"
    text = f"max.{kind} $0, $1, $2;"
    both = functools.reduce(lambda a, w: ptx(Uint32, text, a, w & 0x7FFF7FFF), words, Uint32(0))
    one = ptx(Uint32, text, both, both >> 16)
    return values([one & 0xFFFF], dtype)[0]
