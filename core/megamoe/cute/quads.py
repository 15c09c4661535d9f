"""What four neighbouring lanes, which share a row of an accumulator of `wgmma`, exchange without shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cutlass import Boolean, Float32, Int32, Int64, Numeric, Uint32, cute
from cutlass._mlir.dialects import llvm

from megamoe.cute import arith, warp
from megamoe.cute.arith import ptx

LANES = 4
_WITHIN_QUAD = (32 - LANES) << 8 | 31  # of a shuffle: lane numbers count from the quad's first


class Quad:
    """A lane's view of its quad, made once: which of the four it is and what that means for moving bytes."""

    def __init__(self) -> None:
        lane = cute.arch.lane_idx()
        self.odd: Boolean = (lane & 1) != 0
        self.upper: Boolean = (lane & 2) != 0
        self._halves = self._pick(0x5410, 0x7632, 0x5410, 0x7632)
        self._other_halves = self._pick(0x7632, 0x5410, 0x7632, 0x5410)
        self._pairs = self._pick(0x5410, 0x5410, 0x7632, 0x7632)
        self._even_bytes = self._pick(0x6240, 0x2604, 0x4062, 0x0426)
        self._bytes = self._pick(0x6240, 0x3715, 0x4062, 0x1537)

    def _pick(self, *by_lane: int) -> Uint32:
        first, second, third, fourth = (Uint32(value) for value in by_lane)
        low, high = arith.select(self.odd, second, first), arith.select(self.odd, fourth, third)
        return Uint32(arith.select(self.upper, high, low))

    def reduce(self, parts: Sequence[Float32], combine: Callable[[Float32, Float32], Float32]) -> Float32:
        """Combines each of four numbers over the quad; lane i gets what becomes of the number i."""
        pairs = []
        for even, odd in ((parts[0], parts[1]), (parts[2], parts[3])):
            kept, sent = arith.select(self.odd, odd, even), arith.select(self.odd, even, odd)
            pairs.append(combine(kept, warp.from_lane(sent, 1)))
        kept, sent = arith.select(self.upper, pairs[1], pairs[0]), arith.select(self.upper, pairs[0], pairs[1])
        return combine(kept, warp.from_lane(sent, 2))

    def all_of(self, value: Numeric) -> list[Numeric]:
        """The values of the four lanes, in their order."""
        return [cute.arch.shuffle_sync(value, lane, mask_and_clamp=_WITHIN_QUAD) for lane in range(LANES)]

    def gather_halves(self, words: Sequence[Uint32]) -> tuple[Uint32, Uint32]:
        """Lane i gets all lanes' halfwords i of two words (four halfwords): their low bytes, then their high bytes."""
        kept, sent = arith.select(self.upper, words[1], words[0]), arith.select(self.upper, words[0], words[1])
        other = warp.from_lane(sent, 2)
        mine, theirs = _permute(kept, other, self._halves), _permute(kept, other, self._other_halves)
        got = warp.from_lane(theirs, 1)
        return _permute(mine, got, self._even_bytes), _permute(mine, got, self._even_bytes + 0x1111)

    def gather_bytes(self, word: Uint32) -> Uint32:
        """Lane i gets all lanes' bytes i, the first lane's lowest."""
        pairs = _permute(word, warp.from_lane(word, 2), self._pairs)
        return _permute(pairs, warp.from_lane(pairs, 1), self._bytes)


def _permute(a: Uint32, b: Uint32, selector: Uint32) -> Uint32:
    return Uint32(ptx(Uint32, "prmt.b32 $0, $1, $2, $3;", a, b, selector))


def store8_if(target: Int64, words: Sequence[Uint32], condition: Int32) -> None:
    """Writes two words of global memory where the condition is not 0; no branch."""
    llvm.inline_asm(
        None,
        [operand.ir_value() for operand in (target, *words, condition)],
        "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2};}",
        "l,r,r,r,~{memory}",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
