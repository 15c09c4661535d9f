"""The append kernel: quantises new keys and values straight into their pages, by `cute.recipe`, the same bits.

A thread owns a block of 16 values of one new token: it loads them, finds their scale and writes 8 bytes of codes and
the scale byte where the block table says. What does not exist is dropped.
"""

from __future__ import annotations

import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from megamoe.cute import arith, asm, gmem, recipe
from megamoe.cute.arith import Target
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.recipe import BLOCK
from megamoe.cute.strips import DTYPES

THREADS = 512  # few CTAs: the decode kernel has no room on an SM before the last of them there has ended


@cute.jit
def launch(
    k_new: cute.Tensor,  # (batch * new * kv_heads, D) bf16, fp16 or fp32
    v_new: cute.Tensor,  # (batch * new * kv_heads, Dv); the keys' with one side
    k_codes: cute.Tensor,  # (pages * kv_heads * page, D/2) uint8
    k_scales: cute.Tensor,  # (pages * kv_heads * page, D/16) uint8
    v_codes: cute.Tensor,
    v_scales: cute.Tensor,
    k_scale: cute.Tensor,  # () fp32
    v_scale: cute.Tensor,  # () fp32
    block_table: cute.Tensor,  # (batch, max_pages) int32
    lengths: cute.Tensor,  # (batch,) int32
    new: Int32,
    kv_heads: Int32,
    page: Int32,
    pages: Int32,
    sides: Int32,  # 1: keys only
    stream: CUstream,
) -> None:
    """Launches a thread for each block of the larger side."""
    blocks = cutlass.max(cute.size(k_new), cute.size(v_new)) // BLOCK
    kernel(
        k_new,
        v_new,
        k_codes,
        k_scales,
        v_codes,
        v_scales,
        k_scale,
        v_scale,
        block_table,
        lengths,
        new,
        kv_heads,
        page,
        pages,
    ).launch(grid=[cute.ceil_div(blocks, THREADS), sides, 1], block=[THREADS, 1, 1], use_pdl=True, stream=stream)


@cute.kernel
def kernel(
    k_new: cute.Tensor,
    v_new: cute.Tensor,
    k_codes: cute.Tensor,
    k_scales: cute.Tensor,
    v_codes: cute.Tensor,
    v_scales: cute.Tensor,
    k_scale: cute.Tensor,
    v_scale: cute.Tensor,
    block_table: cute.Tensor,
    lengths: cute.Tensor,
    new: Int32,
    kv_heads: Int32,
    page: Int32,
    pages: Int32,
) -> None:
    """Keys by the CTAs of the first row of the grid, values by the second."""
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()  # what ran before has ended: the decode kernel only waits for this one
    thread, _, _ = cute.arch.thread_idx()
    cta, side, _ = cute.arch.block_idx()
    block = cta * THREADS + thread
    if side == 0:
        append(block, k_new, k_codes, k_scales, k_scale, block_table, lengths, new, kv_heads, page, pages)
    else:
        append(block, v_new, v_codes, v_scales, v_scale, block_table, lengths, new, kv_heads, page, pages)


@cute.jit
def append(
    block: Int32,
    fresh: cute.Tensor,
    codes: cute.Tensor,
    scales: cute.Tensor,
    scale: cute.Tensor,
    block_table: cute.Tensor,
    lengths: cute.Tensor,
    new: Int32,
    kv_heads: Int32,
    page: Int32,
    pages: Int32,
) -> None:
    """Encodes one block of 16 into its slot, where there is one."""
    target = Target.SM90
    cols = cute.size(scales, mode=[1])  # blocks a row
    if block < cute.size(fresh, mode=[0]) * cols:
        row, col = block // cols, block % cols
        token, head = row // kv_heads, row % kv_heads
        sequence = token // new
        length = lengths[sequence]
        position = length - new + token - sequence * new
        held = cutlass.min(length, cute.size(block_table, mode=[1]) * page)
        home = Int32(-1)
        if (position >= 0) & (position < held):
            home = block_table[sequence, position // page]
        if (home >= 0) & (home < pages):
            slot = Int64((home * kv_heads + head) * page + position % page)
            enc = arith.reciprocal(scale[()], target)
            words = load_block(fresh, Int64(block))
            encoded = recipe.encode_block(words, fresh.element_type, recipe.regular_global_scale(enc, target), target)
            low, high, byte = encoded.low, encoded.high, encoded.scale
            if not encoded.regular:  # rare: NaN, infinity or saturation
                encoded = recipe.encode_any_block(words, fresh.element_type, recipe.global_scale(enc, target), target)
                low, high, byte = encoded.low, encoded.high, encoded.scale
            gmem.store8(asm.address(codes) + (slot * cols + col) * 8, [low, high])
            scales[Int32(slot), col] = Uint8(byte)


def load_block(fresh: cute.Tensor, block: Int64) -> list[Uint32]:
    """The words of a block of 16 values."""
    count = recipe.words_of_block(fresh.element_type)
    at = asm.address(fresh) + block * (4 * count)
    return [word for i in range(count // 4) for word in gmem.load16(at + 16 * i)]


def spec(dtype: str, target: Target = Target.SM90) -> KernelSpec:
    """The kernel for new tokens of one dtype, a key of DTYPES."""

    def arguments() -> tuple[object, ...]:
        size = cute.sym_int32

        def matrix(kind: type, columns: object, align: int) -> object:
            return make_fake_compact_tensor(kind, (size(), columns), stride_order=(1, 0), assumed_align=align)

        fresh = [matrix(DTYPES[dtype], size(divisibility=BLOCK), 16) for _ in range(2)]
        caches = [
            matrix(Uint8, size(divisibility=8), 8) if i == 0 else matrix(Uint8, size(), 1)
            for _ in range(2)
            for i in range(2)
        ]
        scalars = [make_fake_tensor(Float32, (), (), assumed_align=4) for _ in range(2)]
        lengths = make_fake_compact_tensor(Int32, (size(),), stride_order=(0,), assumed_align=4)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return (*fresh, *caches, *scalars, matrix(Int32, size(), 4), lengths, *(Int32(0) for _ in range(5)), stream)

    return KernelSpec(f"append_{dtype}", target.value, launch, arguments, (dtype,))
