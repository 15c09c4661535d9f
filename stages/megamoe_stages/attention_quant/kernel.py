"""attention_quant for sm_90a: the head_dim 512 schedule of multi_cta_attention with an FP4 epilogue."""

from __future__ import annotations

from cuda.bindings.driver import CUstream
from cutlass import Constexpr, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import mask_bits, recipe
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.recipe import BLOCK
from megamoe_stages.attention_quant import encode
from megamoe_stages.attention_quant.encode import Quantized
from megamoe_stages.attention_quant.limits import ROPE_DIM
from megamoe_stages.multi_cta_attention import kernel_512, shape_512
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.pieces_512 import Attention
from megamoe_stages.multi_cta_attention.rows_512 import Mask, Rows
from megamoe_stages.multi_cta_attention.shape_512 import DIM, Shape

SHAPES = tuple(shape._replace(angles=True) for shape in shape_512.SHAPES)


@cute.jit
def launch(
    q: cute.Tensor,  # (queries, heads, 512) bf16
    k: cute.Tensor,  # (keys, kv_heads, 512) bf16
    v: cute.Tensor,  # the same
    cu_seqlens_q: cute.Tensor,  # (sequences + 1,) int32
    cu_seqlens_k: cute.Tensor,  # (sequences + 1,) int32
    sink: cute.Tensor,  # (heads,) fp32; not read unless has_sink
    positions: cute.Tensor,  # int32 (queries,), or int64 seen as int32 (2 * queries,)
    cos: cute.Tensor,  # (P, 32) fp32
    sin: cute.Tensor,  # (P, 32) fp32
    enc: cute.Tensor,  # () fp32
    codes: cute.Tensor,  # (G, queries, heads / G * 256) uint8
    scales: cute.Tensor,  # (G, queries, heads / G * 32) uint8, or padded to 128 queries
    dec: cute.Tensor,  # () fp32
    lse: cute.Tensor,  # (queries, heads) fp32
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,  # 0 for none
    has_sink: Int32,
    sms: Int32,
    stream: CUstream,
    tiled: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """Launches as `multi_cta_attention.kernel_512` does."""
    numbers = (softmax_scale, causal, window, has_sink, sms)
    given = kernel_512.prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, *numbers, shape)
    heads_a_group = cute.FastDivmodDivisorV2(codes.shape[2] // (DIM // 2))
    made = kernel(given, None, positions, cos, sin, enc, codes, scales, dec, heads_a_group, tiled, shape)
    kernel_512.start(made, given.order, stream, shape)


@cute.jit
def launch_masked(
    q: cute.Tensor,
    k: cute.Tensor,
    v: cute.Tensor,
    cu_seqlens_q: cute.Tensor,
    cu_seqlens_k: cute.Tensor,
    sink: cute.Tensor,
    mask: cute.Tensor,  # these three as in `kernel_512.launch_masked`
    words: cute.Tensor,
    entries: Int32,
    positions: cute.Tensor,
    cos: cute.Tensor,
    sin: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    lse: cute.Tensor,
    softmax_scale: Float32,
    causal: Int32,
    window: Int32,
    has_sink: Int32,
    sms: Int32,
    stream: CUstream,
    tiled: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """Packs the mask, then launches as `launch` does."""
    bits = mask_bits.bits_of(words)
    mask_bits.start_packing(mask, bits, stream)
    numbers = (softmax_scale, causal, window, has_sink, sms)
    given = kernel_512.prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, lse, *numbers, shape)
    heads_a_group = cute.FastDivmodDivisorV2(codes.shape[2] // (DIM // 2))
    made = kernel(given, Mask(bits, entries), positions, cos, sin, enc, codes, scales, dec, heads_a_group, tiled, shape)
    kernel_512.start(made, given.order, stream, shape)


@cute.kernel
def kernel(
    given: Attention,
    mask: Mask | None,
    positions: cute.Tensor,
    cos: cute.Tensor,
    sin: cute.Tensor,
    enc: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    dec: cute.Tensor,
    heads_a_group: cute.FastDivmodDivisorV2,
    tiled: Constexpr[bool],
    shape: Constexpr[Shape],
) -> None:
    """The kernel; see the module."""
    thread, _, _ = cute.arch.thread_idx()
    cta, _, _ = cute.arch.block_idx()
    out = Quantized(positions, cos, sin, enc, codes, scales, heads_a_group, tiled)
    if tiled:
        encode.write_rest(out)

    def finish(me: Consumer, rows: Rows) -> None:
        encode.encode_rows(me, rows, out, shape)

    def fetch(base: Int32, rows: Rows) -> None:
        encode.fetch(base, rows, out, shape)

    kernel_512.work_on_rows(given, mask, finish, shape, fetch)
    if cta + thread == 0:
        dec[()] = recipe.global_scale(enc[()], Target.SM90).dec


def shape_for(window: int | None, *, masked: bool) -> Shape:
    """The kernel of `SHAPES` for a window and, besides, a mask of one's own."""
    return SHAPES[shape_512.SHAPES.index(shape_512.shape_for(window, masked=masked))]


def spec(tiled: bool, shape: Shape) -> KernelSpec:
    """The kernel for any sizes."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def compact(dtype: type, sizes: tuple[object, ...], align: int) -> object:
            order = tuple(reversed(range(len(sizes))))
            return make_fake_compact_tensor(dtype, sizes, stride_order=order, assumed_align=align)

        *given, lse = kernel_512.tensors()
        if shape.masked:
            given += kernel_512.masked_arguments()
        positions = compact(Int32, (size(),), 4)
        cos, sin = (compact(Float32, (size(), ROPE_DIM // 2), 4) for _ in range(2))
        enc, dec = (make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(2))
        codes = compact(Uint8, (size(), size(), size(divisibility=DIM // 2)), 16)
        scales = compact(Uint8, (size(), size(), size(divisibility=DIM // BLOCK)), 16)
        numbers = Float32(0), *(Int32(0) for _ in range(3))
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (*given, positions, cos, sin, enc, codes, scales, dec, lse, *numbers, Int32(0), stream, tiled, shape)

    function = launch_masked if shape.masked else launch
    kind = "128x4" if tiled else "linear"
    return KernelSpec(
        f"d512_{kind}_{kernel_512.name_of(shape)}",
        Target.SM90.value,
        function,
        arguments,
        (tiled, *shape),
    )
