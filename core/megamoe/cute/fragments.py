"""From the `hopper` layout of `numerics.fragments` to operands of bf16 tensor cores, in registers.

Everything that comes out is exactly 2^-7 of E2M1 * E4M3 (`convert.DECODED_UNIT`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cutlass import Float32, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from megamoe.cute import arith, convert
from megamoe.cute.arith import Target

_VALUE = 0x81C081C0  # sign and magnitude of a decoded pair, as bf16 times 2^-126
_SCALE = 0x0FF00FF0  # S0E5M3 codes in a pair of bf16
_SCALE_BIAS = 0x70007000
_X_OF_Z = 0xC180C180
_OR, _AND_OR, _SELECT = 0xFC, 0xEA, 0xE4  # look-up tables of a | b, a & b | c, c ? a : b
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


class Masks(NamedTuple):
    """Two masks that `decode_pair` combines three words with: in one instruction each if the masks are registers.

    Attributes:
        scale: Of S0E5M3 codes in a pair of bf16.
        x_of_z: Of the bits of z that x holds.
    """

    scale: Uint32
    x_of_z: Uint32


MASKS = Masks(Uint32(_SCALE), Uint32(_X_OF_Z))


def masks(target: Target) -> Masks:
    """MASKS in registers: the compiler does not know them, or it would write constants into two instructions each."""
    zero = Uint32(arith.hidden_zero(target))
    scale, x_of_z = (_lop3(zero, Uint32(mask), Uint32(0), _OR, target) for mask in (_SCALE, _X_OF_Z))
    return Masks(scale, x_of_z)


def scale_pairs(word: Uint32, mask: Uint32, target: Target) -> tuple[Uint32, Uint32]:
    """The scales of rows g and g + 8 of a k32 group: bf16 pairs (block 0, block 1), times 2^119."""
    low, high = (_lop3(w, mask, Uint32(_SCALE_BIAS), _AND_OR, target) for w in (word, (word << 8) | (word >> 24)))
    return low, high


def decode_pair(x: Uint32, y: Uint32, scales: Uint32, target: Target, given: Masks = MASKS) -> list[Uint32]:
    """A lane's left operands of the two k16 steps of a k32 group.

    Args:
        x: First word of codes.
        y: Second word.
        scales: The word of scale codes.
        target: What to compile for.
        given: `masks` for a loop that decodes much.

    Returns:
        a0..a3 of the first step, then of the second: rows g, g + 8, g, g + 8 of m16k16.
    """
    low, high = scale_pairs(scales, given.scale, target)
    z = _lop3(x, y, given.x_of_z, _SELECT, target)
    first = (x << 6, x << 2, _rotate_right(x, 4), y << 4)
    second = (y, _rotate_right(y, 6), _rotate_right(z, 2), _rotate_right(z, 8))
    return [
        convert.mul_bf16x2(form & _word(_VALUE), high if i % 2 else low, target)
        for i, form in enumerate((*first, *second))
    ]


def _lop3(a: Uint32, b: Uint32, c: Uint32, table: int, target: Target) -> Uint32:
    """Any function of three bits, for each bit: `table` holds it at 4 a + 2 b + c: PTX lop3.b32."""
    if not target.host:
        return arith.ptx(Uint32, f"lop3.b32 $0, $1, $2, $3, {table};", a, b, c)
    out = Uint32(0)
    for place in range(8):
        if table >> place & 1:
            out = out | ((a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c))
    return out


def interleave(first: Sequence[Uint32], second: Sequence[Uint32], target: Target) -> list[Uint32]:
    """Two blocks of bf16, 2 n words of pairs in all, in slot order: word p holds element p of both.

    Args:
        first: Block 0, or the same part of it as `second` is of block 1; n words.
        second: Block 1.
        target: What to compile for.
    """
    pairs = zip(first, second, strict=True)
    return [arith.permute(a, b, part, target) for a, b in pairs for part in (0x5410, 0x7632)]


def activation_pairs(
    first: Sequence[Uint32], second: Sequence[Uint32], scales: tuple[Uint32, Uint32], target: Target
) -> list[Uint32]:
    """Two blocks of NVFP4 activations as 16 words in slot order, 2^-7 of E2M1 * E4M3.

    Args:
        first: The 8 bytes of codes of block 0.
        second: Of block 1.
        scales: Their E4M3 bytes, not NaN.
        target: What to compile for.
    """
    low, high = (convert.bf16_factor(scale, target) for scale in scales)
    factor = arith.permute(low, high, 0x5410, target)
    words: list[Uint32] = []
    for a, b in zip(first, second, strict=True):
        for half in (0x5410, 0x7632):
            codes = arith.permute(a, b, half, target)  # four codes of block 0 below four of block 1
            for i in range(4):
                top = codes << (12 - 4 * i) if i < 3 else codes
                spread = (top & _word(0x80008000)) | (top >> 6 & 0x01C001C0)
                words.append(convert.mul_bf16x2(spread, factor, target))
    return words


def operand_order(words: Sequence[Uint32]) -> list[list[Uint32]]:
    """16 words of a token in slot order, as the right operands of lanes t = 0..3: two steps of (b0, b1) each."""
    return [[words[t + 4 * i] for i in range(4)] for t in range(4)]


def mma(a: Sequence[Uint32], b: Sequence[Uint32], c: Sequence[Float32]) -> list[Float32]:
    """c + a b, one warp, of a (16, 16) and b (16, 8) bf16 and c (16, 8) fp32; (g, t) = (lane // 4, lane % 4).

    Args:
        a: A lane's (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its neighbour to the right.
        b: (2t, g), (2t + 8, g), each with the one below.
        c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).

    Returns:
        Placed as c.
    """
    out = llvm.inline_asm(
        llvm.StructType.get_literal([Float32.mlir_type] * 4),
        [operand.ir_value() for operand in (*a, *b, *c)],
        _MMA,
        ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4),
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    place = [ir.DenseI64ArrayAttr.get([i]) for i in range(4)]
    return [Float32(llvm.extractvalue(Float32.mlir_type, out, p)) for p in place]


def _rotate_right(word: Uint32, by: int) -> Uint32:
    return (word >> by) | (word << (32 - by))


def _word(pattern: int) -> Uint32:
    return Uint32(pattern & 0xFFFFFFFF)
