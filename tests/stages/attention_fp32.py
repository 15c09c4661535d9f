"""The head_dim 512 attention with an fp32 output: what its epilogues start from."""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from megamoe.cute import arith, attention_mma, ring
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.multicast import Boxes
from megamoe_stages.multi_cta_attention import kernel_512
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.kernel_512 import Attention
from megamoe_stages.multi_cta_attention.shape_512 import DIM, HALF, THREADS, Shape
from megamoe_stages.multi_cta_attention.tiles_512 import lanes


@cute.jit
def launch(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_q: cute.Tensor,
    cu_k: cute.Tensor,
    sink: cute.Tensor,
    out: cute.Tensor,  # (queries * heads, 512) fp32
    lse: cute.Tensor,
    softmax_scale: Float32,
    heads: Int32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    ctas: Int32,
    stream: CUstream,
    shape: Constexpr[Shape],
) -> None:
    numbers = (softmax_scale, heads, causal, window, has_sink)
    given = kernel_512.prepare(q, k, v, cu_q, cu_k, sink, lse, q, *numbers, shape)  # no mask: anything of two dims
    kernel(*given, out, shape).launch(
        grid=kernel_512.grid(given, ctas, shape),
        block=[THREADS, 1, 1],
        cluster=[shape.ctas, 1, 1],
        smem=shape.shared_bytes,
        min_blocks_per_mp=1,
        stream=stream,
    )


@cute.kernel
def kernel(
    q: cute.Tensor,
    keys: Boxes,
    values: Boxes,
    cu_q: cute.Tensor,
    cu_k: cute.Tensor,
    sink: cute.Tensor,
    lse: cute.Tensor,
    factor: Float32,
    heads: Int32,
    kv_heads: Int32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    mask: cute.Tensor,
    out: cute.Tensor,
    shape: Constexpr[Shape],
) -> None:
    def finish(me: Consumer) -> None:
        store(me, out)

    given = Attention(q, keys, values, cu_q, cu_k, sink, lse, factor, heads, kv_heads, causal, window, has_sink, mask)
    kernel_512.work(given, finish, shape)


@cute.jit
def store(me: Constexpr[Consumer], out: cute.Tensor) -> None:
    _, t, _ = lanes()
    tile, sequences = me.tile, me.sequences
    for half in cutlass.range_constexpr(2):
        row = me.row(half)
        pairs = [[arith.bits(me.acc[4 * block + 2 * half + j]) for j in range(2)] for block in range(HALF // 8)]
        column = me.number * HALF + 2 * t
        if tile.first + row < tile.rows:
            at = ring.address(out.iterator) + (Int64(tile.place(row, sequences)) * DIM + column) * 4
            for block, pair in enumerate(pairs):
                attention_mma.store8_global(at + block * 32, pair)


def spec(shape: Shape) -> KernelSpec:
    def arguments() -> tuple[object, ...]:
        *given, lse, _ = kernel_512.tensors()
        out = make_fake_compact_tensor(Float32, (cute.sym_int32(), DIM), stride_order=(1, 0), assumed_align=16)
        return (*given, out, lse, *kernel_512.numbers(), make_fake_stream(use_tvm_ffi_env_stream=True), shape)

    return KernelSpec(f"fp32_{kernel_512.name_of(shape)}", Target.SM90.value, launch, arguments, tuple(shape))
