"""The instruction table, part one: integer, logic, floating-point and comparison instructions.

Each rule checks an opcode's modifiers and types and names the native operation; sections are those of the PTX ISA 8.8.
"""

from __future__ import annotations

from ptxemu.lowering import SINK, Form, Native, rule, width_of

INTEGERS = "u16 s16 u32 s32 u64 s64"
BITS = "b16 b32 b64"
HALVES = "f16 bf16 f16x2 bf16x2"
# flags of the floating-point operations, as in native/real.h and native/half.c
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3}
FTZ, SAT, PROPAGATE_NAN, XORSIGN, ABS, RELU, SATFINITE, RNA = 4, 8, 16, 32, 64, 128, 256, 512
_BF, _PAIR = 1 << 16, 1 << 17
# flags of comparisons, as in native/compare.h
_COMPARISON_NAMES = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_COMPARISONS = {name: k for k, name in enumerate(_COMPARISON_NAMES)}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE = {"and": 32, "or": 64, "xor": 96}
_COMPARE_FTZ, _COMBINE_NEGATED, _SET_FLOAT = 16, 128, 256


def bits(kind: str) -> str:
    """The untyped type of the same width, "b32" for "s32"."""
    return f"b{8 * width_of(kind)}"


def is_float(kind: str) -> bool:
    """Whether a type holds floating-point numbers."""
    return "f" in kind


def half(kind: str) -> int:
    """The flags that say which kind of half-precision operand it is."""
    return (_BF if kind.startswith("bf") else 0) | (_PAIR if kind.endswith("x2") else 0)


def rounding(form: Form) -> int:
    """The rounding modifier; none means to the nearest even."""
    return ROUNDING[form.one_of(ROUNDING, "rn")]


def _real_flags(form: Form) -> int:
    return rounding(form) | form.flag("ftz", FTZ) | form.flag("sat", SAT)


@rule("add sub", "9.7.1.1, 9.7.1.2, 9.7.2, 9.7.3.3, 9.7.3.4, 9.7.4.1, 9.7.4.2")
def _add(form: Form) -> Native:
    name = form.instruction.opcode
    kind = form.type()
    if kind in {"f16", "bf16"} and form.flag("f32"):
        return _mixed(form, kind, halves=1)
    places = form.same(kind, sources=2)
    if kind in HALVES.split():
        return Native(f"{name}_half", places, _real_flags(form) | half(kind))
    if is_float(kind):
        return Native(f"{name}_{kind}", places, _real_flags(form))
    if form.flag("cc"):
        return Native(f"{name}c_{bits(kind)}", places, 2)
    if form.flag("sat"):
        return Native(f"{name}_sat_{kind}", places)
    return Native(f"{name}_b16x2" if kind.endswith("x2") else f"{name}_{bits(kind)}", places)


@rule("addc subc", "9.7.2.2, 9.7.2.4")
def _add_with_carry(form: Form) -> Native:
    kind = form.type("u32 s32 u64 s64")
    return Native(f"{form.instruction.opcode}_{bits(kind)}", form.same(kind, sources=2), 1 | form.flag("cc", 2))


@rule("mul", "9.7.1.3, 9.7.3.5, 9.7.4.3")
def _multiply(form: Form) -> Native:
    kind = form.type()
    if kind in HALVES.split():
        return Native("mul_half", form.same(kind, sources=2), _real_flags(form) | half(kind))
    if is_float(kind):
        return Native(f"mul_{kind}", form.same(kind, sources=2), _real_flags(form))
    part = form.one_of(("lo", "hi", "wide"))
    if part == "wide":
        d, a, b = form.operands
        width = width_of(kind)
        return Native(f"mul_wide_{kind}", (form.destination(d, 2 * width), form.place(a, width), form.place(b, width)))
    return Native(f"mul_{part}_{bits(kind) if part == 'lo' else kind}", form.same(kind, sources=2))


@rule("mad", "9.7.1.4, 9.7.3.7")
def _multiply_add(form: Form) -> Native:
    kind = form.type()
    if is_float(kind):
        return Native(f"fma_{kind}", form.same(kind, sources=3), _real_flags(form))
    part = form.one_of(("lo", "hi", "wide"))
    if form.flag("cc"):
        return Native("madc_u32", form.same(kind, sources=3), 2 | (4 if part == "hi" else 0))
    if part == "wide":
        d, a, b, c = form.operands
        width = width_of(kind)
        places = (form.destination(d, 2 * width), form.place(a, width), form.place(b, width), form.place(c, 2 * width))
        return Native(f"mad_wide_{kind}", places)
    name = f"mad_{part}_{'sat_' if form.flag('sat') else ''}{bits(kind) if part == 'lo' else kind}"
    return Native(name, form.same(kind, sources=3))


@rule("madc", "9.7.2.6")
def _multiply_add_with_carry(form: Form) -> Native:
    kind = form.type("u32")
    part = form.one_of(("lo", "hi"))
    return Native("madc_u32", form.same(kind, sources=3), 1 | form.flag("cc", 2) | (4 if part == "hi" else 0))


@rule("mul24 mad24", "9.7.1.5, 9.7.1.6")
def _multiply_24_bits(form: Form) -> Native:
    kind = form.type("u32 s32")
    part = form.one_of(("lo", "hi") if form.instruction.opcode == "mul24" else ("lo",))
    return Native(f"{form.instruction.opcode}_{part}_{kind}", form.same(kind))


@rule("fma", "9.7.3.6, 9.7.4.4")
def _fused_multiply_add(form: Form) -> Native:
    kind = form.type("f32 f64 f32x2 " + HALVES)
    if kind in {"f16", "bf16"} and form.flag("f32"):
        return _mixed(form, kind, halves=2)
    places = form.same(kind, sources=3)
    if kind in HALVES.split():
        return Native("fma_half", places, _real_flags(form) | form.flag("relu", RELU) | half(kind))
    return Native(f"fma_{kind}", places, _real_flags(form))


def _mixed(form: Form, kind: str, *, halves: int) -> Native:
    """Mixed precision, 9.7.5: the first operands are halves, the last one and the result f32."""
    d, *sources = form.operands
    if len(sources) != halves + 1:
        raise form.unsupported(f"{len(form.operands)} operands")
    places = (form.destination(d, 4), *(form.place(x, 2) for x in sources[:-1]), form.place(sources[-1], 4))
    return Native(f"{form.instruction.opcode}_mixed", places, _real_flags(form) | half(kind))


@rule("div", "9.7.1.8, 9.7.3.8")
def _divide(form: Form) -> Native:
    kind = form.type(INTEGERS + " f32 f64")
    form.ignore("full", "approx")  # these are allowed an error, which is not modelled
    return Native(f"div_{kind}", form.same(kind, sources=2), _real_flags(form) if is_float(kind) else 0)


@rule("rem", "9.7.1.9")
def _remainder(form: Form) -> Native:
    kind = form.type(INTEGERS)
    return Native(f"rem_{kind}", form.same(kind, sources=2))


@rule("neg abs", "9.7.1.10, 9.7.1.11, 9.7.3.9, 9.7.3.10, 9.7.4.5, 9.7.4.6")
def _sign(form: Form) -> Native:
    name = form.instruction.opcode
    kind = form.type()
    places = form.same(kind, sources=1)
    if kind in HALVES.split():
        form.ignore("ftz")
        return Native(f"{name}_half", places, half(kind))
    if is_float(kind):
        return Native(f"{name}_{kind}", places, form.flag("ftz", FTZ))
    return Native(f"{name}_{bits(kind) if name == 'neg' else kind}", places)


@rule("min max", "9.7.1.12, 9.7.1.13, 9.7.3.11, 9.7.3.12, 9.7.4.7, 9.7.4.8")
def _extreme(form: Form) -> Native:
    name = form.instruction.opcode
    kind = form.type()
    three = form.count(3, 4) == 4
    places = form.same(kind)
    if is_float(kind):
        flags = form.flag("ftz", FTZ) | form.flag("NaN", PROPAGATE_NAN) | form.flag("abs", ABS)
        if form.flag("xorsign"):
            flags |= XORSIGN
        if kind in HALVES.split():
            return Native(f"{name}{'3' if three else ''}_half", places, flags | half(kind))
        return Native(f"{name}_{kind}", places, flags)
    return Native(f"{name}{'3' if three else ''}_{'relu_' if form.flag('relu') else ''}{kind}", places)


@rule("rcp sqrt", "9.7.3.13, 9.7.3.14, 9.7.3.15, 9.7.3.16")
def _reciprocal(form: Form) -> Native:
    kind = form.type("f32 f64")
    approximate = ("_gross" if kind == "f64" else "_approx") if form.flag("approx") else ""
    return Native(f"{form.instruction.opcode}{approximate}_{kind}", form.same(kind, sources=1), _real_flags(form))


@rule("rsqrt sin cos lg2 ex2 tanh", "9.7.3.17 to 9.7.3.22, 9.7.4.9, 9.7.4.10")
def _approximate(form: Form) -> Native:
    name = form.instruction.opcode
    kind = form.type("f32 f64 " + HALVES)
    form.ignore("approx")
    flags = form.flag("ftz", FTZ)
    if kind in HALVES.split():
        return Native(f"{name}_half", form.same(kind, sources=1), half(kind) | (0 if kind.startswith("bf") else flags))
    return Native(
        f"{name}_{'gross' if kind == 'f64' and flags else 'approx'}_{kind}", form.same(kind, sources=1), flags
    )


@rule("copysign", "9.7.3.2")
def _copy_sign(form: Form) -> Native:
    kind = form.type("f32 f64")
    return Native(f"copysign_{kind}", form.same(kind, sources=2))


@rule("testp", "9.7.3.1")
def _test_property(form: Form) -> Native:
    kind = form.type("f32 f64")
    tests = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    test = tests.index(form.one_of(tests))
    p, a = form.operands
    return Native("testp", (form.destination(p, 0), form.place(a, width_of(kind))), test | (8 if kind == "f64" else 0))


@rule("popc clz bfind brev", "9.7.1.15 to 9.7.1.18, 9.7.1.22")
def _count_bits(form: Form) -> Native:
    name = form.instruction.opcode
    kind = form.type("b32 b64 u32 s32 u64 s64")
    d, a = form.operands
    width = width_of(kind)
    places = (form.destination(d, width if name == "brev" else 4), form.place(a, width))
    return Native(f"{name}_{kind}", places, form.flag("shiftamt"))


@rule("fns", "9.7.1.18")
def _find_nth_set(form: Form) -> Native:
    return Native("fns_b32", form.same(form.type("b32"), sources=3))


@rule("sad", "9.7.1.7")
def _absolute_difference(form: Form) -> Native:
    kind = form.type(INTEGERS)
    return Native(f"sad_{kind}", form.same(kind, sources=3))


@rule("bfe", "9.7.1.20")
def _extract_field(form: Form) -> Native:
    kind = form.type("u32 s32 u64 s64")
    d, a, b, c = form.operands
    width = width_of(kind)
    return Native(f"bfe_{kind}", (form.destination(d, width), form.place(a, width), form.place(b, 4), form.place(c, 4)))


@rule("bfi", "9.7.1.21")
def _insert_field(form: Form) -> Native:
    kind = form.type("b32 b64")
    d, a, b, c, e = form.operands
    width = width_of(kind)
    places = (
        form.destination(d, width),
        form.place(a, width),
        form.place(b, width),
        form.place(c, 4),
        form.place(e, 4),
    )
    return Native(f"bfi_{kind}", places)


@rule("szext bmsk", "9.7.1.19, 9.7.1.23")
def _field_mask(form: Form) -> Native:
    kind = form.type("u32 s32 b32")
    return Native(f"{form.instruction.opcode}_{form.one_of(('clamp', 'wrap'))}_{kind}", form.same(kind, sources=2))


@rule("dp4a dp2a", "9.7.1.24, 9.7.1.25")
def _dot_product(form: Form) -> Native:
    second, first = form.type("u32 s32"), form.type("u32 s32")
    flags = (1 if first == "s32" else 0) | (2 if second == "s32" else 0)
    if form.instruction.opcode == "dp2a":
        flags |= 4 | (8 if form.one_of(("lo", "hi")) == "hi" else 0)
    return Native("dot_b32", form.same("b32", sources=3), flags)


@rule("and or xor not cnot", "9.7.8.1 to 9.7.8.5")
def _logic(form: Form) -> Native:
    kind = form.type(BITS + " pred")
    return Native(f"{form.instruction.opcode}_{kind}", form.same(kind))


@rule("lop3", "9.7.8.6")
def _logic_of_three(form: Form) -> Native:
    kind = form.type("b32")
    form.count(5)
    d, a, b, c, table = form.operands
    places = (form.destination(d, 4), *(form.place(x, 4) for x in (a, b, c)))
    return Native(f"lop3_{kind}", places, getattr(table, "value", 0) & 255)


@rule("shl shr", "9.7.8.8, 9.7.8.9")
def _shift(form: Form) -> Native:
    name = form.instruction.opcode
    kind = form.type(BITS + " " + INTEGERS)
    d, a, b = form.operands
    width = width_of(kind)
    signed = kind if name == "shr" and kind[0] == "s" else f"{'u' if name == 'shr' else 'b'}{8 * width}"
    return Native(f"{name}_{signed}", (form.destination(d, width), form.place(a, width), form.place(b, 4)))


@rule("shf", "9.7.8.7")
def _funnel_shift(form: Form) -> Native:
    kind = form.type("b32")
    side, mode = form.one_of(("l", "r")), form.one_of(("clamp", "wrap"))
    return Native(f"shf_{side}_{mode}_{kind}", form.same(kind, sources=3))


@rule("prmt", "9.7.9.7")
def _permute(form: Form) -> Native:
    modes = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    mode = form.one_of(modes, "")  # stands behind the type
    form.type("b32")
    places = form.same("b32", sources=3)
    return Native("prmt_mode_b32", places, modes.index(mode)) if mode else Native("prmt_b32", places)


def _compare(form: Form, kind: str) -> tuple[int, str]:
    """Flags of a comparison, and the name of its operand type."""
    name = form.one_of((*_COMPARISONS, *_UNSIGNED))
    flags = _COMPARISONS[_UNSIGNED.get(name, name)] | form.flag("ftz", _COMPARE_FTZ)
    if combined := form.one_of(_COMBINE, ""):
        flags |= _COMBINE[combined]
    if kind in HALVES.split():
        return flags | half(kind), "half"
    return flags, kind if is_float(kind) else f"{'s' if kind[0] == 's' else 'u'}{8 * width_of(kind)}"


def _combined(form: Form, k: int, flags: int) -> tuple[tuple[int, ...], int]:
    """The predicate that a comparison is combined with."""
    if not flags & 96:
        form.count(k)
        return (), flags
    place, negated = form.predicate(form.at(k))
    return (place,), flags | (_COMBINE_NEGATED if negated else 0)


@rule("setp", "9.7.6.2, 9.7.7.2")
def _set_predicate(form: Form) -> Native:
    kind = form.type(BITS + " " + INTEGERS + " f32 f64 " + HALVES)
    flags, name = _compare(form, kind)
    extra, flags = _combined(form, 3, flags)
    sources = (form.place(form.at(1), width_of(kind)), form.place(form.at(2), width_of(kind)))
    return Native(f"setp_{name}", (*form.pair(form.at(0), 0, 0), *sources, *extra), flags)


@rule("set", "9.7.6.1")
def _set_word(form: Form) -> Native:
    kind, result = form.type(BITS + " " + INTEGERS + " f32 f64"), form.type("u32 s32 f32")
    flags, name = _compare(form, kind)
    extra, flags = _combined(form, 3, flags | (_SET_FLOAT if result == "f32" else 0))
    sources = (form.place(form.at(1), width_of(kind)), form.place(form.at(2), width_of(kind)))
    return Native(f"set_{name}", (form.destination(form.at(0), 4), *sources, *extra), flags)


@rule("selp", "9.7.6.4")
def _select(form: Form) -> Native:
    kind = form.type(BITS + " " + INTEGERS + " f32 f64")
    form.count(4)
    d, a, b, c = form.operands
    width = width_of(kind)
    p, negated = form.predicate(c)
    return Native(
        f"selp_u{8 * width}", (form.destination(d, width), form.place(a, width), form.place(b, width), p), int(negated)
    )


@rule("slct", "9.7.6.5")
def _select_by_sign(form: Form) -> Native:
    by = form.type("s32 f32")
    kind = form.type(BITS + " " + INTEGERS + " f32 f64")
    form.ignore("ftz")
    d, a, b, c = form.operands
    width = width_of(kind)
    places = (form.destination(d, width), form.place(a, width), form.place(b, width), form.place(c, 4))
    return Native(f"slct_u{8 * width}", places, int(by == "f32"))


@rule("mov", "9.7.9.3, 9.7.9.4")
def _move(form: Form) -> Native:
    kind = form.type(BITS + " " + INTEGERS + " f32 f64 pred b128")
    form.count(2)
    to, source = form.operands
    if kind == "b128":
        return Native("mov_two_b64", (*form.halves(to, destination=True), *form.halves(source, destination=False)))
    width = width_of(kind)
    clock = {"%clock": 0, "%clock_hi": 0, "%clock64": 1, "%globaltimer": 1}.get(getattr(source, "name", ""))
    if clock is not None:
        return Native("clock", (form.destination(to, width),), clock)
    parts = form.items(to)
    if len(parts) > 1:
        part = width // len(parts)
        places = tuple(SINK if x.__class__.__name__ == "Sink" else form.destination(x, part) for x in parts)
        sinks = sum(1 << k for k, place in enumerate(places) if place == SINK)
        return Native("unpack", (*places, form.place(source, width)), part | sinks << 8)
    parts = form.items(source)
    if len(parts) > 1:
        part = width // len(parts)
        places = tuple(form.place(x, part) for x in parts)
        pair = len(parts) == 2 and part > 1
        return Native(
            f"pack_{kind if kind[0] == 'b' else bits(kind)}" if pair else "pack",
            (form.destination(to, width), *places),
            part,
        )
    if kind == "pred":
        return Native("mov_pred", (form.destination(to, 0), form.predicate(source)[0]))
    return Native(f"mov_{bits(kind)}", (form.destination(to, width), form.place(parts[0], width)))
