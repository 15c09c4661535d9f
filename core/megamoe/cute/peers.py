"""What CTAs of one launch tell each other: arrivals at the mbarriers of a cluster, and counts in global memory."""

from __future__ import annotations

from cutlass import Int32, Int64
from cutlass._mlir.dialects import llvm


def arrive_at_if(barrier: Int32, rank: Int32, condition: Int32) -> None:
    """Arrives at the same mbarrier of a CTA of the cluster, from the threads whose condition is not 0; no branch."""
    text = (
        "{.reg .pred p; .reg .b32 there; setp.ne.s32 p, $2, 0; @p mapa.shared::cluster.u32 there, $0, $1;"
        " @p mbarrier.arrive.shared::cluster.b64 _, [there];}"
    )
    llvm.inline_asm(
        None,
        [operand.ir_value() for operand in (barrier, rank, condition)],
        text,
        "r,r,r,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


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
