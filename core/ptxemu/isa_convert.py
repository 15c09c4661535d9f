"""The instruction table, part two: cvt, PTX ISA 9.7.9.21."""

from __future__ import annotations

from ptxemu.instruction import Operand, Register
from ptxemu.isa import FTZ, RELU, RNA, ROUNDING, SAT, SATFINITE
from ptxemu.lowering import Form, Native, rule, width_of

# kinds of operand, as in native/convert.c
_PLAIN_NAMES = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64")
_PLAIN = {name: k for k, name in enumerate(_PLAIN_NAMES)}
_SMALL = {name: k for k, name in enumerate(["e4m3x2", "e5m2x2", "e2m3x2", "e3m2x2", "e2m1x2"])}
_TO_INTEGER = 1 << 15
_DIRECT = {
    ("u32", "u16"),
    ("u16", "u32"),
    ("u64", "u32"),
    ("u32", "u64"),
    ("s64", "s32"),
    ("s32", "s16"),
    ("f32", "bf16"),
    ("f32", "f16"),
}
_TO_INTEGRAL = {f"{name}i": value for name, value in ROUNDING.items()}


@rule("cvt", "9.7.9.21")
def _convert(form: Form) -> Native:
    source, result = form.type(), form.type()
    if result in _SMALL:
        return _to_small(form, result, source)
    if result == "ue8m0x2":
        return _to_powers(form, source)
    if source in _SMALL or source == "ue8m0x2":
        return _from_small(form, result, source)
    if result in {"f16x2", "bf16x2"}:
        flags = _flags(form) | (1 << 16 if result == "bf16x2" else 0)
        d, a, b = form.operands
        return Native("cvt_pair_f32", (form.destination(d, 4), form.place(a, 4), form.place(b, 4)), flags)
    if result == "tf32":
        d, a = form.operands
        return Native("cvt_tf32_f32", (form.destination(d, 4), form.place(a, 4)), _flags(form))
    return _plain(form, result, source)


def _flags(form: Form) -> int:
    flags = ROUNDING[form.one_of(ROUNDING, "rn")] | form.flag("relu", RELU) | form.flag("satfinite", SATFINITE)
    return flags | form.flag("rna", RNA)


def _plain(form: Form, result: str, source: str) -> Native:
    d, a = form.operands
    if source not in _PLAIN or result not in _PLAIN:
        raise form.unsupported(f"from {source} to {result}")
    integral = form.one_of(_TO_INTEGRAL, "")
    flags = _TO_INTEGER | _TO_INTEGRAL[integral] if integral else ROUNDING[form.one_of(ROUNDING, "rn")]
    flags |= form.flag("ftz", FTZ) | form.flag("sat", SAT) | form.flag("relu", RELU) | form.flag("satfinite", SATFINITE)
    to, room = form.destination(d, width_of(result), wider=True), _room(d, width_of(result))
    place, width = form.place(a, width_of(source), wider=True), _room(a, width_of(source))
    exact = (room, width) == (width_of(result), width_of(source))
    if exact and not flags and (result, source) in _DIRECT:
        return Native(f"cvt_{result}_{source}", (to, place))
    return Native("cvt", (to, place), flags | _PLAIN[source] << 16 | _PLAIN[result] << 20, width | room << 4)


def _room(operand: Operand, width: int) -> int:
    """Bytes from one lane to the next."""
    return operand.width if isinstance(operand, Register) else width


def _to_small(form: Form, result: str, source: str) -> Native:
    flags = _flags(form) | _SMALL[result] << 16
    sources = {"f32": 0, "f16x2": 1, "bf16x2": 2}
    if source not in sources:
        raise form.unsupported(f"from {source} to {result}")
    form.count(3 if source == "f32" else 2)
    d, *values = form.operands
    places = (form.destination(d, 2), *(form.place(value, 4) for value in values))
    return Native("cvt_small", places, flags | sources[source] << 20)


def _to_powers(form: Form, source: str) -> Native:
    packed = source == "bf16x2"
    form.count(2 if packed else 3)
    flags = ROUNDING[form.one_of(("rz", "rp"))] | form.flag("satfinite", SATFINITE)
    d, *values = form.operands
    places = (form.destination(d, 2), *(form.place(value, 4) for value in values))
    return Native("cvt_ue8m0x2", places, flags | int(packed) << 20)


def _from_small(form: Form, result: str, source: str) -> Native:
    form.one_of(("rn",))
    d, a = form.operands
    places = (form.destination(d, 4), form.place(a, 2))
    if source == "ue8m0x2" and result == "bf16x2":
        return Native("cvt_bf16x2_ue8m0x2", places)
    if source not in _SMALL or result != "f16x2":
        raise form.unsupported(f"from {source} to {result}")
    return Native("cvt_f16x2_small", places, form.flag("relu", RELU) | _SMALL[source] << 16)
