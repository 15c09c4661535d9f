"""Tensor copies: every swizzle, rank, type and edge, against straight loops over the elements of the box."""

import itertools
from typing import Any

import numpy as np
import pytest

from ptxemu import POLICIES, emulate
from ptxemu.tensor import tensormap
from tests.ptxemu.tensor.kernels import BARRIER, aligned, copy_in, copy_out, kernel, tensor_map, wait

SHARED = ".shared .align 1024 .b8 buf[{0}]; .shared .align 8 .b8 bar[8];"


def _coordinates(rank: Any) -> Any:
    names = ", ".join(f"%r{100 + i}" for i in range(rank))
    loads = "".join(f"ld.param.u32 %r{100 + i}, [c{i}];\n" for i in range(rank))
    params = "".join(f", .param .u32 c{i}" for i in range(rank))
    return loads, names, params


def _load_kernel(rank: Any, size: Any) -> Any:
    loads, names, params = _coordinates(rank)
    body = f"""{BARRIER}
  mov.b64 %rd1, tm; cvta.param.u64 %rd1, %rd1;
  mov.u32 %r1, buf;
  {loads}
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], {size};
  @%p14 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    [%r1], [%rd1, {{{names}}}], [%r280];
  {wait()} {copy_out("buf", size)}"""
    return kernel(body, params=".param .align 64 .b8 tm[128], .param .u64 out" + params, shared=SHARED.format(size))


def _store_kernel(
    rank: Any, size: Any, opcode: Any = "cp.async.bulk.tensor.{0}d.global.shared::cta.tile.bulk_group"
) -> Any:
    loads, names, params = _coordinates(rank)
    body = f"""{copy_in("buf", size)}
  mov.b64 %rd1, tm; cvta.param.u64 %rd1, %rd1;
  mov.u32 %r1, buf; setp.eq.u32 %p14, %r0, 0;
  {loads}
  @%p14 {opcode.format(rank)} [%rd1, {{{names}}}], [%r1];
  @%p14 cp.async.bulk.commit_group;
  @%p14 cp.async.bulk.wait_group 0;"""
    return kernel(body, params=".param .align 64 .b8 tm[128], .param .u64 src" + params, shared=SHARED.format(size))


def _swizzled(address: Any, mode: Any) -> Any:
    width = {"none": 1, "32B": 2, "64B": 4, "128B": 8}[mode]
    return address ^ ((address >> 7) & (width - 1)) << 4


def _expected(tensor: Any, box: Any, coordinates: Any, steps: Any, fill: Any) -> Any:
    """The box, element by element: tensor and box are given with dimension 0 first."""
    counts = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    out = np.full(counts[::-1], fill, tensor.dtype)
    for index in itertools.product(*(range(n) for n in counts)):
        where = [c + i * s for c, i, s in zip(coordinates, index, steps, strict=True)]
        if all(0 <= w < n for w, n in zip(where, tensor.shape[::-1], strict=True)):
            out[index[::-1]] = tensor[tuple(where[::-1])]
    return out


CASES = [
    ("f16", (64, 40), (8, 32), (0, 0), None, "none"),
    ("f16", (64, 40), (16, 32), (8, 3), None, "32B"),
    ("f16", (64, 40), (32, 16), (-8, -3), None, "64B"),
    ("f16", (72, 40), (64, 32), (16, 20), None, "128B"),
    ("u8", (80, 9), (32, 8), (64, 4), None, "32B"),
    ("f32", (20, 12), (32, 8), (-4, 2), None, "128B"),
    ("f64", (10, 6), (4, 4), (8, 4), None, "none"),
    ("u16", (256,), (64,), (200,), None, "none"),
    ("s32", (16, 5, 4), (8, 2, 4), (4, 4, -1), None, "32B"),
    ("bf16", (8, 5, 4, 3), (8, 2, 2, 2), (0, 4, 3, 2), None, "none"),
    ("u32", (8, 3, 4, 3, 2), (4, 2, 2, 2, 2), (4, 1, 3, -1, 0), None, "none"),
    ("f16", (64, 40), (16, 32), (0, 0), (1, 4), "none"),
    ("f32", (64, 40), (32, 12), (4, -2), (1, 3), "128B"),
    ("u8", (64, 40), (64, 8), (-16, 0), (2, 1), "64B"),
]
DTYPE = {"u8": np.uint8, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "f16": np.uint16, "bf16": np.uint16}
DTYPE |= {"f32": np.uint32, "f64": np.uint64}


def _case(kind: Any, sizes: Any, box: Any, swizzle: Any, steps: Any, *, nan: Any = False) -> Any:
    """A tensor with padded rows, filled with random bits, and its map."""
    rng = np.random.default_rng(sum(sizes) + sum(box))
    dtype = np.dtype(DTYPE[kind])
    strides, total = [], sizes[0] * dtype.itemsize
    for size in sizes[1:]:
        total = -(-total // 16) * 16 + 16
        strides.append(total)
        total *= size
    room = aligned(rng.integers(0, 256, total + 64, np.uint8))
    full = (*reversed(strides), dtype.itemsize)
    tensor = np.ndarray(sizes[::-1], dtype, room, strides=full)
    raw = tensor_map(room.ctypes.data, kind, sizes, strides, box, swizzle=swizzle, steps=steps, nan=nan)
    return room, tensor, raw


@pytest.mark.parametrize(("kind", "sizes", "box", "coordinates", "steps", "swizzle"), CASES)
def test_load(kind: Any, sizes: Any, box: Any, coordinates: Any, steps: Any, swizzle: Any) -> None:
    room, tensor, raw = _case(kind, sizes, box, swizzle, steps)
    steps = (1, *steps[1:]) if steps else (1,) * len(sizes)  # that of dimension 0 is ignored
    expected = _expected(tensor, box, coordinates, steps, 0)
    out = np.zeros(expected.nbytes, np.uint8)
    for policy in ("eager", "lazy"):
        out[:] = 0
        report = emulate(
            _load_kernel(len(sizes), expected.nbytes), 1, [raw, out, *coordinates], extra=[room], policy=policy
        )
        report.raise_for_findings()
        flat = expected.reshape(-1).view(np.uint8)
        for address in range(0, expected.nbytes, 16):
            np.testing.assert_array_equal(out[_swizzled(address, swizzle) :][:16], flat[address : address + 16])


@pytest.mark.parametrize(("kind", "sizes", "box", "coordinates", "steps", "swizzle"), CASES)
def test_store(kind: Any, sizes: Any, box: Any, coordinates: Any, steps: Any, swizzle: Any) -> None:
    room, tensor, raw = _case(kind, sizes, box, swizzle, steps)
    steps = (1, *steps[1:]) if steps else (1,) * len(sizes)
    coordinates = tuple(max(c, 0) for c in coordinates)  # a store may not start before the tensor
    counts = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    data = np.random.default_rng(5).integers(0, 256, int(np.prod(counts)) * tensor.itemsize, np.uint8)
    swizzled = np.zeros_like(data)
    for address in range(0, len(data), 16):
        swizzled[_swizzled(address, swizzle) :][:16] = data[address : address + 16]
    before, expected = room.copy(), room.copy()
    view = np.ndarray(tensor.shape, tensor.dtype, expected, strides=tensor.strides)
    source = data.view(tensor.dtype).reshape(counts[::-1])
    for index in itertools.product(*(range(n) for n in counts)):
        where = [c + i * s for c, i, s in zip(coordinates, index, steps, strict=True)]
        if all(0 <= w < n for w, n in zip(where, sizes, strict=True)):
            view[tuple(where[::-1])] = source[index[::-1]]
    for policy in ("eager", "lazy"):
        room[:] = before
        report = emulate(
            _store_kernel(len(sizes), len(data)), 1, [raw, swizzled, *coordinates], extra=[room], policy=policy
        )
        report.raise_for_findings()
        np.testing.assert_array_equal(room, expected)


def test_coordinates_that_are_illegal() -> None:
    """An H200 stops with an illegal instruction."""
    room, _, raw = _case("f16", (64, 40), (8, 32), "none", None)
    data = np.zeros(512, np.uint8)
    for x, y, loads, stores in ((8, -1, True, False), (-8, 0, True, False), (4, 0, False, False), (72, 50, True, True)):
        for ptx, legal in ((_load_kernel(2, 512), loads), (_store_kernel(2, 512), stores)):
            report = emulate(ptx, 1, [raw, data, x, y], extra=[room])
            assert (not report.kinds()) == legal


def test_nan_fill() -> None:
    room, tensor, raw = _case("f16", (16, 4), (16, 8), "none", None, nan=True)
    out = np.zeros(256, np.uint8)
    emulate(_load_kernel(2, 256), 1, [raw, out, 0, 0], extra=[room]).raise_for_findings()
    got = out.view(np.float16).reshape(8, 16)
    np.testing.assert_array_equal(got[:4].view(np.uint16), tensor)
    assert (got[4:].view(np.uint16) == 0x7FF7).all()


@pytest.mark.parametrize("operation", ["add", "min", "max"])
def test_reduce(operation: Any) -> None:
    rng = np.random.default_rng(6)
    target = aligned(rng.integers(-50, 50, (6, 16)).astype(np.float32))
    source = rng.integers(-50, 50, (4, 8)).astype(np.float32)
    before = target.copy()
    raw = tensor_map(target.ctypes.data, "f32", (16, 6), (64,), (8, 4))
    opcode = "cp.reduce.async.bulk.tensor.{0}d.global.shared::cta." + operation + ".tile.bulk_group"
    emulate(_store_kernel(2, source.nbytes, opcode), 1, [raw, source, 4, 3], extra=[target]).raise_for_findings()
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation]
    before[3:6, 4:12] = function(before[3:6, 4:12], source[:3])
    np.testing.assert_array_equal(target, before)


@pytest.mark.parametrize(("kind", "bits"), [("16u4_align16b", 4), ("16u6_align16b", 6)])
def test_sub_byte_types_are_padded_to_sixteen_bytes(kind: Any, bits: Any) -> None:
    rng = np.random.default_rng(7)
    rows = aligned(rng.integers(0, 256, (4, 128 * bits // 8), np.uint8))
    raw = tensor_map(rows.ctypes.data, kind, (128, 4), (128 * bits // 8,), (128, 4), swizzle="128B")
    out = np.zeros(512, np.uint8)
    emulate(_load_kernel(2, 512), 1, [raw, out, 0, 0], extra=[rows]).raise_for_findings()
    for row in range(4):
        for chunk in range(8):
            got = out[_swizzled(row * 128 + chunk * 16, "128B") :][: 2 * bits]
            np.testing.assert_array_equal(got, rows[row, chunk * 2 * bits : (chunk + 1) * 2 * bits])


def test_calibrated_fields() -> None:
    """Bytes 8 to 60 of two maps as cuTensorMapEncodeTiled wrote them on an H200."""
    words = "00000340 00000008 000000a0 00000640 00001f40 00000000 0000003f"
    words += " 00000013 00000009 00000004 00000002 07004688 00010103"
    raw = (0x7F1234560000).to_bytes(8, "little") + b"".join(bytes.fromhex(w)[::-1] for w in words.split()) + bytes(4)
    got = tensormap.decode(raw)
    assert (got.base, got.type.name, got.sizes, got.steps) == (
        0x7F1234560000,
        "f16",
        (64, 20, 10, 5, 3),
        (1, 2, 3, 4, 5),
    )
    assert got.strides[1:] == (128, 2560, 25600, 128000)
    assert got.box == (8, 4, 2, 2, 1)
    words = "00006340 00000000 00000000 00000000 00000000 00008342 000001ff"
    words += " 00000003 00000003 00000003 00000003 3f000000 00000000"
    raw = bytes(8) + b"".join(bytes.fromhex(w)[::-1] for w in words.split()) + bytes(4)
    got = tensormap.decode(raw)
    assert got.strides[1:] == (1 << 37, 1 << 38, 3 << 36, 1 << 39)
    assert (got.swizzle, got.problems) == ("128B", ())


def test_descriptors_that_are_refused() -> None:
    def problems(**changes: Any) -> Any:
        given = {"base": 0, "kind": "f16", "sizes": (64, 8), "strides": (128,), "box": (64, 8), **changes}
        return " ".join(tensormap.decode(tensor_map(**given)[:64]).problems)

    assert problems(swizzle="128B") == ""
    assert "longer than the 64B swizzle" in problems(swizzle="64B")
    assert "not a multiple of 16" in problems(box=(4, 8))
    assert "global address" in problems(base=8)
    assert "tf32" in problems(tf32=True)
    assert "not a multiple of its element stride" in problems(steps=(1, 3))
    assert tensormap.decode(tensor_map(0, "f16", (64, 8), (128,), (8, 8), interleave=1)[:64]).unsupported


def _kinds(report: Any) -> Any:
    return {str(kind) for kind in report.kinds()}


def test_faults_are_found() -> None:
    room, _, raw = _case("f16", (64, 40), (8, 32), "none", None)
    out = np.zeros(512, np.uint8)
    good = _load_kernel(2, 512)
    short = good.replace("expect_tx.shared.b64 _, [%r280], 512", "expect_tx.shared.b64 _, [%r280], 528")
    assert "deadlock" in _kinds(emulate(short, 1, [raw, out, 0, 0], extra=[room]))
    unfenced = good.replace("fence.mbarrier_init.release.cluster;", "")
    assert "missing_fence" in _kinds(emulate(unfenced, 1, [raw, out, 0, 0], extra=[room]))
    unaligned = good.replace("mov.u32 %r1, buf;", "mov.u32 %r1, buf; add.u32 %r1, %r1, 16;")
    assert "misaligned" in _kinds(emulate(unaligned, 1, [raw, out, 0, 0], extra=[room]))
    unwaited = good.replace(wait(), "")
    assert "async_race" in _kinds(emulate(unwaited, 1, [raw, out, 0, 0], extra=[room], policy="lazy"))
    outside = emulate(good, 1, [raw, out, 0, 0], extra=[room[:1024]])
    assert "out_of_bounds" in _kinds(outside)


def test_missing_proxy_fence_before_a_store() -> None:
    room, _, raw = _case("f16", (64, 40), (8, 32), "none", None)
    ptx = _store_kernel(2, 512).replace("fence.proxy.async.shared::cta;", "")
    report = emulate(ptx, 1, [raw, np.zeros(512, np.uint8), 0, 0], extra=[room])
    assert _kinds(report) == {"missing_proxy_fence"}


def test_source_overwritten_before_the_wait() -> None:
    room, _, raw = _case("f16", (64, 40), (8, 32), "none", None)
    good = _store_kernel(2, 512)
    bad = good.replace(
        "@%p14 cp.async.bulk.wait_group 0;", "st.shared.u32 [%r1], %r0; @%p14 cp.async.bulk.wait_group 0;"
    )
    fine = good.replace(
        "wait_group 0;", "wait_group.read 0; st.shared.u32 [%r1], %r0; @%p14 cp.async.bulk.wait_group 0;"
    )
    for policy in POLICIES:
        emulate(
            fine.replace(" st.shared", " @%p14 st.shared"),
            1,
            [raw, np.zeros(512, np.uint8), 0, 0],
            extra=[room],
            policy=policy,
        ).raise_for_findings()
        report = emulate(
            bad.replace(" st.shared", " @%p14 st.shared"),
            1,
            [raw, np.zeros(512, np.uint8), 0, 0],
            extra=[room],
            policy=policy,
        )
        assert ("async_race" in _kinds(report)) == (policy != "eager")


def test_multicast_reaches_every_cta_of_the_mask() -> None:
    room, tensor, raw = _case("f16", (64, 40), (8, 32), "none", None)
    size = 512
    body = f"""{BARRIER}
  mov.b64 %rd1, tm; cvta.param.u64 %rd1, %rd1;
  mov.u32 %r1, buf;
  @%p14 mbarrier.arrive.expect_tx.shared.b64 _, [%r280], {size};
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  mov.u32 %r2, %cluster_ctarank; setp.eq.and.u32 %p1, %r2, 0, %p14;
  mov.u16 %h1, 3; mov.u32 %r3, 8; mov.u32 %r4, 2;
  @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
    [%r1], [%rd1, {{%r3, %r4}}], [%r280], %h1;
  {wait()}
  ld.param.u64 %rd60, [out]; mad.wide.u32 %rd60, %r2, {size}, %rd60;
""" + copy_out("buf", size).replace("ld.param.u64 %rd60, [out];", "")
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    ptx = kernel(body, params=".param .align 64 .b8 tm[128], .param .u64 out", shared=SHARED.format(size))
    for policy in POLICIES:
        out = np.zeros((2, size), np.uint8)
        emulate(ptx, 2, [raw, out], cluster=2, extra=[room], policy=policy).raise_for_findings()
        expected = _expected(tensor, (8, 32), (8, 2), (1, 1), 0).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(out, [expected, expected])
