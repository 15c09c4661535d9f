"""Tensor copies of boxes, and loads that the CTAs of a cluster share: each loads a part of a tile for all (sm_90a).

A tile lies in shared memory as blocks of 64 columns, a row of a block 128 bytes with its 16-byte chunks swizzled as in
`wgmma`. Who has read a place says so to the mbarriers of all CTAs, since any of them may write there next.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int16, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu.warpgroup import SmemLayoutAtomKind, make_smem_layout_atom

BLOCK_COLUMNS = 64  # of 16 bits


class Boxes:
    """Boxes of (rows, blocks of 64 columns) of one head of a (tokens, heads, D) tensor, each for so many CTAs."""

    def __init__(self, info: cpasync.TmaInfo, dtype: type[Numeric], rows: int, blocks: int = 1, ctas: int = 1) -> None:
        self.info, self.dtype, self.rows, self.blocks, self.ctas = info, dtype, rows, blocks, ctas

    def __extract_mlir_values__(self) -> list[Any]:
        values: list[Any] = self.info.__extract_mlir_values__()
        return values

    def __extract_mlir_attributes__(self) -> list[Any]:
        attributes: list[Any] = self.info.__extract_mlir_attributes__()
        return attributes

    def __new_from_mlir_values__(self, values: list[Any]) -> Boxes:
        return Boxes(self.info.__new_from_mlir_values__(values), self.dtype, self.rows, self.blocks, self.ctas)


def boxes(tensor: cute.Tensor, rows: int, blocks: int, ctas: int) -> Boxes:
    """A tensor map of a (tokens, heads, D) tensor of 16-bit values to read; on the host, in the launcher.

    Args:
        tensor: Contiguous, D a multiple of 64.
        rows: Of a box, a multiple of 8 up to 256.
        blocks: Of 64 columns of a box.
        ctas: Of a cluster; each box goes to all of them.
    """
    how = cpasync.CopyBulkTensorTileG2SMulticastOp() if ctas > 1 else cpasync.CopyBulkTensorTileG2SOp()
    return _boxes(how, tensor, rows, blocks, ctas)


def boxes_to_write(tensor: cute.Tensor, rows: int, blocks: int) -> Boxes:
    """As `boxes`, of a tensor to write."""
    return _boxes(cpasync.CopyBulkTensorTileS2GOp(), tensor, rows, blocks, 1)


def load_box(source: Boxes, token: Int32, head: Int32, block: Int32, slot: Int32, barrier: Int32) -> None:
    """Starts the copy of a box to the same place of all CTAs; a whole warp. All its bytes count at their mbarriers.

    Args:
        source: Where from.
        token: The first row; rows beyond the tensor become zeros.
        head: Which head.
        block: The first block of columns.
        slot: Address in shared memory, a multiple of 1024.
        barrier: Address of an mbarrier.
    """
    target, origin = both_sides(source, (token, 0, block, head), slot)
    at = cute.make_ptr(Int64, barrier, cute.AddressSpace.smem, assumed_align=8)
    to_all = {"mcast_mask": Int16((1 << source.ctas) - 1)} if source.ctas > 1 else {}
    cute.copy(source.info.atom, origin, target, tma_bar_ptr=at, **to_all)


def store_box(to: Boxes, token: Int32, head: Int32 | int, block: Int32, slot: Int32) -> None:
    """Starts the copy of a box from shared memory, in the next group of bulk stores of this warp; a whole warp.

    What others wrote there must have been shown to the copy engine (`smem.proxy_fence`, by who wrote it).

    Args:
        to: Where to, of `boxes_to_write`.
        token: The first row; rows beyond the tensor are left out.
        head: Which head.
        block: The first block of columns.
        slot: Address in shared memory, a multiple of 1024.
    """
    origin, target = both_sides(to, (token, 0, block, head), slot)
    cute.copy(to.info.atom, origin, target)


def _boxes(how: Any, tensor: cute.Tensor, rows: int, blocks: int, ctas: int) -> Boxes:
    tokens, heads, width = tensor.shape
    layout = cute.make_layout(
        (tokens, BLOCK_COLUMNS, width // BLOCK_COLUMNS, heads), stride=(heads * width, 1, BLOCK_COLUMNS, width)
    )
    seen = cute.make_tensor(tensor.iterator, layout)
    atom = make_smem_layout_atom(SmemLayoutAtomKind.K_SW128, tensor.element_type)
    inside = cute.append(cute.tile_to_shape(atom, (rows, BLOCK_COLUMNS, blocks), (0, 1, 2)), cute.make_layout(1))
    info = cpasync.make_tiled_tma_atom(how, seen, inside, (rows, BLOCK_COLUMNS, blocks, 1))
    return Boxes(info, tensor.element_type, rows, blocks, ctas)


def both_sides(boxes: Boxes, place: tuple[Int32 | int, ...], slot: Int32) -> tuple[cute.Tensor, cute.Tensor]:
    """A box in shared memory, at `slot`, and in global memory, at `place` of the map, as the copy engine takes them."""
    tensor, layout = boxes.info.tma_tensor, boxes.info.smem_layout
    box = (boxes.rows, BLOCK_COLUMNS, boxes.blocks, 1)
    there = cute.local_tile(cute.domain_offset(place, tensor), box, (0, 0, 0, 0))
    pointer = cute.make_ptr(boxes.dtype, slot, cute.AddressSpace.smem, assumed_align=1024)
    here = cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=boxes.dtype), layout.outer)
    sides: tuple[cute.Tensor, cute.Tensor] = cpasync.tma_partition(
        boxes.info.atom, 0, cute.make_layout(1), cute.group_modes(here, 0, 4), cute.group_modes(there, 0, 4)
    )
    return sides
