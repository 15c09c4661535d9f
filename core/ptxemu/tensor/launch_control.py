"""Cluster launch control, dependent launches, and changes to tensor maps.

Sources: PTX ISA 9.7.13.16 (clusterlaunchcontrol), 9.7.13.14 (griddepcontrol), 9.7.9.27 (tensormap.replace), 9.7.13.18
(tensormap.cp_fenceproxy). The response of try_cancel is opaque; here it is x, y, z and a flag, 4 bytes each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Address, Immediate, Vector
from ptxemu.registry import Execute, operation
from ptxemu.tensor.shared import OFFSET, RANK_SHIFT, async_barrier

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction

RESPONSE_BYTES = 16


@operation("griddepcontrol", section="9.7.13.14")
def griddepcontrol(ins: Instruction) -> Execute:
    """Launches run one after the other, so what a grid depends on is complete and nothing waits for its signal."""
    if not (ins.has("launch_dependents") or ins.has("wait")):
        raise UnsupportedInstruction(ins, "this form")
    return lambda ctx: None


@operation("clusterlaunchcontrol.try_cancel", section="9.7.13.16.1")
def try_cancel(ins: Instruction) -> Execute:
    """Asks for a cluster that has not started; the answer arrives in shared memory and on a barrier."""
    target, barrier = ins.operands
    everywhere = ins.has("multicast::cluster::all")
    if not isinstance(target, Address) or not isinstance(barrier, Address):
        raise UnsupportedInstruction(ins, "operands that are not addresses")

    def execute(ctx: Context) -> None:
        if ctx.mask & (ctx.mask - 1):
            ctx.finding(
                "divergence", f"clusterlaunchcontrol.try_cancel is issued by {ctx.mask.bit_count()} threads, once each"
            )
        to, signal = int(ctx.address(target)[ctx.lane]), int(ctx.address(barrier)[ctx.lane])
        if to % RESPONSE_BYTES:
            ctx.finding("misaligned", f"response at {to:#x}, which is not a multiple of 16", address=to, stop=True)
        ranks = range(len(ctx.cluster.ctas)) if everywhere else [to >> RANK_SHIFT]
        places = [
            (np.array([rank << RANK_SHIFT | to & OFFSET]), rank << RANK_SHIFT | signal & OFFSET) for rank in ranks
        ]
        if not everywhere:
            places = [(np.array([to]), signal)]
        for where, _ in places:
            ctx.overwrite(where, RESPONSE_BYTES)
        targets = [
            (where, async_barrier(ctx, bar), ctx.hold(where, RESPONSE_BYTES, "write", space="shared"))
            for where, bar in places
        ]

        def step() -> None:
            index = ctx.machine.cancel_next()
            answer = np.array([*(index or (0, 0, 0)), index is not None], np.uint32).view(np.uint8)[None]
            for where, bar, hold in targets:
                ctx.store(where, answer, space="shared", proxy="async", hold=hold)
                hold.release()
                bar.complete_tx(RESPONSE_BYTES)

        ctx.defer("load", [step], text="clusterlaunchcontrol.try_cancel")

    return execute


@operation("clusterlaunchcontrol.query_cancel", section="9.7.13.16.2")
def query_cancel(ins: Instruction) -> Execute:
    """Reads the answer of try_cancel: whether there is a cluster, and the index of its first CTA."""
    target, handle = ins.operands
    axis = next(("xyz".index(m[-1]) for m in ins.modifiers if m.startswith("get_first_ctaid::")), -1)
    if not (ins.has("is_canceled") or ins.has("get_first_ctaid") or axis >= 0):
        raise UnsupportedInstruction(ins, "this query")

    def execute(ctx: Context) -> None:
        words = ctx.read128(handle).view(np.uint32).reshape(32, 4)
        if ins.has("is_canceled"):
            ctx.write(target, words[:, 3] != 0)
        elif axis >= 0:
            ctx.write(target, words[:, axis])
        elif isinstance(target, Vector):
            for i, item in enumerate(target.items[:3]):
                ctx.write(item, words[:, i])

    return execute


# Fields of a tensor map as tensormap.replace names them: (first byte, bytes, first bit, bits, what is subtracted).
FIELDS: dict[str, tuple[int, int, int, int, int]] = {
    "global_address": (0, 8, 0, 64, 0),
    "rank": (8, 4, 4, 3, 0),
    "elemtype": (8, 4, 7, 4, 0),
    "interleave_layout": (8, 4, 11, 2, 0),
    "swizzle_mode": (8, 4, 13, 2, 0),
    "fill_mode": (8, 4, 15, 1, 0),
    "swizzle_atomicity": (8, 4, 19, 2, 0),
}
# Types as tensormap.replace numbers them, to data type and tf32 bit.
ELEMENT_TYPES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7 | 1 << 9, 8 | 1 << 9, 11, 12, 13)


def replace_field(raw: bytearray, name: str, value: int, ordinal: int = 0) -> None:
    """Changes one field of a tensor map, in place.

    Args:
        raw: At least 64 bytes.
        name: As tensormap.replace spells it.
        value: As tensormap.replace takes it: ranks and atomicities from 0, sizes in elements, strides in bytes.
        ordinal: Of the dimension, for the fields that have one.

    Raises:
        KeyError: No such field.
    """

    def put(first: int, size: int, shift: int, bits: int, new: int) -> None:
        old = int.from_bytes(raw[first : first + size], "little")
        mask = ((1 << bits) - 1) << shift
        raw[first : first + size] = (old & ~mask | new << shift & mask).to_bytes(size, "little")

    if name == "global_dim":
        put(32 + 4 * ordinal, 4, 0, 32, value - 1)
    elif name == "box_dim":
        put(55 + ordinal, 1, 0, 8, value - 1)
    elif name == "element_stride":
        put(52, 3, 3 * ordinal, 3, value - 1)
    elif name == "global_stride":
        put(12 + 4 * ordinal, 4, 0, 32, value >> 4)
        put(28, 4, 4 * ordinal, 4, value >> 36)
    elif name == "elemtype":
        code = ELEMENT_TYPES[value]
        put(8, 4, 7, 4, code & 15)
        put(8, 4, 16, 1, code >> 9)
    else:
        first, size, shift, bits, less = FIELDS[name]
        put(first, size, shift, bits, value - less)


@operation("tensormap.replace.tile", section="9.7.9.27")
def tensormap_replace(ins: Instruction) -> Execute:
    """Changes one field of a tensor map in shared or global memory."""
    name = ins.modifiers[2] if len(ins.modifiers) > 2 else ""
    where, *rest = ins.operands
    if not isinstance(where, Address) or not rest:
        raise UnsupportedInstruction(ins, "the operands")
    ordinal = rest[0].value if len(rest) == 2 and isinstance(rest[0], Immediate) else 0
    try:
        replace_field(bytearray(128), name, 1, ordinal)
    except KeyError:
        raise UnsupportedInstruction(ins, f"the field {name}") from None
    space = (
        "shared" if any(m.startswith("shared") for m in ins.modifiers) else "global" if ins.has("global") else "generic"
    )

    def execute(ctx: Context) -> None:
        pointer = np.array([int(ctx.address(where)[ctx.lane])], np.int64)
        raw = bytearray(ctx.load(pointer, 64, space=space, proxy="generic").tobytes())
        replace_field(raw, name, ctx.scalar(rest[-1]), ordinal)
        ctx.store(pointer, np.frombuffer(bytes(raw), np.uint8)[None], space=space, proxy="generic")

    return execute


@operation("tensormap.cp_fenceproxy", section="9.7.13.18", converged=True)
def tensormap_copy(ins: Instruction) -> Execute:
    """Copies a tensor map from shared to global memory and makes it visible to the tensor map proxy."""
    target, source, size = ins.operands
    if (
        not isinstance(target, Address)
        or not isinstance(source, Address)
        or not isinstance(size, Immediate)
        or size.value != 128
    ):
        raise UnsupportedInstruction(ins, "the operands")

    def execute(ctx: Context) -> None:
        data = ctx.load(np.array([int(ctx.address(source)[ctx.lane])]), 64, space="shared", proxy="generic")
        ctx.store(np.array([int(ctx.address(target)[ctx.lane])]), data, space="global", proxy="async")

    return execute
