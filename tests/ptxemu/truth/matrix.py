"""Micro-kernels of the matrix and asynchronous units: fragments, mma.sync, wgmma, cp.async, bulk copies, st.async."""

# ruff: noqa: E501, E731  (a row of PTX is one line; arguments are bound early)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptxemu.tensor import formats, mma_sync
from tests.ptxemu.tensor.images import hopper_fields, operand, small
from tests.ptxemu.tensor.kernels import BARRIER, aligned, copy_in, copy_out, kernel, wait
from tests.ptxemu.truth.micro import Micro

Arrays = list[NDArray[np.generic]]
ANY = -1  # a spread: any bits
_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}


def _lanes(first: int, count: int, parameter: str, access: str, threads: int = 32) -> str:
    """Loads or stores registers of all threads, (registers, threads) words."""
    lines = [
        f"ld.param.u64 %rd50, [{parameter}]; cvt.u64.u32 %rd51, %r0; shl.b64 %rd51, %rd51, 2; add.u64 %rd50, %rd50, %rd51;"
    ]
    for i in range(count):
        place, register = f"[%rd50+{4 * threads * i}]", f"%r{first + i}"
        lines.append(f"ld.global.u32 {register}, {place};" if access == "ld" else f"st.global.u32 {place}, {register};")
    return "\n".join(lines)


def _names(first: int, count: int) -> str:
    return ", ".join(f"%r{first + i}" for i in range(count))


def _words(seed: int, *shape: int) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint64).astype(np.uint32)


def _values(seed: int, kind: str, shape: tuple[int, ...], spread: int = 0) -> NDArray[Any]:
    """Numbers that a format holds: of ordinary size, of exponents up to `spread` apart, or any finite (ANY)."""
    rng = np.random.default_rng(seed)
    if kind in {"s8", "u8"}:
        return rng.integers(*((-128, 128) if kind == "s8" else (0, 256)), shape)
    if spread == ANY:
        codes = rng.integers(0, 1 << formats.ELEMENT_BITS[kind], shape, np.uint64).astype(np.uint32)
        values = formats.decode(kind, codes)
        return np.where(np.isfinite(values), values, 1.0)
    normal = rng.normal(size=shape)
    if spread:
        normal = normal * 2.0 ** rng.integers(-spread, 1, shape) * (rng.random(shape) < 0.8)
    if kind == "tf32":
        return (normal.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return np.asarray(formats.decode(kind, np.asarray(formats.encode(kind, normal)).astype(np.uint32)), np.float64)


def _codes(seed: int, kind: str, count: int, spread: int = 0) -> NDArray[np.uint32]:
    """Random values of a format, packed into words."""
    bits = formats.ELEMENT_BITS[kind]
    values = _values(seed, kind, (count * 32 // bits,), spread)
    if kind in {"s8", "u8"}:
        return (values & 255).astype(np.uint8).view(np.uint32)
    if spread == ANY:  # infinities and NaNs among them
        special = {
            "f16": (0x7C00, 0xFC00, 0x7E01),
            "bf16": (0x7F80, 0xFF80, 0x7FC1),
            "e5m2": (0x7C, 0xFC, 0x7F),
            "e4m3": (0x7F, 0xFF),
        }
        rng = np.random.default_rng(seed + 1)
        made = (
            values.astype(np.float32).view(np.uint32)
            if kind == "tf32"
            else np.asarray(formats.encode(kind, values)).astype(f"u{bits // 8}")
        )
        edges = np.array(special.get(kind, (0x7F800000, 0xFF800000, 0x7FC02000)), made.dtype)
        return np.where(rng.random(made.shape) < 0.01, rng.choice(edges, made.shape), made).view(np.uint32)
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)
    return np.asarray(formats.encode(kind, values)).astype(f"u{bits // 8}").view(np.uint32)


def _fragments() -> Iterator[Micro]:
    rows = "mov.u32 %r1, buf; and.b32 %r2, %r0, {}; shl.b32 %r2, %r2, 4; add.u32 %r1, %r1, %r2;"
    for count in (1, 2, 4):
        shared = f".shared .align 128 .b8 buf[{128 * count}];"
        for trans in ("", ".trans"):
            start = rows.format(8 * count - 1)
            body = f"""{copy_in("buf", 128 * count)} {start}
  ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{_names(100, count)}}}, [%r1]; {_lanes(100, count, "out", "st")}"""
            data: Callable[..., Arrays] = lambda n=count: [_words(n, n, 32), np.zeros((n, 32), np.uint32)]
            ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=shared)
            yield Micro(f"ldmatrix_x{count}{trans}", ptx, data, (1,), group="fragment")
            body = f"""{_lanes(100, count, "src", "ld")} {start}
  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{_names(100, count)}}}; bar.sync 0; {copy_out("buf", 128 * count)}"""
            ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=shared)
            yield Micro(f"stmatrix_x{count}{trans}", ptx, data, (1,), group="fragment")
    body = (
        f"{_lanes(99, 1, 'src', 'ld')} movmatrix.sync.aligned.m8n8.trans.b16 %r100, %r99; {_lanes(100, 1, 'out', 'st')}"
    )
    ptx = kernel(body, params=".param .u64 src, .param .u64 out")
    yield Micro("movmatrix", ptx, lambda: [_words(9, 32), np.zeros(32, np.uint32)], (1,), group="fragment")


def _mma_one(kind: str, depth: int, d: str, *, b_kind: str = "", tail: str = "", spread: int = 0) -> Micro:
    bits = formats.ELEMENT_BITS[kind]
    a, b = 16 * depth * bits // 1024, 8 * depth * bits // 1024
    count = 2 if d == "f16" else 4
    body = f"""{_lanes(110, a + b, "src", "ld")} {_lanes(100, count, "acc", "ld")}
  mma.sync.aligned.m16n8k{depth}.row.col{tail}.{d}.{kind}.{b_kind or kind}.{d} {{{_names(100, count)}}}, {{{_names(110, a)}}},
    {{{_names(110 + a, b)}}}, {{{_names(100, count)}}}; {_lanes(100, count, "acc", "st")}"""

    def data() -> Arrays:
        left, right = _codes(a + b, kind, 32 * a, spread), _codes(b, b_kind or kind, 32 * b, spread)
        return [np.concatenate([left, right]), _start(count, 32, d, spread)]

    name = f"mma_{kind}{b_kind and '_' + b_kind}_k{depth}_{d}{tail.replace('.', '_')}{SPREADS.get(spread, '_spread')}"
    ptx = kernel(body, params=".param .u64 src, .param .u64 acc")
    return Micro(name, ptx, data, (1,), group="integer mma" if d == "s32" else "mma")


def _start(count: int, threads: int, d: str, spread: int = 0) -> NDArray[Any]:
    """Accumulators: registers of all threads."""
    rng = np.random.default_rng(6)
    if d == "f16":
        return rng.normal(size=(count, 2 * threads)).astype(np.float16)
    if d == "s32":
        near = rng.integers(-(1 << 31), (1 << 31) - 1, (count, threads))
        return np.where(rng.random((count, threads)) < 0.5, near, near >> 20).astype(np.int32)
    if spread == ANY:
        return rng.integers(0, 1 << 32, (count, threads), np.uint64).astype(np.uint32).view(np.float32)
    values = rng.normal(size=(count, threads)) * 2.0 ** rng.integers(-2 * spread, 1, (count, threads))
    return np.asarray(values.astype(np.float32))


SPREADS = {0: "", ANY: "_any"}
SPREAD = {"f16": 10, "bf16": 30, "tf32": 30, "e4m3": 7, "e5m2": 14}


def _mma_sync() -> Iterator[Micro]:
    for kind, depths in mma_sync.DEPTHS.items():
        for depth in depths:
            yield _mma_one(kind, depth, "s32" if kind in {"s8", "u8"} else "f32")
            if kind in SPREAD:
                yield _mma_one(kind, depth, "f32", spread=SPREAD[kind])
                yield _mma_one(kind, depth, "f32", spread=ANY)
    for depth in (8, 16):
        yield _mma_one("f16", depth, "f16")
    for kind in ("e4m3", "e5m2"):
        yield _mma_one(kind, 32, "f16")
        yield _mma_one(kind, 16, "f16")
    yield _mma_one("e4m3", 32, "f32", b_kind="e5m2")
    yield _mma_one("e5m2", 32, "f32", b_kind="e4m3")
    for kind, other in (("s8", "u8"), ("u8", "s8"), ("s8", "s8")):
        yield _mma_one(kind, 32, "s32", b_kind=other, tail=".satfinite")
    body = """ld.param.u64 %rd50, [src]; mad.wide.u32 %rd50, %r0, 8, %rd50; ld.param.u64 %rd51, [acc]; mad.wide.u32 %rd51, %r0, 16, %rd51;
  ld.global.b64 %rd1, [%rd50]; ld.global.b64 %rd2, [%rd50+256]; ld.global.v2.b64 {%rd3, %rd4}, [%rd51]; .reg .f64 %d<8>;
  mov.b64 %d1, %rd1; mov.b64 %d2, %rd2; mov.b64 %d3, %rd3; mov.b64 %d4, %rd4;
  mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d3, %d4}, {%d1}, {%d2}, {%d3, %d4}; st.global.v2.f64 [%rd51], {%d3, %d4};"""
    ptx = kernel(body, params=".param .u64 src, .param .u64 acc")
    make: Callable[..., Arrays] = lambda: [
        np.random.default_rng(7).normal(size=64),
        np.random.default_rng(8).normal(size=64),
    ]
    yield Micro("mma_f64", ptx, make, (1,), group="mma")


@dataclass(frozen=True)
class Form:
    """A wgmma instruction and its data.

    Attributes:
        n, kind, d, mode: Columns, type of A, type of D, swizzle of both operands.
        b_kind: Type of B where it is another one.
        a_mn, b_mn: The operand is transposed in memory.
        registers: A comes from registers.
        negate: Of A and B.
        keep: D is added to.
        tail: More modifiers.
        spread: Exponents of the numbers.
        plain: Small integers, so that sums are exact and the recording is small.
        steps: Instructions along K, each with its descriptors moved on.
        rows: Rows of 128 bytes by which A's swizzle pattern is moved, said in the descriptor's base offset.
        gap: Bytes added to both offsets of the descriptors.
    """

    n: int
    kind: str
    d: str = "f32"
    mode: str = "128B"
    b_kind: str = ""
    a_mn: bool = False
    b_mn: bool = False
    registers: bool = False
    negate: tuple[int, int] = (1, 1)
    keep: bool = True
    tail: str = ""
    spread: int = 0
    plain: bool = False
    steps: int = 1
    rows: int = 0
    gap: int = 0

    @property
    def name(self) -> str:
        """Unique among the forms."""
        given = {
            "b_kind": "",
            "a_mn": "ta",
            "b_mn": "tb",
            "keep": "new",
            "tail": "",
            "spread": SPREADS.get(self.spread, "spread").strip("_"),
            "plain": "plain",
        }
        parts = [f"wgmma_n{self.n}_{self.kind}", self.b_kind, self.d, self.mode, "RS" if self.registers else "SS"]
        for key, word in given.items():
            if key not in {"b_kind", "tail"} and getattr(self, key) != getattr(type(self), key):
                parts.append(word)
        parts += (
            [f"x{self.steps}"] * (self.steps > 1) + [f"base{self.rows}"] * (self.rows > 0) + ["gap"] * (self.gap > 0)
        )
        parts += ["negate" + "".join("pm"[v < 0] for v in self.negate)] * (self.negate != (1, 1)) + [
            self.tail.strip(".")
        ]
        return "_".join(part for part in parts if part)

    def matrix(self, which: str) -> tuple[NDArray[np.uint8], int, int]:
        """Image of A or B in shared memory, its descriptor's fields, what is added to the descriptor at each step."""
        kind = self.kind if which == "a" else self.b_kind or self.kind
        mn = self.a_mn if which == "a" else self.b_mn
        count, depth = 64 if which == "a" else self.n, _DEPTH[self.kind] * self.steps
        if self.plain:
            values = small(np.random.default_rng(count + ord(which)), kind, (count, depth))
        else:
            values = _values(count + ord(which), kind, (count, depth), self.spread)
        image, leading, stride = operand(kind, values, self.mode, mn_major=mn, spread=self.gap)
        fields = hopper_fields(self.mode, leading, stride)
        if which == "a" and self.rows:
            image = np.concatenate([np.zeros(128 * self.rows, np.uint8), image])
            fields |= self.rows << 49
        step = 2 * (leading if self.mode == "none" else stride if mn else 16)  # two chunks, or two groups of 8 along K
        return image, fields, step >> 4

    def micro(self) -> Micro:
        """The kernel."""
        count, depth, whole = self.n // (4 if self.d == "f16" else 2), _DEPTH[self.kind], self.d == "s32"
        (a_image, a_fields, a_step), (b_image, b_fields, b_step) = self.matrix("a"), self.matrix("b")
        scale = "" if whole else f", {self.negate[0]}, {self.negate[1]}"
        if self.kind in {"f16", "bf16"}:
            scale += f", {int(self.b_mn)}" if self.registers else f", {int(self.a_mn)}, {int(self.b_mn)}"

        def data() -> Arrays:
            words = _codes(self.n, self.kind, 512, self.spread) if self.registers else self.matrix("a")[0]
            start = _start(count, 128, self.d, self.spread)
            return [words, self.matrix("b")[0], np.zeros_like(start) if self.plain else start]

        def descriptor(register: str, symbol: str, fields: int) -> str:
            return f"mov.u32 %r10, {symbol}; shr.u32 %r10, %r10, 4; cvt.u64.u32 {register}, %r10; or.b64 {register}, {register}, {fields:#x};"

        load = _lanes(240, 4, "asrc", "ld", 128) if self.registers else copy_in("abuf", a_image.size, "asrc", 128)
        a_text = f"{{{_names(240, 4)}}}" if self.registers else "%rd1"
        body = f"""{load} {copy_in("bbuf", b_image.size, "bsrc", 128)} {_lanes(100, count, "acc", "ld", 128)}
  {"" if self.registers else descriptor("%rd1", f"abuf+{128 * self.rows}", a_fields)} {descriptor("%rd2", "bbuf", b_fields)}
  setp.{"eq" if self.keep else "ne"}.u32 %p1, 0, 0; wgmma.fence.sync.aligned;
"""
        for step in range(self.steps):
            if step:
                body += f"add.u64 %rd1, %rd1, {a_step}; add.u64 %rd2, %rd2, {b_step}; setp.eq.u32 %p1, 0, 0;\n"
            body += f"""  wgmma.mma_async.sync.aligned.m64n{self.n}k{depth}{self.tail}.{self.d}.{self.kind}.{self.b_kind or self.kind} {{{_names(100, count)}}}, {a_text}, %rd2, %p1{scale};
"""
        body += (
            f"wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {_lanes(100, count, 'acc', 'st', 128)}"
        )
        shared = f".shared .align 1024 .b8 abuf[{a_image.size}]; .shared .align 1024 .b8 bbuf[{b_image.size}];"
        ptx = kernel(body, params=".param .u64 asrc, .param .u64 bsrc, .param .u64 acc", shared=shared, threads=128)
        return Micro(self.name, ptx, data, (2,), block=128, group="integer mma" if whole or self.plain else "mma")


def _forms() -> Iterator[Form]:
    modes = ("none", "32B", "64B", "128B")
    for kind in _DEPTH:
        d = "s32" if kind in {"s8", "u8"} else "f32"
        yield Form(64, kind, d)
        yield Form(16, kind, d, registers=True)
        for mode in modes[:3]:
            yield Form(32, kind, d, mode, plain=True)
        if kind in SPREAD:
            yield Form(32, kind, spread=SPREAD[kind])
            yield Form(16, kind, spread=SPREAD[kind], registers=True)
            yield Form(16, kind, spread=ANY, registers=True)
            yield Form(16, kind, steps=2, spread=SPREAD[kind])
        if kind in {"f16", "e4m3", "e5m2"}:
            yield Form(16, kind, "f16", spread=3)
            yield Form(16, kind, "f16", registers=True)
        if kind in {"f16", "bf16"}:
            for mode in modes:
                for a_mn, b_mn in ((True, False), (False, True), (True, True)):
                    yield Form(64, kind, "f32", mode, a_mn=a_mn, b_mn=b_mn, plain=True)
                yield Form(128, kind, "f32", mode, b_mn=True, registers=True, plain=True)
    for n in (8, 24, 40, 80, 120, 136, 192, 248, 256):
        yield Form(n, "f16", plain=True)
        yield Form(n, "e4m3", "f16", registers=True, plain=True)
    yield Form(8, "f16", mode="none")
    yield Form(96, "f16", "f16", "64B")
    yield Form(64, "f16", mode="128B", a_mn=True, b_mn=True)
    for mode in modes:
        yield Form(32, "f16", "f32", mode, plain=True, gap=256)
        yield Form(128, "bf16", "f32", mode, a_mn=True, b_mn=True, plain=True, gap=1024)
    for negate in ((-1, 1), (1, -1), (-1, -1)):
        yield Form(16, "bf16", negate=negate)
        yield Form(16, "f16", "f16", negate=negate, registers=True)
    for kind in ("f16", "tf32", "e5m2", "s8"):
        yield Form(16, kind, "s32" if kind == "s8" else "f32", keep=False)
        yield Form(16, kind, "s32" if kind == "s8" else "f32", steps=4)
    for mode in ("none", "128B"):
        yield Form(64, "f16", "f32", mode, a_mn=True, b_mn=True, plain=True, steps=4)
    for kind, other in (("e4m3", "e5m2"), ("e5m2", "e4m3"), ("s8", "u8"), ("u8", "s8")):
        yield Form(16, kind, "s32" if kind[0] in "su" else "f32", b_kind=other)
    yield Form(16, "s8", "s32", tail=".satfinite")
    yield Form(16, "u8", "s32", tail=".satfinite", registers=True)
    for rows in (1, 3, 6):
        yield Form(16, "f16", rows=rows, plain=True)
    yield Form(16, "f16", mode="64B", rows=2, plain=True)


def _wgmma() -> Iterator[Micro]:
    for form in _forms():
        yield form.micro()


def _copies() -> Iterator[Micro]:
    shared = ".shared .align 128 .b8 buf[1024]; .shared .align 8 .b8 bar[8];"
    two = ".param .u64 src, .param .u64 out"
    for size in (4, 8, 16):
        body = f"""
  mov.u32 %r1, buf; mul.lo.u32 %r2, %r0, {size}; add.u32 %r1, %r1, %r2;
  ld.param.u64 %rd1, [src]; cvt.u64.u32 %rd2, %r2; add.u64 %rd1, %rd1, %rd2; rem.u32 %r3, %r0, {size + 1};
  cp.async.{"cg" if size == 16 else "ca"}.shared.global [%r1], [%rd1], {size}, %r3;
  cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; {copy_out("buf", 32 * size)}"""
        data: Callable[..., Arrays] = lambda n=size: [aligned(_words(n, 8 * n)), np.zeros(8 * n, np.uint32)]
        yield Micro(f"cp_async_{size}", kernel(body, params=two, shared=shared), data, (1,), group="copy")
    body = f"""{BARRIER} mov.u32 %r1, buf; ld.param.u64 %rd1, [src];
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 512;
  @%p14 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 512, [%r280];
  {wait()} {copy_out("buf", 512)}"""
    yield Micro(
        "bulk_load",
        kernel(body, params=two, shared=shared),
        lambda: [aligned(_words(1, 128)), np.zeros(128, np.uint32)],
        (1,),
        group="copy",
    )
    for name, kinds in REDUCTIONS.items():
        for kind in kinds.split():
            noftz = ".noftz" if name == "add" and kind in {"f16", "bf16"} else ""
            body = f"""{copy_in("buf", 512)} mov.u32 %r1, buf; ld.param.u64 %rd1, [out]; setp.eq.u32 %p1, %r0, 0;
  @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.{name}{noftz}.{kind} [%rd1], [%r1], 512;
  @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
            yield Micro(
                f"bulk_{name}_{kind}",
                kernel(body, params=two, shared=shared),
                lambda k=kind: [_reducible(2, k), aligned(_reducible(3, k))],  # type: ignore[misc]
                (1,),
                group="copy",
            )
    body = f"""{copy_in("buf", 512)} mov.u32 %r1, buf; ld.param.u64 %rd1, [out]; setp.eq.u32 %p1, %r0, 0;
  @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 496;
  @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    yield Micro(
        "bulk_store",
        kernel(body, params=two, shared=shared),
        lambda: [_words(1, 128), aligned(_words(2, 128))],
        (1,),
        group="copy",
    )
    load = f"""{BARRIER} mov.u32 %r1, buf; mul.lo.u32 %r2, %r0, 16; add.u32 %r1, %r1, %r2; setp.eq.u32 %p1, 0, 0;
  ld.param.u64 %rd1, [src]; cvt.u64.u32 %rd2, %r2; add.u64 %rd1, %rd1, %rd2; and.b32 %r3, %r0, 1; setp.eq.u32 %p2, %r3, 0;"""
    ends = {
        "noinc": "cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.mbarrier.arrive.noinc.shared.b64 [%r280];",
        "arrive": "cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.mbarrier.arrive.shared.b64 [%r280]; mbarrier.arrive.shared.b64 _, [%r280];",
    }
    for name, end in ends.items():
        body = f"{load.replace('[%r280], 1;', '[%r280], 32;')} {end} {wait()} {copy_out('buf', 512)}"
        yield Micro(
            f"cp_async_{name}",
            kernel(body, params=two, shared=shared),
            lambda: [aligned(_words(4, 128)), np.zeros(128, np.uint32)],
            (1,),
            group="copy",
        )
    body = f"{load} cp.async.ca.shared.global [%r1], [%rd1], 16, %p2; cp.async.wait_all; bar.sync 0; {copy_out('buf', 512)}"
    yield Micro(
        "cp_async_ignore",
        kernel(body, params=two, shared=shared),
        lambda: [aligned(_words(4, 128)), np.zeros(128, np.uint32)],
        (1,),
        group="copy",
    )


REDUCTIONS = {
    "add": "u32 s32 u64 f16 bf16 f32 f64", "min": "u32 s32 u64 s64 f16 bf16", "max": "u32 s32 u64 s64 f16 bf16",
    "inc": "u32", "dec": "u32", "and": "b32 b64", "or": "b32 b64", "xor": "b32 b64",
}  # fmt: skip


def _reducible(seed: int, kind: str) -> NDArray[Any]:
    """Elements with edges among them, 512 bytes."""
    rng = np.random.default_rng(seed)
    edges: dict[str, tuple[int, ...]] = {
        "f16": (0x7C00, 0xFC00, 0x7E01, 0x8000, 0, 0x7BFF, 1, 0x8001),
        "bf16": (0x7F80, 0xFF80, 0x7FC1, 0x8000, 0, 0x7F7F, 1, 0x8001),
        "f32": (0x7F800000, 0xFF800000, 0x7FC00001, 1 << 31, 0, 0x7F7FFFFF, 1, 0x80000001),
        "f64": (0x7FF << 52, 0xFFF << 52, 0x7FF8000000000001, 1 << 63, 0, 0x7FEFFFFFFFFFFFFF, 1, (1 << 63) + 1),
    }
    if kind not in edges:
        words = _words(seed, 128)
        words[rng.random(128) < 0.3] >>= np.uint32(29)
        return words
    if kind == "f64":
        codes: NDArray[Any] = rng.normal(size=64).view(np.uint64)
    else:
        codes = (
            rng.normal(size=128).astype(np.float32).view(np.uint32)
            if kind == "f32"
            else _codes(seed, kind, 128).view(np.uint16)
        )
    return np.where(rng.random(len(codes)) < 0.25, rng.choice(np.array(edges[kind], codes.dtype), len(codes)), codes)


CLUSTER_REDUCTIONS = {
    "add": "u32 s32 u64", "min": "u32 s32", "max": "u32 s32", "inc": "u32", "dec": "u32", "and": "b32", "or": "b32", "xor": "b32",
}  # fmt: skip


def _to_the_other() -> Iterator[Micro]:
    """Each CTA of a pair sends 128 bytes to the other one, which waits for them on its barrier."""
    bulk = "@%p14 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [%r3], 128, [%r9];"
    sends = {
        "st_async": "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r7], %r8, [%r9];",
        "red_async": "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r7], %r8, [%r9];",
        "bulk_to_cluster": bulk,
    }
    for name, kinds in CLUSTER_REDUCTIONS.items():
        for kind in kinds.split():
            sends[f"bulk_{name}_{kind}_to_cluster"] = bulk.replace("cp.async.bulk", "cp.reduce.async.bulk").replace(
                "bytes", f"bytes.{name}.{kind}"
            )
    for name, kinds in CLUSTER_REDUCTIONS.items():
        for kind in kinds.split():
            if kind != "u64":
                sends[f"red_async_{name}_{kind}"] = sends["red_async"].replace("add.u32", f"{name}.{kind}")
    sends["st_async_v2"] = (
        "@%p12 st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r7], {%r8, %r0}, [%r9];"
    )
    sends["st_async_b64"] = "@%p12 st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%r7], %rd9, [%r9];"
    shared = ".shared .align 128 .b8 buf[1024]; .shared .align 8 .b8 bar[8]; .shared .align 16 .b8 own[128];"
    for name, send in sends.items():
        body = f"""{BARRIER}
  mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r3, own; mov.u32 %r4, buf; shl.b32 %r5, %r0, 2;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 128;
  mapa.shared::cluster.u32 %r6, %r4, %r2; add.u32 %r7, %r6, %r5; mapa.shared::cluster.u32 %r9, %r280, %r2;
  mad.lo.u32 %r8, %r1, 100, %r0; add.u32 %r10, %r3, %r5; st.shared.u32 [%r10], %r8;
  add.u32 %r10, %r4, %r5; mad.lo.u32 %r11, %r0, 13, 7; {"st.shared.u32 [%r10], %r11;" if "red" in name or "bulk_" in name else ""}
  and.b32 %r12, %r0, 1; setp.eq.u32 %p12, %r12, 0; mov.b64 %rd9, {{%r8, %r11}};
  fence.proxy.async.shared::cta; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  {send} {wait()}
  ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r1, 128, %rd60;
""" + copy_out("buf", 128).replace("ld.param.u64 %rd60, [out];", "")
        body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        ptx = kernel(body, params=".param .u64 out", shared=shared)
        yield Micro(name, ptx, lambda: [np.zeros((2, 32), np.uint32)], (0,), grid=2, cluster=2, group="copy")


def _bulk_multicast() -> Iterator[Micro]:
    """CTA 2 of four copies bytes to those of a mask."""
    body = f"""{BARRIER} mov.u32 %r2, %cluster_ctarank; mov.u32 %r1, buf; ld.param.u64 %rd1, [src];
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 512; setp.eq.and.u32 %p1, %r2, 2, %p14; mov.u16 %h1, 11;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; setp.eq.u32 %p2, %r2, 2; @%p2 bra ISSUE;
W_LOOP: mbarrier.try_wait.parity.shared.b64 %p13, [%r280], 0; @!%p13 bra W_LOOP;
  ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r2, 512, %rd60;
{copy_out("buf", 512).replace("ld.param.u64 %rd60, [out];", "")} bra DONE;
ISSUE:
  @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1], 512, [%r280], %h1;
DONE: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    shared = ".shared .align 128 .b8 buf[512]; .shared .align 8 .b8 bar[8];"
    ptx = kernel(body, params=".param .u64 src, .param .u64 out", shared=shared)
    arrays: Callable[..., Arrays] = lambda: [aligned(_words(1, 128)), np.zeros((4, 128), np.uint32)]
    yield Micro("bulk_multicast", ptx, arrays, (1,), grid=4, cluster=4, group="copy")


def kernels() -> Iterator[Micro]:
    """All micro-kernels of these units."""
    for group in (_fragments, _mma_sync, _wgmma, _copies, _to_the_other, _bulk_multicast):
        yield from group()
