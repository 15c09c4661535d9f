"""What becomes of the sums of the head_dim 512 kernel: registers to shared memory, rows from there by bulk stores."""

from __future__ import annotations

import math

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, attention_mma, multicast, ring
from megamoe.cute.arith import Target
from megamoe.cute.attention_mma import exp2
from megamoe.cute.softmax import left_operands
from megamoe_stages.multi_cta_attention.attend_512 import NONE, Consumer, finite
from megamoe_stages.multi_cta_attention.rows_512 import Rows, lanes
from megamoe_stages.multi_cta_attention.shape_512 import DIM, HALF, OUT_PITCH, Shape

_LN2 = math.log(2)
_LOG2E = 1 / _LN2
_WARP_ROWS = 16


@cute.jit
def load_sinks(sinks: cute.Tensor, rows: Constexpr[Rows], given: cute.Tensor, has_sink: Int32) -> None:
    """Loads the sinks of a thread's two rows, -inf for none."""
    g, _, wide = lanes()
    for half in cutlass.range_constexpr(2):
        sinks[half] = Float32(NONE)
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
        whole = total + exp2(sinks[half] * Float32(_LOG2E) - top)
        some = total > Float32(0.0)
        scale.append(arith.select(some, Float32(1.0) / whole, Float32(0.0)))
        own = arith.select(some, (top + attention_mma.log2(total)) * Float32(_LN2), Float32(NONE))
        if inside & (t == 0) & (me.number == 0):
            lse[Int64(query) * rows.heads + head] = own
    for i in cutlass.range_constexpr(HALF // 2):
        me.acc[i] = me.acc[i] * scale[i // 2 % 2]


@cute.jit
def store(me: Constexpr[Consumer], rows: Constexpr[Rows], out: cute.Tensor, shape: Constexpr[Shape]) -> None:
    """Writes this consumer's half of the columns, a row of 512 bytes a bulk store; over its ring, which it has read."""
    lane = cute.arch.lane_idx()
    _, _, wide = lanes()
    at = me.base + shape.ring_at + me.number * shape.ring_bytes + wide * (_WARP_ROWS * OUT_PITCH)
    matrix = at + (lane % 16) * OUT_PITCH + lane // 16 * 16  # of lane 8 i + r: rows 8 (i % 2) + r, columns 8 (i // 2)
    for pair in cutlass.range_constexpr(HALF // 16):
        words = left_operands([me.acc[8 * pair + i] for i in range(8)], shape.kind)  # rows 0, 8 of columns 0, then 8
        multicast.store_matrices(matrix + pair * 32, words)
    attention_mma.proxy_fence()
    cute.arch.sync_warp()
    row = rows.first + wide * _WARP_ROWS + lane
    inside = (lane < _WARP_ROWS) & (row < rows.count)
    place = rows.place(arith.select(inside, row, Int32(0)))
    there = ring.address(out.iterator) + (place * DIM + me.number * HALF) * 2
    multicast.store_row(there, at + lane * OUT_PITCH, 2 * HALF, arith.select(inside, Int32(1), Int32(0)))
    cute.arch.cp_async_bulk_commit_group()
    cute.arch.cp_async_bulk_wait_group(0, read=True)
