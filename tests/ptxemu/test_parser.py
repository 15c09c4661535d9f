"""PTX text in, typed instructions out."""

from __future__ import annotations

import pytest

from ptxemu.errors import PtxSyntaxError
from ptxemu.instruction import Address, Immediate, Negated, Pair, Register, Sink, Special, Symbol, Vector
from ptxemu.parser import parse

TEXT = """//
.version 8.8
.target sm_100a, texmode_independent
.address_size 64
.file 1 "kernel.py"
.extern .shared .align 128 .b8 dynamic[];
.global .align 4 .b8 table[6] = {1, 2, 0xff};
.visible .func (.param .b32 r) helper(.param .b32 x) { ret; }
.visible .entry other() { ret; }
.visible .entry first(
    .param .align 64 .b8 map[128],
    .param .u64 .ptr .global .align 16 pointer,
    .param .f32 scale
)
.reqntid 128, 1, 1
.reqnctapercluster 2, 1, 1
{
    .reg .pred %p<3>;
    .reg .b32 %r<5>; .reg .f32 x, y; /* both
    of 32 bits */
    .loc 1 2 3
    .shared .align 8 .b8 bar[16];
$L_top:
    ld.param.b64 %rd1, [map+8];
    @!%p1 bra $L_top;
    { .reg .b32 %r1; .reg .b8 b;
      $L_top: mov.b32 %r1, -5;
      @%p2 bra.uni $L_top; }
    setp.lt.and.s32 %p1|_, %r1, 0x10, !%p2;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [dynamic], [%rd1, {%r1, 7}], [bar];
    tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r2, _}, [%r3 + -16];
    fma.rn.f32 x, y, 0f3F800000, 0fBF800000;
    add.f64 %rd1, %rd1, 0d3FF0000000000000;
    mov.u32 %r2, %tid.x; mov.b64 %rd1, dynamic+32;
}
""".replace("%rd1", "%q1").replace(".reg .f32 x, y;", ".reg .f32 x, y; .reg .b64 %q<2>;")


def test_a_module() -> None:
    module = parse(TEXT)
    assert list(module.kernels) == ["other", "first"]
    assert module.target == "sm_100a"
    kernel = module.kernel("first")
    assert [(p.name, p.type, p.size, p.align) for p in kernel.parameters] == [
        ("map", "b8", 128, 64), ("pointer", "u64", 8, 8), ("scale", "f32", 4, 4),
    ]  # fmt: skip
    assert (kernel.block, kernel.cluster) == ((128, 1, 1), (2, 1, 1))
    assert kernel.variables["table"].data == bytes([1, 2, 255, 0, 0, 0])
    assert (kernel.variables["dynamic"].size, kernel.variables["bar"].size) == (0, 16)


def test_instructions() -> None:
    load, back, inner, loop, setp, copy, tensor, fma, double, tid, address = parse(TEXT).kernel("first").instructions
    assert load.operands[1] == Address(Symbol("map"), 8)
    assert load.line == 24
    assert (back.target, back.negated, back.guard and back.guard.name) == (0, True, "%p1")
    assert inner.operands == (Register("%r1@1", "b32", 2), Immediate((1 << 64) - 5))
    assert loop.target == 2
    assert isinstance(setp.operands[0], Pair)
    assert setp.operands[0].second == Sink()
    assert isinstance(setp.operands[3], Negated)
    assert isinstance(setp.operands[1], Register)
    assert setp.operands[1].name == "%r1"
    destination, source, barrier = copy.operands
    assert (destination, barrier) == (Address(Symbol("dynamic")), Address(Symbol("bar")))
    assert isinstance(source, Address)
    assert source.coordinates[1] == Immediate(7)
    assert copy.name.endswith("global.mbarrier::complete_tx::bytes")
    assert isinstance(tensor.operands[0], Vector)
    assert tensor.operands[0].items[1] == Sink()
    assert isinstance(tensor.operands[1], Address)
    assert tensor.operands[1].offset == -16
    assert fma.operands[2:] == (Immediate(0x3F800000), Immediate(0xBF800000))
    assert double.operands[2] == Immediate(0x3FF0000000000000)
    assert tid.operands[1] == Special("%tid.x")
    assert address.operands[1] == Symbol("dynamic", 32)
    assert isinstance(fma.operands[0], Register)


ERRORS = {
    "@%q bra X;": r"PTX line 3: %q is not a predicate",
    "bra NOWHERE;": "no such label",
    "add.s32 a b;": "cannot read the operand",
    "add.s32 a, b": "without end",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_the_line(text: str) -> None:
    with pytest.raises(PtxSyntaxError, match=ERRORS[text]):
        parse(f".version 8.8\n.entry k() {{\n{text}\n}}")


def test_an_unknown_kernel() -> None:
    with pytest.raises(PtxSyntaxError, match="no such kernel among other, first"):
        parse(TEXT).kernel()
