"""Inline PTX: where the text of an instruction meets its operands.

Every wrapper of an instruction goes through here. What has effects stays where it is written among all that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Boolean, Int32, Int64, Numeric, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, select_

_LETTERS = {"Float32": "f", "Int64": "l", "Uint64": "l"}  # of the others, all of 32 bits: "r"


def address(place: cute.Pointer | cute.Tensor) -> Any:
    """Of a pointer, or of a tensor's first element: Int64 in global memory, Int32 in shared memory."""
    pointer = place.iterator if isinstance(place, cute.Tensor) else place
    wide = pointer.memspace == cute.AddressSpace.gmem
    value = llvm.ptrtoint(T.i64() if wide else T.i32(), pointer.to_llvm_ptr())
    return Int64(value) if wide else Int32(value)


def flag(condition: Boolean | Int32) -> Int32:
    """A condition as an operand: what is not 0 holds."""
    return Int32(select_(condition, Int32(1), Int32(0))) if isinstance(condition, Boolean) else condition


def effect(text: str, *operands: Numeric) -> None:
    """An instruction, or some, without a result; $0 and on are the operands."""
    _inline(None, text, [], operands, effects=True)


def value(kind: type[Numeric], text: str, *operands: Numeric, effects: bool = True) -> Any:
    """An instruction with one result, $0; $1 and on are the operands."""
    return kind(_inline(kind.mlir_type, text, [f"={_letter(kind)}"], operands, effects))


def values(
    kinds: Sequence[type[Numeric]],
    text: str,
    *operands: Numeric,
    kept: int = 0,
    early: bool = False,
    effects: bool = True,
) -> list[Any]:
    """An instruction with several results, $0 and on; the operands follow.

    Args:
        kinds: Types of the results.
        text: Of the instruction.
        operands: Its operands.
        kept: Of the operands that many, the first, are the registers of the first results: read and written.
        early: Results are written before the operands have been read.
        effects: False where only the results matter.
    """
    result = llvm.StructType.get_literal([kind.mlir_type for kind in kinds])
    mark = "=&" if early else "="
    out = _inline(result, text, [f"{mark}{_letter(kind)}" for kind in kinds], operands, effects, kept)
    places = [ir.DenseI64ArrayAttr.get([i]) for i in range(len(kinds))]
    return [kind(llvm.extractvalue(kind.mlir_type, out, at)) for kind, at in zip(kinds, places, strict=True)]


def _letter(kind: type[Numeric]) -> str:
    return _LETTERS.get(kind.__name__, "r")


def _inline(
    result: Any, text: str, results: list[str], operands: Sequence[Numeric], effects: bool, kept: int = 0
) -> Any:
    letters = [str(i) if i < kept else _letter(type(operand)) for i, operand in enumerate(operands)]
    memory = ["~{memory}"] if effects else []
    return llvm.inline_asm(
        result,
        [operand.ir_value() for operand in operands],
        text,
        ",".join([*results, *letters, *memory]),
        has_side_effects=effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
