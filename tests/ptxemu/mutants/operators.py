"""What is done to an instruction: each operator breaks one thing, and leaves PTX that can be loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ptxemu.instruction import Instruction
from ptxemu.parser import _split

Change = Callable[["Statement"], str | None]


@dataclass(frozen=True)
class Statement:
    """The text of an instruction in its parts.

    Attributes:
        guard: "@%p1 " or nothing.
        name: Opcode and modifiers.
        operands: As written.
    """

    guard: str
    name: str
    operands: tuple[str, ...]

    @classmethod
    def of(cls, instruction: Instruction) -> Statement:
        found = re.match(r"(@!?[%\w$]+\s+)?([\w.:]+)\s*(.*)$", instruction.text, re.DOTALL)
        assert found is not None
        return cls(found.group(1) or "", found.group(2), tuple(_split(found.group(3))) if found.group(3) else ())

    def has(self, *prefixes: str) -> bool:
        """The name starts with one of them."""
        return self.name.startswith(prefixes)

    def with_operand(self, index: int, text: str) -> str:
        """The instruction with another operand."""
        operands = list(self.operands)
        operands[index] = text
        return f"{self.guard}{self.name} {', '.join(operands)};"

    def computed(self, index: int, operation: str, operand: str, kind: str = "b32") -> str:
        """The instruction with an operand that `operation` makes of the old one and of `operand`."""
        declared = f".reg .{kind} mutant; {operation} mutant, {self.operands[index]}, {operand};"
        return f"{{ {declared} {self.with_operand(index, 'mutant')} }}"

    def moved(self, index: int, by: int) -> str:
        """The instruction with an address moved by some bytes, columns or lanes."""
        address = self.operands[index][1:-1]
        base, comma, coordinates = address.partition(",")
        found = re.match(r"(.*?)\+(-?\d+)\s*$", base)
        start, offset = (found.group(1), int(found.group(2))) if found else (base.strip(), 0)
        return self.with_operand(index, f"[{start}+{offset + by}{comma}{coordinates}]")


@dataclass(frozen=True)
class Operator:
    """A way to break a kernel.

    Attributes:
        name: Of the mutants.
        breaks: What the kernel lacks then, or does wrong.
        change: The text that replaces an instruction; None where the operator does not apply.
    """

    name: str
    breaks: str
    change: Change


OPERATORS: dict[str, Operator] = {}


def operator(name: str, breaks: str) -> Callable[[Change], Change]:
    """Registers a function as an operator."""

    def register(change: Change) -> Change:
        OPERATORS[name] = Operator(name, breaks, change)
        return change

    return register


def _drop(name: str, breaks: str, *prefixes: str) -> None:
    operator(name, breaks)(lambda s: "" if s.has(*prefixes) else None)


_drop("drop-wait-group", "a wait for copies", "cp.async.wait_", "cp.async.bulk.wait_group")
_drop("drop-wgmma-wait", "the wait for products before their registers are read", "wgmma.wait_group")
_drop("drop-tmem-wait", "the wait for registers loaded from, or stored to tensor memory", "tcgen05.wait")
_drop("drop-commit-group", "a group that a wait counts", "cp.async.commit_group", "cp.async.bulk.commit_group")
_drop("drop-wgmma-commit", "a group of products that a wait counts", "wgmma.commit_group")
_drop("drop-mma-commit", "the arrival when products of tcgen05 are complete", "tcgen05.commit")
_drop("drop-proxy-fence", "what orders data of threads before the asynchronous proxy", "fence.proxy.async")
_drop("drop-init-fence", "what makes an mbarrier's initialisation visible to others", "fence.mbarrier_init")
_drop("drop-wgmma-fence", "what orders registers before wgmma", "wgmma.fence")
_drop("drop-before-fence", "the tcgen05 fence before a synchronisation", "tcgen05.fence::before")
_drop("drop-after-fence", "the tcgen05 fence after a synchronisation", "tcgen05.fence::after")
_drop("drop-init", "an mbarrier's initialisation", "mbarrier.init")
_drop("drop-arrive", "an arrival at an mbarrier", "mbarrier.arrive", "cp.async.mbarrier.arrive")
_drop("drop-cluster-wait", "the wait for the other CTAs", "barrier.cluster.wait")
_drop("drop-cluster-arrive", "the arrival that the other CTAs wait for", "barrier.cluster.arrive")
_drop("drop-dealloc", "the release of tensor memory", "tcgen05.dealloc")


@operator("drop-barrier", "a barrier of the CTA's threads")
def drop_barrier(s: Statement) -> str | None:
    return "" if s.has("bar.sync", "barrier.sync", "barrier.cta.sync") else None


@operator("relax-cluster-arrive", "what makes stores before the barrier of the cluster visible to the other CTAs")
def relax_cluster_arrive(s: Statement) -> str | None:
    if not s.has("barrier.cluster.arrive") or ".relaxed" in s.name:
        return None
    return f"{s.guard}barrier.cluster.arrive.relaxed{'.aligned' if s.name.endswith('.aligned') else ''};"


@operator("relax-atomic", "what orders an atomic or a flag with what other CTAs stored before it")
def relax_atomic(s: Statement) -> str | None:
    if not s.has("atom.", "red.", "ld.acquire", "st.release"):
        return None
    name = re.sub(r"\.(acq_rel|acquire|release)\b", ".relaxed", s.name)
    return f"{s.guard}{name} {', '.join(s.operands)};" if name != s.name else None


@operator("pass-wait", "a wait for an mbarrier's phase: it never waits")
def pass_wait(s: Statement) -> str | None:
    if not s.has("mbarrier.try_wait", "mbarrier.test_wait"):
        return None
    return f"{s.guard}setp.eq.u32 {s.operands[0].split('|')[0]}, 0, 0;"


@operator("other-parity", "a wait: for the phase before")
def other_parity(s: Statement) -> str | None:
    if not s.has("mbarrier.try_wait.parity", "mbarrier.test_wait.parity"):
        return None
    return s.computed(2, "xor.b32", "1")


@operator("later-group", "a wait for groups: one more may be outstanding")
def later_group(s: Statement) -> str | None:
    if not s.has("cp.async.wait_group", "cp.async.bulk.wait_group", "wgmma.wait_group"):
        return None
    return s.with_operand(0, str(int(s.operands[0]) + 1))


@operator("expect-more", "an expect_tx: 16 bytes too many")
def expect_more(s: Statement) -> str | None:
    return s.computed(len(s.operands) - 1, "add.u32", "16") if "expect_tx" in s.name else None


@operator("expect-fewer", "an expect_tx: 16 bytes too few")
def expect_fewer(s: Statement) -> str | None:
    return s.computed(len(s.operands) - 1, "sub.u32", "16") if "expect_tx" in s.name else None


@operator("forget-bytes", "an expect_tx: an arrival without it")
def forget_bytes(s: Statement) -> str | None:
    if not s.has("mbarrier.arrive.expect_tx"):
        return None
    return f"{s.guard}{s.name.replace('.expect_tx', '')} {', '.join(s.operands[:2])};"


@operator("init-one-more", "an mbarrier's count: an arrival too many is waited for")
def init_one_more(s: Statement) -> str | None:
    return s.computed(1, "add.u32", "1") if s.has("mbarrier.init") else None


@operator("arrive-elsewhere", "the stage index of an arrival: the next mbarrier gets it")
def arrive_elsewhere(s: Statement) -> str | None:
    if s.has("tcgen05.commit"):
        return s.moved(0, 8)
    return s.moved(1, 8) if s.has("mbarrier.arrive") else None


@operator("wait-elsewhere", "the stage index of a wait: for the next mbarrier")
def wait_elsewhere(s: Statement) -> str | None:
    return s.moved(1, 8) if s.has("mbarrier.try_wait", "mbarrier.test_wait") else None


def _load(s: Statement) -> bool:
    """A bulk copy into shared memory."""
    return s.has("cp.async.bulk.") and "complete_tx" in s.name


@operator("complete-elsewhere", "the stage index of a copy's mbarrier: the next one gets the bytes")
def complete_elsewhere(s: Statement) -> str | None:
    if not _load(s):
        return None
    return s.moved(2 if ".tensor." in s.name else 3, 8)


@operator("load-elsewhere", "the stage index of a copy's destination: 1 KiB further")
def load_elsewhere(s: Statement) -> str | None:
    return s.moved(0, 1024) if _load(s) else None


@operator("store-elsewhere", "the stage index of a copy's source: 128 bytes further")
def store_elsewhere(s: Statement) -> str | None:
    return s.moved(1, 128) if s.has("cp.async.bulk.") and "bulk_group" in s.name else None


@operator("multiply-elsewhere", "the stage index of a product's operand: 1 KiB further")
def multiply_elsewhere(s: Statement) -> str | None:
    if not s.has("wgmma.mma_async", "tcgen05.mma"):
        return None
    return s.computed(2, "add.u64", "64", "b64")


@operator("other-column", "a column of tensor memory: 4 further")
def other_column(s: Statement) -> str | None:
    if s.has("tcgen05.mma", "tcgen05.cp", "tcgen05.st"):
        return s.moved(0, 4)
    return s.moved(1, 4) if s.has("tcgen05.ld.") else None


@operator("other-peer", "the CTA that an address belongs to: its neighbour")
def other_peer(s: Statement) -> str | None:
    return s.computed(2, "xor.b32", "1") if s.has("mapa") else None


@operator("one-cta", "a multicast: only the first CTA gets it")
def one_cta(s: Statement) -> str | None:
    if "multicast::cluster" not in s.name or not s.has("tcgen05.commit"):
        return None
    return f"{{ .reg .b16 mutant; mov.b16 mutant, 1; {s.with_operand(1, 'mutant')} }}"


@operator("copy-fewer", "a bulk copy: 16 bytes too few")
def copy_fewer(s: Statement) -> str | None:
    if not s.has("cp.async.bulk.") or ".tensor." in s.name or len(s.operands) < 3:
        return None
    return s.computed(2, "sub.u32", "16")
