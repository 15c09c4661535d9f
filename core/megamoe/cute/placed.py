"""Accesses that stay where they are written, besides those of `ring`."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from megamoe.cute import ring


def count_round(at: Int64, last: Int32) -> Int32:
    """Counts in global memory up to `last`, then from 0 again; returns what was there, orders what this thread sees."""
    out = llvm.inline_asm(
        Int32.mlir_type,
        [at.ir_value(), last.ir_value()],
        "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
        "=r,l,r,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return Int32(out)


def load16_if(at: Int32, words: Sequence[Uint32], condition: Int32) -> list[Uint32]:
    """Four words of shared memory where the condition is not 0, else those given; no branch."""
    word = Uint32.mlir_type
    out = llvm.inline_asm(
        llvm.StructType.get_literal([word] * 4),
        [operand.ir_value() for operand in (*words, at, condition)],
        "{.reg .pred p; setp.ne.s32 p, $9, 0; @p ld.shared.v4.b32 {$0, $1, $2, $3}, [$8];}",
        "=r,=r,=r,=r,0,1,2,3,r,r,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return [Uint32(llvm.extractvalue(word, out, ir.DenseI64ArrayAttr.get([i]))) for i in range(4)]


def ask(numbers: cute.Tensor, i: Int32) -> Float32:
    """One of some fp32 in global memory, asked for here, though it may be needed much later."""
    out = llvm.inline_asm(
        Float32.mlir_type,
        [(ring.address(numbers.iterator) + Int64(i) * 4).ir_value()],
        "ld.global.f32 $0, [$1];",
        "=f,l,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return Float32(out)
