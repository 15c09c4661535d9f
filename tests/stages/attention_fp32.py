"""The head_dim 512 attention with an fp32 output: what its epilogues start from."""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, asm, compiler, gmem, mask_bits
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe_stages.multi_cta_attention import kernel_512
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.pieces_512 import Attention
from megamoe_stages.multi_cta_attention.rows_512 import Mask, Rows, lanes
from megamoe_stages.multi_cta_attention.shape_512 import DIM, HALF, Shape


@cute.jit
def launch(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    out: cute.Tensor,  # (queries, heads, 512) fp32
    lse: cute.Tensor,  # (queries, heads) fp32
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    sms: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    numbers = (softmax_scale, causal, window, has_sink, sms)
    given = kernel_512.prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, *numbers, shape)
    kernel_512.start(kernel(given, None, out, shape), given.order, stream, shape)


@cute.jit
def launch_masked(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    mask: cute.Tensor,
    words: cute.Tensor,
    entries: Int32,
    out: cute.Tensor,
    lse: cute.Tensor,
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    sms: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    bits = mask_bits.bits_of(words)
    mask_bits.start_packing(mask, bits, stream)
    numbers = (softmax_scale, causal, window, has_sink, sms)
    given = kernel_512.prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, *numbers, shape)
    kernel_512.start(kernel(given, Mask(bits, entries), out, shape), given.order, stream, shape)


@cute.kernel
def kernel(
    given: Attention,
    mask: Mask | None,
    out: cute.Tensor,
    shape: Constexpr[Shape],
) -> None:
    def finish(me: Consumer, rows: Rows) -> None:
        store(me, rows, out)

    kernel_512.work_on_rows(given, mask, finish, shape)


@cute.jit
def store(me: Constexpr[Consumer], rows: Constexpr[Rows], out: cute.Tensor) -> None:
    g, t, wide = lanes()
    for half in cutlass.range_constexpr(2):
        row = rows.first + wide * 16 + g + 8 * half
        if row < rows.count:
            at = asm.address(out) + (rows.place(row) * DIM + Int64(me.number * HALF + 2 * t)) * 4
            for block in cutlass.range_constexpr(HALF // 8):
                pair = [arith.bits(me.acc[4 * block + 2 * half + j]) for j in range(2)]
                gmem.store8(at + block * 32, pair)


def spec(shape: Shape) -> KernelSpec:
    def arguments() -> tuple[object, ...]:
        *given, lse = kernel_512.tensors()
        if shape.masked:
            given += kernel_512.masked_arguments()
        size = cute.sym_int32
        out = make_fake_compact_tensor(Float32, (size(), size(), DIM), stride_order=(2, 1, 0), assumed_align=16)
        numbers = Float32(0), *(Int32(0) for _ in range(4))
        return (*given, out, lse, *numbers, make_fake_stream(use_tvm_ffi_env_stream=True), shape)

    schedule = compiler.cache_key(kernel_512.spec(shape))  # a test's own key would not follow the stage's sources
    key = (*shape, schedule)
    function = launch_masked if shape.masked else launch
    return KernelSpec(f"fp32_{kernel_512.name_of(shape)}", Target.SM90.value, function, arguments, key)
