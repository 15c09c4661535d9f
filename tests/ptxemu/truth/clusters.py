"""Micro-kernels of clusters and address spaces: rows of one 32-bit result a thread, in two clusters of four CTAs.

A row is PTX text whose result is %d. Cells of 16 bytes for each thread lie in global (%cell) and shared memory (%scell,
its generic address %gcell), a barrier of the CTA for four arrivals of each of 32 threads at [bar] (%bar). %next is the
rank of the next CTA of the cluster.
"""

# ruff: noqa: E501  (a row of PTX is one line)

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tests.ptxemu.tensor.kernels import HEAD
from tests.ptxemu.truth.micro import Micro

CTAS, LANES, CLUSTER = 8, 32, 4
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
MAP = "mapa.shared::cluster.u32 %far, %scell, %next;"
WAIT = "WAIT_{0}: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%bar], {1}; @!%p1 bra WAIT_{0};"


def _registers() -> Iterator[str]:
    """Special registers, PTX ISA 10."""
    for name in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid"):
        for axis in "xyz":
            yield f"mov.u32 %d, %{name}.{axis};"
    for name in ("cluster_ctarank", "cluster_nctarank", "laneid"):
        yield f"mov.u32 %d, %{name};"
    for name in ("eq", "lt", "le", "gt", "ge"):
        yield f"mov.u32 %d, %lanemask_{name};"
    yield "mov.pred %p1, %is_explicit_cluster; selp.u32 %d, 1, 0, %p1;"


def _spaces() -> Iterator[str]:
    """isspacep, getctarank, mapa, ldu, PTX ISA 9.7.9."""
    addresses = {
        "global": "mov.u64 %w, %cell;",
        "own": "mov.u64 %w, %gcell;",
        "far": "mapa.u64 %w, %gcell, %next;",
        "local": "mov.u64 %w, frame; cvta.local.u64 %w, %w;",
    }
    for text in addresses.values():
        for space in ("global", "shared", "shared::cta", "shared::cluster", "local"):
            yield f"{text} isspacep.{space} %p1, %w; selp.u32 %d, 1, 0, %p1;"
    yield f"{MAP} getctarank.shared::cluster.u32 %d, %far;"
    yield "getctarank.shared::cluster.u32 %d, %scell;"
    yield "mapa.u64 %w, %gcell, %next; getctarank.u64 %d, %w;"
    yield "ldu.global.u32 %d, [%cell];"
    yield "ldu.global.v2.u32 {%x, %d}, [%cell];"
    yield "ldu.u16 %h, [%cell+2]; cvt.u32.u16 %d, %h;"


def _remote() -> Iterator[str]:
    """Loads, stores and atomics in another CTA's shared memory; rows with a store end behind a barrier."""
    yield f"{MAP} ld.shared::cluster.u32 %d, [%far];"
    yield f"{MAP} ld.shared::cluster.v2.u32 {{%x, %d}}, [%far];"
    yield "mapa.u64 %w, %gcell, %next; ld.u32 %d, [%w+4];"
    yield f"{MAP} st.shared::cluster.u32 [%far], %t; {SYNC} ld.shared.u32 %d, [%scell];"
    yield f"{MAP} st.shared::cluster.u8 [%far+1], %t; {SYNC} ld.shared.u32 %d, [%scell];"
    yield f"mapa.u64 %w, %gcell, %next; st.v2.u32 [%w], {{%t, %rank}}; {SYNC} ld.shared.u32 %d, [%scell+4];"
    for name, kind in (("add", "u32"), ("min", "s32"), ("max", "u32"), ("xor", "b32"), ("exch", "b32"), ("inc", "u32")):
        yield f"{MAP} atom.shared::cluster.{name}.{kind} %d, [%far], %t;"
        yield f"{MAP} atom.shared::cluster.{name}.{kind} %x, [%far], %t; {SYNC} ld.shared.u32 %d, [%scell];"
    yield f"{MAP} red.relaxed.cluster.shared::cluster.add.u32 [%far], %t; {SYNC} ld.shared.u32 %d, [%scell];"
    yield f"{MAP} atom.shared::cluster.cas.b32 %d, [%far], 7, %t;"


def _barriers() -> Iterator[str]:
    """Arrivals at other CTAs' barriers, cluster barriers."""
    everywhere = " ".join(
        f"mapa.shared::cluster.u32 %far, %bar, {k}; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%far];"
        for k in range(CLUSTER)
    )
    store = "add.u32 %x, %t, 5; st.shared.u32 [%scell], %x;"
    yield f"{store} {everywhere} {WAIT.format(0, 0)} {MAP} ld.shared::cluster.u32 %d, [%far];"
    count = "mapa.shared::cluster.u32 %far, %bar, %next; setp.eq.u32 %p1, %t, 3; @%p1 mbarrier.arrive.shared::cluster.b64 _, [%far], 128;"
    yield f"{store} {count} {WAIT.format(1, 1)} mov.u32 %d, 9;"
    yield f"{store} barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; {MAP} ld.shared::cluster.u32 %d, [%far];"
    yield f"{store} barrier.cluster.arrive.relaxed; barrier.cluster.wait; mov.u32 %d, %rank;"


def _kernel(rows: list[str]) -> str:
    lines = [
        f"{HEAD.format(target='sm_90a')}.visible .entry k(.param .u64 cells, .param .u64 out)\n.reqntid {LANES}\n{{",
        ".reg .pred %p<4>; .reg .b16 %h; .reg .b32 %d, %x, %t, %far, %scell, %bar, %rank, %next, %flat; .reg .b64 %cell, %gcell, %w, %out;",
        f".shared .align 16 .b8 cellars[{16 * LANES}]; .shared .align 8 .b8 bar[8]; .local .align 16 .b8 frame[16];",
        "mov.u32 %t, %tid.x; mov.u32 %rank, %cluster_ctarank; add.u32 %next, %rank, 1; and.b32 %next, %next, 3; mov.u32 %flat, %ctaid.x;",
        f"mad.lo.u32 %flat, %flat, {LANES}, %t; ld.param.u64 %cell, [cells]; mad.wide.u32 %cell, %flat, 16, %cell;",
        "ld.param.u64 %out, [out]; mad.wide.u32 %out, %flat, 4, %out; mov.u32 %bar, bar; mov.u32 %scell, cellars;",
        "mad.lo.u32 %scell, %t, 16, %scell; cvt.u64.u32 %gcell, %scell; cvta.shared.u64 %gcell, %gcell;",
        f"setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%bar], {CLUSTER * LANES}; fence.mbarrier_init.release.cluster;",
    ]
    for k, row in enumerate(rows):
        lines += [
            "mad.lo.u32 %x, %rank, 100, %t; add.u32 %far, %x, 0x80000;",
            f"st.shared.v4.u32 [%scell], {{%x, %far, %x, %far}}; {SYNC}",
            row,
            f"st.global.u32 [%out+{4 * CTAS * LANES * k}], %d; {SYNC}",
        ]
    return "\n".join([*lines, "ret;", "}"]) + "\n"


def kernels() -> Iterator[Micro]:
    """All micro-kernels of clusters."""
    for group in (_registers, _spaces, _remote, _barriers):
        rows = list(group())

        def arrays(count: int = len(rows)) -> list[NDArray[np.generic]]:
            cells = np.random.default_rng(4).integers(0, 1 << 32, (CTAS * LANES, 4), np.uint64).astype(np.uint32)
            cells[:] = cells[::LANES].repeat(LANES, 0)  # ldu: the same in all threads of a warp
            return [cells, np.zeros((count, CTAS * LANES), np.uint32)]

        name = f"cluster{group.__name__}"
        yield Micro(name, _kernel(rows), arrays, (1,), CTAS, LANES, CLUSTER, tuple(rows), "exchanges")
