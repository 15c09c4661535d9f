"""Micro-kernels of TMA: tensor loads, stores and reductions, multicast, changes to tensor maps."""

# ruff: noqa: E501  (a row of PTX is one line)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptxemu.tensor import tensormap
from tests.ptxemu.tensor.kernels import BARRIER, TYPE, aligned, copy_in, copy_out, kernel, wait
from tests.ptxemu.truth.micro import Map, Micro

Arrays = list[NDArray[np.generic]]
Box = tuple[int, ...]
SWIZZLES = ("none", "32B", "64B", "128B")  # Hopper has neither other atoms of the 128B swizzle
TYPES = tuple(kind for kind in TYPE if not kind.startswith("16u"))  # nor sub-byte types
_SPAN = {"none": 64, "32B": 32, "64B": 64, "128B": 128}


def _map(kind: str, box: Box, *, swizzle: str = "none", steps: Box = (), nan: bool = False) -> Map:
    """A map over argument 0: a little more than two boxes in each dimension, rows padded by 16 bytes."""
    bits = tensormap.TYPES[TYPE[kind] & 15].bits
    sizes = (2 * box[0] + 3, *(2 * b + 1 for b in box[1:]))
    strides, total = [], -(-sizes[0] * bits // 8)
    for size in sizes[1:]:
        total = -(-total // 32) * 32 + 32
        strides.append(total)
        total *= size
    return Map(0, kind, sizes, tuple(strides), box, swizzle, steps, nan)


def _tensor(m: Map) -> NDArray[np.uint8]:
    """The bytes under a map: floats with every kind of edge among them, counters for the rest; padding is 0xEE."""
    size = max(m.strides[-1] * m.sizes[-1] if m.strides else m.sizes[0] * 8, 64)
    out = aligned(np.full(size, 0xEE, np.uint8))
    count = size // 4
    if "f32" in m.kind:
        rng = np.random.default_rng(size)
        out.view(np.uint32)[:] = rng.choice(rng.integers(0, 1 << 32, 64, np.uint64).astype(np.uint32), count)
        edges = (
            0,
            1 << 31,
            1,
            0x80001000,
            0x7F800000,
            0xFF800000,
            0x7FC00001,
            0x7F800001,
            0x3F801000,
            0x3F803000,
            0x7F7FFFFF,
        )
        out.view(np.uint32)[: 11 * (count // 11)] = np.where(
            rng.random(11 * (count // 11)) < 0.3,
            np.resize(np.array(edges, np.uint32), 11 * (count // 11)),
            out.view(np.uint32)[: 11 * (count // 11)],
        )
    else:
        out[:] = (np.arange(size) * 7 + np.arange(size) // 256 * 29) & 255
    return out


def _box_bytes(m: Map) -> int:
    steps = (1, *m.steps[1:]) if m.steps else (1,) * len(m.box)  # that of dimension 0 is ignored
    counts = [-(-b // s) for b, s in zip(m.box, steps, strict=True)]
    return int(np.prod(counts)) * tensormap.TYPES[TYPE[m.kind] & 15].shared_bits // 8


def _corners(m: Map) -> list[Box]:
    """Coordinates inside, before, behind and beyond a tensor's edges; dimension 0 starts at multiples of 16 bytes."""
    step = 16 * 8 // tensormap.TYPES[TYPE[m.kind] & 15].bits
    inside = tuple(b // 2 // step * step if k == 0 else 1 for k, b in enumerate(m.box))
    before = tuple(-step if k == 0 else -2 for k in range(len(m.box)))
    behind = tuple(
        (n - b // 2) // step * step if k == 0 else n - 1 for k, (n, b) in enumerate(zip(m.sizes, m.box, strict=True))
    )
    beyond = tuple(n // step * step + step if k == 0 else n + 5 for k, n in enumerate(m.sizes))
    return [inside, before, behind, beyond]


def _coordinates(box: Box) -> tuple[str, str]:
    """Text that sets registers to coordinates, and their list."""
    return " ".join(f"mov.b32 %r{100 + i}, {c};" for i, c in enumerate(box)), ", ".join(
        f"%r{100 + i}" for i in range(len(box))
    )


_HEAD = "mov.b64 %rd1, tm; cvta.param.u64 %rd1, %rd1; mov.u32 %r1, buf; setp.eq.u32 %p14, %r0, 0;"
_PARAMETERS = ".param .align 64 .b8 tm[128], .param .u64 tensor"


def _load(name: str, m: Map, boxes: list[Box]) -> Micro:
    """Boxes into shared memory, one behind the other, copied out with what the swizzle made of them."""
    size, rank = _box_bytes(m), len(m.box)
    pitch = -(-size // 1024) * 1024
    total = pitch * len(boxes)
    body = f"{BARRIER} {_HEAD} @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], {size * len(boxes)};\n"
    for box in boxes:
        start, names = _coordinates(box)
        body += f"{start} @%p14 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {{{names}}}], [%r280]; add.u32 %r1, %r1, {pitch};\n"
    if pitch != size:  # what a load leaves of the buffer is not read
        copies = "".join(
            copy_out(f"buf+{k * pitch}", size)
            .replace("[out];", f"[out]; add.u64 %rd60, %rd60, {k * size};")
            .replace("OUT_LOOP", f"OUT_{k}")
            for k in range(len(boxes))
        )
    else:
        copies = copy_out("buf", total)
    shared = f".shared .align 1024 .b8 buf[{total}]; .shared .align 8 .b8 bar[8];"
    ptx = kernel(f"{body} {wait()} {copies}", params=_PARAMETERS + ", .param .u64 out", shared=shared)
    return Micro(
        f"tma_load_{name}",
        ptx,
        lambda: [_tensor(m), np.zeros(size * len(boxes), np.uint8)],
        (1,),
        group="tile",
        maps=(m,),
    )


def _source(m: Map, count: int, seed: int = 8) -> NDArray[np.uint8]:
    if "f32" in m.kind:
        return np.resize(_tensor(m)[::-1].copy(), count) ^ np.uint8(0x10)
    return np.random.default_rng(seed).integers(0, 4, count, np.uint8) * np.uint8(61)


def _store(
    name: str, m: Map, boxes: list[Box], opcode: str = "cp.async", operation: str = "", data: Any = None
) -> Micro:
    """Boxes out of shared memory; the whole tensor is recorded, its padding too."""
    size, rank = _box_bytes(m), len(m.box)
    total = -(-size * len(boxes) // 1024) * 1024
    pitch = total // len(boxes) // 1024 * 1024 or 1024
    total = max(total, pitch * len(boxes))
    body = f"{copy_in('buf', total)} {_HEAD}\n"
    for box in boxes:
        start, names = _coordinates(box)
        body += f"{start} @%p14 {opcode}.bulk.tensor.{rank}d.global.shared::cta{operation}.tile.bulk_group [%rd1, {{{names}}}], [%r1]; add.u32 %r1, %r1, {pitch};\n"
        body += "@%p14 cp.async.bulk.commit_group; @%p14 cp.async.bulk.wait_group 0;\n"
    ptx = kernel(body, params=_PARAMETERS + ", .param .u64 src", shared=f".shared .align 1024 .b8 buf[{total}];")

    def arrays() -> Arrays:
        if data is None:
            return [_tensor(m), _source(m, total)]
        return [aligned(data(1, len(_tensor(m))).view(np.uint8)), data(2, total)]

    return Micro(f"tma_{name}", ptx, arrays, (0,), group="tile", maps=(m,))


def _shapes() -> Iterator[tuple[str, Map]]:
    """Every type with every swizzle in two dimensions; other ranks, element strides and fills with some."""
    for kind in TYPES:
        bits = tensormap.TYPES[TYPE[kind] & 15].shared_bits
        for swizzle in SWIZZLES:
            yield (
                f"{kind}_{swizzle}",
                _map(kind, (_SPAN[swizzle] * 8 // bits, 9 if swizzle == "none" else 16), swizzle=swizzle),
            )
    for kind in ("f16", "bf16", "f32", "f64", "f32_ftz", "tf32", "tf32_ftz"):
        yield f"{kind}_nan", _map(kind, (16, 5), nan=True)
    yield "f16_1d", _map("f16", (64,))
    yield "u8_1d", _map("u8", (256,))
    yield "bf16_3d", _map("bf16", (32, 3, 4), swizzle="64B")
    yield "u32_4d", _map("u32", (8, 2, 3, 2), swizzle="32B")
    yield "f32_5d", _map("f32", (4, 2, 2, 2, 2))
    yield "u8_5d", _map("u8", (128, 2, 1, 2, 2), swizzle="128B")
    yield "f16_steps", _map("f16", (64, 8), steps=(2, 4))
    yield "f32_steps", _map("f32", (32, 12), swizzle="128B", steps=(4, 3))
    yield "u8_steps", _map("u8", (64, 8), steps=(2, 1), swizzle="64B")
    yield "s32_steps_3d", _map("s32", (16, 8, 4), steps=(1, 8, 2))


def _loads_and_stores() -> Iterator[Micro]:
    for name, m in _shapes():
        inside, before, behind, beyond = _corners(m)
        yield _load(name, m, [inside, before, behind, beyond])
        if not m.nan:
            yield _store(f"store_{name}", m, [inside, behind, beyond])  # none may start before the tensor


def _numbers(kind: str) -> Any:
    """Makes elements for reductions: numbers of ordinary size and edges."""

    def make(seed: int, count: int) -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        width = tensormap.TYPES[TYPE[kind] & 15].bits // 8
        if kind in {"f16", "bf16", "f32", "f32_ftz", "f64"}:
            values = rng.choice(rng.normal(size=40) * 4, count // width)
            if kind == "bf16":
                out = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
                edges = np.array((0x7F80, 0xFF80, 0x7FC1, 0x8000, 0, 0x7F7F, 1, 0x8001), np.uint16)
            elif kind == "f16":
                out = values.astype(np.float16).view(np.uint16)
                edges = np.array((0x7C00, 0xFC00, 0x7E01, 0x8000, 0, 0x7BFF, 1, 0x8001), np.uint16)
            else:
                out = values.astype(np.float32).view(np.uint32)
                edges = np.array((0x7F800000, 0xFF800000, 0x7FC00001, 1 << 31, 0, 0x7F7FFFFF, 1, 0x80000001), np.uint32)
            return np.where(rng.random(len(out)) < 0.25, rng.choice(edges, len(out)), out)
        pool = np.concatenate([rng.integers(0, 1 << 63, 24, np.uint64) * 2 + 1, np.arange(8, dtype=np.uint64)])
        return rng.choice(pool, count // width).astype(f"u{width}")

    return make


REDUCTIONS = {
    "add": "u32 s32 u64 f16 bf16 f32 f32_ftz", "min": "u32 s32 u64 s64 f16 bf16", "max": "u32 s32 u64 s64 f16 bf16",
    "inc": "u32", "dec": "u32", "and": "u32 u64", "or": "u32 u64", "xor": "u32 u64",
}  # fmt: skip


def _reductions() -> Iterator[Micro]:
    for operation, kinds in REDUCTIONS.items():
        for kind in kinds.split():
            bits = tensormap.TYPES[TYPE[kind]].bits
            m = _map(kind, (64 * 8 // bits, 8), swizzle="64B")
            yield _store(f"{operation}_{kind}", m, _corners(m)[::2], "cp.reduce.async", f".{operation}", _numbers(kind))


def _multicast() -> Iterator[Micro]:
    """CTA 1 of four loads a box into those of a mask; they wait, and say what their buffers hold."""
    for mask in (0b1111, 0b0101, 0b1000):
        m = _map("f16", (64, 8), swizzle="128B")
        size = _box_bytes(m)
        body = f"""{BARRIER} {_HEAD}
  mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, 1; shl.b32 %r3, %r3, %r2; and.b32 %r3, %r3, {mask}; setp.ne.u32 %p1, %r3, 0;
  mov.u32 %r5, 0; mov.u32 %r4, %r0; mad.lo.u32 %r6, %r0, 4, %r1;
FILL: st.shared.u32 [%r6], %r2; add.u32 %r6, %r6, 128; add.u32 %r4, %r4, 32; setp.lt.u32 %p2, %r4, {size // 4}; @%p2 bra FILL;
  fence.proxy.async.shared::cta; bar.sync 0;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], {size};
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  setp.eq.and.u32 %p3, %r2, 1, %p14; mov.u16 %h1, {mask}; mov.u32 %r7, 8; mov.u32 %r8, -2;
  @%p3 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1, {{%r7, %r8}}], [%r280], %h1;
W_LOOP: @!%p1 bra DONE; mbarrier.try_wait.parity.shared.b64 %p13, [%r280], 0; @!%p13 bra W_LOOP;
DONE: ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r2, {size}, %rd60;
""" + copy_out("buf", size).replace("ld.param.u64 %rd60, [out];", "")
        body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        shared = f".shared .align 1024 .b8 buf[{size}]; .shared .align 8 .b8 bar[8];"
        ptx = kernel(body, params=_PARAMETERS + ", .param .u64 out", shared=shared)

        def arrays(m: Map = m, size: int = size) -> Arrays:
            return [_tensor(m), np.zeros((4, size), np.uint8)]

        yield Micro(f"tma_multicast_{mask:04b}", ptx, arrays, (1,), grid=4, cluster=4, group="tile", maps=(m,))


def _replacements() -> Iterator[Micro]:
    """A map copied to shared memory, changed there, copied to global memory and used; its words are recorded too."""
    changes = {
        "global_address": ["global_address.shared::cta.b1024.b64 [tmap], %rd5"],
        "rank": ["rank.shared::cta.b1024.b32 [tmap], 0x2", "global_dim.shared::cta.b1024.b32 [tmap], 2, 3",
                 "global_stride.shared::cta.b1024.b64 [tmap], 1, 1024", "box_dim.shared::cta.b1024.b32 [tmap], 2, 2",
                 "element_stride.shared::cta.b1024.b32 [tmap], 2, 1"],
        "global_dim": ["global_dim.shared::cta.b1024.b32 [tmap], 0, 20", "global_dim.shared::cta.b1024.b32 [tmap], 1, 5"],
        "global_stride": ["global_stride.shared::cta.b1024.b64 [tmap], 0, 144"],
        "box_dim": ["box_dim.shared::cta.b1024.b32 [tmap], 1, 7"],
        "element_stride": ["element_stride.shared::cta.b1024.b32 [tmap], 1, 2"],
        "elemtype": ["elemtype.shared::cta.b1024.b32 [tmap], 0xa"],
        "elemtype_tf32": ["elemtype.shared::cta.b1024.b32 [tmap], 0xb"],
        "elemtype_u8": ["elemtype.shared::cta.b1024.b32 [tmap], 0x0"],
        "swizzle_mode": ["swizzle_mode.shared::cta.b1024.b32 [tmap], 0x2"],
        "fill_mode": ["fill_mode.shared::cta.b1024.b32 [tmap], 0x1"],
        "interleave_layout": ["interleave_layout.shared::cta.b1024.b32 [tmap], 0x1", "interleave_layout.shared::cta.b1024.b32 [tmap], 0x0"],
    }  # fmt: skip
    for name, rows in changes.items():
        rank = 3 if name == "rank" else 2
        base = _map("f16", (32, 8))
        m = replace(base, box=(32, 7)) if name == "box_dim" else base
        size = {"rank": 1024, "box_dim": 448, "element_stride": 256, "elemtype_tf32": 1024, "elemtype_u8": 256}.get(
            name, 512
        )
        names = ", ".join(("%r20", "%r21", "%r22")[:rank])
        lines = "\n".join(f"@%p14 tensormap.replace.tile.{row};" for row in rows)
        body = f"""{BARRIER} {_HEAD} mov.u32 %r2, tmap; mad.lo.u32 %r3, %r0, 4, %r2; cvt.u64.u32 %rd2, %r0; mad.lo.u64 %rd2, %rd2, 4, %rd1;
  ld.b32 %r4, [%rd2]; st.shared.b32 [%r3], %r4; bar.sync 0; ld.param.u64 %rd5, [other];
  {lines} bar.sync 0;
  ld.param.u64 %rd3, [room]; tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd3], [tmap], 128;
  fence.proxy.tensormap::generic.acquire.gpu [%rd3], 128;
  mov.u32 %r20, 16; mov.b32 %r21, -2; mov.u32 %r22, 0;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], {size};
  @%p14 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd3, {{{names}}}], [%r280];
  {wait()} {copy_out("buf", size)}
  ld.param.u64 %rd6, [words]; mad.wide.u32 %rd6, %r0, 4, %rd6; setp.ge.u32 %p1, %r0, 2; setp.lt.and.u32 %p1, %r0, 16, %p1;
  ld.shared.b32 %r4, [%r3]; @%p1 st.global.b32 [%rd6], %r4;"""
        shared = f".shared .align 1024 .b8 buf[{size}]; .shared .align 128 .b8 tmap[128]; .shared .align 8 .b8 bar[8];"
        params = _PARAMETERS + ", .param .u64 other, .param .u64 room, .param .u64 out, .param .u64 words"

        def arrays(m: Map = m, size: int = size) -> Arrays:
            first = aligned(np.resize(_tensor(m), 4096))
            return [
                first,
                aligned(first[::-1].copy()),
                aligned(np.zeros(128, np.uint8)),
                np.zeros(size, np.uint8),
                np.zeros(32, np.uint32),
            ]

        ptx = kernel(body, params=params, shared=shared)
        yield Micro(f"tensormap_{name}", ptx, arrays, (3, 4), group="tile", maps=(m,))


def kernels() -> Iterator[Micro]:
    """All micro-kernels of TMA."""
    for group in (_loads_and_stores, _reductions, _multicast, _replacements):
        yield from group()
