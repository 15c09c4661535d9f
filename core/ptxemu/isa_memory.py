"""The instruction table, part three: loads, stores, atomics and addresses, PTX ISA 9.7.9 and 9.7.13."""

from __future__ import annotations

from ptxemu.instruction import Address, Operand, Register, Sink, Symbol, Vector
from ptxemu.isa import half
from ptxemu.lowering import SINK, Form, Native, rule, width_of

_SPACES = {
    "global": 1,
    "const": 1,
    "shared": 2,
    "shared::cta": 2,
    "shared::cluster": 2,
    "local": 3,
}  # as SPACE_* in ptxemu.h
_SIGNED, _SPACE_SHIFT, _NARROW, _SINK_SHIFT = 1 << 8, 9, 1 << 11, 16  # aux of ld and st, see native/memory.c
_STRONG, _ACQUIRES, _RELEASES, WIDE = (1 << k for k in range(12, 16))  # of atom too, as in ptxemu.h
_TWO_WORDS = 8 | 8 << 4  # elements of 8 bytes, in registers of 8
_OPERATIONS = {name: k for k, name in enumerate(["and", "or", "xor", "add", "inc", "dec", "min", "max", "exch", "cas"])}
_ATOMIC_TYPES = {
    "b16": 0,
    "b32": 1,
    "u32": 1,
    "s32": 2,
    "b64": 3,
    "u64": 3,
    "s64": 4,
    "f32": 5,
    "f64": 6,
    "f16": 7,
    "bf16": 8,
    "f16x2": 9,
    "bf16x2": 10,
}
_ATOMIC_SPACE_SHIFT, _ATOMIC_NARROW, _RETURNS = 8, 1 << 10, 1 << 11
WIDE_SCOPES = ("gpu", "gl", "sys")  # of other clusters too, PTX ISA 8.5; membar has gl for gpu
_CACHING = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified")  # they change speed, not values


def _memory_modifiers(form: Form, *, atomic: bool = False) -> int:
    """Takes what says how strong and how cached an access is: flags, 0 for a weak one; PTX ISA 8.4."""
    meanings = {"volatile": 0, "relaxed": 0, "mmio": 0, "acquire": _ACQUIRES, "release": _RELEASES}
    meanings["acq_rel"] = _ACQUIRES | _RELEASES
    found = [meaning for name, meaning in meanings.items() if form.flag(name)]
    narrow = form.flag("cta") + form.flag("cluster")  # else gpu, sys, or a default that means one of them
    form.ignore("weak", "gpu", "sys", *_CACHING)
    form.ignore_prefix("L1::", "L2::", "level::")
    return _STRONG | sum(found) | (0 if narrow else WIDE) if found or atomic else 0


def _space(form: Form) -> int:
    """The state space, 0 for a generic address."""
    return _SPACES.get(form.one_of(_SPACES, "generic"), 0)


def _lanes_of(form: Form, values: tuple[Operand, ...], width: int) -> int:
    """Bytes of a lane of the registers of a vector, which are all alike."""
    rooms = {value.width for value in values if isinstance(value, Register)} or {max(width, 2)}
    if len(rooms) != 1 or (room := rooms.pop()) < width:
        raise form.unsupported("registers of different widths")
    return room


def _drop_cache_policy(form: Form, first: int) -> None:
    """A cache policy may follow the operands; it changes nothing."""
    form.count(first, first + 1)


@rule("ld ldu", "9.7.9.8, 9.7.9.10")
def _load(form: Form) -> Native:
    kind = form.type()
    vector = int(form.one_of(("v2", "v4", "v8"), "v1")[1])
    is_param = form.flag("param") or form.flag("param::entry")
    strong = _memory_modifiers(form)
    space = _space(form)
    if kind == "b128":
        _drop_cache_policy(form, 2)
        halves = form.halves(form.at(0), destination=True)
        base, offset, narrow = form.address(form.at(1), narrow=space == 2)
        aux = strong | _TWO_WORDS | space << _SPACE_SHIFT | (_NARROW if narrow else 0)
        return Native("ld_strong" if strong and space < 2 else "ld", (*halves, base), aux, offset)
    values = form.items(form.at(0))
    width = width_of(kind)
    if len(values) != vector:
        raise form.unsupported(f"{len(values)} destinations")
    _drop_cache_policy(form, 2)
    room = _lanes_of(form, values, width)
    places = tuple(SINK if isinstance(value, Sink) else form.destination(value, width, wider=True) for value in values)
    sinks = sum(1 << k for k, value in enumerate(values) if isinstance(value, Sink))
    aux = width | room << 4 | (_SIGNED if kind[0] == "s" else 0) | sinks << _SINK_SHIFT
    if is_param and not (isinstance(address := form.at(1), Address) and isinstance(address.base, Register)):
        return Native("ld_param", places, aux, _parameter_offset(form, width * vector))
    base, offset, narrow = form.address(form.at(1), narrow=space == 2)
    aux |= strong | space << _SPACE_SHIFT | (_NARROW if narrow else 0)
    return Native("ld_strong" if strong and space < 2 else "ld", (*places, base), aux, offset)


def _parameter_offset(form: Form, size: int) -> int:
    """Where a parameter's bytes lie in the block of all parameters."""
    address = form.at(1)
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise form.unsupported("ld.param of this address")
    found = form.places.symbols.get(address.base.name)
    parameter = next((p for p in form.places.kernel.parameters if p.name == address.base.name), None)
    if found is None or parameter is None:
        raise form.unsupported(f"unknown parameter {address.base.name}")
    if address.offset < 0 or address.offset + size > parameter.size:
        raise form.unsupported(f"bytes {address.offset} to {address.offset + size} of a parameter of {parameter.size}")
    return found[1] - form.places.parameter_base + address.offset


@rule("st", "9.7.9.11")
def _store(form: Form) -> Native:
    kind = form.type()
    vector = int(form.one_of(("v2", "v4", "v8"), "v1")[1])
    strong = _memory_modifiers(form)
    space = _space(form)
    if kind == "b128":
        _drop_cache_policy(form, 2)
        base, offset, narrow = form.address(form.at(0), narrow=space == 2)
        aux = strong | _TWO_WORDS | space << _SPACE_SHIFT | (_NARROW if narrow else 0)
        return Native("st", (base, *form.halves(form.at(1), destination=False)), aux, offset)
    values = form.items(form.at(1))
    width = width_of(kind)
    if len(values) != vector:
        raise form.unsupported(f"{len(values)} sources")
    _drop_cache_policy(form, 2)
    room = _lanes_of(form, values, width)
    places = tuple(
        form.place(value, room if isinstance(value, Register) else max(room, 2), wider=True) for value in values
    )
    base, offset, narrow = form.address(form.at(0), narrow=space == 2)
    aux = strong | width | room << 4 | space << _SPACE_SHIFT | (_NARROW if narrow else 0)
    return Native("st", (base, *places), aux, offset)


@rule("atom red", "9.7.13.5, 9.7.13.7")
def _atomic(form: Form) -> Native:
    returns = form.instruction.opcode == "atom"
    kind = form.type()
    form.ignore("noftz")
    vector = int(form.one_of(("v2", "v4", "v8"), "v1")[1])
    order = _memory_modifiers(form, atomic=True)
    space = _space(form)
    operation = form.one_of(_OPERATIONS)
    if kind not in _ATOMIC_TYPES:
        raise form.unsupported(f"type {kind}")
    if (kind.startswith("f") or half(kind)) and kind in {"f32", "f64"} and operation not in {"add", "exch"}:
        raise form.unsupported(f"{operation} of {kind}")
    operands = list(form.operands)
    width = width_of(kind)
    places: list[int] = []
    sinks = 0
    if returns:
        items = form.items(operands.pop(0))
        places = [SINK if isinstance(item, Sink) else form.destination(item, width) for item in items]
        sinks = sum(1 << k for k, item in enumerate(items) if isinstance(item, Sink))
    base, offset, narrow = form.address(operands.pop(0), narrow=space == 2)
    sources = 2 if operation == "cas" else 1
    if not sources <= len(operands) <= sources + 1:  # a cache policy may follow
        raise form.unsupported(f"{len(form.operands)} operands")
    values = [item for operand in operands[:sources] for item in form.items(operand)]
    if len(values) != sources * vector:
        raise form.unsupported(f"{len(values)} sources")
    aux = _OPERATIONS[operation] | _ATOMIC_TYPES[kind] << 4 | space << _ATOMIC_SPACE_SHIFT | sinks << _SINK_SHIFT
    aux |= order | (_ATOMIC_NARROW if narrow else 0) | (_RETURNS if returns else 0)
    return Native("atom", (*places, base, *(form.place(value, width) for value in values)), aux, offset)


@rule("cvta", "9.7.9.20")
def _convert_address(form: Form) -> Native:
    kind = form.type("u64 u32 b64")
    if kind == "u32":
        raise form.unsupported("32-bit generic addresses")
    back = form.flag("to")
    space = form.one_of(
        ("global", "const", "param", "param::entry", "shared", "shared::cta", "shared::cluster", "local")
    )
    d, a = form.operands
    places = (form.destination(d, 8), form.place(a, 8))
    if space not in {"shared", "shared::cta", "shared::cluster", "local"}:
        return Native("mov_b64", places)
    return Native("cvta", places, (1 if back else 0) | (2 if space == "local" else 0))


@rule("isspacep", "9.7.9.19")
def _is_in_space(form: Form) -> Native:
    spaces = ("global", "shared::cluster", "local", "shared::cta")
    space = form.one_of((*spaces, "shared"))
    p, a = form.operands
    return Native(
        "isspacep",
        (form.destination(p, 0), form.place(a, 8)),
        spaces.index("shared::cta" if space == "shared" else space),
    )


@rule("mapa", "9.7.9.23")
def _map_address(form: Form) -> Native:
    kind = form.type("u32 u64")
    form.ignore("shared::cluster")
    d, a, rank = form.operands
    width = width_of(kind)
    return Native("mapa", (form.destination(d, width), form.place(a, width), form.place(rank, 4)), int(kind == "u64"))


@rule("getctarank", "9.7.9.24")
def _cta_rank(form: Form) -> Native:
    kind = form.type("u32 u64")
    form.ignore("shared::cluster")
    d, a = form.operands
    return Native("getctarank", (form.destination(d, 4), form.place(a, width_of(kind))), int(kind == "u64"))


@rule("prefetch prefetchu discard applypriority createpolicy", "9.7.9.13 to 9.7.9.18")
def _hint(form: Form) -> Native:
    """Hints to the caches; discard, which leaves the bytes undefined, is taken as a hint too."""
    if form.instruction.opcode == "createpolicy":
        form.left.clear()
        return Native("mov_b64", (form.destination(form.at(0), 8), form.places.constant(0, 8)))
    if isinstance(form.at(0), Vector):
        raise form.unsupported("operand")
    form.ignore("global", "local", "L1", "L2", "const", "param")
    form.ignore_prefix("L2::", "L1::")
    return Native("nop")
