"""What becomes of the sums of the head_dim 512 kernel: rows, staged in shared memory, leave 16 bytes a lane."""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, asm, attention_mma, gmem, smem
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import CHUNK, exp2
from megamoe.cute.softmax import HIDDEN, LN2, LOG2E, finite, fma, left_operands
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.rows_512 import CHUNKS, ROWS_AT_ONCE, Rows, chunk_at, lanes
from megamoe_stages.multi_cta_attention.shape_512 import BLOCK_BYTES, DIM, HALF, ROW_BYTES, Shape

_WARP_ROWS = 16


@cute.jit
def load_sinks(sinks: cute.Tensor, rows: Constexpr[Rows], given: cute.Tensor, has_sink: Int32) -> None:
    """Loads the sinks of a thread's two rows, -inf for none."""
    g, _, wide = lanes()
    for half in cutlass.range_constexpr(2):
        sinks[half] = Float32(HIDDEN)
    if has_sink != 0:
        for half in cutlass.range_constexpr(2):
            _, head = rows.split(cutlass.min(rows.first + wide * _WARP_ROWS + g + 8 * half, rows.count - 1))
            sinks[half] = given[head]


@cute.jit
def finish_rows(me: Constexpr[Consumer], rows: Constexpr[Rows], lse: cute.Tensor, sinks: cute.Tensor) -> None:
    """Turns the sums of a thread's two rows into their output, in place, and writes their lse."""
    g, t, wide = lanes()
    scale = []
    for half in cutlass.range_constexpr(2):
        row = rows.first + wide * _WARP_ROWS + g + 8 * half
        inside = row < rows.count
        query, head = rows.split(arith.select(inside, row, Int32(0)))
        top, total = arith.mul(finite(me.stat[half]), me.factor, Target.SM90), me.stat[2 + half]
        whole = total + exp2(fma(sinks[half], Float32(LOG2E), -top))
        some = total > Float32(0.0)
        scale.append(arith.select(some, Float32(1.0) / whole, Float32(0.0)))
        own = arith.select(some, (top + attention_mma.log2(total)) * Float32(LN2), Float32(HIDDEN))
        if inside & (t == 0) & (me.number == 0):
            lse[Int64(query) * rows.heads + head] = own
    for i in cutlass.range_constexpr(HALF // 2):
        me.acc[i] = me.acc[i] * scale[i // 2 % 2]


@cute.jit
def store(me: Constexpr[Consumer], rows: Constexpr[Rows], out: cute.Tensor, shape: Constexpr[Shape]) -> None:
    """Writes this consumer's half of the columns, over the weights' place, 64 columns at a time."""
    lane = cute.arch.lane_idx()
    _, _, wide = lanes()
    area = me.base + shape.weights_at + me.number * BLOCK_BYTES + wide * (_WARP_ROWS * ROW_BYTES)
    row, chunk = lane // CHUNKS, lane % CHUNKS
    there, inside = [], []
    for i in cutlass.range_constexpr(_WARP_ROWS // ROWS_AT_ONCE):
        number = rows.first + wide * _WARP_ROWS + i * ROWS_AT_ONCE + row
        exists = number < rows.count
        place = rows.place(arith.select(exists, number, Int32(0)))
        there.append(asm.address(out) + ((place * DIM + me.number * HALF) * 2 + chunk * CHUNK))
        inside.append(asm.flag(exists))
    for part in cutlass.range_constexpr(2 * HALF // ROW_BYTES):
        for pair in cutlass.range_constexpr(ROW_BYTES // 32):
            first = 8 * (part * (ROW_BYTES // 32) + pair)
            words = left_operands([me.acc[first + i] for i in range(8)], shape.kind)  # rows 0, 8 of columns 0, then 8
            smem.store_matrices(chunk_at(area, lane % _WARP_ROWS, 2 * pair + lane // _WARP_ROWS), words)
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(_WARP_ROWS // ROWS_AT_ONCE):
            words = smem.load16(chunk_at(area, i * ROWS_AT_ONCE + row, chunk))
            gmem.store16_if(there[i] + part * ROW_BYTES, words, inside[i])
        cute.arch.sync_warp()
