"""The routing kernels in CuTe DSL, one source for sm_90a and sm_100a: a warp a token, a lane every 32nd expert.

To choose, a lane keeps score + bias of its experts as integers of the same order; a warp-wide maximum of these, and a
minimum of the numbers of the experts that have it, finds one expert after the other. To look experts up, a lane reads
one expert's number and logit. Lane s ends with slot s.
"""

from __future__ import annotations

import math

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith
from megamoe.cute.arith import Target, bits, number, ptx
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.warp import WARP

LOGITS_A_LANE = (8, 12, 16)  # 256, 384 and 512 experts
THREADS = 128
_TINY = 1e-20  # see the reference
_LOG2_E = 1.4426950216293335  # the fp32 nearest to log2(e), and what is left of it
_LOG2_E_REST = math.log2(math.e) - _LOG2_E
_ATANH = tuple(1 / n for n in range(17, 0, -2))  # of z^2 in atanh(z) / z, highest power first: 2^-29 at z = 1/3


def logits_a_lane(experts: int) -> int:
    """Of a kernel for so many experts."""
    return next(n for n in LOGITS_A_LANE if n * WARP >= experts)


@cute.jit
def launch_choosing(
    logits: cute.Tensor,  # (T, E) fp32
    bias: cute.Tensor,  # (E,) fp32
    indices: cute.Tensor,  # (T, k) int32
    weights: cute.Tensor,  # (T, k) fp32
    scaling: Float32,
    stream: CUstream,
    target: Constexpr[Target],
    count: Constexpr[int],
    biased: Constexpr[bool],
) -> None:
    """Launches a warp for every token; without a bias the tensor is not read."""
    grid = cute.ceil_div(cute.size(logits, mode=[0]), THREADS // WARP)
    choose(logits, bias, indices, weights, scaling, target, count, biased).launch(
        grid=[grid, 1, 1], block=[THREADS, 1, 1], use_pdl=True, stream=stream
    )


@cute.jit
def launch_looking_up(
    logits: cute.Tensor,  # (T, E) fp32
    token_ids: cute.Tensor,  # (T * id_words,) int32
    table: cute.Tensor,  # (vocabulary, k * table_words) int32
    indices: cute.Tensor,  # (T, k) int32
    weights: cute.Tensor,  # (T, k) fp32
    scaling: Float32,
    stream: CUstream,
    target: Constexpr[Target],
    id_words: Constexpr[int],
    table_words: Constexpr[int],
) -> None:
    """Launches a warp for every token."""
    grid = cute.ceil_div(cute.size(logits, mode=[0]), THREADS // WARP)
    look_up(logits, token_ids, table, indices, weights, scaling, target, id_words, table_words).launch(
        grid=[grid, 1, 1], block=[THREADS, 1, 1], use_pdl=True, stream=stream
    )


@cute.kernel
def choose(
    logits: cute.Tensor,
    bias: cute.Tensor,
    indices: cute.Tensor,
    weights: cute.Tensor,
    scaling: Float32,
    target: Constexpr[Target],
    count: Constexpr[int],
    biased: Constexpr[bool],
) -> None:
    """Top-k; see the module."""
    token, lane = _place()
    experts = cute.size(logits, mode=[1])
    if token < cute.size(logits, mode=[0]):
        scores, keys = cute.make_rmem_tensor(count, Float32), cute.make_rmem_tensor(count, Uint32)
        for i in cutlass.range_constexpr(count):
            expert = lane + i * WARP
            there = cutlass.min(expert, experts - 1)
            scores[i] = score(logits[token, there], target)
            choice = scores[i]
            if cutlass.const_expr(biased):
                choice = arith.add(choice, bias[there], target)
            keys[i] = arith.select(expert < experts, _in_order(choice), Uint32(0))
        total, mine, own = Float32(0.0), Int32(0), Float32(0.0)
        for slot in cutlass.range(cute.size(indices, mode=[1]), unroll=1):
            key, at, value = keys[0], Int32(0), scores[0]
            for i in cutlass.range_constexpr(1, count):
                larger = keys[i] > key
                key = arith.select(larger, keys[i], key)
                at = arith.select(larger, Int32(i), at)
                value = arith.select(larger, scores[i], value)
            largest = _over_warp(key, "max")
            number_of = Uint32(lane + at * WARP)
            expert = Int32(_over_warp(arith.select(key == largest, number_of, Uint32(0xFFFFFFFF)), "min"))
            for i in cutlass.range_constexpr(count):
                keys[i] = arith.select(expert == lane + i * WARP, Uint32(0), keys[i])
            chosen = cute.arch.shuffle_sync(value, expert % WARP)
            total = arith.add(total, chosen, target)
            mine = arith.select(lane == slot, expert, mine)
            own = arith.select(lane == slot, chosen, own)
        _write(indices, weights, token, lane, mine, own, total, scaling, target)


@cute.kernel
def look_up(
    logits: cute.Tensor,
    token_ids: cute.Tensor,
    table: cute.Tensor,
    indices: cute.Tensor,
    weights: cute.Tensor,
    scaling: Float32,
    target: Constexpr[Target],
    id_words: Constexpr[int],
    table_words: Constexpr[int],
) -> None:
    """By token id; see the module. Numbers are clamped, so that none leads out of the table or the logits."""
    token, lane = _place()
    top_k = cute.size(indices, mode=[1])
    if token < cute.size(logits, mode=[0]):
        row = _within(token_ids[token * id_words], cute.size(table, mode=[0]))
        mine = table[row, cutlass.min(lane, top_k - 1) * table_words]
        own = score(logits[token, _within(mine, cute.size(logits, mode=[1]))], target)
        total = Float32(0.0)
        for slot in cutlass.range(top_k, unroll=1):
            total = arith.add(total, cute.arch.shuffle_sync(own, slot), target)
        _write(indices, weights, token, lane, mine, own, total, scaling, target)


def score(logit: Float32, target: Target) -> Float32:
    """sqrt(softplus(logit)), softplus as max(x, 0) + log1p(exp(-|x|)), within some 2^-22; 0 below about -87."""
    a = number(bits(logit) | Uint32(0x80000000))  # -|x|
    wide = arith.mul(a, Float32(_LOG2_E), target)
    whole = ptx(Float32, "cvt.rni.f32.f32 $0, $1;", wide)
    part = ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", a, Float32(_LOG2_E), number(bits(whole) ^ Uint32(0x80000000)))
    part = ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", a, Float32(_LOG2_E_REST), part)
    small = arith.mul(ptx(Float32, "ex2.approx.ftz.f32 $0, $1;", whole), _power_of_two(part), target)
    small = arith.select(whole < Float32(-126.0), Float32(0.0), small)  # also where the part is meaningless
    positive = arith.maximum(logit, Float32(0.0), target)
    softplus = arith.add(positive, _log_of_one_plus(small, target), target)
    return ptx(Float32, "sqrt.approx.f32 $0, $1;", softplus)


def _power_of_two(x: Float32) -> Float32:
    return ptx(Float32, "ex2.approx.ftz.f32 $0, $1;", x)


def _log_of_one_plus(t: Float32, target: Target) -> Float32:
    """log(1 + t) for 0 <= t <= 1: 2 atanh(t / (2 + t))."""
    z = arith.mul(t, arith.reciprocal_in_range(arith.add(t, Float32(2.0), target), target), target)
    square = arith.mul(z, z, target)
    sum_ = Float32(_ATANH[0])
    for coefficient in _ATANH[1:-1]:
        sum_ = ptx(Float32, "fma.rn.f32 $0, $1, $2, $3;", sum_, square, Float32(coefficient))
    rest = arith.mul(arith.mul(sum_, square, target), z, target)
    half = arith.add(rest, z, target)
    return arith.add(half, half, target)


def _in_order(x: Float32) -> Uint32:
    """An integer that grows with x, at least 1 for every number."""
    pattern = bits(x)
    flipped = arith.select((pattern >> 31) == 0, Uint32(0x80000000), Uint32(0xFFFFFFFF))
    return pattern ^ flipped


def _over_warp(value: Uint32, what: str) -> Uint32:
    return Uint32(cute.arch.warp_redux_sync(value, what))


def _place() -> tuple[Int32, Int32]:
    """The warp's token, and the lane."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()  # the start of this kernel overlaps with the end of the one before
    return cta * (THREADS // WARP) + thread // WARP, thread % WARP


def _within(value: Int32, size: Int32) -> Int32:
    return cutlass.min(cutlass.max(value, Int32(0)), size - 1)


@cute.jit
def _write(
    indices: cute.Tensor,
    weights: cute.Tensor,
    token: Int32,
    lane: Int32,
    expert: Int32,
    own: Float32,
    total: Float32,
    scaling: Float32,
    target: Constexpr[Target],
) -> None:
    """Each lane writes its slot."""
    share = ptx(Float32, "div.rn.f32 $0, $1, $2;", own, arith.add(total, Float32(_TINY), target))
    if lane < cute.size(indices, mode=[1]):
        indices[token, lane] = expert
        weights[token, lane] = arith.mul(share, scaling, target)


def choosing(count: int, biased: bool, target: Target) -> KernelSpec:
    """The kernel that chooses.

    Args:
        count: One of LOGITS_A_LANE.
        biased: With a bias.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        experts = cute.sym_int32()
        logits, out = _matrices(experts)
        bias = make_fake_compact_tensor(Float32, (experts,), stride_order=(0,), assumed_align=4)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (logits, bias, *out, Float32(0.0), stream, target, count, biased)

    name = f"moe_route_{count * WARP}{'_biased' if biased else ''}"
    return KernelSpec(name, target.value, launch_choosing, arguments, (count, biased))


def looking_up(id_bytes: int, table_bytes: int, target: Target) -> KernelSpec:
    """The kernel that looks up.

    Args:
        id_bytes: Of a token id, 4 or 8.
        table_bytes: Of an expert's number in the table, 4 or 8.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        logits, out = _matrices(cute.sym_int32())
        ids = make_fake_compact_tensor(Int32, (cute.sym_int32(),), stride_order=(0,), assumed_align=4)
        shape = (cute.sym_int32(), cute.sym_int32())
        table = make_fake_compact_tensor(Int32, shape, stride_order=(1, 0), assumed_align=4)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (logits, ids, table, *out, Float32(0.0), stream, target, id_bytes // 4, table_bytes // 4)

    name = f"moe_route_hash_{8 * id_bytes}_{8 * table_bytes}"
    return KernelSpec(name, target.value, launch_looking_up, arguments, (id_bytes, table_bytes))


def _matrices(experts: object) -> tuple[object, tuple[object, object]]:
    """Fake logits, and indices and weights."""
    tokens, top_k = cute.sym_int32(), cute.sym_int32()
    logits = make_fake_compact_tensor(Float32, (tokens, experts), stride_order=(1, 0), assumed_align=4)
    out = [
        make_fake_compact_tensor(kind, (tokens, top_k), stride_order=(1, 0), assumed_align=4)
        for kind in (Int32, Float32)
    ]
    return logits, (out[0], out[1])
