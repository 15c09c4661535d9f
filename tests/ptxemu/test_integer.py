"""Integer, logic, shift and comparison instructions against Python's integers, which have no width."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tests.ptxemu.micro import apply, register

EDGES = {
    16: [0, 1, 2, 7, 15, 16, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFFE, 0x1234],
    32: [0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678, 0x00FF8001],
    64: [0, 1, 2, 63, 64, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0],
}
COUNTS = [0, 1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0xFFFFFFFF]


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def value(x: int, kind: str) -> int:
    bits = int(kind[1:])
    return signed(x, bits) if kind[0] == "s" else x


def trunc_div(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


def clamp(x: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, x))


def check(
    instruction: str, kinds: list[str], result: int, oracle: Callable[..., int], values: list[list[int]] | None = None
) -> None:
    lists = values or [EDGES[int(k[1:])] for k in kinds]
    rng = np.random.default_rng(0)
    rows = list(itertools.product(*lists))
    rows += [
        tuple(int(x) for x in r)
        for r in zip(*(rng.integers(0, 1 << min(int(k[1:]), 63), 32) for k in kinds), strict=True)
    ]
    columns = [np.array(c, f"u{int(k[1:]) // 8}") for c, k in zip(zip(*rows, strict=True), kinds, strict=True)]
    got = apply(instruction, f"b{result}", *((register(k), c) for k, c in zip(kinds, columns, strict=True)))
    for row, found in zip(rows, got, strict=True):
        expected = oracle(*(value(x, k) for x, k in zip(row, kinds, strict=True))) & ((1 << result) - 1)
        assert int(found) == expected, (instruction, [hex(x) for x in row], hex(int(found)), hex(expected))


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: trunc_div(a, b) if b else -1,
    "rem": lambda a, b: a - b * trunc_div(a, b) if b else a,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name: str, kind: str) -> None:
    check(f"{name}.{kind} d, a, b", [kind, kind], int(kind[1:]), BINARY[name])


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_high_and_wide_products(kind: str) -> None:
    bits = int(kind[1:])
    check(f"mul.hi.{kind} d, a, b", [kind, kind], bits, lambda a, b: a * b >> bits)
    few = [EDGES[bits][::3], EDGES[bits][::2], EDGES[bits][::3]]
    check(f"mad.hi.{kind} d, a, b, c", [kind] * 3, bits, lambda a, b, c: (a * b >> bits) + c, few)
    check(f"mad.lo.{kind} d, a, b, c", [kind] * 3, bits, lambda a, b, c: a * b + c, few)
    if bits < 64:
        check(f"mul.wide.{kind} d, a, b", [kind, kind], 2 * bits, lambda a, b: a * b)
        wide = f"{kind[0]}{2 * bits}"
        check(
            f"mad.wide.{kind} d, a, b, c",
            [kind, kind, wide],
            2 * bits,
            lambda a, b, c: a * b + c,
            [*few[:2], EDGES[2 * bits][::3]],
        )


def test_saturating_and_24_bits() -> None:
    check("add.sat.s32 d, a, b", ["s32", "s32"], 32, lambda a, b: clamp(a + b, 32))
    check("sub.sat.s32 d, a, b", ["s32", "s32"], 32, lambda a, b: clamp(a - b, 32))
    check("mul24.lo.u32 d, a, b", ["u32", "u32"], 32, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF))
    check("mul24.lo.s32 d, a, b", ["s32", "s32"], 32, lambda a, b: signed(a, 24) * signed(b, 24))
    check("mul24.hi.s32 d, a, b", ["s32", "s32"], 32, lambda a, b: signed(a, 24) * signed(b, 24) >> 16)
    check("min.relu.s32 d, a, b", ["s32", "s32"], 32, lambda a, b: max(min(a, b), 0))


UNARY: dict[str, tuple[str, int, Callable[[int], int]]] = {
    "neg.s16": ("s16", 16, lambda a: -a),
    "neg.s32": ("s32", 32, lambda a: -a),
    "neg.s64": ("s64", 64, lambda a: -a),
    "abs.s32": ("s32", 32, abs),
    "abs.s64": ("s64", 64, abs),
    "not.b32": ("b32", 32, lambda a: ~a),
    "not.b64": ("b64", 64, lambda a: ~a),
    "cnot.b32": ("b32", 32, lambda a: int(a == 0)),
    "popc.b32": ("b32", 32, lambda a: a.bit_count()),
    "popc.b64": ("b64", 32, lambda a: a.bit_count()),
    "clz.b32": ("b32", 32, lambda a: 32 - a.bit_length()),
    "clz.b64": ("b64", 32, lambda a: 64 - a.bit_length()),
    "brev.b32": ("b32", 32, lambda a: int(f"{a:032b}"[::-1], 2)),
    "brev.b64": ("b64", 64, lambda a: int(f"{a:064b}"[::-1], 2)),
    "bfind.u32": ("u32", 32, lambda a: a.bit_length() - 1),
    "bfind.u64": ("u64", 32, lambda a: a.bit_length() - 1),
    "bfind.s32": ("s32", 32, lambda a: (a if a >= 0 else ~a).bit_length() - 1),
    "bfind.shiftamt.u32": ("u32", 32, lambda a: 32 - a.bit_length() if a else -1),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    kind, result, oracle = UNARY[name]
    check(f"{name} d, a", [kind], result, oracle)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits: int) -> None:
    for name, oracle in {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}.items():
        check(f"{name}.b{bits} d, a, b", [f"b{bits}"] * 2, bits, oracle)
    counts = [EDGES[bits], COUNTS]
    check(f"shl.b{bits} d, a, b", [f"b{bits}", "u32"], bits, lambda a, n: a << n if n < bits else 0, counts)
    check(f"shr.u{bits} d, a, b", [f"u{bits}", "u32"], bits, lambda a, n: a >> n if n < bits else 0, counts)
    check(f"shr.s{bits} d, a, b", [f"s{bits}", "u32"], bits, lambda a, n: a >> min(n, bits - 1), counts)


def test_funnel_shifts() -> None:
    values = [EDGES[32][::2], EDGES[32][1::2], COUNTS]
    for side, mode in itertools.product("lr", ["clamp", "wrap"]):

        def oracle(a: int, b: int, n: int, side: str = side, mode: str = mode) -> int:
            n = n & 31 if mode == "wrap" else min(n, 32)
            both = b << 32 | a
            return both << n >> 32 if side == "l" else both >> n

        check(f"shf.{side}.{mode}.b32 d, a, b, c", ["b32", "b32", "u32"], 32, oracle, values)


def test_fields() -> None:
    places, lengths = [0, 1, 7, 31, 32, 60, 255], [0, 1, 5, 31, 32, 64, 255]

    def bfe(a: int, pos: int, length: int, bits: int, is_signed: bool) -> int:
        a = a & ((1 << bits) - 1)
        pos, length = (pos & 255, length & 255) if bits == 32 else (pos, length)
        sign = a >> min(pos + length - 1, bits - 1) & 1 if is_signed and length else 0
        field = 0
        for k in range(bits):
            field |= (a >> (pos + k) & 1 if k < length and pos + k < bits else sign) << k
        return field

    def bfi(a: int, b: int, pos: int, length: int, bits: int) -> int:
        pos, length = (pos & 255, length & 255) if bits == 32 else (pos, length)
        for k in range(min(length, max(0, bits - pos))):
            b = b & ~(1 << (pos + k)) | (a >> k & 1) << (pos + k)
        return b

    for kind in ("u32", "s32", "u64", "s64"):
        bits = int(kind[1:])
        check(
            f"bfe.{kind} d, a, b, c", [kind, "u32", "u32"], bits,
            lambda a, p, n, bits=bits, kind=kind: bfe(a, p, n, bits, kind[0] == "s"), [EDGES[bits], places, lengths],
        )  # fmt: skip
    for bits in (32, 64):
        check(
            f"bfi.b{bits} d, a, b, c, e", [f"b{bits}", f"b{bits}", "u32", "u32"], bits,
            lambda a, b, p, n, bits=bits: bfi(a, b, p, n, bits),
        [EDGES[bits][::2], EDGES[bits][::3], places[:5], lengths],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "table"),  # which bytes of {b, a} the two lowest bits of c choose, PTX ISA 9.7.9.7
    [
        ("f4e", (0x3210, 0x4321, 0x5432, 0x6543)),
        ("b4e", (0x5670, 0x6701, 0x7012, 0x0123)),
        ("rc8", (0x0000, 0x1111, 0x2222, 0x3333)),
        ("ecl", (0x3210, 0x3211, 0x3222, 0x3333)),
        ("ecr", (0x0000, 0x1110, 0x2210, 0x3210)),
        ("rc16", (0x1010, 0x3232, 0x1010, 0x3232)),
    ],
)
def test_prmt_modes(mode: str, table: tuple[int, ...]) -> None:
    def expected(a: int, b: int, c: int) -> int:
        both = (b << 32 | a).to_bytes(8, "little")
        return int.from_bytes(bytes(both[table[c % 4] >> 4 * k & 15] for k in range(4)), "little")

    check(f"prmt.b32.{mode} d, a, b, c", ["b32"] * 3, 32, expected, [EDGES[32], EDGES[32][::2], [0, 1, 2, 3, 6]])


def test_prmt_and_lop3() -> None:
    def prmt(a: int, b: int, selector: int) -> int:
        whole = (b << 32 | a).to_bytes(8, "little")
        out = []
        for k in range(4):
            s = selector >> 4 * k & 15
            byte = whole[s & 7]
            out.append((255 if byte & 128 else 0) if s & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    selectors = [0x3210, 0x7654, 0x0123, 0x8888, 0xF7E6, 0x4321, 0xFEDC, 0x9A0B]
    check("prmt.b32 d, a, b, c", ["b32"] * 3, 32, prmt, [EDGES[32], EDGES[32][::2], selectors])
    few = [EDGES[32][::2], EDGES[32][1::2], EDGES[32][::3]]
    check("lop3.b32 d, a, b, c, 0xE8", ["b32"] * 3, 32, lambda a, b, c: a & b | a & c | b & c, few)
    check("lop3.b32 d, a, b, c, 0x96", ["b32"] * 3, 32, lambda a, b, c: a ^ b ^ c, few)


def test_carry_chain() -> None:
    """A 64-bit sum in two halves of 32 bits."""
    low = "mov.b64 {%r4, %r5}, a; mov.b64 {%r6, %r7}, b;"
    check(
        f"{low} add.cc.u32 %r8, %r4, %r6; addc.u32 %r9, %r5, %r7; mov.b64 d, {{%r8, %r9}}",
        ["u64", "u64"],
        64,
        lambda a, b: a + b,
    )
    check(
        f"{low} sub.cc.u32 %r8, %r4, %r6; subc.u32 %r9, %r5, %r7; mov.b64 d, {{%r8, %r9}}",
        ["u64", "u64"],
        64,
        lambda a, b: a - b,
    )


def test_dot_products() -> None:
    def dp4a(a: int, b: int, c: int) -> int:
        return c + sum(signed(a >> 8 * k, 8) * (b >> 8 * k & 255) for k in range(4))

    def dp2a(a: int, b: int, c: int) -> int:
        return c + sum((a >> 16 * k & 0xFFFF) * (b >> 8 * k & 255) for k in range(2))

    few = [EDGES[32][::2], EDGES[32][1::2], EDGES[32][::3]]
    check("dp4a.s32.u32 d, a, b, c", ["b32"] * 3, 32, dp4a, few)
    check("dp2a.lo.u32.u32 d, a, b, c", ["b32"] * 3, 32, dp2a, few)


COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_comparisons(kind: str) -> None:
    for name, oracle in COMPARISONS.items():
        check(
            f"setp.{name}.{kind} %p2, a, b; selp.b32 d, 1, 0, %p2",
            [kind, kind],
            32,
            lambda a, b, oracle=oracle: int(oracle(a, b)),
        )


def test_comparison_combined_with_a_predicate() -> None:
    body = (
        "setp.gt.s32 %p2, b, 0; setp.lt.and.s32 %p3|%p4, a, 5, !%p2; "
        "selp.b32 %r4, 1, 0, %p3; selp.b32 %r5, 2, 0, %p4; or.b32 d, %r4, %r5"
    )
    check(body, ["s32", "s32"], 32, lambda a, b: int(a < 5 and b <= 0) | 2 * int(not a < 5 and b <= 0))


def test_packed_halves() -> None:
    def halves(x: int) -> tuple[int, int]:
        return x & 0xFFFF, x >> 16

    def both(oracle: Callable[[int, int], int], is_signed: bool) -> Callable[[int, int], int]:
        def run(a: int, b: int) -> int:
            out = [
                oracle(*(signed(v, 16) if is_signed else v for v in pair)) & 0xFFFF
                for pair in zip(halves(a), halves(b), strict=True)
            ]
            return out[0] | out[1] << 16

        return run

    check("max.u16x2 d, a, b", ["b32", "b32"], 32, both(max, False))
    check("min.s16x2 d, a, b", ["b32", "b32"], 32, both(min, True))
    check("add.u16x2 d, a, b", ["b32", "b32"], 32, both(lambda a, b: a + b, False))


def test_moves_between_vectors_and_words() -> None:
    check("mov.b32 {%h4, %h5}, a; mov.b32 d, {%h5, %h4}", ["b32"], 32, lambda a: a >> 16 | (a & 0xFFFF) << 16)
    check("mov.b64 {_, %r4}, a; mov.b32 d, %r4", ["b64"], 32, lambda a: a >> 32)
    swap = "{ .reg .b8 w, x, y, z; mov.b32 {w, x, y, z}, a; mov.b32 d, {z, y, x, w}; }"
    check(swap, ["b32"], 32, lambda a: int.from_bytes(a.to_bytes(4, "little"), "big"))


def test_bit_masks() -> None:
    check(
        "bmsk.clamp.b32 d, a, b",
        ["u32", "u32"],
        32,
        lambda a, b: ((1 << min(b, 32)) - 1) << a if a < 32 else 0,
        [COUNTS, COUNTS],
    )
    check("bmsk.wrap.b32 d, a, b", ["u32", "u32"], 32, lambda a, b: ((1 << (b & 31)) - 1) << (a & 31), [COUNTS, COUNTS])
    check(
        "szext.clamp.s32 d, a, b",
        ["u32", "u32"],
        32,
        lambda a, n: signed(a, min(n, 32)) if n else 0,
        [EDGES[32], [0, 1, 7, 31, 32, 99]],
    )
    check("sad.s32 d, a, b, c", ["s32", "s32", "u32"], 32, lambda a, b, c: abs(a - b) + c, [EDGES[32][::2]] * 3)
