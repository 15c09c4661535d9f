"""Small PTX kernels and tensor maps for the tests, built from text."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

HEAD = ".version 8.8\n.target {target}\n.address_size 64\n"
SWIZZLE = {"none": 0, "32B": 1, "64B": 2, "128B": 3, "128B_atom32B": 3 | 1 << 6, "128B_atom64B": 3 | 3 << 6}
SWIZZLE |= {"128B_atom32B_flip8B": 3 | 2 << 6}
TYPE = {"u8": 0, "u16": 1, "u32": 2, "s32": 3, "u64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 9, "bf16": 10}
TYPE |= {"f32_ftz": 8, "tf32": 7 | 1 << 9, "tf32_ftz": 8 | 1 << 9}
TYPE |= {"16u4_align8b": 11, "16u4_align16b": 12, "16u6_align16b": 13}


def tensor_map(
    base: Any,
    kind: Any,
    sizes: Any,
    strides: Any,
    box: Any,
    *,
    swizzle: Any = "none",
    steps: Any = None,
    nan: Any = False,
    tf32: Any = False,
    interleave: Any = 0,
) -> Any:
    """A tensor map as the driver writes it: 128 bytes. Strides are in bytes, of dimensions 1 and up."""
    rank = len(sizes)
    flags = (rank - 1) << 4 | TYPE[kind] << 7 | interleave << 11 | SWIZZLE[swizzle] << 13 | nan << 15 | tf32 << 16
    raw = bytearray(128)
    struct.pack_into("<QI", raw, 0, base, flags)
    high = 0
    for i, stride in enumerate(strides):
        struct.pack_into("<I", raw, 12 + 4 * i, stride >> 4 & 0xFFFFFFFF)
        high |= (stride >> 36) << 4 * i
    struct.pack_into("<I", raw, 28, high)
    for i, size in enumerate(sizes):
        struct.pack_into("<I", raw, 32 + 4 * i, size - 1)
    packed = sum((s - 1) << 3 * i for i, s in enumerate(steps or (1,) * rank))
    raw[52:55] = packed.to_bytes(3, "little")
    for i, b in enumerate(box):
        raw[55 + i] = b - 1
    return bytes(raw)


def kernel(body: str, *, params: str, shared: str = "", target: str = "sm_90a", threads: int = 32) -> str:
    """A kernel `k` around a body; registers %r, %rd, %f, %p and %h are declared."""
    return f"""{HEAD.format(target=target)}
.visible .entry k({params})
.reqntid {threads}
{{
  .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<300>; .reg .b64 %rd<64>; .reg .f32 %f<16>;
  {shared}
  mov.u32 %r0, %tid.x;
  {body}
  ret;
}}
"""


def copy_out(symbol: str, count: int, parameter: str = "out", threads: int = 32) -> str:
    """Copies `count` bytes of shared memory to a global pointer, 4 bytes a thread and step."""
    return f"""
  ld.param.u64 %rd60, [{parameter}];
  mov.u32 %r290, {symbol};
  shl.b32 %r291, %r0, 2;
  add.u32 %r290, %r290, %r291;
  cvt.u64.u32 %rd61, %r291;
  add.u64 %rd60, %rd60, %rd61;
OUT_LOOP:
  ld.shared.u32 %r292, [%r290];
  st.global.u32 [%rd60], %r292;
  add.u32 %r290, %r290, {4 * threads};
  add.u64 %rd60, %rd60, {4 * threads};
  add.u32 %r291, %r291, {4 * threads};
  setp.lt.u32 %p15, %r291, {count};
  @%p15 bra OUT_LOOP;
"""


def copy_in(symbol: str, count: int, parameter: str = "src", threads: int = 32) -> str:
    """Copies `count` bytes of global to shared memory, 4 bytes a thread and step, and fences them."""
    return f"""
  ld.param.u64 %rd60, [{parameter}];
  mov.u32 %r290, {symbol};
  shl.b32 %r291, %r0, 2;
  add.u32 %r290, %r290, %r291;
  cvt.u64.u32 %rd61, %r291;
  add.u64 %rd60, %rd60, %rd61;
IN_LOOP_{symbol}:
  ld.global.u32 %r292, [%rd60];
  st.shared.u32 [%r290], %r292;
  add.u32 %r290, %r290, {4 * threads};
  add.u64 %rd60, %rd60, {4 * threads};
  add.u32 %r291, %r291, {4 * threads};
  setp.lt.u32 %p15, %r291, {count};
  @%p15 bra IN_LOOP_{symbol};
  fence.proxy.async.shared::cta;
  bar.sync 0;
"""


BARRIER = """
  mov.u32 %r280, bar;
  setp.eq.u32 %p14, %r0, 0;
  @%p14 mbarrier.init.shared.b64 [%r280], 1;
  fence.mbarrier_init.release.cluster;
  bar.sync 0;
"""


def wait(parity: int = 0, label: str = "W") -> str:
    """Waits for a phase of `bar`."""
    return f"""
{label}_LOOP:
  mbarrier.try_wait.parity.shared.b64 %p13, [%r280], {parity};
  @!%p13 bra {label}_LOOP;
"""


def aligned(array: np.ndarray, to: int = 128) -> np.ndarray:
    """A copy whose first byte lies at a multiple of `to`."""
    flat = np.ascontiguousarray(array)
    room = np.zeros(flat.nbytes + to, np.uint8)
    start = -room.ctypes.data % to
    out = room[start : start + flat.nbytes].view(flat.dtype).reshape(flat.shape)
    out[...] = flat
    return out
