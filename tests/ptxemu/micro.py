"""Kernels of one instruction, run over arrays of operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ptxemu
from ptxemu.report import Report

HEADER = ".version 8.8\n.target sm_100a\n.address_size 64\n"
WIDTH = {"8": 8, "16": 16, "32": 32, "64": 64}


def register(kind: str) -> str:
    """The untyped register type that a type's values lie in."""
    bits = {"f16x2": 32, "bf16x2": 32, "f32x2": 64, "u16x2": 32, "s16x2": 32}.get(kind) or int(kind.lstrip("bfsuw"))
    return f"b{bits}"


def kernel(body: str, parameters: Sequence[str] = (".u64 x", ".u64 y"), declarations: str = "", block: int = 32) -> str:
    """PTX of a kernel: pred %p, 16-, 32- and 64-bit registers %h, %r, %d are declared, 40 of each."""
    listed = ", ".join(f".param {p}" for p in parameters)
    registers = ".reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<40>; .reg .b64 %d<40>;"
    head = f"{HEADER}{declarations}\n.visible .entry k({listed})\n.reqntid {block}, 1, 1"
    return f"{head}\n{{\n{registers}\n{body}\nret;\n}}\n"


def apply(instruction: str, result: str, *operands: tuple[str, NDArray[Any]]) -> NDArray[Any]:
    """Runs `instruction`, in which d is the destination and a, b, c, e are the sources, over arrays of equal length.

    Args:
        instruction: "add.s32 d, a, b".
        result: Type of the destination, "b32".
        operands: Type and values of each source.

    Returns:
        The unsigned words of the results.
    """
    count = operands[0][1].size
    names = "abce"
    lines = [f".reg .{result} d;", "ld.param.u64 %d1, [out];", "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;"]
    lines += ["mad.lo.u32 %r3, %r2, 32, %r1;", f"setp.ge.u32 %p1, %r3, {count}; @%p1 bra END;"]
    for name, (kind, values) in zip(names, operands, strict=False):
        if kind == "pred":
            lines += [
                f".reg .pred {name}; .reg .b16 {name}w;",
                f"ld.param.u64 %d2, [p{name}]; mul.wide.u32 %d3, %r3, 2;",
            ]
            lines += [f"add.s64 %d2, %d2, %d3; ld.global.b16 {name}w, [%d2]; setp.ne.b16 {name}, {name}w, 0;"]
            continue
        lines += [f".reg .{kind} {name};", f"ld.param.u64 %d2, [p{name}]; mul.wide.u32 %d3, %r3, {values.itemsize};"]
        lines += [f"add.s64 %d2, %d2, %d3; ld.global.b{8 * values.itemsize} {name}, [%d2];"]
    lines.append(instruction if instruction.endswith(";") else instruction + ";")
    size = 2 if result == "pred" else int(result[1:]) // 8
    lines += [f"mul.wide.u32 %d3, %r3, {size}; add.s64 %d1, %d1, %d3;"]
    if result == "pred":
        lines += ["selp.b16 %h1, 1, 0, d; st.global.b16 [%d1], %h1;"]
    else:
        lines += [f"st.global.b{8 * size} [%d1], d;"]
    text = kernel(
        "\n".join([*lines, "END:"]), [*(f".u64 p{n}" for n, _ in zip(names, operands, strict=False)), ".u64 out"]
    )
    out = np.zeros(count, f"u{size}")
    arrays = [np.ascontiguousarray(v.astype(np.uint16) if k == "pred" else v) for k, v in operands]
    report = ptxemu.emulate(text, -(-count // 32), [*arrays, out])
    report.raise_for_findings()
    return out


def run(body: str, *args: np.ndarray | int | float | bytes, **options: object) -> Report:
    """Emulates a kernel of one CTA whose parameters are p0, p1, …: pointers for arrays, else 32-bit numbers."""
    declarations, block = str(options.pop("declarations", "")), int(str(options.pop("block", 32)))
    grid = options.pop("grid", 1)
    parameters = [f".u64 p{k}" if isinstance(a, np.ndarray) else f".u32 p{k}" for k, a in enumerate(args)]
    return ptxemu.emulate(kernel(body, parameters, declarations, block), grid, args, **options)  # type: ignore[arg-type]
