"""Copies of single threads into shared memory that complete on mbarriers."""

from __future__ import annotations

from cutlass import Int32
from cutlass._mlir.dialects import llvm


def arrive_behind(barrier: Int32) -> None:
    """Arrives, one of the arrivals that the mbarrier was made for, once the copies this thread started are done."""
    llvm.inline_asm(
        None,
        [barrier.ir_value()],
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
        "r,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
