"""Exact fp32 and integer operations that mean the same on the CPU and in PTX, and the targets themselves.

A GPU operation is inline PTX with its rounding spelled out: the compiler may contract a plain `a * b + c` to an FMA,
which rounds once where the recipe rounds twice, but never a `mul.rn`. No operation flushes subnormals.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from cutlass import Boolean, Float32, Int32, Numeric, Uint32, cute
from cutlass.cutlass_dsl import select_

from megamoe.cute import asm


class Target(Enum):
    """What the device code is compiled for; HOST is the DSL's JIT for the CPU, which tests use."""

    HOST = "host"
    SM90 = "sm_90a"
    SM100 = "sm_100a"

    @property
    def host(self) -> bool:
        """Whether plain operations stand in for PTX."""
        return self is Target.HOST

    @property
    def native_e2m1(self) -> bool:
        """Whether there is an instruction that encodes E2M1."""
        return self is Target.SM100


def ptx(result: type[Numeric], text: str, *operands: Numeric) -> Any:
    """One inline PTX instruction without side effects; $0 is the result, $1 and on the operands, all 32 bits wide."""
    return asm.value(result, text, *operands, effects=False)


def bits(x: Float32) -> Uint32:
    """The bit pattern of an fp32 value."""
    return x.bitcast(Uint32)


def number(x: Uint32) -> Float32:
    """The fp32 value of a bit pattern."""
    return x.bitcast(Float32)


def select(condition: Boolean, yes: Numeric, no: Numeric) -> Any:
    """`yes` where the condition holds, else `no`; both of one type."""
    return type(yes)(select_(condition, yes, no))


def mul(a: Float32, b: Float32, target: Target) -> Float32:
    """RN(a * b)."""
    return a * b if target.host else ptx(Float32, "mul.rn.f32 $0, $1, $2;", a, b)


def add(a: Float32, b: Float32, target: Target) -> Float32:
    """RN(a + b)."""
    return a + b if target.host else ptx(Float32, "add.rn.f32 $0, $1, $2;", a, b)


def scale_add(a: Float32, power_of_two: float, c: float, target: Target) -> Float32:
    """RN(a * power_of_two + c); on the CPU two operations, since the product is exact where it matters."""
    if target.host:
        return a * Float32(power_of_two) + Float32(c)
    return ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", a, Float32(power_of_two), Float32(c))


def reciprocal(a: Float32, target: Target) -> Float32:
    """RN(1 / a), any a."""
    return Float32(1.0) / a if target.host else ptx(Float32, "rcp.rn.f32 $0, $1;", a)


def reciprocal_in_range(a: Float32, target: Target) -> Float32:
    """RN(1 / a) for 2^-126 <= a < 2^126, without a branch; anything elsewhere.

    On a GPU these are the instructions of ptxas' own fast path of rcp.rn.f32, less the test and the branch.
    """
    if target.host:
        return Float32(1.0) / a
    near = ptx(Float32, "rcp.approx.ftz.f32 $0, $1;", a)
    error = ptx(Float32, "fma.rn.f32 $0, $1, $2, 0fBF800000;", a, near)
    minus = ptx(Float32, "neg.f32 $0, $1;", error)
    return ptx(Float32, "fma.rn.f32 $0, $1, $2, $1;", near, minus)


def magnitude(x: Float32, target: Target) -> Float32:
    """|x|, NaN stays NaN; on a GPU it becomes a modifier of the instruction that uses it."""
    return number(bits(x) & 0x7FFFFFFF) if target.host else ptx(Float32, "abs.f32 $0, $1;", x)


def maximum(a: Float32, b: Float32, target: Target) -> Float32:
    """The larger one; a NaN loses to a number."""
    if not target.host:
        return ptx(Float32, "max.f32 $0, $1, $2;", a, b)
    return select(b != b, a, select(a >= b, a, b))


def minimum(a: Float32, b: Float32, target: Target) -> Float32:
    """The smaller one; a NaN loses to a number."""
    if not target.host:
        return ptx(Float32, "min.f32 $0, $1, $2;", a, b)
    return select(b != b, a, select(a <= b, a, b))


def umin(a: Uint32, b: Uint32, target: Target) -> Uint32:
    """The smaller of two unsigned integers; of three, nested, sm_90 does it in one instruction."""
    return select(a < b, a, b) if target.host else ptx(Uint32, "min.u32 $0, $1, $2;", a, b)


def umax_halves(a: Uint32, b: Uint32, target: Target) -> Uint32:
    """The larger of each pair of 16-bit halves, as unsigned integers."""
    if not target.host:
        return ptx(Uint32, "max.u16x2 $0, $1, $2;", a, b)
    low_a, low_b = a & 0xFFFF, b & 0xFFFF
    return select(low_a > low_b, low_a, low_b) | select(a - low_a > b - low_b, a - low_a, b - low_b)


def permute(a: Uint32, b: Uint32, selector: int, target: Target) -> Uint32:
    """Bytes of (b, a) picked by the nibbles of `selector`, 0 to 3 from a and 4 to 7 from b: PTX prmt.b32."""
    if not target.host:
        return ptx(Uint32, "prmt.b32 $0, $1, $2, $3;", a, b, Uint32(selector))
    out = Uint32(0)
    for i in range(4):
        pick = selector >> (4 * i) & 7
        source = a if pick < 4 else b
        out = out | ((source >> (pick % 4 * 8)) & 0xFF) << (8 * i)
    return out


def any_lane(condition: Boolean, target: Target) -> Boolean:
    """Whether the condition holds for a lane of the warp, all of which must come here; on the CPU for this thread."""
    return condition if target.host else cute.arch.vote_any_sync(condition)


def hidden_zero(target: Target) -> Int32:
    """0, which the compiler does not know: what depends on it is computed where it is used, and only there."""
    if target.host:
        return Int32(0)
    text = "{.reg .u32 z; mov.u32 z, %ctaid.z; shr.u32 $0, z, 16;}"  # z is at most 65534
    return Int32(asm.value(Int32, text))


def loads_first(target: Target) -> None:
    """What was read above is asked for before anything below is computed; the whole warp must come here.

    Left alone, ptxas moves a load down to its first use when that saves registers, and latencies add up.
    """
    if not target.host:
        cute.arch.sync_warp()


def is_nan(x: Float32) -> Boolean:
    """Whether x is NaN."""
    return x != x
