"""The compile cache, what is read from a cubin, and `megamoe compile`: kernels for GPUs that need not be there."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import cutlass
import pytest
import torch
from cutlass import Constexpr, Float32, Int32, cute
from cutlass.cute.runtime import make_fake_compact_tensor

from megamoe import cli
from megamoe.cute import compiler, inspect, report
from megamoe.cute.arith import Target
from megamoe.cute.compiler import Artifact, KernelSpec
from megamoe.errors import ArgumentError
from megamoe.model import Arch, Kind
from megamoe_stages.quantize import STAGE, kernel, limits, sm90, sm100


@cute.kernel  # type: ignore[untyped-decorator]
def lookup(x: cute.Tensor, size: Constexpr) -> None:
    thread, _, _ = cute.arch.thread_idx()
    table = cute.make_rmem_tensor(size, Float32)
    for i in cutlass.range_constexpr(size):
        table[i] = x[i] * x[thread]
    x[thread] = table[Int32(x[thread + 1])] if cutlass.const_expr(size > 1) else table[0]


@cute.jit  # type: ignore[untyped-decorator]
def launch_lookup(x: cute.Tensor, size: Constexpr) -> None:
    lookup(x, size).launch(grid=[1, 1, 1], block=[32, 1, 1])


def lookup_spec(size: int) -> KernelSpec:
    def arguments() -> tuple[Any, ...]:
        return make_fake_compact_tensor(Float32, (cute.sym_int32(),), assumed_align=4), size

    return KernelSpec(f"lookup{size}", "sm_90a", launch_lookup, arguments, (size,))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))


def test_a_kernel_is_compiled_once_and_loads_without_a_gpu() -> None:
    first = compiler.compile_kernel(lookup_spec(1))
    again = compiler.compile_kernel(lookup_spec(1))
    assert (first.cached, again.cached) == (False, True)
    assert again.folder == first.folder
    assert ".target sm_90a" in again.ptx
    assert callable(compiler.load(lookup_spec(1)))


def test_the_key_tells_specs_apart() -> None:
    spec = lookup_spec(1)
    other = [lookup_spec(2), KernelSpec(spec.name, "sm_100a", spec.function, spec.arguments, spec.key)]
    assert len({compiler.cache_key(s) for s in (spec, *other)}) == 3
    assert compiler.cache_key(spec) == compiler.cache_key(lookup_spec(1))


def test_the_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiler.cache_key(lookup_spec(1))
    monkeypatch.setattr(compiler, "_sources", lambda module: f"{module} changed")
    assert compiler.cache_key(lookup_spec(1)) != before


def test_sources_cover_the_shared_device_code() -> None:
    source = compiler._sources.__wrapped__("megamoe_stages.quantize.kernel")
    assert source != compiler._sources.__wrapped__("megamoe.cute.recipe")


def _slow_compile(log: Path, spec: KernelSpec, folder: Path) -> float:
    folder.mkdir()
    with log.open("a") as file:
        file.write("x")
    time.sleep(0.3)
    (folder / "facts.json").write_text(json.dumps({"seconds": 0.3}))
    return 0.3


def _ask(log: Path) -> None:
    compiler._compile = functools.partial(_slow_compile, log)
    compiler.compile_kernel(lookup_spec(1))


def test_processes_that_want_one_kernel_compile_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_ask, args=(log,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "x"


def test_a_compile_that_fails_leaves_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(spec: KernelSpec, folder: Path) -> float:
        folder.mkdir()
        raise RuntimeError("no")

    monkeypatch.setattr(compiler, "_compile", fails)
    with pytest.raises(RuntimeError):
        compiler.compile_kernel(lookup_spec(1))
    assert not [p for p in compiler.cache_folder().iterdir() if p.is_dir()]


def test_local_memory_is_seen() -> None:
    (plain,) = inspect.kernels(compiler.compile_kernel(lookup_spec(1)).cubin)
    (indexed,) = inspect.kernels(compiler.compile_kernel(lookup_spec(64)).cubin)
    assert not plain.spills and plain.stack == 0
    assert indexed.spills and indexed.stack >= 256
    if inspect.nvdisasm():
        assert plain.count("global") and not plain.count("local") and indexed.count("local")


def sass(*instructions: tuple[str, int, int]) -> str:
    """As `inspect.disassembly`: instructions, each with its scoreboard (7: none) and a mask of those it waits for."""
    lines = [".text.some_kernel:"]
    for i, (text, scoreboard, waits) in enumerate(instructions):
        lines.append(f"        /*{i * 16:04x}*/                   {text} ;    /* 0x{i:016x} */")
        lines.append(f"{'':80} /* 0x{0xFE20000000C00 & (1 << 46) - 1 | scoreboard << 46 | waits << 52:016x} */")
    return "\n".join(lines)


LOAD, LATER_LOAD = ("LDS.128 R8, [R3]", 2, 0), ("@P1 LDS.U16 R7, [R6+0x40]", 3, 0)
COPY, TENSOR_COPY = ("@!UP1 UBLKCP.S.G [UR8], [UR6], UR10", 7, 0), ("UTMALDG.2D [UR8], [UR4]", 7, 0)
USE, USE_OF_LATER = ("LOP3.LUT R4, R8, 0x1, RZ, 0x3c, !PT", 7, 0b100), ("IMAD R0, R7, R7, R7", 7, 0b1000)


@pytest.mark.parametrize(
    ("instructions", "found"),
    [
        ([LOAD, COPY], ["0x0010"]),
        ([LOAD, TENSOR_COPY, COPY], ["0x0010", "0x0020"]),
        ([LOAD, USE, COPY], []),
        ([LOAD, LATER_LOAD, USE, COPY], ["0x0030"]),  # the later one may still be on its way
        ([LOAD, LATER_LOAD, USE_OF_LATER, COPY], []),  # loads come in order
        ([LOAD, USE_OF_LATER, COPY], ["0x0020"]),  # of a scoreboard of something else
        ([("LDS R4, [R2]", 7, 0), LOAD, USE, COPY], []),
        ([("LDG.E R4, [R2]", 2, 0), COPY], []),  # not of shared memory
        ([("@!PT LDS RZ, [RZ]", 7, 0), COPY], []),  # never executed
        ([LOAD, ("UTMASTG.2D [UR8], [UR4]", 7, 0)], []),  # reads what the load reads
        ([LOAD, ("@P0 BRA `(.L_x_1)", 7, 0), COPY], ["0x0020"]),
        ([LOAD, ("BRA `(.L_x_1)", 7, 0), COPY], []),  # reached from elsewhere
        ([LOAD, ("BAR.ARV 0x1, 0x80", 7, 0), COPY], ["0x0020"]),  # waits for no load
    ],
)
def test_copies_that_may_overtake_loads_are_seen(instructions: list[tuple[str, int, int]], found: list[str]) -> None:
    assert inspect.early_copies(sass(*instructions)) == ({"some_kernel": found} if found else {})
    assert inspect.early_copies(sass(*instructions) + "\n" + sass(COPY)) == ({"some_kernel": found} if found else {})


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100], ids=str)
@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
def test_the_quantise_kernel_compiles_without_spills(target: Target, scale_layout: str) -> None:
    artifact = compiler.compile_kernel(kernel.spec("bfloat16", scale_layout, kernel.SHAPE[scale_layout], target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 64  # four CTAs of 256 threads an SM
    assert ("cvt.rn.satfinite.e2m1x2.f32" in artifact.ptx) == (target is Target.SM100)
    assert "div.approx" not in artifact.ptx and "mul.ftz" not in artifact.ptx


def test_stages_declare_their_kernels() -> None:
    names = [(stage.id, spec.name) for stage, _, spec in report.specs([STAGE], Arch(90))]
    assert len(names) == len(set(names)) == len(sm90.kernels())
    assert {spec.arch for _, _, spec in report.specs([STAGE])} == {"sm_90a", "sm_100a"}
    assert len(sm100.kernels()) == len(sm90.kernels())


@pytest.mark.parametrize(
    ("stack", "copies", "words"), [(0, (), ""), (16, (), "local memory"), (0, ("0x0310",), "a bulk copy at 0x0310")]
)
def test_compile_fails_on_faults(
    stack: int, copies: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = lookup_spec(1)
    variant = next(v for v in STAGE.variants if v.name == "fused_sm90")
    compiled, code = inspect.Kernel("lookup", 40, stack, 0, None, copies), int(bool(words))
    row = report.Row("quantize", variant, spec, Artifact(spec, Path(), 1.5, False), compiled)
    monkeypatch.setattr(report, "compile_all", lambda stages, arch, fresh: [row])
    assert cli.main(["compile", "quantize", "--arch", "sm_90a"]) == code
    out = capsys.readouterr()
    assert "lookup1" in out.out
    assert words in out.err and bool(out.err) == bool(words)
    (record,) = report.records([row], {"quantize": STAGE}, {"some": "1.0"})
    assert (record.kind, record.arch, record.variant, record.ok) == (Kind.COMPILED, Arch(90), "fused_sm90", code == 0)
    assert words in record.cases[0].reason


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({}, ""),
        ({"scale_dims": 0, "rows": 8192, "k": 7168, "zero_guard": "scale", "fast": False, "four_over_six": None}, ""),
        ({"fast": True}, "fast"),
        ({"zero_guard": "amax"}, "zero_guard"),
        ({"four_over_six": "mse"}, "four_over_six"),
        ({"scale_dims": -1}, "amax"),
        ({"scale_dims": 2}, "batch"),
        ({"rows": 2**20, "k": 2**15}, "scales"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(facts: dict[str, Any], word: str) -> None:
    reasons = limits.supports(facts)
    assert len(reasons) == bool(word)
    assert all(word in reason for reason in reasons)


def test_a_fused_variant_names_what_does_not_fit() -> None:
    x, enc = torch.ones(2, 32, dtype=torch.bfloat16), torch.tensor(1.0)
    with pytest.raises(ArgumentError, match="CUDA"):
        sm90.quantize(x, enc)
    with pytest.raises(ArgumentError, match="fast=True"):
        sm90.quantize(x, enc, fast=True)
    with pytest.raises(ArgumentError, match="amax"):
        sm100.quantize(x)
    with pytest.raises(ArgumentError, match="float64"):
        sm90.quantize(x.double(), enc)
