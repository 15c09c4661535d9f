"""The instruction descriptor of tcgen05.mma and the shapes that each kind allows.

Sources: PTX ISA 9.7.16.4.2 (tables 42 to 44, instruction descriptor), 9.7.16.2.1 (shapes), 9.7.16.10.7 (scale factors).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
ELEMENTS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": F8F6F4,
    "i8": {0: "u8", 1: "s8"},
    "mxf8f6f4": F8F6F4,
    "mxf4": {1: "e2m1"},
    "mxf4nvf4": {1: "e2m1"},
}
ACCUMULATORS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "f32"},
    "tf32": {1: "f32"},
    "f8f6f4": {0: "f16", 1: "f32"},
    "i8": {2: "s32"},
}
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
BLOCK_SCALED = ("mxf8f6f4", "mxf4", "mxf4nvf4")
# Scale factors along K of one instruction, by kind and by the modifier that says so ("" where it may be left out).
VECTORS: dict[str, dict[str, int]] = {
    "mxf8f6f4": {"": 1, "scale_vec::1X": 1, "block32": 1},
    "mxf4": {"": 2, "scale_vec::2X": 2, "block32": 2},
    "mxf4nvf4": {"scale_vec::2X": 2, "block32": 2, "scale_vec::4X": 4, "block16": 4},
}


@dataclass(frozen=True)
class Shape:
    """What an instruction descriptor says.

    Attributes:
        m: Rows of D, of both CTAs.
        n: Columns of D.
        k: Elements along K.
        a: Format of A.
        b: Format of B.
        d: Format of D, "f32", "f16" or "s32".
        a_mn: A is MN-major.
        b_mn: B is MN-major.
        negate: -1 when exactly one of A and B is negated.
        saturate: Of integers.
        scale: Format of the scale factors, "" without.
        a_scale_id: First byte of A's scale factors in a column.
        b_scale_id: The same of B.
        problems: What is illegal, in words.
    """

    m: int
    n: int
    k: int
    a: str
    b: str
    d: str
    a_mn: bool
    b_mn: bool
    negate: int
    saturate: bool
    scale: str
    a_scale_id: int
    b_scale_id: int
    problems: tuple[str, ...]


@lru_cache(maxsize=1024)
def decode(bits: int, kind: str, ctas: int, vector: int = 0) -> Shape:
    """Decodes and checks a 32-bit instruction descriptor.

    Args:
        bits: Of the descriptor.
        kind: Without "kind::".
        ctas: 1 or 2, of cta_group.
        vector: Scale factors along K of one instruction, 0 for kinds without.
    """
    problems = []
    scaled = kind in BLOCK_SCALED
    m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    formats = []
    for name, shift in (("A", 7), ("B", 10)):
        code = bits >> shift & 7
        if code not in ELEMENTS[kind]:
            problems.append(f"type {code} of {name} is not one of kind::{kind}")
        formats.append(ELEMENTS[kind].get(code, next(iter(ELEMENTS[kind].values()))))
    if bits >> 2 & 1:
        problems.append("the sparsity bit is set on a dense instruction")
    if bits & 3:
        problems.append("the sparsity selector is set on a dense instruction")
    d, scale = "f32", ""
    if scaled:
        scale = "ue8m0" if bits >> 23 & 1 else "ue4m3"
        problems += _scaled_problems(bits, kind, vector, scale)
    else:
        code = bits >> 4 & 3
        if code not in ACCUMULATORS[kind]:
            problems.append(f"type {code} of D is not one of kind::{kind}")
        d = ACCUMULATORS[kind].get(code, "f32")
        if bits >> 3 & 1 and kind != "i8":
            problems.append("the saturation bit is set")
        reserved = bits & (1 << 6 | 1 << 23 | 1 << 29)
        if reserved:
            problems.append(f"reserved bits {reserved:#x} are set")
        if bits >> 30 & 3:
            problems.append("a maximum shift is set, which only .ws has")
    if bits >> 13 & 3 and kind == "i8":
        problems.append("negation of integers")
    a_mn, b_mn = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
    for name, fmt, flag in (("A", formats[0], a_mn), ("B", formats[1], b_mn)):
        if flag and fmt not in ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8"):
            problems.append(f"{name} of type {fmt} cannot be MN-major")
    problems += _shape_problems(m, n, kind, ctas)
    return Shape(
        m, n, DEPTH[kind], formats[0], formats[1], d, a_mn, b_mn, -1 if (bits >> 13 ^ bits >> 14) & 1 else 1,
        bool(bits >> 3 & 1) and kind == "i8", scale, bits >> 29 & 3 if scaled else 0, bits >> 4 & 3 if scaled else 0,
        tuple(problems),
    )  # fmt: skip


def _scaled_problems(bits: int, kind: str, vector: int, scale: str) -> list[str]:
    out = []
    if bits & (1 << 3 | 1 << 6):
        out.append(f"reserved bits {bits & (1 << 3 | 1 << 6):#x} are set")
    if bits >> 31:
        out.append("K size 1 (K = 96) needs sm_103a")
    if scale == "ue4m3" and not (kind == "mxf4nvf4" and vector == 4):
        out.append(f"scale factors of type ue4m3 with kind::{kind} and {vector} a row")
    for name, ident in (("A", bits >> 29 & 3), ("B", bits >> 4 & 3)):
        if ident % vector:
            out.append(f"scale factor id {ident} of {name} with {vector} scale factors a row")
    return out


def _shape_problems(m: int, n: int, kind: str, ctas: int) -> list[str]:
    allowed = {1: (128,) if kind in BLOCK_SCALED else (64, 128), 2: (128, 256)}[ctas]
    if m not in allowed:
        return [f"M of {m} with cta_group::{ctas} and kind::{kind}, not one of {allowed}"]
    step = 8 if ctas == 1 and (m == 64 or kind in BLOCK_SCALED) else 16
    if n % step or not step <= n <= 256:
        return [f"N of {n} with M of {m} and cta_group::{ctas}: not a multiple of {step} up to 256"]
    return []
