"""Copies that are not tensor copies: cp.async, cp.async.bulk, cp.reduce.async.bulk, st.async, red.async, and the
waits for them.

Sources: PTX ISA 9.7.9.25.3 (cp.async), 9.7.9.25.4 (bulk copies), 9.7.9.13 (st.async), 9.7.13.17 (red.async),
9.7.13.15.17 (cp.async.mbarrier.arrive).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Address, Immediate, Vector
from ptxemu.registry import Blocked, Execute, operation
from ptxemu.tensor import groups, reduce
from ptxemu.tensor.shared import OFFSET, async_barrier, completion_barrier, destinations, rank_of

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction, Operand

Bytes = npt.NDArray[np.uint8]


def _addresses(ins: Instruction, *operands: Operand) -> list[Address]:
    out = [operand for operand in operands if isinstance(operand, Address)]
    if len(out) != len(operands):
        raise UnsupportedInstruction(ins, "an operand that is not an address")
    return out


def _aligned(ctx: Context, value: int, multiple: int, what: str) -> int:
    if value % multiple:
        ctx.finding("misaligned", f"{what} {value:#x} is not a multiple of {multiple}", address=value, stop=True)
    return value


def _each_lane(ctx: Context) -> list[Context]:
    return [ctx] if ctx.mask == 1 << ctx.lane else [ctx.single(int(lane)) for lane in ctx.lanes]


def _per_lane(issue: Any) -> Execute:
    def execute(ctx: Context) -> None:
        for one in _each_lane(ctx):
            issue(one)

    return execute


# ---- cp.async --------------------------------------------------------------------------------------------------------


@operation("cp.async", section="9.7.9.25.3.1")
def cp_async(ins: Instruction) -> Execute:
    """Copies 4, 8 or 16 bytes a thread from global to shared memory; what lies beyond src-size is zero."""
    if ins.modifiers[1:2] not in (("ca",), ("cg",)) or len(ins.operands) < 3:
        raise UnsupportedInstruction(ins, "this form of cp.async")
    target, source = _addresses(ins, *ins.operands[:2])
    if not isinstance(ins.operands[2], Immediate):
        raise UnsupportedInstruction(ins, "a size that is not a constant")
    size = ins.operands[2].value
    if size not in (4, 8, 16) or (ins.has("cg") and size != 16):
        raise UnsupportedInstruction(ins, f"a size of {size} bytes")
    extra: Operand | None = ins.operands[3] if len(ins.operands) > 3 and "cache_hint" not in ins.name else None
    if len(ins.operands) > 4:
        extra = ins.operands[3]
    ignores = (
        extra is not None and getattr(extra, "type", getattr(getattr(extra, "register", None), "type", "")) == "pred"
    )

    def execute(ctx: Context) -> None:
        lanes = ctx.lanes
        to, origin = ctx.address(target)[lanes].astype(np.int64), ctx.address(source)[lanes].astype(np.int64)
        for values, what in ((to, "shared address"), (origin, "global address")):
            if (values % size).any():
                _aligned(ctx, int(values[values % size != 0][0]), size, what)
        count = np.full(len(lanes), size)
        if extra is not None:
            count = (
                np.where(ctx.read(extra, np.bool_)[lanes], 0, size)
                if ignores
                else ctx.read(extra)[lanes].astype(np.int64)
            )
        hold = ctx.hold(to, size, "write", space="shared")

        def step() -> None:
            data = np.zeros((len(lanes), size), np.uint8)
            for n in np.unique(np.minimum(count, size)):
                if n:
                    chosen = count >= n if n == size else count == n
                    data[chosen, :n] = ctx.load(origin[chosen], int(n), space="global", proxy="generic")
            ctx.store(to, data, space="shared", proxy="generic", hold=hold)

        op = ctx.defer("load", [step], queue=("cp.async", ctx.warp), text=f"cp.async of {size} bytes a lane")
        groups.of_warp(ctx, "cp.async").add(groups.Copy(op, hold, ctx.mask))

    return execute


@operation("cp.async.commit_group", section="9.7.9.25.3.2")
def cp_async_commit(ins: Instruction) -> Execute:
    """Closes the thread's group of cp.async."""
    del ins
    return lambda ctx: groups.of_warp(ctx, "cp.async").commit(ctx.mask)


@operation("cp.async.wait_group", section="9.7.9.25.3.3")
def cp_async_wait(ins: Instruction) -> Execute:
    """Waits for the thread's groups of cp.async but the newest few."""
    keep = _count(ins)

    def execute(ctx: Context) -> Blocked | None:
        reason = groups.of_warp(ctx, "cp.async").wait(ctx.mask, keep, read_only=False)
        return Blocked(reason) if reason else None

    return execute


@operation("cp.async.wait_all", section="9.7.9.25.3.3")
def cp_async_wait_all(ins: Instruction) -> Execute:
    """Waits for every cp.async of the thread."""
    del ins

    def execute(ctx: Context) -> Blocked | None:
        reason = groups.of_warp(ctx, "cp.async").wait(ctx.mask, 0, read_only=False, everything=True)
        return Blocked(reason) if reason else None

    return execute


@operation("cp.async.mbarrier.arrive", section="9.7.13.15.17")
def cp_async_arrive(ins: Instruction) -> Execute:
    """Arrives when the thread's earlier cp.async are complete; without .noinc the pending count grows first."""
    (where,) = _addresses(ins, *ins.operands)
    noinc = ins.has("noinc")

    def issue(ctx: Context) -> None:
        bar = ctx.mbarrier(int(ctx.address(where)[ctx.lane]))
        if not noinc:
            bar.add_pending(1)
        copies = groups.of_warp(ctx, "cp.async").so_far(ctx.lane)

        def arrive() -> None:
            for copy in copies:
                copy.observed(ctx.lane)
            bar.arrive()

        ctx.defer("load", [arrive], queue=("cp.async", ctx.warp), text="cp.async.mbarrier.arrive")

    return _per_lane(issue)


def _count(ins: Instruction) -> int:
    if len(ins.operands) != 1 or not isinstance(ins.operands[0], Immediate):
        raise UnsupportedInstruction(ins, "a number of groups that is not a constant")
    return ins.operands[0].value


# ---- bulk groups -----------------------------------------------------------------------------------------------------


@operation("cp.async.bulk.commit_group", section="9.7.9.25.4.3")
def bulk_commit(ins: Instruction) -> Execute:
    """Closes the thread's group of bulk copies."""
    del ins
    return lambda ctx: groups.of_warp(ctx, "cp.async.bulk").commit(ctx.mask)


@operation("cp.async.bulk.wait_group", section="9.7.9.25.4.4")
def bulk_wait(ins: Instruction) -> Execute:
    """Waits for the thread's groups of bulk copies but the newest few; `.read`: until their sources have been read."""
    keep, read_only = _count(ins), ins.has("read")

    def execute(ctx: Context) -> Blocked | None:
        reason = groups.of_warp(ctx, "cp.async.bulk").wait(ctx.mask, keep, read_only=read_only)
        return Blocked(reason) if reason else None

    return execute


# ---- bulk copies -----------------------------------------------------------------------------------------------------


def _memories(ins: Instruction) -> tuple[str, str]:
    """Destination and source: "shared" or "global" each."""
    memory = [m.split("::")[0] for m in ins.modifiers if m.startswith("shared") or m == "global"]
    if len(memory) != 2:
        raise UnsupportedInstruction(ins, "this pair of memories")
    return memory[0], memory[1]


@operation("cp.async.bulk", section="9.7.9.25.4.1")
def bulk_copy(ins: Instruction) -> Execute:
    """Copies contiguous bytes between global and shared memory, or to another CTA's shared memory."""
    if ins.has("cp_mask") or ins.has("ignore_oob"):
        raise UnsupportedInstruction(ins, "a byte mask or ignored bytes")
    return _bulk(ins, "", "")


@operation("cp.reduce.async.bulk", section="9.7.9.25.4.2")
def bulk_reduce(ins: Instruction) -> Execute:
    """Combines contiguous elements of shared memory with those of global or another CTA's shared memory."""
    names = [m for m in ins.modifiers if m in reduce.OPERATIONS]
    types = [m for m in ins.modifiers if m in reduce.WIDTH]
    if len(names) != 1 or len(types) != 1:
        raise UnsupportedInstruction(ins, "the operation or the type")
    return _bulk(ins, names[0], types[0])


def _bulk(ins: Instruction, name: str, kind: str) -> Execute:
    target_space, source_space = _memories(ins)
    target, source = _addresses(ins, *ins.operands[:2])
    size_operand = ins.operands[2]
    to_shared = target_space == "shared"
    multicast = ins.has("multicast::cluster")
    barrier = _addresses(ins, ins.operands[3])[0] if to_shared else None

    def issue(ctx: Context) -> None:
        size = _aligned(ctx, ctx.scalar(size_operand) & 0xFFFFFFFF, 16, "size")
        to = _aligned(ctx, int(ctx.address(target)[ctx.lane]), 16, f"{target_space} destination")
        origin = _aligned(ctx, int(ctx.address(source)[ctx.lane]), 16, f"{source_space} source")
        pieces = np.arange(0, size, 16, dtype=np.int64)
        if source_space == "shared" and not to_shared and origin >> 24:
            origin = origin & OFFSET | rank_of(ctx, origin) << 24
        data: list[Bytes] = []

        def fetch() -> None:
            data.append(ctx.load(origin + pieces, 16, space=source_space, proxy="async"))

        def put(where: npt.NDArray[np.int64], hold: Any = None) -> None:
            new = data[0]
            if name:
                new = reduce.apply(name, kind, ctx.load(where, 16, space=target_space, proxy="async"), new)
            ctx.store(where, new, space=target_space, proxy="async", hold=hold)

        text = f"{ins.opcode} of {size} bytes to {target_space} {to:#x}"
        if barrier is None:
            hold = ctx.hold(origin + pieces, 16, "read", space="shared")
            steps = [fetch, lambda: put(to + pieces)]
            op = ctx.defer("store", steps, queue=("bulk", ctx.warp, ctx.lane), text=text)
            groups.of_warp(ctx, "cp.async.bulk").add(groups.Copy(op, hold, 1 << ctx.lane))
            return
        signal = int(ctx.address(barrier)[ctx.lane])
        ranks = destinations(ctx, ctx.scalar(ins.operands[4])) if multicast else [rank_of(ctx, to)]
        steps = [fetch]
        for rank in ranks:
            where = ((to & OFFSET) | rank << 24) + pieces
            bar = completion_barrier(ctx, signal, rank, multicast=multicast, pair=False)
            ctx.overwrite(where, 16)
            write_hold = None if name else ctx.hold(where, 16, "write", space="shared")

            def arrive(where: Any = where, bar: Any = bar, hold: Any = write_hold) -> None:
                put(where, hold)
                if hold is not None:
                    hold.release()
                bar.complete_tx(size)

            steps.append(arrive)
        if source_space == "shared":
            source_hold = ctx.hold(origin + pieces, 16, "read", space="shared")
            steps.insert(1, source_hold.release)
        ctx.defer("load", steps, text=text)

    return _per_lane(issue)


@operation("cp.async.bulk.prefetch", section="9.7.9.25.4.5")
def bulk_prefetch(ins: Instruction) -> Execute:
    """A hint: only address and size are checked."""
    (source,) = _addresses(ins, ins.operands[0])

    def issue(ctx: Context) -> None:
        _aligned(ctx, int(ctx.address(source)[ctx.lane]), 16, "global source")
        _aligned(ctx, ctx.scalar(ins.operands[1]) & 0xFFFFFFFF, 16, "size")

    return _per_lane(issue)


# ---- st.async, red.async ---------------------------------------------------------------------------------------------


@operation("st.async", section="9.7.9.13")
def st_async(ins: Instruction) -> Execute:
    """Stores to another CTA's shared memory and completes the bytes on a barrier there."""
    return _remote(ins, "")


@operation("red.async", section="9.7.13.17")
def red_async(ins: Instruction) -> Execute:
    """Reduces in another CTA's shared memory and completes the bytes on a barrier there."""
    names = [m for m in ins.modifiers if m in reduce.OPERATIONS]
    if len(names) != 1:
        raise UnsupportedInstruction(ins, "the operation")
    return _remote(ins, names[0])


def _remote(ins: Instruction, name: str) -> Execute:
    target, barrier = _addresses(ins, ins.operands[0], ins.operands[2])
    kind = next((m for m in ins.modifiers if m in reduce.WIDTH), "")
    if not kind or not any(m.startswith("mbarrier::complete_tx") for m in ins.modifiers):
        raise UnsupportedInstruction(ins, "the type, or no barrier")
    width = reduce.WIDTH[kind]
    value = ins.operands[1]
    items = value.items if isinstance(value, Vector) else (value,)
    dtype = np.uint64 if width == 8 else np.uint32

    def issue(ctx: Context) -> None:
        to = _aligned(ctx, int(ctx.address(target)[ctx.lane]), width * len(items), "destination")
        bar = async_barrier(ctx, int(ctx.address(barrier)[ctx.lane]))
        new = np.array([ctx.read(item, dtype)[ctx.lane] for item in items], dtype).view(np.uint8)

        def step() -> None:
            where = np.array([to], np.int64)
            data = new
            if name:
                data = reduce.apply(name, kind, ctx.load(where, len(new), space="shared", proxy="async")[0], new)
            ctx.store(where, data[None], space="shared", proxy="async")
            bar.complete_tx(len(new))

        ctx.defer("load", [step], text=f"{ins.opcode}.async of {len(new)} bytes to shared {to:#x}")

    return _per_lane(issue)
