"""The combine kernel in CuTe DSL, one source for sm_90a and sm_100a: reads each row once, writes each token once.

A thread owns eight neighbouring values of a token. It asks for them in up to eight of the token's rows before it adds
the first, in the order of the slots; more slots come in further rounds. A slot that a token does not have counts as
zeros of weight 0, which change no sum: one that began with +0 is never -0.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import BFloat16, Boolean, Constexpr, Float16, Float32, Int32, Int64, Numeric, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, asm, bf16, gmem, recipe
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.moe_combine.limits import PIECE

DTYPES: dict[str, type[Numeric]] = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}
SLOTS = 8  # rows that a thread asks for at once
THREADS = 128
_LOAD = (
    "{.reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];}"
)


@cute.jit
def launch(
    outputs: cute.Tensor,  # (M, H) bf16, fp16 or fp32
    rows: cute.Tensor,  # (T, k) int32
    weights: cute.Tensor,  # (T, k) fp32
    out: cute.Tensor,  # (T, H) bf16, fp16 or fp32
    stream: CUstream,
    target: Constexpr[Target],
) -> None:
    """Launches a thread for every piece of the result; a CTA has one token."""
    ctas = cute.ceil_div(cute.size(out, mode=[1]), PIECE * THREADS)
    moe_combine(outputs, rows, weights, out, cute.FastDivmodDivisorV2(ctas), target).launch(
        grid=[cute.size(out, mode=[0]) * ctas, 1, 1],
        block=[THREADS, 1, 1],
        min_blocks_per_mp=1,  # or ptxas saves registers, and asks for one row after the other
        use_pdl=True,
        stream=stream,
    )


@cute.kernel
def moe_combine(
    outputs: cute.Tensor,
    rows: cute.Tensor,
    weights: cute.Tensor,
    out: cute.Tensor,
    across: cute.FastDivmodDivisorV2,
    target: Constexpr[Target],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    token, part = divmod(cta, across)
    column = (part * THREADS + thread) * PIECE
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()  # what stands above overlaps with the end of the kernel before
    total = [Float32(0.0)] * PIECE
    for first in cutlass.range(0, cute.size(rows, mode=[1]), SLOTS, unroll=1):
        total = _add(total, first, token, column, outputs, rows, weights, target)
    _store(total, column < cute.size(out, mode=[1]), out, Int64(token) * cute.size(out, mode=[1]) + column, target)


def _add(
    total: list[Float32],
    first: Int32,
    token: Int32,
    column: Int32,
    outputs: cute.Tensor,
    rows: cute.Tensor,
    weights: cute.Tensor,
    target: Target,
) -> list[Float32]:
    """The sum after the slots from `first` on, SLOTS of them or as many as there are."""
    hidden, top_k, dtype = cute.size(outputs, mode=[1]), cute.size(rows, mode=[1]), outputs.element_type
    mine = first + cute.arch.lane_idx() % SLOTS  # a lane reads one slot's row and weight for its warp
    slot = cutlass.min(mine, top_k - 1)
    # clamped, so that no number leads out of the rows
    row = cutlass.min(cutlass.max(rows[token, slot], Int32(0)), cute.size(outputs, mode=[0]) - 1)
    factor = arith.select(mine < top_k, weights[token, slot], Float32(0.0))
    loaded = []
    for s in range(SLOTS):
        source = outputs.iterator + (Int64(cute.arch.shuffle_sync(row, s)) * hidden + column)
        loaded.append(_load(source, dtype, (first + s < top_k) & (column < hidden)))
    for s, words in enumerate(loaded):
        weight = cute.arch.shuffle_sync(factor, s)
        products = [arith.mul(value, weight, target) for value in recipe.values(words, dtype)]
        total = [arith.add(*pair, target) for pair in zip(total, products, strict=True)]
    return total


def _load(source: cute.Pointer, dtype: type[Numeric], valid: Boolean) -> list[Uint32]:
    """The words of a piece, zeros where not `valid`; past the L1, since nobody reads them again."""
    words: list[Uint32] = []
    for i in range(0, PIECE, 128 // dtype.width):
        words += asm.values([Uint32] * 4, _LOAD, asm.address(source + i), asm.flag(valid), early=True)
    return words


def _store(values: list[Float32], valid: Boolean, out: cute.Tensor, at: Int64, target: Target) -> None:
    """Rounds a piece and writes it at offset `at` where `valid`, 16 bytes at a time."""
    dtype = out.element_type
    if dtype is Float32:
        words = [arith.bits(value) for value in values]
    else:
        pairs = zip(values[::2], values[1::2], strict=True)
        words = [_pack(low, high, dtype, target) for low, high in pairs]
    for i in range(0, len(words), 4):
        gmem.store16_if(asm.address(out.iterator + (at + i * 32 // dtype.width)), words[i : i + 4], valid)


def _pack(low: Float32, high: Float32, dtype: type[Numeric], target: Target) -> Uint32:
    """Two values rounded to nearest even, `low` in the low half."""
    if dtype is BFloat16:
        return bf16.pack(low, high, target)
    return arith.ptx(Uint32, "cvt.rn.f16x2.f32 $0, $2, $1;", low, high)


def spec(dtype: str, out_dtype: str, target: Target) -> KernelSpec:
    """The kernel for two dtypes, any sizes that `limits` allows.

    Args:
        dtype: Of the experts' outputs, a key of DTYPES.
        out_dtype: Of the result, a key of DTYPES.
        target: A GPU.
    """

    def arguments() -> tuple[object, ...]:
        tokens, top_k, hidden = cute.sym_int32(), cute.sym_int32(), cute.sym_int32(divisibility=PIECE)

        def matrix(kind: type[Numeric], rows: object, columns: object, align: int) -> object:
            return make_fake_compact_tensor(kind, (rows, columns), stride_order=(1, 0), assumed_align=align)

        return (
            matrix(DTYPES[dtype], cute.sym_int32(), hidden, 16),
            matrix(Int32, tokens, top_k, 4),
            matrix(Float32, tokens, top_k, 4),
            matrix(DTYPES[out_dtype], tokens, hidden, 16),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            target,
        )

    return KernelSpec(f"moe_combine_{dtype}_{out_dtype}", target.value, launch, arguments, (dtype, out_dtype))
