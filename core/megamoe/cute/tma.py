"""Tensor maps over rows that belong to sequences (sm_90a).

Sequences of any length lie back to back in a (tokens, heads, D) tensor, and a box of rows must end where its sequence
does. One tensor map does it for all of them: the tensor is seen with two dimensions of the same stride, one of which is
as long as the box. A box that starts `box - count` rows down that dimension has `count` rows inside; the rest is
outside the tensor, so the copy engine fills it with zeros and touches no memory for it. The other dimension makes up
for the start; its origin lies a box before the tensor, where nothing is ever read.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind, make_smem_layout_atom

from megamoe.cute.multicast import BLOCK_COLUMNS, Boxes, both_sides


def row_boxes(tensor: cute.Tensor, rows: int) -> Boxes:
    """A tensor map of a (tokens, heads, D) tensor of 16-bit values, D a multiple of 64; on the host, in the launcher.

    Args:
        tensor: Contiguous.
        rows: Of a box, a multiple of 8 up to 256.
    """
    tokens, heads, width = tensor.shape
    stride = heads * width
    layout = cute.make_layout((rows, width, heads, tokens + 1), stride=(stride, 1, width, stride))
    shifted = cute.make_tensor(tensor.iterator - rows * stride, layout)
    atom = make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, tensor.element_type)
    block = cute.tile_to_shape(atom, (rows, BLOCK_COLUMNS), (0, 1))
    box = (rows, BLOCK_COLUMNS, 1, 1)
    staged = cute.append(cute.append(block, cute.make_layout(1)), cute.make_layout(1))
    info = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), shifted, staged, box)
    return Boxes(info, tensor.element_type, rows)


def load_box(boxes: Boxes, first: Int32, count: Int32, head: Int32, column: Int32, slot: Int32, barrier: Int32) -> None:
    """Starts the copy of a box into shared memory; a whole warp. All its bytes count at the mbarrier, filled ones too.

    Args:
        boxes: Where from.
        first: The first row, of all tokens.
        count: Rows from there on that may be read, at least 1; those of the box beyond them become zeros.
        head: Which head.
        column: The first of 64 columns.
        slot: Address of the box in shared memory, a multiple of 1024.
        barrier: Address of an mbarrier.
    """
    inside = cutlass.min(count, boxes.rows)
    target, origin = both_sides(boxes, (boxes.rows - inside, column, head, first + inside), slot)
    at = cute.make_ptr(Int64, barrier, cute.AddressSpace.smem, assumed_align=8)
    cute.copy(boxes.info.atom, origin, target, tma_bar_ptr=at)
