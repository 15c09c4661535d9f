"""tcgen05.mma and cp: every kind, shape and operand source against a plain matrix product."""

from typing import Any

import numpy as np
import pytest

from ptxemu import POLICIES, FindingKind, emulate
from ptxemu.tensor import formats, idesc
from tests.ptxemu.tensor.images import blackwell_fields, operand, small
from tests.ptxemu.tensor.kernels import BARRIER, copy_in, kernel, wait

CODE = {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}
A_CODE = {"f16": {"f16": 0, "bf16": 1}, "tf32": {"tf32": 2}, "i8": {"u8": 0, "s8": 1}, "f8f6f4": CODE, "mxf8f6f4": CODE}
A_CODE |= {"mxf4": {"e2m1": 1}, "mxf4nvf4": {"e2m1": 1}}
DEPTH = {"f16": 16, "tf32": 8, "i8": 32, "f8f6f4": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}


def instruction_descriptor(
    kind: Any,
    a: Any,
    b: Any,
    m: Any,
    n: Any,
    *,
    d: Any = 1,
    a_mn: Any = False,
    b_mn: Any = False,
    negate: Any = 0,
    scale: Any = 0,
    ids: Any = (0, 0),
) -> Any:
    bits = (
        A_CODE[kind][a] << 7
        | A_CODE[kind][b] << 10
        | negate << 13
        | a_mn << 15
        | b_mn << 16
        | n >> 3 << 17
        | m >> 4 << 24
    )
    if kind.startswith("mx"):
        return bits | scale << 23 | ids[1] << 4 | ids[0] << 29
    return bits | (2 if kind == "i8" else d) << 4


def _words(image: Any) -> Any:
    return f"{{ {', '.join(str(v) for v in image)} }}"


def _descriptor(register: Any, symbol: Any, fields: Any) -> Any:
    return f"""mov.u32 %r10, {symbol}; shr.u32 %r10, %r10, 4; and.b32 %r10, %r10, 0x3fff;
  cvt.u64.u32 {register}, %r10; or.b64 {register}, {register}, {fields:#x};"""


def _read_d(first: Any, columns: Any, stores: Any = True) -> Any:
    """Reads columns of D into out as (columns, lanes of the CTA)."""
    lines = []
    for start in range(0, columns, 8):
        names = ", ".join(f"%r{100 + i}" for i in range(8))
        lines.append(f"add.u32 %r6, %r5, {first + start}; tcgen05.ld.sync.aligned.32x32b.x8.b32 {{{names}}}, [%r6];")
        lines.append("tcgen05.wait::ld.sync.aligned;")
        lines += [f"st.global.u32 [%rd52+{512 * (start + i)}], %r{100 + i};" for i in range(8)]
    return "\n".join(lines)


def gemm_kernel(
    kind: str,
    bits: int,
    a_fields: int,
    b_fields: int,
    sizes: tuple[int, int],
    columns: int,
    *,
    ctas: int = 1,
    scales: str = "",
    mma_tail: str = "",
    vector: str = "",
    a_tmem: bool = False,
    fences: bool = True,
    initial: bool = False,
    prologue: str = "",
    repeat: int = 1,
) -> str:
    """One tcgen05.mma (repeated), its operands copied from asrc and bsrc, D read back to out; D starts at column 0."""
    group = f"cta_group::{ctas}"
    a = "[%r20]" if a_tmem else "%rd1"
    scaled = ".block_scale" if kind.startswith("mx") else ""
    enable = 1 if initial else 0
    load_initial = ""
    if initial:
        load_initial = "\n".join(
            f"ld.global.u32 %r100, [%rd52+{512 * i}]; add.u32 %r6, %r5, {i};"
            "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r6], {%r100};"
            for i in range(columns)
        )
        load_initial += "tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync;"
        load_initial += "bar.sync 0; tcgen05.fence::after_thread_sync;"
    before = "tcgen05.fence::before_thread_sync;" if fences else ""
    after = "tcgen05.fence::after_thread_sync;" if fences else ""
    cluster_sync = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" if ctas == 2 else ""
    leader = (
        "mov.u32 %r7, %cluster_ctarank; setp.eq.and.u32 %p2, %r7, 0, %p14;" if ctas == 2 else "setp.eq.u32 %p2, %r0, 0;"
    )
    commit = f"tcgen05.commit.{group}.mbarrier::arrive::one.shared::cluster.b64 [%r280];"
    if ctas == 2:
        opcode = f"tcgen05.commit.{group}.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64"
        commit = f"mov.u16 %h1, 3; @%p2 {opcode} [%r280], %h1;"
    else:
        commit = "@%p2 " + commit
    multiply = f"@%p2 tcgen05.mma.{group}.kind::{kind}{scaled}{vector} [%r3], {a}, %rd2, %r11{mma_tail}, %p3;"
    multiply += "setp.eq.u32 %p3, 1, 1;"
    body = f"""
  mov.u32 %r1, slot; shr.u32 %r2, %r0, 5; setp.eq.u32 %p1, %r2, 0;
  @%p1 tcgen05.alloc.{group}.sync.aligned.shared::cta.b32 [%r1], 512;
  {BARRIER}
  ld.shared.u32 %r3, [slot]; shl.b32 %r4, %r2, 21; add.u32 %r5, %r3, %r4;
  cvt.u64.u32 %rd51, %r0; shl.b64 %rd51, %rd51, 2; ld.param.u64 %rd52, [out]; add.u64 %rd52, %rd52, %rd51;
  mov.u32 %r7, %cluster_ctarank; mad.wide.u32 %rd52, %r7, {512 * columns}, %rd52;
  ld.param.u64 %rd53, [asrc]; mad.wide.u32 %rd53, %r7, {sizes[0]}, %rd53;
  ld.param.u64 %rd54, [bsrc]; mad.wide.u32 %rd54, %r7, {sizes[1]}, %rd54;
  {copy_in("abuf", sizes[0], "asrc", 128).replace("ld.param.u64 %rd60, [asrc];", "mov.u64 %rd60, %rd53;")}
  {copy_in("bbuf", sizes[1], "bsrc", 128).replace("ld.param.u64 %rd60, [bsrc];", "mov.u64 %rd60, %rd54;")}
  {prologue} {load_initial}
  {_descriptor("%rd1", "abuf", a_fields)} {_descriptor("%rd2", "bbuf", b_fields)}
  mov.u32 %r11, {bits}; setp.eq.u32 %p3, {enable}, 1;
  {before} {cluster_sync} {after}
  {leader}
  {scales}
  {multiply * repeat}
  {commit}
  {wait()}
  {after}
  {_read_d(0, columns)}
  tcgen05.fence::before_thread_sync; bar.sync 0; {cluster_sync}
  @%p1 tcgen05.dealloc.{group}.sync.aligned.b32 %r3, 512;"""
    shared = f""".shared .align 1024 .b8 abuf[{sizes[0]}]; .shared .align 1024 .b8 bbuf[{sizes[1]}];
  .shared .align 1024 .b8 sfbuf[8192]; .shared .align 8 .b8 bar[8]; .shared .align 8 .b8 slot[8];"""
    return kernel(
        body,
        params=".param .u64 asrc, .param .u64 bsrc, .param .u64 out, .param .u64 sfsrc",
        shared=shared,
        target="sm_100a",
        threads=128,
    )


def _place(m: int, n: int, ctas: int, row: Any, column: Any) -> tuple[Any, Any, Any]:
    """CTA, lane and tensor memory column of elements of D: figures of 9.7.16.10.5."""
    if ctas == 1:
        return 0 * row, row if m == 128 else row // 16 * 32 + row % 16, column
    if m == 256:
        return row // 128, row % 128, column
    return row // 64, row % 64 + 64 * (column // (n // 2)), column % (n // 2)


def _pack_d(values: Any, kind: str, ctas: int, columns: int) -> tuple[Any, Any]:
    """D as it lies in tensor memory, uint32 (CTA, column, lane), and which of these cells it fills."""
    m, n = values.shape
    row, column = np.indices((m, n))
    cta, lane, where = _place(m, n, ctas, row, column)
    if kind == "f16":
        code = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        code = values.astype(np.int32 if kind == "s32" else np.float32).view(np.uint32)
    out, used = np.zeros((ctas, columns, 128), np.uint32), np.zeros((ctas, columns, 128), bool)
    out[cta, where, lane], used[cta, where, lane] = code, True
    return out, used


def _split(kind: Any, values: Any, mode: Any, ctas: Any, *, mn_major: Any, padded: Any) -> Any:
    """Images of an operand for each CTA, which hold equal shares of the rows."""
    parts = [operand(kind, part, mode, mn_major=mn_major, padded=padded) for part in np.split(values, ctas)]
    return np.stack([p[0] for p in parts]), parts[0][1], parts[0][2]


def _run(
    kind: Any,
    m: Any,
    n: Any,
    *,
    a: Any = "",
    b: Any = "",
    d: Any = "f32",
    mode: Any = "128B",
    ctas: Any = 1,
    a_mn: Any = False,
    b_mn: Any = False,
    negate: Any = 0,
    policy: Any = "eager",
    initial: Any = False,
    **more: Any,
) -> Any:
    rng = np.random.default_rng(m + n)
    a, b = a or next(iter(A_CODE[kind])), b or a or next(iter(A_CODE[kind]))
    left, right = small(rng, a, (m, DEPTH[kind])), small(rng, b, (n, DEPTH[kind]))
    padded = kind == "f8f6f4"
    a_image, a_leading, a_stride = _split(a, left, mode, ctas, mn_major=a_mn, padded=padded)
    b_image, b_leading, b_stride = _split(b, right, mode, ctas, mn_major=b_mn, padded=padded)
    split = ctas == 2 and m == 128
    columns = -(-(n // 2 if split else n) // 8) * 8
    start = rng.integers(-20, 20, (m, n)) if initial else np.zeros((m, n))
    acc = "s32" if kind == "i8" else d
    out, used = _pack_d(start, acc, ctas, columns)
    bits = instruction_descriptor(kind, a, b, m, n, d=int(d == "f32"), a_mn=a_mn, b_mn=b_mn, negate=negate)
    ptx = gemm_kernel(
        kind, bits, blackwell_fields(mode, a_leading, a_stride), blackwell_fields(mode, b_leading, b_stride),
        (a_image.shape[1], b_image.shape[1]), columns, ctas=ctas, initial=initial, **more,
    )  # fmt: skip
    report = emulate(ptx, ctas, [a_image, b_image, out, np.zeros(16, np.uint8)], cluster=ctas, policy=policy)
    expected, _ = _pack_d((-1 if negate in (1, 2) else 1) * (left @ right.T) + start, acc, ctas, columns)
    return report, np.where(used, out, 0), expected


def _check(result: Any, ignore: Any = ()) -> Any:
    report, got, expected = result
    report.raise_for_findings(ignore)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("kind", "a", "b", "d"),
    [
        ("f16", "f16", "", "f32"),
        ("f16", "bf16", "", "f32"),
        ("f16", "f16", "", "f16"),
        ("tf32", "tf32", "", "f32"),
        ("i8", "s8", "", "s32"),
        ("i8", "u8", "s8", "s32"),
    ]
    + [("f8f6f4", a, b, "f32") for a, b in (("e4m3", "e5m2"), ("e5m2", "e2m1"), ("e2m1", "e2m3"), ("e3m2", "e4m3"))],
)
def test_kinds(kind: Any, a: Any, b: Any, d: Any) -> None:
    _check(_run(kind, 128, 64, a=a, b=b, d=d))


@pytest.mark.parametrize(
    ("ctas", "m", "n"), [(1, 64, 8), (1, 64, 256), (1, 128, 16), (1, 128, 256), (2, 128, 64), (2, 256, 256)]
)
def test_shapes(ctas: Any, m: Any, n: Any) -> None:
    ignore = (
        (FindingKind.UNINITIALISED,) if (ctas, m) == (1, 64) else ()
    )  # half of the lanes hold nothing, and all are read back
    _check(_run("f16", m, n, ctas=ctas), ignore)


@pytest.mark.parametrize("mode", ["none", "32B", "64B", "128B"])
@pytest.mark.parametrize(("a_mn", "b_mn"), [(False, False), (True, False), (True, True)])
def test_layouts(mode: Any, a_mn: Any, b_mn: Any) -> None:
    _check(_run("f16", 128, 128, mode=mode, a_mn=a_mn, b_mn=b_mn))


@pytest.mark.parametrize("kind", ["e4m3", "s8"])
def test_mn_major_bytes(kind: Any) -> None:
    _check(_run("f8f6f4" if kind == "e4m3" else "i8", 128, 128, a=kind, a_mn=True, b_mn=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ctas", [1, 2])
def test_accumulates_under_every_policy(policy: Any, ctas: Any) -> None:
    _check(_run("f16", 128 * ctas, 32, ctas=ctas, initial=True, policy=policy))


@pytest.mark.parametrize("negate", [1, 2, 3])
def test_negation(negate: Any) -> None:
    _check(_run("f16", 128, 32, negate=negate))


def test_scale_input_d_and_disabled_lanes() -> None:
    report, got, _ = _run("f16", 128, 16, initial=True)
    plain = got.view(np.float32).copy()
    _, halved, _ = _run("f16", 128, 16, initial=True, mma_tail=", {5, 0, 0, 0x80000000}")
    _, start, _ = _run("f16", 128, 16, initial=True, mma_tail=", {-1, -1, -1, -1}".replace("-1", "0xffffffff"))
    report.raise_for_findings()
    off = np.zeros(128, bool)
    off[[0, 2, 127]] = True
    np.testing.assert_array_equal(halved.view(np.float32), np.where(off, start.view(np.float32), plain))


SCALED = [
    ("mxf8f6f4", "", 1, "ue8m0", "e4m3"),
    ("mxf8f6f4", ".scale_vec::1X", 1, "ue8m0", "e2m1"),
    ("mxf8f6f4", ".block32", 1, "ue8m0", "e3m2"),
    ("mxf4", "", 2, "ue8m0", "e2m1"),
    ("mxf4", ".block32", 2, "ue8m0", "e2m1"),
    ("mxf4nvf4", ".scale_vec::2X", 2, "ue8m0", "e2m1"),
    ("mxf4nvf4", ".scale_vec::4X", 4, "ue4m3", "e2m1"),
    ("mxf4nvf4", ".block16", 4, "ue4m3", "e2m1"),
    ("mxf4nvf4", ".block16", 4, "ue8m0", "e2m1"),
]


def _scale_image(code: Any, rows: Any, first: Any) -> Any:
    """Scale factors (rows, vector) as tcgen05.cp.32x128b reads them: 4 blocks of 32 rows side by side."""
    image = np.zeros((-(-rows // 128), 32, 4, 4), np.uint8)
    for row in range(rows):
        image[row // 128, row % 32, row % 128 // 32, first : first + code.shape[1]] = code[row]
    return image.reshape(-1)


@pytest.mark.parametrize(
    ("kind", "vector", "count", "scale", "element", "late"),
    [(*case, late) for case in SCALED for late in (False, True) if not (late and case[2] == 4)],
)
@pytest.mark.parametrize(("ctas", "m", "n"), [(1, 128, 64), (1, 128, 256), (2, 256, 128)])
def test_block_scaled(
    kind: Any, vector: Any, count: Any, scale: Any, element: Any, ctas: Any, m: Any, n: Any, late: Any
) -> None:
    """`late`: the scale factors are those at the end of each 4 bytes, chosen by the ids of the descriptor."""
    ident = 4 - count if late else 0
    rng = np.random.default_rng(count + n)
    left, right = small(rng, element, (m, DEPTH[kind])), small(rng, element, (n, DEPTH[kind]))
    a_image, a_leading, a_stride = _split(element, left, "128B", ctas, mn_major=False, padded=kind == "mxf8f6f4")
    b_image, b_leading, b_stride = _split(element, right, "128B", ctas, mn_major=False, padded=kind == "mxf8f6f4")
    low, high = (120, 134) if scale == "ue8m0" else (40, 70)
    sfa, sfb = (rng.integers(low, high, (rows, count)).astype(np.uint8) for rows in (m, n))
    images = [
        np.concatenate([_scale_image(part, m // ctas, ident), _scale_image(sfb, n, ident)])
        for part in np.split(sfa, ctas)
    ]
    size = images[0].size
    a_blocks, blocks = -(-m // ctas // 128), size // 512
    copies = "mov.u32 %r30, sfbuf; shr.u32 %r30, %r30, 4; cvt.u64.u32 %rd3, %r30; or.b64 %rd3, %rd3, %rd4;"
    for block in range(blocks):
        copies += f"add.u64 %rd5, %rd3, {32 * block}; add.u32 %r31, %r3, {256 + 4 * block};"
        copies += f"@%p2 tcgen05.cp.cta_group::{ctas}.32x128b.warpx4 [%r31], %rd5;"
    copies = f"mov.u64 %rd4, {blackwell_fields('none', 128, 128):#x};" + copies
    copies += f"add.u32 %r32, %r3, 256; add.u32 %r33, %r3, {256 + 4 * a_blocks};"
    prologue = copy_in("sfbuf", size, "sfsrc", 128).replace(
        "ld.param.u64 %rd60, [sfsrc];", f"ld.param.u64 %rd60, [sfsrc]; mad.wide.u32 %rd60, %r7, {size}, %rd60;"
    )
    bits = instruction_descriptor(kind, element, element, m, n, scale=int(scale == "ue8m0"), ids=(ident, ident))
    ptx = gemm_kernel(
        kind, bits, blackwell_fields("128B", a_leading, a_stride), blackwell_fields("128B", b_leading, b_stride),
        (a_image.shape[1], b_image.shape[1]), n, ctas=ctas, scales=copies,
        mma_tail=", [%r32], [%r33]", vector=vector, prologue=prologue,
    )  # fmt: skip
    out = np.zeros((ctas, n, 128), np.uint32)
    emulate(ptx, ctas, [a_image, b_image, out, np.stack(images)], cluster=ctas, policy="lazy").raise_for_findings()
    per = DEPTH[kind] // count
    a_scale, b_scale = (np.repeat(formats.decode(scale, codes), per, 1) for codes in (sfa, sfb))
    expected = (left * a_scale) @ (right * b_scale).T
    np.testing.assert_array_equal(out.view(np.float32), _pack_d(expected, "f32", ctas, n)[0].view(np.float32))


def test_a_in_tensor_memory() -> None:
    """A as f16 pairs in columns 256 to 263, stored by the four warps."""
    rng = np.random.default_rng(3)
    left, right = small(rng, "f16", (128, 16)), small(rng, "f16", (32, 16))
    image, leading, stride = operand("f16", right, "128B")
    pairs = np.ascontiguousarray(left.astype(np.float16).view(np.uint32).reshape(128, 8).T)
    names = ", ".join(f"%r{200 + i}" for i in range(8))
    load = "ld.param.u64 %rd55, [asrc]; add.u64 %rd55, %rd55, %rd51;" + "".join(
        f"ld.global.u32 %r{200 + i}, [%rd55+{512 * i}];" for i in range(8)
    )
    store = f"add.u32 %r21, %r5, 256; tcgen05.st.sync.aligned.32x32b.x8.b32 [%r21], {{{names}}};"
    prologue = (
        load
        + store
        + "tcgen05.wait::st.sync.aligned; add.u32 %r20, %r3, 256;"
        + "tcgen05.fence::before_thread_sync; bar.sync 0; tcgen05.fence::after_thread_sync;"
    )
    fields = blackwell_fields("128B", leading, stride)
    bits = instruction_descriptor("f16", "f16", "f16", 128, 32)
    out = np.zeros((1, 32, 128), np.uint32)

    def run(text: Any) -> Any:
        ptx = gemm_kernel("f16", bits, 0, fields, (4096, image.size), 32, a_tmem=True, prologue=text)
        return emulate(ptx, 1, [pairs, image, out, np.zeros(16, np.uint8)])

    run(prologue).raise_for_findings()
    np.testing.assert_array_equal(out, _pack_d(left @ right.T, "f32", 1, 32)[0])
    for missing in ("tcgen05.wait::st.sync.aligned;", "tcgen05.fence::before_thread_sync;"):
        fenced = gemm_kernel("f16", bits, 0, fields, (4096, image.size), 32, a_tmem=True, prologue=prologue)
        start = fenced.index("tcgen05.st.sync")  # the first of its kind after the store of A
        broken = fenced[:start] + fenced[start:].replace(missing, "", 2 if "before" in missing else 1)
        report = emulate(broken, 1, [pairs, image, out, np.zeros(16, np.uint8)])
        assert "missing_fence" in {str(k) for k in report.kinds()}


@pytest.mark.parametrize(
    ("shape", "rows", "size", "lanes"),
    [
        ("128x256b", 128, 32, lambda r: [r]),
        ("128x128b", 128, 16, lambda r: [r]),
        ("4x256b", 4, 32, lambda r: [32 * r]),
        ("64x128b.warpx2::02_13", 64, 16, lambda r: [r, r + 64]),
        ("64x128b.warpx2::01_23", 64, 16, lambda r: [r + 32 * (r // 32), r + 32 + 32 * (r // 32)]),
        ("32x128b.warpx4", 32, 16, lambda r: [r, r + 32, r + 64, r + 96]),
    ],
)
def test_copy_shapes(shape: Any, rows: Any, size: Any, lanes: Any) -> None:
    """Rows of 8 in core matrices, their chunks of 16 bytes 128 bytes apart, groups of 8 rows 256 bytes apart."""
    rng = np.random.default_rng(rows)
    data = rng.integers(0, 1 << 32, (rows, size // 4)).astype(np.uint32)
    image = np.zeros(4096, np.uint8)
    for row in range(rows):
        for chunk in range(size // 16):
            start = row // 8 * 256 + chunk * 128 + row % 8 * 16
            image[start : start + 16] = data[row, 4 * chunk : 4 * chunk + 4].view(np.uint8)
    copy = _descriptor("%rd1", "abuf", blackwell_fields("none", 128, 256))
    copy += f"@%p2 tcgen05.cp.cta_group::1.{shape} [%r3], %rd1;"
    ptx = gemm_kernel("f16", 0, 0, 0, (4096, 1024), 8, scales=copy, repeat=0)
    out = np.zeros((8, 128), np.uint32)
    report = emulate(ptx, 1, [image, np.zeros(1024, np.uint8), out, np.zeros(16, np.uint8)])
    report.raise_for_findings(ignore=(FindingKind.UNINITIALISED,))
    for row in range(rows):
        for lane in lanes(row):
            np.testing.assert_array_equal(out[: size // 4, lane], data[row])


def test_instruction_descriptors_that_are_refused() -> None:
    good = instruction_descriptor("f16", "f16", "f16", 128, 64)
    assert idesc.decode(good, "f16", 1).problems == ()
    for bits, words in (
        (good | 1 << 6, "reserved"), (good | 1 << 2, "sparsity"), (good | 1 << 30, "shift"),
        (good | 3 << 4, "type 3 of D"),
        (good | 2 << 7, "type 2 of A"), (instruction_descriptor("f16", "f16", "f16", 128, 24), "N of 24"),
        (instruction_descriptor("f16", "f16", "f16", 256, 64), "M of 256"),
    ):  # fmt: skip
        assert words in " ".join(idesc.decode(bits, "f16", 1).problems)
    scaled = instruction_descriptor("mxf4nvf4", "e2m1", "e2m1", 128, 64)
    assert idesc.decode(scaled, "mxf4nvf4", 1, 4).problems == ()
    assert "ue4m3" in " ".join(idesc.decode(scaled, "mxf4nvf4", 1, 2).problems)
    assert "id 1" in " ".join(idesc.decode(scaled | 1 << 29 | 1 << 23, "mxf4nvf4", 1, 2).problems)
    assert "MN-major" in " ".join(idesc.decode(scaled | 1 << 15, "mxf4nvf4", 1, 4).problems)


def _kinds(report: Any) -> Any:
    return {str(kind) for kind in report.kinds()}


def test_missing_fences_and_accumulation_to_nothing() -> None:
    assert "missing_fence" in _kinds(_run("f16", 128, 32, fences=False)[0])
    rng = np.random.default_rng(1)
    image, leading, stride = operand("f16", small(rng, "f16", (128, 16)), "128B")
    fields = blackwell_fields("128B", leading, stride)
    bits = instruction_descriptor("f16", "f16", "f16", 128, 128)
    ptx = gemm_kernel("f16", bits, fields, fields, (image.size, image.size), 128)
    out = np.zeros((1, 128, 128), np.uint32)
    args = [image, image, out, np.zeros(16, np.uint8)]
    assert _kinds(emulate(ptx.replace("setp.eq.u32 %p3, 0, 1;", "setp.eq.u32 %p3, 1, 1;"), 1, args)) == {
        "uninitialised"
    }
    assert "descriptor" in _kinds(
        emulate(ptx.replace(f"mov.u32 %r11, {bits};", f"mov.u32 %r11, {bits | 64};"), 1, args)
    )
    assert "async_race" in _kinds(emulate(ptx.replace(wait(), ""), 1, args, policy="mma_lazy"))
