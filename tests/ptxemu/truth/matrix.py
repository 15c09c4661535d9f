"""Micro-kernels of the matrix and asynchronous units: fragments, mma.sync, wgmma, cp.async, bulk copies, st.async."""

# ruff: noqa: E501, E731  (a row of PTX is one line; arguments are bound early)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptxemu.tensor import formats, mma_sync
from tests.ptxemu.tensor.images import hopper_fields, operand
from tests.ptxemu.tensor.kernels import BARRIER, aligned, copy_in, copy_out, kernel, wait
from tests.ptxemu.truth.micro import Micro

Arrays = list[NDArray[np.generic]]
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


def _values(seed: int, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Numbers of ordinary size that a format holds."""
    rng = np.random.default_rng(seed)
    if kind in {"s8", "u8"}:
        return rng.integers(*((-128, 128) if kind == "s8" else (0, 256)), shape)
    normal = rng.normal(size=shape)
    if kind == "tf32":
        return (normal.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return np.asarray(formats.decode(kind, np.asarray(formats.encode(kind, normal)).astype(np.uint32)), np.float64)


def _codes(seed: int, kind: str, count: int) -> NDArray[np.uint32]:
    """Random values of a format, packed into words."""
    bits = formats.ELEMENT_BITS[kind]
    values = _values(seed, kind, (count * 32 // bits,))
    if kind in {"s8", "u8"}:
        return (values & 255).astype(np.uint8).view(np.uint32)
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


def _mma_sync() -> Iterator[Micro]:
    for kind, depths in mma_sync.DEPTHS.items():
        for depth in depths:
            bits = formats.ELEMENT_BITS[kind]
            a, b = 16 * depth * bits // 1024, 8 * depth * bits // 1024
            whole = kind in {"s8", "u8"}
            d = "s32" if whole else "f32"
            body = f"""{_lanes(110, a + b, "src", "ld")} {_lanes(100, 4, "acc", "ld")}
  mma.sync.aligned.m16n8k{depth}.row.col.{d}.{kind}.{kind}.{d} {{{_names(100, 4)}}}, {{{_names(110, a)}}},
    {{{_names(110 + a, b)}}}, {{{_names(100, 4)}}}; {_lanes(100, 4, "acc", "st")}"""

            def data(kind: str = kind, count: int = a + b, whole: bool = whole) -> Arrays:
                start = np.random.default_rng(5).normal(size=(4, 32)).astype(np.float32)
                acc = (start * 1000).astype(np.int32) if whole else start
                return [_codes(count, kind, 32 * count), acc]

            ptx = kernel(body, params=".param .u64 src, .param .u64 acc")
            yield Micro(f"mma_{kind}_k{depth}", ptx, data, (1,), group="integer mma" if whole else "mma")


def _wgmma_one(n: int, kind: str, d: str, mode: str, a_mn: bool, b_mn: bool, registers: bool) -> Micro:
    count = n // (4 if d == "f16" else 2)

    def images() -> tuple[Any, Any, int, int]:
        a, b = _values(n, kind, (64, _DEPTH[kind])), _values(n + 1, kind, (n, _DEPTH[kind]))
        a_image, a_leading, a_stride = operand(kind, a, mode, mn_major=a_mn)
        b_image, b_leading, b_stride = operand(kind, b, mode, mn_major=b_mn)
        return a_image, b_image, hopper_fields(mode, a_leading, a_stride), hopper_fields(mode, b_leading, b_stride)

    a_image, b_image, a_fields, b_fields = images()
    whole = d == "s32"
    tail = "" if whole else ", 1, 1"
    if kind in {"f16", "bf16"}:
        tail += f", {int(b_mn)}" if registers else f", {int(a_mn)}, {int(b_mn)}"

    def data() -> Arrays:
        acc = np.random.default_rng(6).normal(size=(count, 256 if d == "f16" else 128))
        start = acc.astype(np.float16) if d == "f16" else (acc * 99).astype(np.int32) if whole else acc.astype("f4")
        first = _codes(n, kind, 512) if registers else images()[0]
        return [first, images()[1], start]

    def descriptor(register: str, symbol: str, fields: int) -> str:
        return f"mov.u32 %r10, {symbol}; shr.u32 %r10, %r10, 4; cvt.u64.u32 {register}, %r10; or.b64 {register}, {register}, {fields:#x};"

    load = _lanes(240, 4, "asrc", "ld", 128) if registers else copy_in("abuf", a_image.size, "asrc", 128)
    a_text = f"{{{_names(240, 4)}}}" if registers else "%rd1"
    body = f"""{load} {copy_in("bbuf", b_image.size, "bsrc", 128)} {_lanes(100, count, "acc", "ld", 128)}
  {"" if registers else descriptor("%rd1", "abuf", a_fields)} {descriptor("%rd2", "bbuf", b_fields)}
  setp.eq.u32 %p1, 0, 0; wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n{n}k{_DEPTH[kind]}.{d}.{kind}.{kind} {{{_names(100, count)}}}, {a_text}, %rd2, %p1{tail};
  wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {_lanes(100, count, "acc", "st", 128)}"""
    shared = f".shared .align 1024 .b8 abuf[{a_image.size}]; .shared .align 1024 .b8 bbuf[{b_image.size}];"
    ptx = kernel(body, params=".param .u64 asrc, .param .u64 bsrc, .param .u64 acc", shared=shared, threads=128)
    name = f"wgmma_n{n}_{kind}_{d}_{mode}_{'RS' if registers else 'SS'}{'_ta' * a_mn}{'_tb' * b_mn}"
    return Micro(name, ptx, data, (2,), block=128, group="integer mma" if whole else "mma")


def _wgmma() -> Iterator[Micro]:
    for kind in _DEPTH:
        d = "s32" if kind in {"s8", "u8"} else "f32"
        yield _wgmma_one(64, kind, d, "128B", False, False, False)
        yield _wgmma_one(16, kind, d, "128B", False, False, True)
    yield _wgmma_one(8, "f16", "f32", "none", False, False, False)
    yield _wgmma_one(96, "f16", "f16", "64B", False, False, False)
    for mode in ("none", "32B", "64B", "128B"):
        yield _wgmma_one(64, "f16", "f32", mode, True, True, False)


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
    for name, kinds in (("add", "u32 s32 u64 f16 bf16"), ("min", "u32 s32 f16"), ("max", "s32 bf16"), ("xor", "b32")):
        for kind in kinds.split():
            noftz = ".noftz" if name == "add" and "f" in kind else ""
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


def _reducible(seed: int, kind: str) -> NDArray[np.uint32]:
    return _codes(seed, kind, 128) if kind in {"f16", "bf16"} else _words(seed, 128)


def _to_the_other() -> Iterator[Micro]:
    """Each CTA of a pair sends 128 bytes to the other one, which waits for them on its barrier."""
    bulk = "@%p14 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [%r3], 128, [%r9];"
    sends = {
        "st_async": "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r7], %r8, [%r9];",
        "red_async": "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r7], %r8, [%r9];",
        "bulk_to_cluster": bulk,
    }
    shared = ".shared .align 128 .b8 buf[1024]; .shared .align 8 .b8 bar[8]; .shared .align 16 .b8 own[128];"
    for name, send in sends.items():
        body = f"""{BARRIER}
  mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; mov.u32 %r3, own; mov.u32 %r4, buf; shl.b32 %r5, %r0, 2;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], 128;
  mapa.shared::cluster.u32 %r6, %r4, %r2; add.u32 %r7, %r6, %r5; mapa.shared::cluster.u32 %r9, %r280, %r2;
  mad.lo.u32 %r8, %r1, 100, %r0; add.u32 %r10, %r3, %r5; st.shared.u32 [%r10], %r8;
  add.u32 %r10, %r4, %r5; mov.u32 %r11, 7; {"st.shared.u32 [%r10], %r11;" if name == "red_async" else ""}
  fence.proxy.async.shared::cta; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  {send} {wait()}
  ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r1, 128, %rd60;
""" + copy_out("buf", 128).replace("ld.param.u64 %rd60, [out];", "")
        body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        ptx = kernel(body, params=".param .u64 out", shared=shared)
        yield Micro(name, ptx, lambda: [np.zeros((2, 32), np.uint32)], (0,), grid=2, cluster=2, group="copy")


def kernels() -> Iterator[Micro]:
    """All micro-kernels of these units."""
    for group in (_fragments, _mma_sync, _wgmma, _copies, _to_the_other):
        yield from group()
