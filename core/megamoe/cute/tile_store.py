"""Tensor copies from shared memory to the boxes that `multicast.boxes` reads: its tiles, the other way (sm_90a)."""

from __future__ import annotations

from cutlass import Int32, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind, make_smem_layout_atom

from megamoe.cute.multicast import BLOCK_COLUMNS, Boxes


def boxes(tensor: cute.Tensor, rows: int, blocks: int) -> Boxes:
    """A tensor map of a (tokens, heads, D) tensor of 16-bit values to write; on the host, in the launcher.

    Args:
        tensor: Contiguous, D a multiple of 64.
        rows: Of a box, a multiple of 8 up to 256.
        blocks: Of 64 columns of a box.
    """
    tokens, heads, width = tensor.shape
    layout = cute.make_layout(
        (tokens, BLOCK_COLUMNS, width // BLOCK_COLUMNS, heads), stride=(heads * width, 1, BLOCK_COLUMNS, width)
    )
    seen = cute.make_tensor(tensor.iterator, layout)
    atom = make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, tensor.element_type)
    inside = cute.append(cute.tile_to_shape(atom, (rows, BLOCK_COLUMNS, blocks), (0, 1, 2)), cute.make_layout(1))
    how = cpasync.CopyBulkTensorTileS2GOp()
    info = cpasync.make_tiled_tma_atom(how, seen, inside, (rows, BLOCK_COLUMNS, blocks, 1))
    return Boxes(info, tensor.element_type, rows, blocks, 1)


def store_box(to: Boxes, token: Int32, head: Int32 | int, block: Int32, slot: Int32) -> None:
    """Starts the copy of a box from shared memory, in the next group of bulk stores of this warp; a whole warp.

    What others wrote there must have been shown to the copy engine (`attention_mma.proxy_fence`, by who wrote it).

    Args:
        to: Where to.
        token: The first row; rows beyond the tensor are left out.
        head: Which head.
        block: The first block of columns.
        slot: Address in shared memory, a multiple of 1024.
    """
    tensor, layout = to.info.tma_tensor, to.info.smem_layout
    box = (to.rows, BLOCK_COLUMNS, to.blocks, 1)
    there = cute.local_tile(cute.domain_offset((token, 0, block, head), tensor), box, (0, 0, 0, 0))
    pointer = cute.make_ptr(to.dtype, slot, cute.AddressSpace.smem, assumed_align=1024)
    here = cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=to.dtype), layout.outer)
    origin, target = cpasync.tma_partition(
        to.info.atom, 0, cute.make_layout(1), cute.group_modes(here, 0, 4), cute.group_modes(there, 0, 4)
    )
    cute.copy(to.info.atom, origin, target)
