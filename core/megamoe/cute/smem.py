"""Accesses to shared memory by its 32-bit addresses; those of a loop stay where they are written."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Boolean, Float32, Int32, Int64, Numeric, Uint32

from megamoe.cute import arith, asm


def load4(at: Int32 | Uint32) -> Int32:
    """A word."""
    out: Int32 = asm.value(Int32, "ld.shared.b32 $0, [$1];", at)
    return out


def load_bytes(at: Int32 | Uint32, count: int) -> Uint32:
    """1 or 2 bytes, zeros above them."""
    out: Uint32 = asm.value(Uint32, f"ld.shared.u{8 * count} $0, [$1];", at)
    return out


def load_words(at: Int32 | Uint32, count: int) -> list[Uint32]:
    """1, 2 or 4 words."""
    if count == 1:
        return [asm.value(Uint32, "ld.shared.b32 $0, [$1];", at)]
    names = ", ".join(f"${i}" for i in range(count))
    return asm.values([Uint32] * count, f"ld.shared.v{count}.b32 {{{names}}}, [${count}];", at)


def load16(at: Int32 | Uint32) -> list[Uint32]:
    """Four words."""
    return load_words(at, 4)


def load16_if(at: Int32, words: Sequence[Uint32], condition: Boolean | Int32) -> list[Uint32]:
    """Four words where the condition holds, else those given; no branch."""
    text = "{.reg .pred p; setp.ne.s32 p, $9, 0; @p ld.shared.v4.b32 {$0, $1, $2, $3}, [$8];}"
    return asm.values([Uint32] * 4, text, *words, at, asm.flag(condition), kept=4)


def load_floats(at: Int32 | Uint32, count: int) -> list[Float32]:
    """1, 2 or 4 fp32."""
    return [arith.number(word) for word in load_words(at, count)]


def load_address(at: Int32 | Uint32) -> Int64:
    """8 bytes."""
    out: Int64 = asm.value(Int64, "ld.shared.b64 $0, [$1];", at)
    return out


def store_address(at: Int32 | Uint32, address: Int64) -> None:
    """8 bytes."""
    asm.effect("st.shared.b64 [$0], $1;", at, address)


def store_low(at: Int32, word: Uint32, size: int) -> None:
    """The lowest 1 or 2 bytes of a word."""
    asm.effect(f"st.shared.u{8 * size} [$0], $1;", at, word)


def store4(at: Int32 | Uint32, value: Numeric) -> None:
    """A word, or an fp32."""
    asm.effect("st.shared.b32 [$0], $1;", at, value)


def store4_if(at: Int32, value: Numeric, condition: Boolean | Int32) -> None:
    """`store4` where the condition holds; no branch."""
    asm.effect("{.reg .pred p; setp.ne.s32 p, $2, 0; @p st.shared.b32 [$0], $1;}", at, value, asm.flag(condition))


def store8(at: Int32 | Uint32, words: Sequence[Numeric]) -> None:
    """Two words."""
    asm.effect("st.shared.v2.b32 [$0], {$1, $2};", at, *words)


def store16(at: Int32 | Uint32, words: Sequence[Numeric]) -> None:
    """Four words, or fp32."""
    asm.effect("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", at, *words)


def store_matrices(at: Int32, words: Sequence[Numeric]) -> None:
    """Four (8, 8) of 16 bits, placed as sums of `wgmma`; lane 8 i + r says where row r of the i-th goes."""
    asm.effect("stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", at, *words)


def store_transposed(at: Int32, words: Sequence[Uint32]) -> None:
    """Four (8, 8) of 16 bits, columns as rows: lane 8 i + r says where column r of the i-th goes."""
    asm.effect("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};", at, *words)


def proxy_fence() -> None:
    """Shows this thread's writes to shared memory to the tensor cores and the copy engine."""
    asm.effect("fence.proxy.async.shared::cta;")
