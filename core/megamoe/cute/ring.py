"""Raw addresses, bulk copies and mbarriers, by inline PTX: what a producer warp and its consumers say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Int32, Int64, Numeric, Uint32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

_LETTERS = {"Float32": "f", "Int64": "l"}


def address(pointer: cute.Pointer) -> Any:
    """Of a pointer: Int64 in global memory, Int32 in shared memory."""
    wide = pointer.memspace == cute.AddressSpace.gmem
    value = llvm.ptrtoint(T.i64() if wide else T.i32(), pointer.to_llvm_ptr())
    return Int64(value) if wide else Int32(value)


def init(barrier: Int32, arrivals: int) -> None:
    """Makes an mbarrier; `init_fence` shows it to the bulk copies."""
    _asm("mbarrier.init.shared::cta.b64 [$0], $1;", barrier, Int32(arrivals))


def init_fence() -> None:
    """After `init`, before anyone uses the mbarriers."""
    _asm("fence.mbarrier_init.release.cluster;")


def expect(barrier: Int32, size: Int32) -> None:
    """Arrives, and tells the mbarrier that `size` bytes of bulk copies belong to its phase."""
    _asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", barrier, size)


def arrive_if(barrier: Int32, condition: Int32) -> None:
    """Arrives from the threads whose condition is not 0; no branch."""
    _asm("{.reg .pred p; setp.ne.s32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0];}", barrier, condition)


def wait(barrier: Int32, parity: Int32) -> None:
    """Until the phase of that parity is complete."""
    text = "{.reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra D; bra L; D: }"
    _asm(text, barrier, parity)


def wait_if(barrier: Int32, parity: Int32, condition: Int32) -> None:
    """`wait` where the condition is not 0, the same in all threads of a warp."""
    text = (
        "{.reg .pred p; setp.eq.s32 p, $2, 0; @p bra D;"
        " L: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra D; bra L; D: }"
    )
    _asm(text, barrier, parity, condition)


def copy(source: Int64, target: Int32, size: Int32, barrier: Int32) -> None:
    """Copies from global to shared memory, all multiples of 16, and counts the bytes at the mbarrier."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$0], $2, [$3];"
    _asm(text, source, target, size, barrier)


def load16(at: Int32) -> list[Uint32]:
    """Four words of shared memory, in order with the waits round it."""
    out = _asm_result([Uint32] * 4, "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", at)
    return [Uint32(value) for value in out]


def load4(at: Int32) -> Int32:
    """A word of shared memory."""
    return Int32(_asm_result([Uint32], "ld.shared.b32 $0, [$1];", at)[0])


def store4(at: Int32, value: Numeric) -> None:
    """Writes a word of shared memory."""
    _asm("st.shared.b32 [$0], $1;", at, value)


def store_transposed(at: Int32, words: Sequence[Uint32]) -> None:
    """Writes four (8, 8) of 16 bits to shared memory, columns as rows: lane 8 i + r says where column r of i goes."""
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    _asm(text, at, *words)


def store_global16_if(at: Int64, words: Sequence[Uint32], condition: Int32) -> None:
    """Writes four words of global memory where the condition is not 0; no branch."""
    text = "{.reg .pred p; setp.ne.s32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4};}"
    _asm(text, at, *words, condition)


def store_global2_if(at: Int64, half: Uint32, condition: Int32) -> None:
    """Writes the low half of a word to global memory where the condition is not 0."""
    text = "{.reg .pred p; .reg .b16 h; setp.ne.s32 p, $2, 0; cvt.u16.u32 h, $1; @p st.global.b16 [$0], h;}"
    _asm(text, at, half, condition)


def store_global8(at: Int64, words: Sequence[Uint32]) -> None:
    """Writes two words of global memory."""
    _asm("st.global.v2.b32 [$0], {$1, $2};", at, *words)


def _letters(operands: tuple[Numeric, ...]) -> list[str]:
    return [_LETTERS.get(type(operand).__name__, "r") for operand in operands]


def _asm(text: str, *operands: Numeric) -> None:
    llvm.inline_asm(
        None,
        [operand.ir_value() for operand in operands],
        text,
        ",".join([*_letters(operands), "~{memory}"]),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def _asm_result(results: list[type[Numeric]], text: str, *operands: Numeric) -> list[Any]:
    types = [result.mlir_type for result in results]
    out = llvm.inline_asm(
        llvm.StructType.get_literal(types) if len(types) > 1 else types[0],
        [operand.ir_value() for operand in operands],
        text,
        ",".join(["=f" if result is Float32 else "=r" for result in results] + _letters(operands)),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    if len(types) == 1:
        return [out]
    return [llvm.extractvalue(t, out, ir.DenseI64ArrayAttr.get([i])) for i, t in enumerate(types)]
