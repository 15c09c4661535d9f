"""Bulk copies into shared memory that complete on mbarriers, and wide accesses to it by its 32-bit addresses.

A ring of stages is a run of addresses: full[s] counts the bytes that arrived, empty[s] the warps that have read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Boolean, Float32, Int32, Int64, Numeric, Uint32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

from megamoe.cute import arith

BARRIER_BYTES = 8


def shared_address(pointer: cute.Pointer) -> Uint32:
    """The address of a place in shared memory."""
    return Uint32(llvm.ptrtoint(T.i32(), pointer.to_llvm_ptr()))


def global_address(tensor: cute.Tensor) -> Int64:
    """The address of a tensor in global memory."""
    return Int64(llvm.ptrtoint(T.i64(), tensor.iterator.to_llvm_ptr()))


def barrier_init(barrier: Uint32, count: int) -> None:
    """Makes an mbarrier that `count` arrivals complete; `fence_barriers` and a barrier of the CTA must follow."""
    _asm("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", barrier, Int32(count))


def fence_barriers() -> None:
    """Shows the initialised mbarriers to the copy engine."""
    _asm("fence.proxy.async.shared::cta;", "")


def barrier_expect(barrier: Uint32, size: Int32 | int) -> None:
    """One arrival, and `size` bytes more to come."""
    _asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r", barrier, Int32(size))


def barrier_arrive(barrier: Uint32) -> None:
    """One arrival; what this thread did before is seen by who waits."""
    _asm("mbarrier.arrive.shared::cta.b64 _, [$0];", "r", barrier)


def barrier_arrive_if(barrier: Uint32, condition: Boolean) -> None:
    """One arrival where the condition holds, without a branch."""
    text = "{.reg .pred p; setp.ne.s32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0];}"
    _asm(text, "r,r", barrier, arith.select(condition, Int32(1), Int32(0)))


def barrier_wait(barrier: Uint32, parity: Int32) -> None:
    """Waits until the phase of that parity is complete."""
    text = "{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra DONE; bra AGAIN; DONE: }"
    _asm(text, "r,r", barrier, parity)


def evict_first() -> Int64:
    """The cache policy of data that is read once."""
    return Int64(_results("createpolicy.fractional.L2::evict_first.b64 $0;", "=l", T.i64()))


def copy(slot: Uint32, source: Int64, size: Int32 | int, barrier: Uint32, policy: Int64) -> None:
    """Starts a copy of `size` bytes, a multiple of 16, from global to shared memory; one thread."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$0], [$1], $2, [$3], $4;"
    _asm(text, "r,l,r,r,l", slot, source, Int32(size), barrier, policy)


def named_barrier(number: int, threads: int) -> None:
    """A barrier of some whole warps of the CTA."""
    _asm(f"bar.sync {number}, {threads};", "")


def load4(address: Uint32) -> list[Uint32]:
    """16 bytes of shared memory."""
    return _words("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "r", 4, address)


def load4_floats(address: Uint32) -> list[Float32]:
    """Four fp32 of shared memory."""
    return [arith.number(word) for word in load4(address)]


def store4(address: Uint32, words: Sequence[Uint32]) -> None:
    """16 bytes to shared memory."""
    _asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", address, *words)


def store1(address: Uint32, value: Float32) -> None:
    """One fp32 to shared memory."""
    _asm("st.shared.f32 [$0], $1;", "r,f", address, value)


def load_global4(address: Int64) -> list[Uint32]:
    """16 bytes of global memory."""
    return _words("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "l", 4, address)


def load_global2(address: Int64) -> list[Uint32]:
    """8 bytes of global memory."""
    return _words("ld.global.v2.b32 {$0, $1}, [$2];", "l", 2, address)


def store_global4(address: Int64, words: Sequence[Uint32]) -> None:
    """16 bytes to global memory."""
    _asm("st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", address, *words)


def _words(text: str, constraint: str, count: int, address: Numeric) -> list[Uint32]:
    result = llvm.StructType.get_literal([T.i32()] * count)
    constraints = ",".join(["=r"] * count + [constraint])
    out = _results(text, constraints, result, address)
    place = [ir.DenseI64ArrayAttr.get([i]) for i in range(count)]
    return [Uint32(llvm.extractvalue(T.i32(), out, p)) for p in place]


def _results(text: str, constraints: str, result: Any, *operands: Numeric) -> Any:
    return llvm.inline_asm(
        result,
        [operand.ir_value() for operand in operands],
        text,
        f"{constraints},~{{memory}}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def _asm(text: str, constraints: str, *operands: Numeric) -> None:
    _results(text, constraints, None, *operands) if constraints else _plain(text)


def _plain(text: str) -> None:
    llvm.inline_asm(
        None,
        [],
        text,
        "~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
