"""Moving data without waiting for it: between the CTAs of a cluster, from memory to shared memory, and into L2."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass import Boolean, Float32, Int32, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

from megamoe.cute import arith


def send(values: Sequence[Float32], slot: cute.Pointer, arrived: cute.Pointer, rank: Int32) -> None:
    """Writes 16 bytes at `slot` of another CTA's shared memory and counts them at its mbarrier `arrived`.

    Args:
        values: Four numbers to send.
        slot: Address in this CTA's shared memory of the same place, a multiple of 16.
        arrived: Address in this CTA of the same mbarrier; whoever waits there has told it how many bytes to expect.
        rank: Of the CTA in the cluster, the sender's own too.
    """
    text = (
        "{.reg .b32 to, bar; mapa.shared::cluster.u32 to, $0, $6; mapa.shared::cluster.u32 bar, $1, $6;"
        " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {$2, $3, $4, $5}, [bar];}"
    )
    _asm(text, "r,r,r,r,r,r,r", slot, arrived, *(value.bitcast(Int32) for value in values), rank)


def expect(arrived: cute.Pointer, size: int, leader: Boolean) -> None:
    """Tells the mbarrier, from the thread that is `leader`, that `size` bytes complete its phase; no branch."""
    text = "{.reg .pred p; setp.ne.s32 p, $2, 0; @p mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;}"
    _asm(text, "r,r,r", arrived, Int32(size), arith.select(leader, Int32(1), Int32(0)))


def copy16(source: cute.Pointer, slot: cute.Pointer, valid: Boolean) -> None:
    """Copies 16 bytes from global to shared memory, or zeros where not `valid`; `wait_copies` waits for it."""
    size = arith.select(valid, Int32(16), Int32(0))
    _asm("cp.async.cg.shared.global [$0], [$1], 16, $2;", "r,l,r", slot, source, size)


def wait_copies() -> None:
    """Waits for this thread's copies; a barrier then shows them to the other threads."""
    _asm("cp.async.wait_all;", "")


def prefetch(source: cute.Pointer, valid: Boolean) -> None:
    """Asks for the 128 bytes round an address of global memory to come into L2 where `valid`."""
    text = "{.reg .pred p; setp.ne.s32 p, $1, 0; @p prefetch.global.L2 [$0];}"
    _asm(text, "l,r", source, arith.select(valid, Int32(1), Int32(0)))


def store16(target: cute.Pointer, words: Sequence[Uint32], valid: Boolean) -> None:
    """Writes four words to global memory where `valid`, without a branch, which the compiler would copy code for."""
    text = "{.reg .pred p; setp.ne.s32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4};}"
    _asm(text, "l,r,r,r,r,r", target, *words, arith.select(valid, Int32(1), Int32(0)))


def _asm(text: str, constraints: str, *operands: cute.Pointer | Int32 | Uint32) -> None:
    values = [op.ir_value() if isinstance(op, Int32 | Uint32) else _address(op) for op in operands]
    llvm.inline_asm(
        None,
        values,
        text,
        f"{constraints},~{{memory}}" if constraints else "~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def _address(pointer: cute.Pointer) -> object:
    wide = pointer.memspace == cute.AddressSpace.gmem
    return llvm.ptrtoint(T.i64() if wide else T.i32(), pointer.to_llvm_ptr())
