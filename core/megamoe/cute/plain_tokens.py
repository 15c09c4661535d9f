"""Producer warps of `weight_gemm` that bring bf16 activations as they are, for one expert: no `pack` before the GEMM.

What `pack` does to memory the warps do on the way to shared memory: two lanes' worth of a block each make a chunk of 8
slots, which is stored where the swizzle of wgmma wants it. A lane asks for AT_ONCE chunks before it waits.
"""

from __future__ import annotations

import cutlass
from cutlass import Constexpr, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm

from megamoe.cute import arith, bulk, fragments, pack, ring, weight_pieces, wgmma
from megamoe.cute.arith import Target
from megamoe.cute.warp import WARP
from megamoe.cute.weight_pieces import (
    GROUP,
    SLAB_CODES,
    SLAB_SCALES,
    STAGE_K,
    Operands,
    Piece,
    Shape,
)

AT_ONCE = 8
_CHUNKS = STAGE_K // 8  # of a token's share of a stage
_TOKENS = GROUP // _CHUNKS  # that the producer warps bring in a round


@cute.jit
def produce(base: Int32, operands: Constexpr[Operands], shape: Constexpr[Shape]) -> None:
    """A producer warp fills the ring for all pieces of this CTA: a quarter of the tokens, and a slab of weights."""
    total = weight_pieces.pieces(base, operands, shape)
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    number, turns = weight_pieces.turn(shape, operands)
    first_stage, k_stages = weight_pieces.stages_of(shape, operands)
    stage, parity = Int32(0), Int32(1)
    mine = warp - (GROUP // WARP - shape.slabs)  # which slab
    chunk = lane % _CHUNKS
    while number < total:
        piece = weight_pieces.piece_of(number, Int32(0), base, operands, shape)
        place = Int64(piece.row_piece * shape.slabs + mine) * operands.k_stages + first_stage
        codes = ring.address(operands.codes.iterator) + place * SLAB_CODES
        scales = ring.address(operands.scales.iterator) + place * SLAB_SCALES
        weights = (mine >= 0) & (mine < weight_pieces.slabs_of(piece, operands, shape))
        copies = weights & (lane == 0)
        row = warp * (WARP // _CHUNKS) + lane // _CHUNKS  # of the piece, in the first round
        for k in cutlass.range(k_stages, unroll=1):
            full, at = base + shape.barriers_at + stage * 16, base + stage * shape.stage_bytes
            ring.wait(full + 8, parity)
            if copies:
                _expect(full, SLAB_CODES + SLAB_SCALES)
                ring.copy(codes, at + shape.weights_at + mine * SLAB_CODES, Int32(SLAB_CODES), full)
                there = at + (shape.weights_at + shape.slabs * SLAB_CODES) + mine * SLAB_SCALES
                ring.copy(scales, there, Int32(SLAB_SCALES), full)
            to = at + chunk // 8 * (shape.weights_at // 2) + row * wgmma.ROW_BYTES + ((chunk ^ row) % 8) * 16
            for start in cutlass.range_constexpr(0, shape.tokens, _TOKENS * AT_ONCE):
                if start < piece.width:
                    at_row = row + start
                    many = min(AT_ONCE, (shape.tokens - start) // _TOKENS)
                    bring(
                        operands, piece, at_row, (first_stage + k) * _CHUNKS + chunk, to + start * wgmma.ROW_BYTES, many
                    )
            bulk.fence_barriers()  # the tensor cores read what was stored
            cute.arch.sync_warp()
            ring.arrive_if(full, arith.select(lane == 0, Int32(1), Int32(0)))
            codes, scales = codes + SLAB_CODES, scales + SLAB_SCALES
            stage, parity = weight_pieces.stage_after(stage, parity, shape)
        number = number + turns


def bring(operands: Operands, piece: Piece, row: Int32, chunk: Int32, to: Int32, rounds: int) -> None:
    """A lane's chunks of tokens _TOKENS apart, from `row` of the piece on; of a token that exists, in any case."""
    values = operands.packed
    rows = [piece.first + cutlass.min(row + i * _TOKENS, piece.valid - 1) for i in range(rounds)]
    loaded = [pack.load(values, values, row, chunk, "bfloat16") for row in rows]
    for i, parts in enumerate(loaded):
        words = fragments.interleave(parts[0], parts[1], Target.SM90)
        bulk.store4(Uint32(to + i * (_TOKENS * wgmma.ROW_BYTES)), words)


def _expect(barrier: Int32, size: int) -> None:
    """Tells the mbarrier that `size` bytes of bulk copies belong to its phase; no arrival."""
    llvm.inline_asm(
        None,
        [Int32(barrier).ir_value(), Int32(size).ir_value()],
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], $1;",
        "r,r,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
