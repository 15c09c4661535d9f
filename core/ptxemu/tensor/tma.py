"""cp.async.bulk.tensor: tiles between global and shared memory through tensor maps.

Sources: PTX ISA 9.7.9.25.5 (tensor copies), 5.5 (tensors, boxes, swizzles, out-of-bounds fill), 9.7.9.25.5.4
(prefetch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Address
from ptxemu.registry import Execute, operation
from ptxemu.tensor import formats, groups, layouts, reduce, tensormap
from ptxemu.tensor.shared import OFFSET, completion_barrier, destinations, rank_of

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction, Operand
    from ptxemu.tensor.tensormap import TensorMap

Bytes = npt.NDArray[np.uint8]
NAN_BYTES = b"\xf7\x7f"  # a NaN in every floating-point format, as an H200 fills


def load_box(tensor_map: TensorMap, boxes: list[tuple[int, ...]], read: Callable[[Any, int], Bytes]) -> Bytes:
    """The bytes that a load puts into shared memory, before the swizzle.

    Args:
        tensor_map: What to load from.
        boxes: Coordinates of one box, or of the four rows of a gather.
        read: Reads global memory: (addresses int64 (rows,), width) to uint8 (rows, width).

    Returns:
        uint8 (rows, row_bytes).
    """
    parts = []
    for coordinates in boxes:
        address, inside = tensor_map.rows(coordinates)
        low, high = tensor_map.columns(coordinates[0])
        rows = _filled(tensor_map, len(address))
        if high > low and inside.any():
            rows[inside] = _place(tensor_map, rows[inside], address[inside], coordinates[0], (low, high), read)
        parts.append(rows)
    return np.concatenate(parts)


def pieces(addresses: npt.NDArray[np.int64], count: int) -> tuple[npt.NDArray[np.int64], int]:
    """Rows of `count` bytes as rows of 16 where alignment allows it, which memory moves faster: addresses and width."""
    if count % 16 or count == 16 or (addresses & 15).any():
        return addresses, count
    return (addresses[:, None] + np.arange(0, count, 16)).reshape(-1), 16


def read_rows(ctx: Context, addresses: npt.NDArray[np.int64], count: int) -> Bytes:
    """Rows of `count` bytes of global memory: uint8 (rows, count)."""
    where, width = pieces(addresses, count)
    return ctx.load(where, width, space="global", proxy="async").reshape(len(addresses), count)


def _filled(tensor_map: TensorMap, count: int) -> Bytes:
    """Rows of the value of elements out of bounds: zero, or NaN."""
    rows = np.zeros((count, tensor_map.row_bytes), np.uint8)
    if tensor_map.nan_fill and "f" in tensor_map.type.name:
        rows[:] = np.tile(np.frombuffer(NAN_BYTES, np.uint8), tensor_map.row_bytes // len(NAN_BYTES))
    return rows


def _place(
    tensor_map: TensorMap,
    rows: Bytes,
    address: npt.NDArray[np.int64],
    first: int,
    span: tuple[int, int],
    read: Callable[[Any, int], Bytes],
) -> Bytes:
    """Rows with the elements of `span` (from, to) read from global memory."""
    low, high = span
    dtype = tensor_map.type
    if dtype.shared_bits != dtype.bits:  # groups of 16 elements: 8 or 12 bytes become 16
        group = 2 * dtype.bits
        data = read(address + (first + low) * dtype.bits // 8, (high - low) * dtype.bits // 8)
        chunks = rows.reshape(len(rows), -1, 16)
        chunks[:, low // 16 : high // 16, :group] = data.reshape(len(rows), -1, group)
        return chunks.reshape(rows.shape)
    start, stop = low * dtype.bits // 8, high * dtype.bits // 8
    rows[:, start:stop] = read(address + (first + low) * dtype.bits // 8, stop - start)
    if tensor_map.tf32:
        codes = rows[:, start:stop].copy().view(np.uint32)
        nan = codes & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
        rounded = np.where(nan, np.uint32(0x7FFFE000), formats.round_tf32(codes, rounding="rn"))
        rows[:, start:stop] = np.ascontiguousarray(rounded).view(np.uint8)
    return rows


def stored_spans(tensor_map: TensorMap, coordinates: tuple[int, ...]) -> list[tuple[Any, Any, int, int]]:
    """Where a store writes: (rows, global addresses (rows,), first byte of the row, bytes) for each run of bytes.

    Dimension 0 is cut at a multiple of 16 bytes, so up to 15 bytes behind its end are written, as an H200 does.
    """
    address, inside = tensor_map.rows(coordinates)
    low, high = tensor_map.columns(coordinates[0])
    rows = np.flatnonzero(inside)
    if high <= low or not len(rows):
        return []
    size = tensor_map.type.bits
    start, stop = low * size // 8, min(-(-high * size // 128) * 16, tensor_map.row_bytes)
    return [(rows, address[rows] + (coordinates[0] + low) * size // 8, start, stop - start)]


def _tensor_map(ctx: Context, operand: Address, rank: int) -> TensorMap:
    """The tensor map that an instruction names; findings for what is illegal about it."""
    pointer = int(ctx.address(operand)[ctx.lane])
    if pointer % 64:
        ctx.finding(
            "misaligned", f"tensor map at {pointer:#x}, which is not a multiple of 64", address=pointer, stop=True
        )
    raw = ctx.load(np.array([pointer]), tensormap.USED_BYTES, space="generic", proxy="async")
    tensor_map = tensormap.decode(raw.tobytes())
    for problem in tensor_map.problems:
        ctx.finding("descriptor", f"tensor map: {problem}", address=pointer, stop=True)
    for what in tensor_map.unsupported:
        raise UnsupportedInstruction(ctx.instruction, what)
    if tensor_map.rank != rank:
        ctx.finding("descriptor", f"tensor map of rank {tensor_map.rank} used with a copy of rank {rank}", stop=True)
    return tensor_map


class _Form:
    """What the modifiers of a tensor copy say."""

    def __init__(self, ins: Instruction, where: Operand) -> None:
        if any("im2col" in m for m in ins.modifiers):
            raise UnsupportedInstruction(ins, "im2col mode")
        ranks = [int(m[0]) for m in ins.modifiers if m in ("1d", "2d", "3d", "4d", "5d")]
        if len(ranks) != 1 or not isinstance(where, Address):
            raise UnsupportedInstruction(ins, "the rank or the coordinates")
        self.where = where
        self.rows4 = ins.has("tile::gather4") or ins.has("tile::scatter4")
        self.rank = ranks[0]
        if len(where.coordinates) != (5 if self.rows4 else self.rank):
            raise UnsupportedInstruction(ins, f"{len(where.coordinates)} coordinates")

    def boxes(self, ctx: Context) -> tuple[TensorMap, list[tuple[int, ...]]]:
        """The tensor map and the coordinates of the box, or of the four rows of a gather or scatter."""
        tensor_map = _tensor_map(ctx, self.where, self.rank)
        signed = [int(np.uint32(ctx.scalar(c) & 0xFFFFFFFF).view(np.int32)) for c in self.where.coordinates]
        if tensor_map.type.bits < 8 and signed[0] % (128 if tensor_map.type.shared_bits == 8 else 2):
            ctx.finding("misaligned", f"coordinate {signed[0]} of a tensor of {tensor_map.type.name}", stop=True)
        elif signed[0] * tensor_map.type.bits % 128:  # "illegal instruction" on an H200
            text = f"the first coordinate {signed[0]} of type {tensor_map.type.name} is not at a multiple of 16 bytes"
            ctx.finding("misaligned", text, stop=True)
        if not self.rows4:
            return tensor_map, [tuple(signed)]
        if tensor_map.box[1] != 1:
            ctx.finding("descriptor", f"gather4 or scatter4 with a box of {tensor_map.box[1]} rows, not 1", stop=True)
        return tensor_map, [(signed[0], row) for row in signed[1:]]


def _shared_chunks(ctx: Context, tensor_map: TensorMap, address: int, count: int) -> npt.NDArray[np.int64]:
    """Addresses of the 16-byte chunks of a box in shared memory, swizzled: int64 (count / 16,)."""
    if address % 128:
        ctx.finding(
            "misaligned",
            f"tile in shared memory at {address:#x}, which is not a multiple of 128",
            address=address,
            stop=True,
        )
    return layouts.swizzle(address + np.arange(0, count, 16, dtype=np.int64), tensor_map.swizzle)


def _each_lane(ctx: Context) -> list[Context]:
    """One context for each active lane: a tensor copy is issued by every thread that executes it."""
    return [ctx] if ctx.mask == 1 << ctx.lane else [ctx.single(int(lane)) for lane in ctx.lanes]


def _load(ins: Instruction) -> Execute:
    destination, source, barrier, *rest = ins.operands
    form = _Form(ins, source)
    multicast, pair = ins.has("multicast::cluster"), ins.has("cta_group::2")
    if not isinstance(destination, Address) or not isinstance(barrier, Address):
        raise UnsupportedInstruction(ins, "operands that are not addresses")
    if multicast and not rest:
        raise UnsupportedInstruction(ins, "multicast without a mask")

    def issue(ctx: Context) -> None:
        tensor_map, boxes = form.boxes(ctx)
        size = tensor_map.shared_bytes * len(boxes)
        target = int(ctx.address(destination)[ctx.lane])
        signal = int(ctx.address(barrier)[ctx.lane])
        ranks = destinations(ctx, ctx.scalar(rest[0])) if multicast else [rank_of(ctx, target)]
        offsets = _shared_chunks(ctx, tensor_map, target & OFFSET, size)
        steps = []
        for rank in ranks:
            chunks = offsets | rank << 24
            bar = completion_barrier(ctx, signal, rank, multicast=multicast, pair=pair)
            ctx.overwrite(chunks, 16)
            hold = ctx.hold(chunks, 16, "write", space="shared")

            def step(chunks: npt.NDArray[np.int64] = chunks, bar: Any = bar, hold: Any = hold) -> None:
                data = load_box(tensor_map, boxes, lambda a, n: read_rows(ctx, a, n))
                ctx.store(chunks, data.reshape(-1, 16), space="shared", proxy="async", hold=hold)
                hold.release()
                bar.complete_tx(size)

            steps.append(step)
        ctx.defer("load", steps, text=f"tensor load of {size} bytes to shared {target:#x}")

    def execute(ctx: Context) -> None:
        for one in _each_lane(ctx):
            issue(one)

    return execute


def _store(ins: Instruction, operation_name: str) -> Execute:
    target, source = ins.operands[:2]
    form = _Form(ins, target)
    if not isinstance(source, Address):
        raise UnsupportedInstruction(ins, "a source that is not an address")

    def issue(ctx: Context, lanes: int) -> None:
        tensor_map, boxes = form.boxes(ctx)
        if tensor_map.type.shared_bits != tensor_map.type.bits:
            ctx.finding("descriptor", f"store of a tensor of type {tensor_map.type.name}", stop=True)
        if operation_name and tensor_map.type.reduction is None and operation_name not in ("and", "or", "xor"):
            ctx.finding("descriptor", f"reduction {operation_name} of a tensor of {tensor_map.type.name}", stop=True)
        if any(c < 0 for box in boxes for c in box):  # "illegal instruction" on an H200; loads may start there
            ctx.finding("out_of_bounds", f"a store of a box that starts at {boxes[0]}, before the tensor", stop=True)
        start = int(ctx.address(source)[ctx.lane])
        chunks = _shared_chunks(ctx, tensor_map, start, tensor_map.shared_bytes * len(boxes))
        data: list[Bytes] = []

        def fetch() -> None:
            data.append(
                ctx.load(chunks, 16, space="shared", proxy="async").reshape(len(boxes), -1, tensor_map.row_bytes)
            )

        def write() -> None:
            for coordinates, rows in zip(boxes, data.pop(), strict=True):
                for which, addresses, first, count in stored_spans(tensor_map, coordinates):
                    new = np.ascontiguousarray(rows[which, first : first + count])
                    if operation_name:
                        old = read_rows(ctx, addresses, count)
                        new = reduce.apply(operation_name, tensor_map.type.reduction or "b32", old, new)
                    where, width = pieces(addresses, count)
                    ctx.store(where, new.reshape(-1, width), space="global", proxy="async")

        hold = ctx.hold(chunks, 16, "read", space="shared")
        op = ctx.defer(
            "store", [fetch, write], queue=("bulk", ctx.warp, ctx.lane), text=f"tensor store from shared {start:#x}"
        )
        groups.of_warp(ctx, "cp.async.bulk").add(groups.Copy(op, hold, lanes))

    def execute(ctx: Context) -> None:
        if not operation_name and _same_in_all_lanes(ctx, form.where, source):
            issue(ctx, ctx.mask)
            return
        for one in _each_lane(ctx):
            issue(one, one.mask)

    return execute


def _same_in_all_lanes(ctx: Context, where: Address, source: Address) -> bool:
    """Whether all active lanes store the same box, so that once is enough (kernels without elect.sync do that)."""
    values = [ctx.address(where), ctx.address(source), *(ctx.read(c) for c in where.coordinates)]
    return all((v[ctx.lanes] == v[ctx.lane]).all() for v in values)


@operation("cp.async.bulk.tensor", section="9.7.9.25.5.2")
def bulk_tensor(ins: Instruction) -> Execute:
    """Loads or stores a tile; what comes first among the memory modifiers is the destination."""
    memory = [m for m in ins.modifiers if m.startswith("shared") or m == "global"]
    if memory[:1] == ["global"]:
        return _store(ins, "")
    return _load(ins)


@operation("cp.reduce.async.bulk.tensor", section="9.7.9.25.5.3")
def reduce_tensor(ins: Instruction) -> Execute:
    """Adds (or another operation) a tile of shared memory to global memory."""
    names = [m for m in ins.modifiers if m in reduce.OPERATIONS]
    if len(names) != 1:
        raise UnsupportedInstruction(ins, "the operation")
    return _store(ins, names[0])


@operation("cp.async.bulk.prefetch.tensor", section="9.7.9.25.5.4")
def prefetch_tensor(ins: Instruction) -> Execute:
    """A hint: only the tensor map is checked."""
    form = _Form(ins, ins.operands[0])

    def execute(ctx: Context) -> None:
        form.boxes(ctx)

    return execute


@operation("prefetch.tensormap", section="9.7.9.16")
def prefetch_tensormap(ins: Instruction) -> Execute:
    """A hint: only the tensor map is checked."""
    (where,) = ins.operands
    if not isinstance(where, Address):
        raise UnsupportedInstruction(ins, "an operand that is not an address")

    def execute(ctx: Context) -> None:
        pointer = int(ctx.address(where)[ctx.lane])
        raw = ctx.load(np.array([pointer]), tensormap.USED_BYTES, space="generic", proxy="async")
        for problem in tensormap.decode(raw.tobytes()).problems:
            ctx.finding("descriptor", f"tensor map: {problem}", address=pointer)

    return execute
