"""Micro-kernels of scalar, warp and memory instructions: rows of one result each, many rows to a kernel.

A row is PTX text; {d32} stands for its destination, {a32} {b32} {c32} for the sources of that width. Predicates %pa and
%pb, a private 32-byte cell in global (%cell) and shared memory (%scell) and a private barrier (%sbar) exist.
"""

# ruff: noqa: E501  (a row of PTX is one line)

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tests.ptxemu.truth.micro import HEAD, Micro

LANES, WARPS = 32, 10
COUNT = LANES * WARPS
_ROWS_A_KERNEL = 40
_EDGES = {
    16: (0, 0x8000, 1, 0x3FF, 0x400, 0x3C00, 0x3F80, 0x7BFF, 0x7F7F, 0x7C00, 0x7F80, 0x7E00, 0x7FC1, 0xFC00, 0xFFFF),
    32: (
        *(0, 1 << 31, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800001, 0x7F7FFFFF, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0xFFC12345, 0x7F800001, 0x33000001, 0x3F000000, 0x40200000, 0x4B000001, 0x477FF000, 0x4F000000),
        *(0xCF000000, 0x5F000000, 0x43E00000, 0x43E80000, 0x7FFFFFFF, 0xFFFFFFFF, 31, 32, 33, 63, 64, 65, 255, 256),
    ),
    64: (
        *(0, 1 << 63, 1, (1 << 52) - 1, 1 << 52, 0x3FF0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000),
        *(0xFFF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001, 0x36A0000000000001, 0x47EFFFFFF0000000),
        *((1 << 63) - 1, (1 << 64) - 1, 31, 32, 64, 65, 0x41E0000000000000, 0x43E0000000000000),
    ),
}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def pool(width: int) -> NDArray[np.unsignedinteger]:
    """Sources a, b and c of a width, (3, COUNT): the edges against each other, numbers of ordinary size, any bits."""
    rng = np.random.default_rng(width)
    kind = np.dtype(f"u{width // 8}")
    edges = np.array(_EDGES[width], np.uint64).astype(kind)
    out = rng.integers(0, (1 << width) - 1, (3, COUNT), np.uint64, endpoint=True).astype(kind)
    ordinary = (rng.normal(size=(3, 96)) * 4).astype(f"f{width // 8}").view(kind)
    for k in range(3):
        out[k, :128] = np.resize(rng.permutation(edges), 128)
        out[k, 128:224] = ordinary[k]
    return out


def _size(kind: str) -> int:
    if kind.endswith("x2"):
        return 2 * _size(kind[:-2])
    return int(kind.lstrip("bfsu"))


def _simple(name: str, kind: str, sources: int = 2, result: int = 0) -> str:
    w = _size(kind)
    operands = ", ".join(f"{{{x}{w}}}" for x in "abc"[:sources])
    return f"{name}.{kind} {{d{result or w}}}, {operands};"


def integers() -> Iterator[str]:
    """Integer arithmetic and logic, PTX ISA 9.7.1, 9.7.2, 9.7.8."""
    for kind in INTEGERS:
        for name in ("add", "sub", "mul.lo", "mul.hi", "div", "rem", "min", "max"):
            row = _simple(name, kind)
            w = _size(kind)
            if name in {"div", "rem"}:  # a divisor of zero has no defined quotient
                row = f"or.b{w} {{b{w}}}, {{b{w}}}, 1; " + row
            yield row
        yield _simple("mad.lo", kind, 3)
        yield _simple("mad.hi", kind, 3)
        yield _simple("sad", kind, 3)
        if _size(kind) < 64:
            w = _size(kind)
            yield f"mul.wide.{kind} {{d{2 * w}}}, {{a{w}}}, {{b{w}}};"
            yield f"mad.wide.{kind} {{d{2 * w}}}, {{a{w}}}, {{b{w}}}, {{c{2 * w}}};"
        if kind[0] == "s":
            yield _simple("neg", kind, 1)
            yield _simple("abs", kind, 1)
        w = _size(kind)
        yield f"shr.{kind} {{d{w}}}, {{a{w}}}, {{b32}};"
    for name in ("add.sat", "sub.sat"):
        yield _simple(name, "s32")
    yield "mad.hi.sat.s32 {d32}, {a32}, {b32}, {c32};"
    for kind in ("u32", "s32"):
        yield f"mul24.lo.{kind} {{d32}}, {{a32}}, {{b32}};"
        yield f"mul24.hi.{kind} {{d32}}, {{a32}}, {{b32}};"
        yield f"mad24.lo.{kind} {{d32}}, {{a32}}, {{b32}}, {{c32}};"
        for other in ("u32", "s32"):
            yield f"dp4a.{kind}.{other} {{d32}}, {{a32}}, {{b32}}, {{c32}};"
            yield f"dp2a.lo.{kind}.{other} {{d32}}, {{a32}}, {{b32}}, {{c32}};"
            yield f"dp2a.hi.{kind}.{other} {{d32}}, {{a32}}, {{b32}}, {{c32}};"
        yield f"szext.clamp.{kind} {{d32}}, {{a32}}, {{b32}};"
        yield f"szext.wrap.{kind} {{d32}}, {{a32}}, {{b32}};"
    yield "bmsk.clamp.b32 {d32}, {a32}, {b32};"
    yield "bmsk.wrap.b32 {d32}, {a32}, {b32};"
    for w in (16, 32, 64):
        for name in ("and", "or", "xor"):
            yield _simple(name, f"b{w}")
        yield _simple("not", f"b{w}", 1)
        yield _simple("cnot", f"b{w}", 1)
        yield f"shl.b{w} {{d{w}}}, {{a{w}}}, {{b32}};"
    for kind in ("u32", "s32", "u64", "s64"):
        w = _size(kind)
        yield f"bfind.{kind} {{d32}}, {{a{w}}};"
        yield f"bfind.shiftamt.{kind} {{d32}}, {{a{w}}};"
        yield f"bfe.{kind} {{d{w}}}, {{a{w}}}, {{b32}}, {{c32}};"
    for w in (32, 64):
        yield f"popc.b{w} {{d32}}, {{a{w}}};"
        yield f"clz.b{w} {{d32}}, {{a{w}}};"
        yield f"brev.b{w} {{d{w}}}, {{a{w}}};"
        yield f"bfi.b{w} {{d{w}}}, {{a{w}}}, {{b{w}}}, {{b32}}, {{c32}};"
    yield "and.b32 {b32}, {b32}, 31; or.b32 {c32}, {c32}, 1; fns.b32 {d32}, {a32}, {b32}, {c32};"
    for table in (0x96, 0xE8, 0xCA, 0x01):
        yield f"lop3.b32 {{d32}}, {{a32}}, {{b32}}, {{c32}}, {table};"
    for side in "lr":
        for mode in ("clamp", "wrap"):
            yield f"shf.{side}.{mode}.b32 {{d32}}, {{a32}}, {{b32}}, {{c32}};"
    yield "prmt.b32 {d32}, {a32}, {b32}, {c32};"
    for first, second in (("add.cc", "addc"), ("sub.cc", "subc")):
        yield f"{first}.u32 {{d32}}, {{a32}}, {{b32}}; {second}.u32 {{d32}}, {{b32}}, {{c32}};"
        yield f"{first}.u64 {{d64}}, {{a64}}, {{b64}}; {second}.u64 {{d64}}, {{b64}}, {{c64}};"
    yield "mad.lo.cc.u32 {d32}, {a32}, {b32}, {c32}; madc.hi.u32 {d32}, {a32}, {b32}, {c32};"
    yield "mov.b64 {d64}, {{{a32}, {b32}}};"
    yield "mov.b32 {{{c16}, {d16}}}, {a32};"
    for w in (16, 32, 64):
        yield f"mov.b{w} {{d{w}}}, {{a{w}}};"


def permutes() -> Iterator[str]:
    """The modes of prmt, PTX ISA 9.7.9.7."""
    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        yield f"prmt.b32.{mode} {{d32}}, {{a32}}, {{b32}}, {{c32}};"


def floats() -> Iterator[str]:
    """Exactly defined floating-point arithmetic, PTX ISA 9.7.3, 9.7.4."""
    for kind in ("f32", "f64"):
        for mode in ("rn", "rz", "rm", "rp"):
            for name in ("add", "sub", "mul", "div"):
                yield _simple(f"{name}.{mode}", kind)
            yield _simple(f"fma.{mode}", kind, 3)
            yield _simple(f"rcp.{mode}", kind, 1)
            yield _simple(f"sqrt.{mode}", kind, 1)
        for name in ("min", "max"):
            yield _simple(name, kind)
        w = _size(kind)
        yield f"neg.{kind} {{d{w}}}, {{a{w}}};"
        yield f"abs.{kind} {{d{w}}}, {{a{w}}};"
        yield f"copysign.{kind} {{d{w}}}, {{a{w}}}, {{b{w}}};"
        for test in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
            yield f"testp.{test}.{kind} %p9, {{a{w}}}; selp.b32 {{d32}}, 1, 0, %p9;"
    for name in ("add.rn.ftz", "mul.rn.ftz", "add.sat", "mul.sat", "min.ftz", "max.ftz", "min.NaN", "max.NaN"):
        yield _simple(name, "f32")
    yield _simple("min.xorsign.abs", "f32")
    yield _simple("fma.rn.ftz.sat", "f32", 3)
    for kind in ("f16", "bf16", "f16x2", "bf16x2"):
        for name in ("add.rn", "sub.rn", "mul.rn", "min", "max", "min.NaN", "max.NaN", "max.xorsign.abs"):
            yield _simple(name, kind)
        for name in ("fma.rn", "fma.rn.relu"):
            yield _simple(name, kind, 3)
        yield _simple("neg", kind, 1)
        yield _simple("abs", kind, 1)
    for mode in ("rz", "rm", "rp"):
        for name in ("add", "sub", "mul"):
            yield _simple(f"{name}.{mode}.ftz", "f32")
        yield _simple(f"fma.{mode}.ftz", "f32", 3)
    for name in (
        "sub.rn.ftz.sat",
        "mul.rn.ftz.sat",
        "add.rz.sat",
        "min.ftz.NaN",
        "max.NaN.xorsign.abs",
        "div.rn.ftz",
        "div.rz.ftz",
    ):
        yield _simple(name, "f32")
    for name in ("neg.ftz", "abs.ftz", "rcp.rn.ftz", "sqrt.rn.ftz", "rcp.rz.ftz", "sqrt.rp.ftz"):
        yield _simple(name, "f32", 1)
    for kind in ("f16", "f16x2"):
        for name in ("add.ftz", "sub.ftz.sat", "mul.sat", "mul.ftz", "min.ftz", "max.ftz.NaN"):
            yield _simple(name, kind)
        for name in ("fma.rn.ftz", "fma.rn.sat", "fma.rn.ftz.relu"):
            yield _simple(name, kind, 3)
    for kind in ("u16x2", "s16x2"):
        for name in ("add", "min", "max"):
            yield _simple(name, kind)
    for kind in ("s32", "s16x2"):
        yield _simple("min.relu", kind)
        yield _simple("max.relu", kind)


def approximate() -> Iterator[str]:
    """Functions with an allowed error, on arguments of the pool."""
    for name in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh"):
        yield f"{name}.approx.f32 {{d32}}, {{a32}};"
    for name in ("ex2", "lg2", "rcp", "rsqrt", "sqrt"):
        yield f"{name}.approx.ftz.f32 {{d32}}, {{a32}};"
    for name in ("sin", "cos"):
        yield f"{name}.approx.f32 {{d32}}, {{a32}};"
        yield f"{name}.approx.ftz.f32 {{d32}}, {{a32}};"
    for name in ("div.approx", "div.approx.ftz", "div.full", "div.full.ftz"):
        yield _simple(name, "f32")
    for name in ("rcp.approx.ftz", "rsqrt.approx", "rsqrt.approx.ftz"):
        yield _simple(name, "f64", 1)
    for kind in ("f16", "f16x2"):
        yield _simple("ex2.approx", kind, 1)
        yield _simple("tanh.approx", kind, 1)
    for kind in ("bf16", "bf16x2"):
        yield _simple("ex2.approx.ftz", kind, 1)
        yield _simple("tanh.approx", kind, 1)


def comparisons() -> Iterator[str]:
    """setp, set, selp and slct, PTX ISA 9.7.6, 9.7.7."""
    for kind in (*INTEGERS, "f32", "f64", "f16", "bf16"):
        w = _size(kind)
        for name in (*COMPARISONS, *(UNORDERED if "f" in kind else ())):
            yield f"setp.{name}.{kind} %p9, {{a{w}}}, {{b{w}}}; selp.b32 {{d32}}, 1, 0, %p9;"
    for name in ("and", "or", "xor"):
        yield f"setp.lt.{name}.s32 %p9|%p8, {{a32}}, {{b32}}, %pa; selp.b32 {{d32}}, 1, 0, %p9; @%p8 add.u32 {{d32}}, {{d32}}, 2;"
        yield f"setp.geu.ftz.{name}.f32 %p9, {{a32}}, {{b32}}, !%pa; selp.b32 {{d32}}, 1, 0, %p9;"
        yield f"{name}.pred %p9, %pa, %pb; selp.b32 {{d32}}, 1, 0, %p9;"
    for kind in ("u32", "s32", "f32"):
        yield f"set.lt.{kind}.f32 {{d32}}, {{a32}}, {{b32}};"
        yield f"set.hi.{kind}.u32 {{d32}}, {{a32}}, {{b32}};"
    for kind in ("f16x2", "bf16x2"):
        for name in ("lt", "ne", "geu", "nan"):
            yield f"setp.{name}.{kind} %p9|%p8, {{a32}}, {{b32}}; selp.b32 {{d32}}, 1, 0, %p9; @%p8 add.u32 {{d32}}, {{d32}}, 2;"
    yield "setp.gt.ftz.f16x2 %p9|%p8, {a32}, {b32}; selp.b32 {d32}, 1, 0, %p9; @%p8 add.u32 {d32}, {d32}, 2;"
    for name in ("lo", "ls", "hi", "hs"):
        yield f"setp.{name}.u32 %p9, {{a32}}, {{b32}}; selp.b32 {{d32}}, 1, 0, %p9;"
    for w in (16, 32, 64):
        yield f"selp.b{w} {{d{w}}}, {{a{w}}}, {{b{w}}}, %pa;"
        yield f"slct.b{w}.s32 {{d{w}}}, {{a{w}}}, {{b{w}}}, {{c32}};"
        yield f"slct.b{w}.f32 {{d{w}}}, {{a{w}}}, {{b{w}}}, {{c32}};"


def _holds(result: str, source: str) -> bool:
    """Whether every integer of type source is one of type result."""
    wider = _size(result) > _size(source)
    return wider if result[0] == "s" else wider and source[0] == "u"


def conversions() -> Iterator[str]:
    """cvt, PTX ISA 9.7.9.21."""
    whole = {"u8": 16, "s8": 16} | {kind: _size(kind) for kind in INTEGERS}
    real = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
    for source, a in whole.items():
        for result, d in whole.items():
            if source != result:
                yield f"cvt.{result}.{source} {{d{d}}}, {{a{a}}};"
                if not _holds(result, source):  # else .sat is refused
                    yield f"cvt.sat.{result}.{source} {{d{d}}}, {{a{a}}};"
        for result, d in real.items():
            if result == "bf16" and source in {"u8", "s8"}:
                continue
            yield f"cvt.rn.{result}.{source} {{d{d}}}, {{a{a}}};"
        for mode in ("rz", "rm", "rp"):
            yield f"cvt.{mode}.f32.{source} {{d32}}, {{a{a}}};"
    for source, a in real.items():
        for result, d in whole.items():
            if source == "bf16" and result in {"u8", "s8"}:
                continue
            for mode in ("rni", "rzi", "rmi", "rpi"):
                yield f"cvt.{mode}.{result}.{source} {{d{d}}}, {{a{a}}};"
    for pair in ("f32.f16", "f32.bf16", "f64.f32", "f64.f16"):
        d, a = (_size(kind) for kind in pair.split("."))
        yield f"cvt.{pair} {{d{d}}}, {{a{a}}};"
    for mode in ("rn", "rz", "rm", "rp"):
        yield f"cvt.{mode}.f32.f64 {{d32}}, {{a64}};"
    for mode in ("rn", "rz"):
        for kind in ("f16", "bf16"):
            for relu in ("", ".relu"):
                yield f"cvt.{mode}{relu}.{kind}.f32 {{d16}}, {{a32}};"
                yield f"cvt.{mode}{relu}.{kind}x2.f32 {{d32}}, {{a32}}, {{b32}};"
    yield "cvt.rn.satfinite.f16.f32 {d16}, {a32};"
    for mode in ("rna", "rn", "rz", "rn.relu", "rz.relu"):
        yield f"cvt.{mode}.tf32.f32 {{d32}}, {{a32}};"
    for row in (
        "rni.ftz.s32",
        "rzi.ftz.u32",
        "rmi.ftz.s64",
        "rpi.ftz.sat.u64",
        "rni.ftz.f32",
        "rzi.ftz.sat.f32",
        "ftz.f32",
        "sat.ftz.f32",
        "rn.ftz.f16",
    ):
        yield f"cvt.{row}.f32 {{d{_size(row.split('.')[-1])}}}, {{a32}};"
    for row in ("f32.f16", "sat.f32.f16", "rn.ftz.sat.f32.f64", "rn.sat.f32.s32", "rn.sat.f16.f32"):
        yield f"cvt.{row} {{d{_size(row.split('.')[-2])}}}, {{a{_size(row.split('.')[-1])}}};"
    for mode in ("rni", "rzi", "rmi", "rpi"):
        yield f"cvt.{mode}.f16.f16 {{d16}}, {{a16}};"
        yield f"cvt.{mode}.f64.f64 {{d64}}, {{a64}};"
    yield "cvt.rn.bf16.f16 {d16}, {a16};"
    yield "cvt.rn.f16.bf16 {d16}, {a16};"
    yield "cvt.sat.f32.f32 {d32}, {a32};"
    for mode in ("rni", "rzi", "rmi", "rpi"):
        yield f"cvt.{mode}.f32.f32 {{d32}}, {{a32}};"
    for kind in ("e4m3x2", "e5m2x2"):
        for relu in ("", ".relu"):
            yield f"cvt.rn.satfinite{relu}.{kind}.f32 {{d16}}, {{a32}}, {{b32}};"
            yield f"cvt.rn.satfinite{relu}.{kind}.f16x2 {{d16}}, {{a32}};"
            yield f"cvt.rn{relu}.f16x2.{kind} {{d32}}, {{a16}};"


def exchanges() -> Iterator[str]:
    """Shuffles, votes, matches, reductions over a warp and barriers, PTX ISA 9.7.9.6, 9.7.13."""
    for mode, clamp in (("up", 0), ("down", 31), ("bfly", 31), ("idx", 31)):
        for by in (1, 5, 31, 33):
            for segment in (0, 0x1000, 0x1800):
                yield (
                    f"shfl.sync.{mode}.b32 {{d32}}|%p9, {{a32}}, {by}, {clamp | segment}, -1; "
                    "@%p9 xor.b32 {d32}, {d32}, 0x5a5a5a5a;"
                )
    for mode in ("all", "any", "uni"):
        yield f"vote.sync.{mode}.pred %p9, %pa, -1; selp.b32 {{d32}}, 1, 0, %p9;"
    yield "vote.sync.ballot.b32 {d32}, !%pa, -1;"
    yield "and.b32 {a32}, {a32}, 3; match.any.sync.b32 {d32}, {a32}, -1;"
    yield "and.b64 {a64}, {a64}, 3; match.any.sync.b64 {d32}, {a64}, -1;"
    yield "match.all.sync.b32 {d32}|%p9, {a32}, -1; @%p9 add.u32 {d32}, {d32}, 1;"
    for name in ("and", "or", "xor"):
        yield f"redux.sync.{name}.b32 {{d32}}, {{a32}}, -1;"
    for name in ("add", "min", "max"):
        yield f"redux.sync.{name}.u32 {{d32}}, {{a32}}, -1;"
        yield f"redux.sync.{name}.s32 {{d32}}, {{a32}}, -1;"
    yield "elect.sync {d32}|%p9, -1; @%p9 add.u32 {d32}, {d32}, 100;"
    yield "activemask.b32 {d32};"
    yield "bar.warp.sync -1; barrier.sync 1; bar.red.popc.u32 {d32}, 0, %pa;"
    for name in ("and", "or"):
        yield f"bar.red.{name}.pred %p9, 0, %pa; selp.b32 {{d32}}, 1, 0, %p9;"


def memory() -> Iterator[str]:
    """Loads and stores of every width, atomics and reductions, addresses, PTX ISA 9.7.9, 9.7.13."""
    for space, cell in (("global", "%cell"), ("shared", "%scell"), ("local", "%lcell")):
        yield f"st.{space}.b64 [{cell}], {{a64}}; ld.{space}.b64 {{d64}}, [{cell}];"
        for kind in ("u8", "s8", "u16", "s16"):
            yield f"st.{space}.b64 [{cell}], {{a64}}; ld.{space}.{kind} {{d32}}, [{cell}+2];"
        yield f"st.{space}.b64 [{cell}], {{a64}}; st.{space}.u8 [{cell}+1], {{b16}}; ld.{space}.b64 {{d64}}, [{cell}];"
        yield f"st.{space}.v4.b32 [{cell}], {{{{{{a32}}, {{b32}}, {{c32}}, {{a32}}}}}}; ld.{space}.v2.b64 {{{{_, {{d64}}}}}}, [{cell}];"
        yield f"st.{space}.v2.b16 [{cell}], {{{{{{a16}}, {{b16}}}}}}; ld.{space}.b32 {{d32}}, [{cell}];"
        yield f"cvta.{space}.u64 {{b64}}, {'%wide' if space == 'shared' else cell}; st.{space}.b64 [{cell}], {{a64}}; ld.b32 {{d32}}, [{{b64}}+4];"
    for space, cell in (("global", "%cell"), ("shared", "%scell")):
        for name, kinds in (
            ("add", "u32 s32 u64 f32 f64"),
            ("min", "u32 s32 u64 s64"),
            ("max", "u32 s32 u64 s64"),
            ("and", "b32 b64"),
            ("or", "b32 b64"),
            ("xor", "b32 b64"),
            ("inc", "u32"),
            ("dec", "u32"),
            ("exch", "b32 b64"),
        ):
            for kind in kinds.split():
                w = _size(kind)
                start, load = f"st.{space}.b{w} [{cell}], {{a{w}}};", f"ld.{space}.b{w} {{d{w}}}, [{cell}];"
                atom = f"atom.{space}.{name}.{kind} {{d{w}}}, [{cell}], {{b{w}}};"
                yield f"{start} {atom}"
                yield f"{start} {atom} {load}"
                if name != "exch":
                    yield f"{start} red.{space}.{name}.{kind} [{cell}], {{c{w}}}; {load}"
        for kind in ("f16", "bf16", "f16x2", "bf16x2"):
            w = _size(kind)
            yield (
                f"st.{space}.b{w} [{cell}], {{a{w}}}; atom.{space}.add.noftz.{kind} {{d{w}}}, [{cell}], {{b{w}}}; "
                f"ld.{space}.b{w} {{d{w}}}, [{cell}];"
            )
        for w in (16, 32, 64):
            yield (
                f"st.{space}.b{w} [{cell}], {{a{w}}}; atom.{space}.cas.b{w} {{d{w}}}, [{cell}], {{b{w}}}, {{c{w}}}; "
                f"ld.{space}.b{w} {{d{w}}}, [{cell}];"
            )


def vectors() -> Iterator[str]:
    """Vector atomics of floats and packed halves in global memory, PTX ISA 9.7.13.5."""
    start, load = "st.global.v2.b64 [%cell], {{{a64}, {b64}}};", "ld.global.v2.b64 {{_, {d64}}}, [%cell];"
    for kind, first in (("f32", "32"), ("f16x2", "32"), ("bf16x2", "32")):
        noftz = "" if kind == "f32" else ".noftz"
        four = f"{{{{{{b{first}}}, {{c{first}}}, {{a{first}}}, {{c{first}}}}}}}"
        yield f"{start} red.global.add{noftz}.v4.{kind} [%cell], {four}; {load}"
        yield f"{start} atom.global.add{noftz}.v4.{kind} {{{{_, {{d32}}, _, _}}}}, [%cell], {four};"
        yield f"{start} red.global.add{noftz}.v2.{kind} [%cell+8], {{{{{{a32}}, {{b32}}}}}}; {load}"
    for name in ("add", "min", "max"):
        for kind in ("f16x2", "bf16x2"):
            yield f"{start} red.global.{name}.noftz.v2.{kind} [%cell+8], {{{{{{a32}}, {{b32}}}}}}; {load}"
        for kind in ("f16", "bf16"):
            yield f"{start} red.global.{name}.noftz.v8.{kind} [%cell], {{{{{{a16}}, {{b16}}, {{c16}}, {{a16}}, {{a16}}, {{b16}}, {{c16}}, {{b16}}}}}}; {load}"


def barriers() -> Iterator[str]:
    """mbarrier: one of two arrivals, then the other, bytes, drops; the state itself is opaque, its readings are not."""
    start = "mbarrier.init.shared.b64 [%sbar], 3; "
    end = " mbarrier.inval.shared.b64 [%sbar];"
    arrive = "mbarrier.arrive.shared.b64 {a64}, [%sbar]; "
    test = "mbarrier.test_wait.parity.shared.b64 %p9, [%sbar], 0; selp.b32 {d32}, 1, 0, %p9;"
    yield start + arrive + "mbarrier.pending_count.b64 {d32}, {a64};" + end
    for count in (1, 2, 3):
        yield start + arrive * count + test + end
    yield start + arrive + "mbarrier.arrive.shared.b64 _, [%sbar], 2; " + test + end
    yield start + "mbarrier.arrive_drop.shared.b64 _, [%sbar]; " + arrive * 2 + test + end
    yield start + arrive * 3 + "mbarrier.test_wait.shared.b64 %p9, [%sbar], {a64}; selp.b32 {d32}, 1, 0, %p9;" + end
    yield start + "mbarrier.arrive.expect_tx.shared.b64 _, [%sbar], 64; " + arrive * 2 + test + end
    complete = "mbarrier.complete_tx.relaxed.cta.shared.b64 [%sbar], 64; "
    expect = "mbarrier.expect_tx.relaxed.cta.shared.b64 [%sbar], 64; "
    yield start + expect + arrive * 3 + complete + test + end


def _kernel(rows: list[str]) -> str:
    declared = " ".join(f".reg .b{w} %{x}{w}, %{x}o{w};" for w in (16, 32, 64) for x in "abcd")
    lines = [
        f"{HEAD}.visible .entry k(.param .u64 s16, .param .u64 s32, .param .u64 s64, .param .u64 cells, .param .u64 out)",
        f".reqntid {LANES}\n{{\n{declared} .reg .pred %p<10>, %pa, %pb; .reg .b32 %r<8>, %scell, %sbar;",
        ".reg .b64 %rd<8>, %cell, %lcell, %wide; .shared .align 16 .b8 smem[1024]; .shared .align 8 .b8 bars[256];",
        ".local .align 16 .b8 frame[32];",
        "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 32, %r1;",
    ]
    for w in (16, 32, 64):
        lines.append(f"ld.param.u64 %rd1, [s{w}]; mad.wide.u32 %rd1, %r3, {w // 8}, %rd1;")
        lines += [f"ld.global.b{w} %{x}o{w}, [%rd1+{k * COUNT * w // 8}];" for k, x in enumerate("abc")]
    lines.append("ld.param.u64 %cell, [cells]; mad.wide.u32 %cell, %r3, 32, %cell; mov.u64 %lcell, frame;")
    lines.append("mov.u32 %scell, smem; mad.lo.u32 %scell, %r1, 32, %scell; cvt.u64.u32 %wide, %scell;")
    lines.append("mov.u32 %sbar, bars; mad.lo.u32 %sbar, %r1, 8, %sbar;")
    lines.append("and.b32 %r4, %ao32, 1; setp.ne.u32 %pa, %r4, 0; and.b32 %r4, %bo32, 1; setp.ne.u32 %pb, %r4, 0;")
    lines.append("ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r3, 8, %rd2;")
    for k, row in enumerate(rows):
        used = sorted(set(re.findall(r"\{([abc])(16|32|64)\}", row)))
        lines += [f"mov.b{w} %{x}{w}, %{x}o{w};" for x, w in used]
        text = re.sub(r"\{([abcd])(16|32|64)\}", r"%\1\2", row).replace("{{", "{").replace("}}", "}")
        width = _result(row)
        lines += [text, f"st.global.b{width} [%rd2+{8 * COUNT * k}], %d{width};"]
    return "\n".join([*lines, "ret;", "}"]) + "\n"


def _result(row: str) -> int:
    return int(re.findall(r"\{d(16|32|64)\}", row)[-1])


def _arguments(rows: int) -> list[NDArray[np.generic]]:
    return [*(pool(w) for w in (16, 32, 64)), np.zeros((COUNT, 32), np.uint8), np.zeros((rows, COUNT), np.uint64)]


def kernels() -> Iterator[Micro]:
    """All scalar micro-kernels."""
    groups = (integers, permutes, floats, approximate, comparisons, conversions, exchanges, memory, vectors, barriers)
    for group in groups:
        rows = list(group())
        for first in range(0, len(rows), _ROWS_A_KERNEL):
            part = rows[first : first + _ROWS_A_KERNEL]
            yield Micro(
                name=f"{group.__name__}_{first // _ROWS_A_KERNEL}",
                ptx=_kernel(part),
                arguments=functools.partial(_arguments, len(part)),
                outputs=(4,),
                grid=WARPS,
                block=LANES,
                rows=tuple(part),
                group=group.__name__,
            )
