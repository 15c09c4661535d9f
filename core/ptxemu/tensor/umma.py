"""tcgen05.mma, cp, shift and commit: the asynchronous pipe of the fifth generation tensor cores.

Sources: PTX ISA 9.7.16.10 (mma), 9.7.16.9 (cp, shift), 9.7.16.12 (commit), 9.7.16.10.5 (data path layouts of D),
9.7.16.10.7 (scale factors). All operations of a CTA, or of a CTA pair, run through one queue in order of issue.
Products, scale factors included, are exact; they and D are added in float64 and rounded once for each
instruction.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxemu.errors import UnsupportedInstruction
from ptxemu.instruction import Address, Immediate, Vector
from ptxemu.registry import Execute, operation
from ptxemu.tensor import formats, idesc, layouts, tmem
from ptxemu.tensor.mma_sync import to_accumulator
from ptxemu.tensor.operands import chunk_addresses, decode_chunks, flag
from ptxemu.tensor.shared import OFFSET, RANK_SHIFT, async_barrier, destinations
from ptxemu.tensor.tmem import COLUMNS, LANES, TensorMemory

if TYPE_CHECKING:
    from ptxemu.context import Context
    from ptxemu.instruction import Instruction, Operand
    from ptxemu.machine import CTA

Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def _pair(ctx: Context, ctas: int) -> list[CTA]:
    """The CTAs that take part, the even one first."""
    if ctas == 1:
        return [ctx.cta]
    even = ctx.cta.rank & ~1
    if even + 1 >= len(ctx.cluster.ctas):
        ctx.finding("tensor_memory", "cta_group::2 in a cluster without a peer CTA", stop=True)
    return list(ctx.cluster.ctas[even : even + 2])


def _queue(ctx: Context, ctas: int) -> tuple[str, int]:
    return ("tcgen05", ctx.cta.rank & ~1 if ctas == 2 else ctx.cta.rank)


def _ctas(ins: Instruction) -> int:
    for count in (1, 2):
        if ins.has(f"cta_group::{count}"):
            return count
    raise UnsupportedInstruction(ins, "no cta_group")


def _once(ctx: Context) -> None:
    """These instructions are issued by each thread that executes them; more than one is never meant."""
    if ctx.mask & (ctx.mask - 1):
        ctx.finding("divergence", f"{ctx.instruction.name} is issued by {ctx.mask.bit_count()} threads, once each")


def _issue(ctx: Context, ctas: int, step: Any, text: str) -> None:
    ctx.defer("mma", [step], queue=_queue(ctx, ctas), text=text)


# ---- data paths ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def d_lanes(rows: int, ctas: int, first: int) -> Indices:
    """Lanes of a CTA's rows of D (or of A in tensor memory), counted for the first half of N where D is split.

    128 rows fill all lanes; 64 rows of one CTA fill 16 of every 32; 64 rows of a pair fill lanes 0 to 63, and the
    second half of N lies in lanes 64 to 127.
    """
    row = np.arange(rows)
    if rows == 64 and ctas == 1:
        return first + row // 16 * 32 + row % 16
    return first + row


def scale_cells(first: int, rows: int, *, split: bool) -> tuple[Indices, Indices]:
    """Lanes and columns of the scale factors of the rows of A or B, in the first of the copies.

    Args:
        first: First column.
        rows: Of A or B.
        split: B of a pair with M of 128: its second half lies in lanes 64 and up.
    """
    row = np.arange(rows)
    if not split:
        return row % 32, first + row // 32
    half = rows // 2
    return row % 32 + 64 * (row // half), first + row % half // 32


# ---- mma -------------------------------------------------------------------------------------------------------------


class Form:
    """A tcgen05.mma instruction, decoded."""

    def __init__(self, ins: Instruction) -> None:
        kind = next((m[6:] for m in ins.modifiers if m.startswith("kind::")), "")
        if kind not in idesc.ELEMENTS or ins.has("sp") or ins.has("ws") or ins.has("ashift"):
            raise UnsupportedInstruction(ins, "this kind, or sparse, weight-stationary or shifted A")
        self.kind, self.ctas = kind, _ctas(ins)
        self.d, self.a, self.b, self.idesc = ins.operands[:4]
        rest = list(ins.operands[4:])
        self.scaled = kind in idesc.BLOCK_SCALED
        if self.scaled != ins.has("block_scale") or not isinstance(self.d, Address):
            raise UnsupportedInstruction(ins, "block_scale, or D that is not an address")
        self.vector, self.scales, self.disable, self.shift = 0, [], None, 0
        if self.scaled:
            names = [m for m in ins.modifiers if m.startswith("scale_vec::") or m in ("block16", "block32")]
            vectors = idesc.VECTORS[kind]
            if (names[0] if names else "") not in vectors or not all(isinstance(r, Address) for r in rest[:2]):
                raise UnsupportedInstruction(ins, f"the scale vector size {names} of kind::{kind}")
            self.vector = vectors[names[0] if names else ""]
            self.scales, rest = [r for r in rest[:2] if isinstance(r, Address)], rest[2:]
        if rest and isinstance(rest[0], Vector):
            self.disable, rest = rest[0].items, rest[1:]
        self.enable = rest[0]
        if len(rest) > 1:
            if not isinstance(rest[1], Immediate):
                raise UnsupportedInstruction(ins, "scale-input-d that is not a constant")
            self.shift = rest[1].value


@operation("tcgen05.mma", section="9.7.16.10.9.1")
def mma(ins: Instruction) -> Execute:
    """Issues D = A B + D."""
    form = Form(ins)

    def execute(ctx: Context) -> None:
        _once(ctx)
        Multiplication(ctx, form).issue()

    return execute


class Multiplication:
    """One execution of tcgen05.mma: everything that is read at issue."""

    def __init__(self, ctx: Context, form: Form) -> None:
        self.ctx, self.form = ctx, form
        self.ctas = _pair(ctx, form.ctas)
        self.shape = idesc.decode(ctx.scalar(form.idesc) & 0xFFFFFFFF, form.kind, form.ctas, form.vector)
        for problem in self.shape.problems:
            ctx.finding("descriptor", f"instruction descriptor: {problem}", stop=True)
        self.rows = self.shape.m // form.ctas
        self.split = form.ctas == 2 and self.shape.m == 128
        self.columns = self.shape.n // 2 if self.split else self.shape.n
        self.lane, self.column = self._address(form.d)
        if self.lane and (self.rows, self.lane) != (64, 16) or self.column + self.columns > COLUMNS:
            ctx.finding(
                "tensor_memory",
                f"D of {self.rows} rows at lane {self.lane}, columns {self.column}..{self.column + self.columns - 1}",
                stop=True,
            )
        self.accumulate = flag(ctx, form.enable)
        self.disabled = None
        if form.disable is not None:
            words = np.array([ctx.scalar(item) & 0xFFFFFFFF for item in form.disable], np.uint32)
            self.disabled = np.unpackbits(words.view(np.uint8), bitorder="little").astype(np.bool_)
        self.chunks: list[tuple[Indices | None, Indices]] = []
        self.a_column = 0

    def _address(self, operand: Operand) -> tuple[int, int]:
        assert isinstance(operand, Address)
        return tmem.split(int(self.ctx.address(operand)[self.ctx.lane]) & 0x3FFFFFFF)

    def _operand(self, operand: Operand, name: str, rows: int, mn_major: bool, fmt: str) -> Indices:
        bits = self.ctx.scalar(operand)
        for problem in layouts.blackwell_descriptor(bits).problems:
            self.ctx.finding("descriptor", f"shared memory descriptor of {name}, {bits:#018x}: {problem}", stop=True)
        return chunk_addresses(bits, True, mn_major, rows, self.shape.k, self._width(fmt))

    def _width(self, fmt: str) -> int:
        """Bits of an element in shared memory: kinds f8f6f4 and mxf8f6f4 pad theirs to bytes."""
        return 8 if self.form.kind in ("f8f6f4", "mxf8f6f4") else formats.ELEMENT_BITS[fmt]

    def issue(self) -> None:
        """Checks, marks D as in flight and puts the multiplication into the pipe."""
        ctx, form, shape = self.ctx, self.form, self.shape
        a = None if isinstance(form.a, Address) else self._operand(form.a, "A", self.rows, shape.a_mn, shape.a)
        if a is None:
            self.a_lane, self.a_column = self._address(form.a)
            if formats.ELEMENT_BITS[shape.a] < 8 or form.scaled:
                raise UnsupportedInstruction(
                    ctx.instruction, f"A of type {shape.a} in tensor memory, kind::{form.kind}"
                )
        b = self._operand(form.b, "B", shape.n // form.ctas, shape.b_mn, shape.b)
        holds = []
        d = slice(self.column, self.column + self.columns)
        for cta in self.ctas:
            at = cta.rank << RANK_SHIFT
            self.chunks.append((None if a is None else a | at, b | at))
            holds += [ctx.hold(c, 16, "read", space="shared") for c in self.chunks[-1] if c is not None]
            memory = tmem.of(cta)
            if not memory.allocated(self.column, self.columns):
                ctx.finding(
                    "tensor_memory",
                    f"D in columns {self.column}..{d.stop - 1} of CTA {cta.rank}, allocated are {memory.allocations}",
                )
            check_ordering(ctx, memory, [d] if a is not None else [d, slice(self.a_column, self.a_column + 8)])
            memory.in_flight[d] += 1

        def step() -> None:
            self.run()
            for hold in holds:
                hold.release()

        _issue(ctx, form.ctas, step, f"tcgen05.mma {form.kind} {shape.m}x{shape.n}x{shape.k}")

    def run(self) -> None:
        """Multiplies: what the pipe does."""
        shape, ctx = self.shape, self.ctx
        padded = self.form.kind in ("f8f6f4", "mxf8f6f4")

        def load(chunks: Indices, fmt: str, mn_major: bool) -> Values:
            data = ctx.load(chunks, 16, space="shared", proxy="async")
            return decode_chunks(fmt, data, mn_major=mn_major, padded=padded)

        b = np.concatenate([load(chunks, shape.b, shape.b_mn) for _, chunks in self.chunks])  # (n, k)
        if shape.negate < 0:
            b = -b
        for number, (cta, (a_chunks, _)) in enumerate(zip(self.ctas, self.chunks, strict=True)):
            memory = tmem.of(cta)
            scaled_b = b * self._scale_factors(memory, 1, shape.n) if self.form.scaled else b
            if a_chunks is not None:
                a = load(a_chunks, shape.a, shape.a_mn)  # (rows, k)
                if self.form.scaled:
                    a = a * self._scale_factors(memory, 0, self.rows)
                product = a @ scaled_b.T
            else:
                product = self._tensor_memory_product(memory, scaled_b)
            self._accumulate(memory, number, product)

    def _tensor_memory_product(self, memory: TensorMemory, b: Values) -> Values:
        """A B with A in tensor memory; a pair with M of 128 has a copy of A for N's second half in lanes 64 up."""
        lanes = d_lanes(self.rows, self.form.ctas, self.a_lane)
        halves = [(lanes, b[: self.columns]), (lanes + 64, b[self.columns :])] if self.split else [(lanes, b)]
        columns = slice(self.a_column, self.a_column + 8)  # 32 bytes of K
        parts = []
        for where, right in halves:
            if not memory.written[where, columns].all():
                self.ctx.finding(
                    "uninitialised",
                    f"A in tensor memory, columns {self.a_column}..{self.a_column + 7}, which nothing wrote",
                )
            cells = np.ascontiguousarray(memory.cells[where, columns])
            parts.append(formats.decode_bytes(self.shape.a, cells.view(np.uint8)) @ right.T)
        return np.concatenate(parts, 1)

    def _scale_factors(self, memory: TensorMemory, which: int, rows: int) -> Values:
        """Scale factors of each element, (rows, k), of A (0) or B (1)."""
        lane, column = self._address(self.form.scales[which])
        lanes, columns = scale_cells(column, rows, split=self.split and which == 1)
        name = "AB"[which]
        if lane or int(columns.max()) >= COLUMNS:
            self.ctx.finding(
                "tensor_memory",
                f"scale factors of {name} at lane {lane}, columns {column}..{int(columns.max())}",
                stop=True,
            )
        copies = (32,) if self.split and which == 1 else (32, 64, 96)
        cells = memory.cells[lanes, columns]
        if not memory.written[lanes, columns].all():
            self.ctx.finding(
                "uninitialised",
                f"scale factors of {name} in columns {column}..{int(columns.max())}, which nothing wrote",
            )
        elif any((memory.cells[lanes + copy, columns] != cells).any() for copy in copies):
            self.ctx.finding("tensor_memory", f"scale factors of {name} differ between the quarters of tensor memory")
        first = (self.shape.a_scale_id, self.shape.b_scale_id)[which]
        codes = cells[:, None].view(np.uint8)[:, first : first + self.form.vector]  # (rows, vector)
        return np.repeat(formats.decode(self.shape.scale, codes), self.shape.k // self.form.vector, 1)

    def _accumulate(self, memory: TensorMemory, number: int, product: Values) -> None:
        """D of one CTA: rounds once and writes the lanes that are enabled."""
        shape = self.shape
        columns = slice(self.column, self.column + self.columns)
        lanes = d_lanes(self.rows, self.form.ctas, self.lane)
        parts = [product[:, : self.columns], product[:, self.columns :]] if self.split else [product]
        for half, part in enumerate(parts):
            where, total = lanes + 64 * half, part
            cells: Any = (
                memory.cells[where[0] : where[-1] + 1, columns] if self.rows == LANES else memory.cells[where, columns]
            )
            if self.accumulate:
                if not memory.written[where, columns].all():
                    self.ctx.finding(
                        "uninitialised",
                        f"D in columns {columns.start}..{columns.stop - 1} is accumulated to, but nothing wrote it",
                    )
                total = part + _old(shape.d, cells) * 2.0**-self.form.shift
            codes = to_accumulator(shape.d, total, saturate=shape.saturate)
            if self.disabled is not None:
                enabled = ~self.disabled[LANES * number :][where]
                where, codes = where[enabled], codes[enabled]
            memory.cells[where, columns] = codes
            memory.written[where, columns] = True
        complete(self.ctx, memory, columns)


def _old(name: str, cells: npt.NDArray[np.uint32]) -> Values:
    """Values of D's cells."""
    if name == "f16":
        return (cells & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float64)
    return np.ascontiguousarray(cells).view(np.int32 if name == "s32" else np.float32).astype(np.float64)


def check_ordering(ctx: Context, memory: TensorMemory, spans: list[slice]) -> None:
    """Findings when other threads' loads or stores are not ordered before an asynchronous operation."""
    key, after = tmem.warp_key(ctx), ctx.warp.state.get("tcgen05.after", 0)
    for span in spans:
        if any(pending[span].any() for pending in memory.unwaited.values()):
            ctx.finding(
                "missing_fence", "columns stored without tcgen05.wait::st before an asynchronous operation uses them"
            )
        if any(open_[span].any() for other, open_ in memory.unfenced.items() if other != key):
            ctx.finding(
                "missing_fence", "no tcgen05.fence::before_thread_sync after another thread's access to these columns"
            )
        if (
            (memory.access_event[span] > after) & (memory.access_warp[span] != key) & (memory.access_warp[span] >= 0)
        ).any():
            ctx.finding(
                "missing_fence",
                "no tcgen05.fence::after_thread_sync between another thread's access to these columns and this",
            )


def complete(ctx: Context, memory: TensorMemory, columns: slice) -> None:
    """Shadow state of an asynchronous write that is complete."""
    memory.mma_event[columns], memory.mma_warp[columns] = next(tmem.EVENT), tmem.warp_key(ctx)
    memory.in_flight[columns] -= 1


# ---- cp, shift, commit -----------------------------------------------------------------------------------------------


def copy_rows(shape: str) -> tuple[int, int, list[Indices]]:
    """Rows that tcgen05.cp reads, bytes of a row, and the lanes (relative) of each row, one array for each copy."""
    row = np.arange(128)
    table = {
        "128x256b": (128, 32, [row]),
        "128x128b": (128, 16, [row]),
        "4x256b": (4, 32, [32 * row[:4]]),
        "64x128b.warpx2::02_13": (64, 16, [row[:64], row[:64] + 64]),
        "64x128b.warpx2::01_23": (64, 16, [row[:64] + 32 * (row[:64] // 32) + 32 * i for i in range(2)]),
        "32x128b.warpx4": (32, 16, [row[:32] + 32 * i for i in range(4)]),
    }
    return table[shape]


@operation("tcgen05.cp", section="9.7.16.9.1")
def cp(ins: Instruction) -> Execute:
    """Copies from shared to tensor memory."""
    ctas = _ctas(ins)
    parts = [m for m in ins.modifiers if re.fullmatch(r"\d+x\d+b|warpx4|warpx2::\d\d_\d\d", m)]
    target, source = ins.operands
    try:
        rows, size, lanes = copy_rows(".".join(parts))
    except KeyError:
        raise UnsupportedInstruction(ins, "the shape") from None
    if any(m.startswith(("b8x16", "b6x16", "b4x16")) for m in ins.modifiers) or not isinstance(target, Address):
        raise UnsupportedInstruction(ins, "decompression")

    def execute(ctx: Context) -> None:
        _once(ctx)
        lane, column = tmem.split(int(ctx.address(target)[ctx.lane]) & 0xFFFFFFFF)
        bits, width = ctx.scalar(source), size // 4
        for problem in layouts.blackwell_descriptor(bits).problems:
            ctx.finding("descriptor", f"shared memory descriptor {bits:#018x}: {problem}", stop=True)
        highest = lane + max(int(copy.max()) for copy in lanes)
        if highest >= LANES or column + width > COLUMNS:
            ctx.finding(
                "tensor_memory",
                f"tcgen05.cp to lanes up to {highest}, columns {column}..{column + width - 1}",
                stop=True,
            )
        chunks, span = chunk_addresses(bits, True, False, rows, size, 8), slice(column, column + width)
        members, every = _pair(ctx, ctas), lane + np.concatenate(lanes)
        holds = []
        for cta in members:
            memory = tmem.of(cta)
            if not memory.allocated(column, width):
                ctx.finding(
                    "tensor_memory",
                    f"tcgen05.cp to columns {column}..{column + width - 1}, allocated are {memory.allocations}",
                )
            check_ordering(ctx, memory, [span])
            memory.in_flight[span] += 1
            holds.append(ctx.hold(chunks | cta.rank << RANK_SHIFT, 16, "read", space="shared"))

        def step() -> None:
            for cta in members:
                data = ctx.load(chunks | cta.rank << RANK_SHIFT, 16, space="shared", proxy="async")
                cells = np.ascontiguousarray(data.reshape(rows, size)).view(np.uint32)
                memory = tmem.of(cta)
                memory.cells[every, span] = np.tile(cells, (len(lanes), 1))
                memory.written[every, span] = True
                complete(ctx, memory, span)
            for hold in holds:
                hold.release()

        _issue(ctx, ctas, step, f"tcgen05.cp {'.'.join(parts)}")

    return execute


@operation("tcgen05.shift", section="9.7.16.9.2")
def shift(ins: Instruction) -> Execute:
    """Moves 31 rows of 32 bytes down by one; the last row falls out and the first stays."""
    ctas = _ctas(ins)
    (target,) = ins.operands
    if not ins.has("down") or not isinstance(target, Address):
        raise UnsupportedInstruction(ins, "a direction other than down")

    def execute(ctx: Context) -> None:
        _once(ctx)
        lane, column = tmem.split(int(ctx.address(target)[ctx.lane]) & 0xFFFFFFFF)
        span = slice(column, column + 8)
        if lane % 32 or column + 8 > COLUMNS:
            ctx.finding("tensor_memory", f"tcgen05.shift at lane {lane}, column {column}", stop=True)
        members = _pair(ctx, ctas)
        for cta in members:
            check_ordering(ctx, tmem.of(cta), [span])
            tmem.of(cta).in_flight[span] += 1

        def step() -> None:
            for cta in members:
                memory = tmem.of(cta)
                for array in (memory.cells, memory.written):
                    array[lane + 1 : lane + 32, span] = array[lane : lane + 31, span].copy()
                complete(ctx, memory, span)

        _issue(ctx, ctas, step, "tcgen05.shift")

    return execute


@operation("tcgen05.commit", section="9.7.16.12.1")
def commit(ins: Instruction) -> Execute:
    """Arrives on barriers when everything issued before is complete."""
    ctas = _ctas(ins)
    target = ins.operands[0]
    multicast = any(m.startswith("multicast") for m in ins.modifiers)
    if not isinstance(target, Address) or multicast != (len(ins.operands) == 2):
        raise UnsupportedInstruction(ins, "the operands")

    def execute(ctx: Context) -> None:
        _once(ctx)
        address = int(ctx.address(target)[ctx.lane])
        addresses = [address]
        if multicast:
            addresses = [
                rank << RANK_SHIFT | address & OFFSET for rank in destinations(ctx, ctx.scalar(ins.operands[1]))
            ]
        barriers = [async_barrier(ctx, one) for one in addresses]

        def step() -> None:
            for barrier in barriers:
                barrier.arrive()

        _issue(ctx, ctas, step, f"tcgen05.commit to {address:#x}")

    return execute
