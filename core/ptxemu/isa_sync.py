"""The instruction table, part four: control flow, warp exchanges, barriers, mbarriers and fences."""

from __future__ import annotations

from ptxemu.instruction import Address, Operand, Register, Sink
from ptxemu.isa_memory import WIDE, WIDE_SCOPES
from ptxemu.lowering import SINK, Form, Native, rule, width_of

_NARROW, _EXPECT_TX, _DROP, _NO_COMPLETE, _STATE, _PARITY, _BLOCKING, _COUNT, _RELAXED = (1 << k for k in range(9))
_FENCE_SC = 1  # aux of fence, with WIDE
_SCOPES = ("cta", "cluster", "gpu", "sys")
_MBARRIER_OPERATIONS = (
    *("init", "inval", "expect_tx", "complete_tx", "arrive", "arrive_drop", "test_wait", "try_wait", "pending_count"),
)


@rule("bra", "9.7.12.2")
def _branch(form: Form) -> Native:
    form.ignore("uni")
    return Native("branch")


@rule("ret exit", "9.7.12.5, 9.7.19.1")
def _exit(form: Form) -> Native:
    form.ignore("uni")
    return Native("exit")


@rule("trap brkpt", "9.7.19.4")
def _trap(form: Form) -> Native:
    return Native("trap" if form.instruction.opcode == "trap" else "nop")


@rule("nanosleep", "9.7.19.3")
def _sleep(form: Form) -> Native:
    form.type("u32")
    return Native("nanosleep")


@rule("pmevent", "9.7.19.2")
def _event(form: Form) -> Native:
    form.ignore("mask")
    return Native("nop")


@rule("setmaxnreg", "9.7.19.5")
def _set_registers(form: Form) -> Native:
    form.type("u32")
    form.one_of(("inc", "dec"))
    form.ignore("sync", "aligned")
    count = getattr(form.at(0), "value", 0)
    if not 24 <= count <= 256 or count % 8:
        raise form.unsupported(f"{count} registers; 24 to 256 in steps of 8 are allowed")
    return Native("nop")


@rule("shfl", "9.7.9.6")
def _shuffle(form: Form) -> Native:
    form.type("b32")
    form.flag("sync")
    mode = ("up", "down", "bfly", "idx").index(form.one_of(("up", "down", "bfly", "idx")))
    form.count(5)
    d, *sources = form.operands
    return Native("shfl", (*form.pair(d, 4, 0), *(form.place(s, 4) for s in sources)), mode)


@rule("vote", "9.7.13.9")
def _vote(form: Form) -> Native:
    form.type("pred b32")
    form.flag("sync")
    mode = ("all", "any", "uni", "ballot").index(form.one_of(("all", "any", "uni", "ballot")))
    d, a, members = form.operands
    p, negated = form.predicate(a)
    return Native(
        "vote", (form.destination(d, 4 if mode == 3 else 0), p, form.place(members, 4)), mode | (8 if negated else 0)
    )


@rule("match", "9.7.13.10")
def _match(form: Form) -> Native:
    kind = form.type("b32 b64")
    form.flag("sync")
    every = form.one_of(("any", "all")) == "all"
    d, a, members = form.operands
    places = (*form.pair(d, 4, 0), form.place(a, width_of(kind)), form.place(members, 4))
    return Native("match", places, int(every) | (2 if kind == "b64" else 0))


@rule("redux", "9.7.13.12")
def _reduce(form: Form) -> Native:
    kind = form.type("b32 u32 s32 f32")
    form.flag("sync")
    operation = ("and", "or", "xor", "add", "min", "max").index(form.one_of(("and", "or", "xor", "add", "min", "max")))
    flags = {"s32": 8, "f32": 16}.get(kind, 0) | form.flag("abs", 32) | form.flag("NaN", 64)
    d, a, members = form.operands
    return Native("redux", (form.destination(d, 4), form.place(a, 4), form.place(members, 4)), operation | flags)


@rule("elect", "9.7.13.13")
def _elect(form: Form) -> Native:
    form.flag("sync")
    d, members = form.operands
    return Native("elect", (*form.pair(d, 4, 0), form.place(members, 4)))


@rule("activemask", "9.7.13.11")
def _active(form: Form) -> Native:
    form.type("b32")
    return Native("activemask", (form.destination(form.at(0), 4),))


@rule("bar barrier", "9.7.13.1 to 9.7.13.4")
def _barrier(form: Form) -> Native:
    if form.flag("cluster"):
        name = form.one_of(("arrive", "wait"))
        form.ignore("release", "acquire")
        return Native(f"cluster_{name}", (), form.flag("aligned") | form.flag("relaxed", 2))
    if form.flag("warp"):
        form.one_of(("sync",))
        return Native("bar_warp", (form.place(form.at(0), 4),))
    form.ignore("cta", "aligned")
    if form.flag("red"):
        return _reducing_barrier(form)
    kind = form.one_of(("sync", "arrive"))
    count = form.count(1, 2)
    threads = form.place(form.at(1), 4) if count == 2 else form.places.constant(0, 4)
    return Native("bar", (form.place(form.at(0), 4), threads), int(kind == "arrive"))


def _reducing_barrier(form: Form) -> Native:
    form.type("u32 pred")
    kind = ("popc", "and", "or").index(form.one_of(("popc", "and", "or")))
    count = form.count(3, 4)
    d, barrier, *threads, p = form.operands
    predicate, negated = form.predicate(p)
    number = form.place(threads[0], 4) if count == 4 else form.places.constant(0, 4)
    places = (form.destination(d, 0 if kind else 4), form.place(barrier, 4), number, predicate)
    return Native("bar", places, 2 + kind | (8 if negated else 0))


@rule("membar fence", "9.7.13.4")
def _fence(form: Form) -> Native:
    if form.flag("mbarrier_init"):
        form.ignore("release", "cluster")
        return Native("fence_mbarrier_init")
    if form.flag("proxy"):
        asynchronous = form.flag("async") + form.flag("async::generic")
        form.ignore(
            "global",
            "shared::cta",
            "shared::cluster",
            "alias",
            "acquire",
            "release",
            "sync_restrict::shared::cta",
            *_SCOPES,
        )
        form.ignore_prefix("tensormap::", "async.", "sync_restrict::")
        return Native("fence_async" if asynchronous else "nop")
    consistent = form.flag("sc", _FENCE_SC) | (_FENCE_SC if form.instruction.opcode == "membar" else 0)
    form.ignore("acq_rel", "acquire", "release")
    form.ignore_prefix("sync_restrict::")
    wide = form.one_of((*_SCOPES, "gl")) in WIDE_SCOPES
    return Native("fence", (), consistent | (WIDE if wide else 0))


@rule("mbarrier", "9.7.13.15")
def _mbarrier(form: Form) -> Native:
    operation = form.left.pop(0) if form.left else ""
    if operation not in _MBARRIER_OPERATIONS:
        raise form.unsupported(f"mbarrier.{operation}")
    if operation == "pending_count":
        form.type("b64")
        d, state = form.operands
        return Native("mbarrier_pending", (form.destination(d, 4), form.place(state, 8)))
    form.type("b64")
    form.ignore("shared", "shared::cta", "shared::cluster", "release", "acquire", *_SCOPES)
    relaxed = form.flag("relaxed", _RELAXED)
    if operation in {"arrive", "arrive_drop"}:
        return _arrive(form, relaxed | (_DROP if operation == "arrive_drop" else 0))
    if operation in {"test_wait", "try_wait"}:
        return _wait(form, relaxed | (_BLOCKING if operation == "try_wait" else 0))
    base, offset, narrow = _mbarrier_address(form, form.at(0))
    if operation == "inval":
        return Native("mbarrier_inval", (base,), narrow, offset)
    places = (base, form.place(form.at(1), 4))
    if operation == "init":
        return Native("mbarrier_init", places, narrow, offset)
    return Native("mbarrier_tx", places, narrow | (_EXPECT_TX if operation == "expect_tx" else 0), offset)


def _mbarrier_address(form: Form, operand: Operand) -> tuple[int, int, int]:
    base, offset, narrow = form.address(operand, narrow=True)
    return base, offset, _NARROW if narrow else 0


def _arrive(form: Form, flags: int) -> Native:
    flags |= form.flag("expect_tx", _EXPECT_TX) | form.flag("noComplete", _NO_COMPLETE)
    operands = list(form.operands)
    state: tuple[int, ...] = ()
    if not isinstance(operands[0], Address):
        first = operands.pop(0)
        state = (SINK if isinstance(first, Sink) else form.destination(first, 8),)
    base, offset, narrow = _mbarrier_address(form, operands.pop(0))
    count: tuple[int, ...] = ()
    if operands:
        count = (form.place(operands.pop(0), 4),)
        flags |= _COUNT
    if operands:
        raise form.unsupported(f"{len(form.operands)} operands")
    return Native("mbarrier_arrive", (*state, base, *count), flags | narrow | (_STATE if state else 0), offset)


def _wait(form: Form, flags: int) -> Native:
    flags |= form.flag("parity", _PARITY)
    form.count(3, 4)  # the fourth is a hint how long to suspend
    base, offset, narrow = _mbarrier_address(form, form.at(1))
    which = form.at(2)
    width = 4 if flags & _PARITY else 8
    if isinstance(which, Register) and which.width != width:
        raise form.unsupported(f"{which.name} of {which.type}")
    return Native(
        "mbarrier_wait", (form.destination(form.at(0), 0), base, form.place(which, width)), flags | narrow, offset
    )
