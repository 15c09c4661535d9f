"""What becomes of the sums of the head_dim 512 kernel: registers to shared memory, rows from there by bulk stores."""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, cute

from megamoe.cute import arith, attention_mma, ring, softmax, tma
from megamoe_stages.multi_cta_attention.attend_512 import Consumer
from megamoe_stages.multi_cta_attention.shape_512 import DIM, HALF, OUT_PITCH, Shape
from megamoe_stages.multi_cta_attention.tiles_512 import lanes

_WARP_ROWS = 16


@cute.jit
def finish_rows(me: Constexpr[Consumer], lse: cute.Tensor, sinks: cute.Tensor, has_sink: Int32) -> None:
    """Turns the sums of a thread's two rows into their output, in place, and writes their lse."""
    _, t, _ = lanes()
    scales = []
    for half in cutlass.range_constexpr(2):
        inside = me.tile.first + me.row(half) < me.tile.rows
        spot = me.tile.place(arith.select(inside, me.row(half), -me.tile.first), me.sequences)
        head = arith.select(has_sink != 0, spot % me.sequences.heads, Int32(0))
        sink = arith.select(has_sink != 0, sinks[head], Float32(softmax.HIDDEN))
        scale, own = softmax.finish(me.stat[half], me.stat[2 + half], me.factor, sink)
        scales.append(scale)
        if inside & (t == 0) & (me.number == 0):
            lse[spot] = own
    for i in cutlass.range_constexpr(HALF // 2):
        me.acc[i] = me.acc[i] * scales[i // 2 % 2]


@cute.jit
def store(me: Constexpr[Consumer], out: cute.Tensor, shape: Constexpr[Shape]) -> None:
    """Writes this consumer's half of the columns, a row of 512 bytes a bulk store; over the queries."""
    lane = cute.arch.lane_idx()
    _, _, wide = lanes()
    at = me.base + me.number * shape.staging_bytes + wide * (_WARP_ROWS * OUT_PITCH)
    to = at + lane % 16 * OUT_PITCH + lane // 16 * 16
    for pair in cutlass.range_constexpr(HALF // 16):
        values = [me.acc[8 * pair + i] for i in range(8)]
        tma.store_matrix(to + pair * 32, softmax.left_operands(values, "bf16"))
    attention_mma.proxy_fence()
    cute.arch.sync_warp()
    row = wide * _WARP_ROWS + lane
    tile, sequences, column = me.tile, me.sequences, me.number * HALF
    if (lane < _WARP_ROWS) & (tile.first + row < tile.rows):
        target = ring.address(out.iterator) + (Int64(tile.place(row, sequences)) * DIM + column) * 2
        tma.store_bulk(target, at + lane * OUT_PITCH, 2 * HALF)
        tma.commit_stores()
        tma.wait_stores()
