"""Raw accesses by addresses: shared memory by its 32-bit ones, global memory by its 64-bit ones."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Int64, Numeric, Uint32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from megamoe.cute import arith

_LETTERS = {"Float32": "f", "Int64": "l"}


def copy16(source: Int64, slot: Int32) -> None:
    """Starts a copy of 16 bytes from global to shared memory; `wait_copies` ends it."""
    _asm("cp.async.cg.shared.global [$0], [$1], 16;", slot, source)


def wait_copies() -> None:
    """Waits for this thread's copies, which only this thread may rely on then."""
    _asm("cp.async.wait_all;")


def load16(at: Int64) -> list[Uint32]:
    """Four words of global memory."""
    return _words("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", 4, at)


def store_global(at: Int64, value: Float32) -> None:
    """One fp32 to global memory."""
    _asm("st.global.f32 [$0], $1;", at, value)


def load_floats(at: Int32, count: int) -> list[Float32]:
    """One fp32 or four of shared memory."""
    if count == 1:
        return [arith.number(word) for word in _words("ld.shared.b32 $0, [$1];", 1, at)]
    return [arith.number(word) for word in _words("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", count, at)]


def store_floats(at: Int32, values: Sequence[Float32]) -> None:
    """One fp32 or four to shared memory."""
    if len(values) == 1:
        _asm("st.shared.f32 [$0], $1;", at, *values)
    else:
        _asm("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", at, *values)


def store16(at: Int32, words: Sequence[Uint32]) -> None:
    """Four words to shared memory."""
    _asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", at, *words)


def address(pointer: cute.Pointer) -> Int32:
    """Of a place in shared memory."""
    return Int32(llvm.ptrtoint(Int32.mlir_type, pointer.to_llvm_ptr()))


def global_address(tensor: cute.Tensor) -> Int64:
    """Of a tensor in global memory."""
    return Int64(llvm.ptrtoint(Int64.mlir_type, tensor.iterator.to_llvm_ptr()))


def _words(text: str, count: int, at: Numeric) -> list[Uint32]:
    single = Uint32.mlir_type
    result = single if count == 1 else llvm.StructType.get_literal([single] * count)
    out = llvm.inline_asm(
        result,
        [at.ir_value()],
        text,
        ",".join(["=r"] * count + [_letter(at), "~{memory}"]),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    if count == 1:
        return [Uint32(out)]
    return [Uint32(llvm.extractvalue(single, out, ir.DenseI64ArrayAttr.get([i]))) for i in range(count)]


def _letter(operand: Numeric) -> str:
    return _LETTERS.get(type(operand).__name__, "r")


def _asm(text: str, *operands: Numeric) -> None:
    llvm.inline_asm(
        None,
        [operand.ir_value() for operand in operands],
        text,
        ",".join([*map(_letter, operands), "~{memory}"]),
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
