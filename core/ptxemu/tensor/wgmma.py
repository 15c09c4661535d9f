"""wgmma: the asynchronous warpgroup matrix multiply-accumulate of sm_90a.

Sources: PTX ISA 9.7.15 (asynchronous warpgroup level matrix instructions). An operation starts when the four warps of
the warpgroup have issued it and is deferred under the policy, in order; the accumulator and A registers stay
pending and the operands in shared memory held until the wgmma.wait_group that covers the operation. Sums are those
of the hardware, see `sums`.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Immediate, Register, Vector
from ptxemu.registry import Blocked, Execute, operation
from ptxemu.tensor import formats, layouts, mma_sync, sums
from ptxemu.tensor.operands import chunk_addresses, flag, sign

if TYPE_CHECKING:
    from ptxemu.context import Context, Hold
    from ptxemu.instruction import Instruction, Operand
    from ptxemu.machine import Warp
    from ptxemu.policy import AsyncOp

Words = npt.NDArray[np.uint32]
Values = npt.NDArray[np.float64]
Chunks = npt.NDArray[np.int64]
WARPS, ROWS = 4, 64  # of a warpgroup
DEPTH_BYTES = 32
TYPES = {
    "f16": ("f16", "f32"),
    "bf16": ("f32",),
    "tf32": ("f32",),
    "e4m3": ("f16", "f32"),
    "e5m2": ("f16", "f32"),
    "s8": ("s32",),
    "u8": ("s32",),
}


@dataclass(eq=False)
class Warpgroup:
    """Operations that some warps of a warpgroup have issued and others have not, by their number in program order."""

    waiting: dict[int, Operation] = field(default_factory=dict)


@dataclass(eq=False)
class Operation:
    """One wgmma.mma_async of a warpgroup; it starts when the last of the four warps has issued it.

    Attributes:
        form: The instruction.
        descriptors: Of A (0 when it is in registers) and B.
        members: The warps, in order of issue: context, A from registers, whether D is added.
        op: The asynchronous operation, once it is under way.
        holds: Its operands in shared memory.
        unobserved: Warps that have not waited for it.
    """

    form: Form
    descriptors: tuple[int, int]
    members: list[tuple[Context, Values | None, bool]] = field(default_factory=list)
    op: AsyncOp | None = None
    holds: list[Hold] = field(default_factory=list)
    unobserved: int = WARPS

    @property
    def done(self) -> bool:
        """It is complete."""
        return self.op is not None and self.op.done

    def observed(self) -> None:
        """One more warp has waited for it."""
        self.unobserved -= 1
        if not self.unobserved:
            for hold in self.holds:
                hold.release()

    def start(self, ctx: Context) -> None:
        """All warps have issued it."""
        form = self.form
        a_bits, b_bits = self.descriptors
        b = _chunks(ctx, b_bits, form.b_mn, form.n, form, "B")
        a = _chunks(ctx, a_bits, form.a_mn, ROWS, form, "A") if not form.a_registers else None
        self.holds = [ctx.hold(chunks, 16, "read", space="shared") for chunks in (a, b) if chunks is not None]
        queue = ("wgmma", ctx.cta, ctx.warp.index // WARPS)
        text = f"wgmma m64n{form.n}k{form.depth}"
        self.op = ctx.defer("mma", [lambda: self.run(ctx, a, b)], queue=queue, text=text)

    def run(self, ctx: Context, a_chunks: Chunks | None, b_chunks: Chunks) -> None:
        """Multiplies and writes the registers of the four warps."""
        form = self.form
        bt = self._matrix(ctx, b_chunks, form.b_type, mn_major=form.b_mn).T  # (depth, n)
        bt = bt if form.negate > 0 else -bt
        members = sorted(self.members, key=lambda member: member[0].warp.index)
        if a_chunks is None:
            a = np.concatenate([left for _, left, _ in members if left is not None]).astype(np.float32)
        else:
            a = self._matrix(ctx, a_chunks, form.a_type, mn_major=form.a_mn)  # (64, depth)
        warps, keep = [ctx.warp for ctx, _, _ in members], [kept for _, _, kept in members]
        a, bt, special = sums.finite(a, bt)
        before = [] if special is None else [warp.matrix(form.key) for warp in warps]
        places, types = warps[0].slots(form.key), (form.a_type, form.b_type)
        sums.accumulate(a, bt, types, form.d_type, saturate=form.saturate, warps=warps, places=places, keep=keep)
        if special is not None:
            self._not_finite(special, warps, before, keep)
        for member, _, _ in members:
            _state(member).seen[form.key] = member.warp.matrix(form.key)

    def _matrix(self, ctx: Context, chunks: Chunks, kind: str, *, mn_major: bool) -> npt.NDArray[np.float32]:
        """An operand in shared memory: (rows, depth)."""
        data = ctx.load(chunks, 16, space="shared", proxy="async")
        values = sums.decode(kind, data.reshape(len(data), -1))
        return values.T if mn_major else values

    def _not_finite(
        self, special: npt.NDArray[np.float32], warps: list[Warp], before: list[Words], keep: list[bool]
    ) -> None:
        """Puts infinities and NaNs that come of the factors into D."""
        form = self.form
        rows, columns = form.positions
        for k, warp in enumerate(warps):
            start = _values(before[k], form.halves) if keep[k] else np.zeros(rows.shape)
            words = warp.matrix(form.key)
            codes = words if not form.halves else np.stack([words & 0xFFFF, words >> 16], 1).reshape(-1, 32)
            codes = sums.override(codes, special[rows + 16 * k, columns], start.astype(np.float32), form.d_type)
            if form.halves:
                codes = codes[0::2] | codes[1::2] << np.uint32(16)
            warp.set_matrix(form.key, codes)


@dataclass(eq=False)
class Group:
    """Operations that one wgmma.commit_group commits; also the token of their pending registers."""

    ops: list[Operation] = field(default_factory=list)
    pending: set[tuple[int, ...]] = field(default_factory=set)


@dataclass
class State:
    """What a warp has under way.

    Attributes:
        issued: Number of operations.
        open: The group not yet committed.
        committed: Groups not yet waited for, oldest first.
        fenced: A wgmma.fence has been executed at all.
        seen: Registers as the last operation or fence left them, by their numbers.
    """

    issued: int = 0
    open: Group = field(default_factory=Group)
    committed: deque[Group] = field(default_factory=deque)
    fenced: bool = False
    seen: dict[tuple[int, ...], Words] = field(default_factory=dict)

    def is_pending(self, key: tuple[int, ...]) -> bool:
        """Whether an operation that has not been waited for uses these registers."""
        return key in self.open.pending or any(key in group.pending for group in self.committed)


def _state(ctx: Context) -> State:
    state: State | None = ctx.warp.state.get("wgmma")
    if state is None:
        state = ctx.warp.state["wgmma"] = State()
    return state


def accumulator_positions(count: int, halves: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows (of the warp's 16) and columns of D's elements, (elements, 32): register order, low half first."""
    lane = np.arange(32)
    if halves:
        i, half = np.divmod(np.arange(2 * count)[:, None], 2)
        return lane // 4 + 8 * (i % 2), 8 * (i // 2) + 2 * (lane % 4) + half
    i = np.arange(count)[:, None]
    return lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


def _registers(ins: Instruction, operand: Operand) -> tuple[Register, ...]:
    if not isinstance(operand, Vector) or not all(isinstance(item, Register) for item in operand.items):
        raise UnsupportedInstruction(ins, "an operand that is not a vector of registers")
    return tuple(item for item in operand.items if isinstance(item, Register))


def _values(words: Words, halves: bool) -> npt.NDArray[np.float64]:
    """Accumulator registers as numbers: uint32 (n, 32) to float64 (n or 2 n, 32)."""
    if halves:
        pairs = words[..., None].copy().view(np.float16).astype(np.float64)  # (n, 32, 2)
        return np.asarray(pairs.transpose(0, 2, 1).reshape(-1, 32))
    return words.view(np.float32).astype(np.float64)


class Form:
    """One wgmma.mma_async instruction, decoded."""

    def __init__(self, ins: Instruction) -> None:
        shape = re.search(r"\.m64n(\d+)k(\d+)\.", ins.name)
        types = [m for m in ins.modifiers if m in formats.ELEMENT_BITS or m == "s32"]
        if ins.has("sp") or shape is None or len(types) != 3:
            raise UnsupportedInstruction(ins, "this form of wgmma")
        self.n, self.depth = int(shape[1]), int(shape[2])
        self.d_type, self.a_type, self.b_type = types
        self.bits = formats.ELEMENT_BITS[self.a_type]
        if self.d_type not in TYPES.get(self.a_type, ()) or self.bits != formats.ELEMENT_BITS[self.b_type]:
            raise UnsupportedInstruction(ins, f"types {types}")
        if self.depth * self.bits != DEPTH_BYTES * 8 or not 8 <= self.n <= 256 or self.n % 8:
            raise UnsupportedInstruction(ins, f"shape n{self.n}k{self.depth} of {self.a_type}")
        self.saturate = ins.has("satfinite")
        self.halves, self.integer = self.d_type == "f16", self.d_type == "s32"
        self.d = _registers(ins, ins.operands[0])
        if len(self.d) != self.n // (4 if self.halves else 2):
            raise UnsupportedInstruction(ins, f"{len(self.d)} accumulator registers for n{self.n}")
        self.a: Operand = ins.operands[1]
        self.a_registers = _registers(ins, self.a) if isinstance(self.a, Vector) else ()
        self.b, self.scale_d = ins.operands[2], ins.operands[3]
        rest = ins.operands[4:]
        self.negate = sign(rest[0]) * sign(rest[1]) if len(rest) >= 2 else 1
        flags = [isinstance(r, Immediate) and bool(r.value & 1) for r in rest[2:]]
        self.a_mn = bool(flags[0]) if len(flags) == 2 else False
        self.b_mn = bool(flags[-1]) if flags else False
        if (self.a_mn or self.b_mn) and self.bits != 16:
            raise UnsupportedInstruction(ins, f"a transposed operand of {self.a_type}")
        self.key = tuple(register.index for register in self.d)
        self.a_key = tuple(register.index for register in self.a_registers)
        self.positions = accumulator_positions(len(self.d), self.halves)


@operation("wgmma.mma_async.sync.aligned", section="9.7.15.5.2", converged=True)
def mma_async(ins: Instruction) -> Execute:
    """Issues D = A B + D."""
    form = Form(ins)

    def execute(ctx: Context) -> None:
        _issue(ctx, form)

    return execute


def _chunks(ctx: Context, bits: int, mn_major: bool, rows: int, form: Form, what: str) -> npt.NDArray[np.int64]:
    for problem in layouts.hopper_descriptor(bits).problems:
        ctx.finding("descriptor", f"matrix descriptor of {what}, {bits:#018x}: {problem}")
    return chunk_addresses(bits, False, mn_major, rows, form.depth, form.bits) | ctx.cta.rank << 24


def _descriptor(ctx: Context, operand: Operand) -> int:
    """A matrix descriptor, which must be the same in all lanes."""
    if isinstance(operand, Register) and (value := ctx.warp.same_in_all_lanes(operand)) is not None:
        return value
    return ctx.uniform(operand)


def _issue(ctx: Context, form: Form) -> None:
    state, warp = _state(ctx), ctx.warp
    _check_fence(ctx, state, form)
    number = warp.index // WARPS
    if len(ctx.cta.warps) < WARPS * (number + 1):
        ctx.finding(
            "divergence", f"wgmma in a CTA of {len(ctx.cta.warps)} warps, whose last warpgroup is not whole", stop=True
        )
    descriptors = (0 if form.a_registers else _descriptor(ctx, form.a), _descriptor(ctx, form.b))
    group = ctx.cta.state.setdefault(("wgmma", number), Warpgroup())
    assert isinstance(group, Warpgroup)
    operation_ = group.waiting.setdefault(state.issued, Operation(form, descriptors))
    if operation_.form is not form or operation_.descriptors != descriptors:
        ctx.finding(
            "not_uniform", "the warps of a warpgroup execute different wgmma instructions or descriptors", stop=True
        )
    left = mma_sync.a_values(form.a_type, warp.matrix(form.a_key), form.depth) if form.a_registers else None
    operation_.members.append((ctx, left, flag(ctx, form.scale_d)))
    for key, registers in ((form.key, form.d), (form.a_key, form.a_registers)):
        if key and key not in state.open.pending:
            state.open.pending.add(key)
            warp.pend(registers, state.open, "wgmma.wait_group")
    state.open.ops.append(operation_)
    if len(operation_.members) == WARPS:
        del group.waiting[state.issued]
        operation_.start(ctx)
    state.issued += 1


def _check_fence(ctx: Context, state: State, form: Form) -> None:
    """A wgmma.fence must lie between another access to the registers and the operation (PTX ISA 9.7.15.7.1)."""
    if not state.fenced:
        ctx.finding("missing_fence", "no wgmma.fence before the first wgmma.mma_async of the warp")
        state.fenced = True
    for key in (form.key, form.a_key):
        if not key or state.is_pending(key):
            continue
        now = ctx.warp.matrix(key)
        before = state.seen.get(key)
        if before is not None and not np.array_equal(before, now):
            ctx.finding("missing_fence", "registers of wgmma.mma_async were written without a wgmma.fence afterwards")
        state.seen[key] = now


@operation("wgmma.fence.sync.aligned", section="9.7.15.7.1", converged=True)
def fence(ins: Instruction) -> Execute:
    """Orders register accesses before it with the operations after it."""
    del ins

    def execute(ctx: Context) -> None:
        state = _state(ctx)
        state.fenced = True
        for key in state.seen:
            if not state.is_pending(key):
                state.seen[key] = ctx.warp.matrix(key)

    return execute


@operation("wgmma.commit_group.sync.aligned", section="9.7.15.7.2", converged=True)
def commit_group(ins: Instruction) -> Execute:
    """Closes the warpgroup's group of operations."""
    del ins

    def execute(ctx: Context) -> None:
        state = _state(ctx)
        state.committed.append(state.open)
        state.open = Group()

    return execute


@operation("wgmma.wait_group.sync.aligned", section="9.7.15.7.3", converged=True)
def wait_group(ins: Instruction) -> Execute:
    """Waits for the groups but the newest few; their registers and shared memory may then be touched."""
    if len(ins.operands) != 1 or not isinstance(ins.operands[0], Immediate):
        raise UnsupportedInstruction(ins, "a number of groups that is not a constant")
    keep = ins.operands[0].value

    def execute(ctx: Context) -> Blocked | None:
        state = _state(ctx)
        old = len(state.committed) - keep
        for group in list(state.committed)[: max(old, 0)]:
            if left := sum(not op.done for op in group.ops):
                return Blocked(f"wgmma.wait_group {keep}: {left} operations are not complete")
        for _ in range(max(old, 0)):
            group = state.committed.popleft()
            ctx.warp.unpend(group)
            for op in group.ops:
                op.observed()
        return None

    return execute
