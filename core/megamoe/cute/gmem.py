"""Accesses to global memory by its 64-bit addresses; they stay where they are written."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Boolean, Float32, Int32, Int64, Numeric, Uint32, cute

from megamoe.cute import asm


def load8(at: Int64) -> list[Uint32]:
    """Two words."""
    return asm.values([Uint32] * 2, "ld.global.v2.b32 {$0, $1}, [$2];", at)


def load16(at: Int64) -> list[Uint32]:
    """Four words, as other CTAs left them."""
    return asm.values([Uint32] * 4, "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", at)


def ask(numbers: cute.Tensor, i: Int32) -> Float32:
    """One of some fp32, asked for here, though it may be needed much later."""
    out: Float32 = asm.value(Float32, "ld.global.f32 $0, [$1];", asm.address(numbers) + Int64(i) * 4)
    return out


def store2_if(at: Int64, half: Uint32, condition: Boolean | Int32) -> None:
    """The low half of a word where the condition holds."""
    text = "{.reg .pred p; .reg .b16 h; setp.ne.s32 p, $2, 0; cvt.u16.u32 h, $1; @p st.global.b16 [$0], h;}"
    asm.effect(text, at, half, asm.flag(condition))


def store4(at: Int64, value: Numeric) -> None:
    """A word, or an fp32."""
    asm.effect("st.global.b32 [$0], $1;", at, value)


def store4_if(at: Int64, value: Numeric, condition: Boolean | Int32) -> None:
    """`store4` where the condition holds; no branch."""
    asm.effect("{.reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.b32 [$0], $1;}", at, value, asm.flag(condition))


def store8(at: Int64, words: Sequence[Uint32]) -> None:
    """Two words."""
    asm.effect("st.global.v2.b32 [$0], {$1, $2};", at, *words)


def store16(at: Int64, words: Sequence[Uint32]) -> None:
    """Four words."""
    asm.effect("st.global.v4.b32 [$0], {$1, $2, $3, $4};", at, *words)


def store16_if(at: Int64, words: Sequence[Uint32], condition: Boolean | Int32) -> None:
    """Four words where the condition holds; no branch, which the compiler would copy code for."""
    text = "{.reg .pred p; setp.ne.s32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4};}"
    asm.effect(text, at, *words, asm.flag(condition))


def count_round(at: Int64, last: Int32) -> Int32:
    """Counts up to `last`, then from 0 again; returns what was there, orders what this thread sees."""
    out: Int32 = asm.value(Int32, "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;", at, last)
    return out


def prefetch(at: Int64, condition: Boolean | Int32) -> None:
    """Asks for the 128 bytes round an address to come into L2 where the condition holds."""
    asm.effect("{.reg .pred p; setp.ne.s32 p, $1, 0; @p prefetch.global.L2 [$0];}", at, asm.flag(condition))
