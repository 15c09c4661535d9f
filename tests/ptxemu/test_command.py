"""The command line, and how native parts are built."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ptxemu import BuildError, build, capture
from ptxemu.__main__ import app
from tests.ptxemu.micro import kernel

DOUBLE = kernel(
    """ld.param.u64 %d1, [p]; mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4; add.s64 %d1, %d1, %d2;
    ld.global.b32 %r2, [%d1]; ld.param.b32 %r4, [by]; mul.lo.u32 %r3, %r2, %r4; st.global.b32 [%d1], %r3;""",
    [".u64 p", ".u32 by"],
)


@pytest.fixture
def ptx(tmp_path: Path) -> str:
    path = tmp_path / "double.ptx"
    path.write_text(DOUBLE)
    return str(path)


def test_run(ptx: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(32, dtype=np.uint32))
    done = CliRunner().invoke(app, ["run", ptx, str(tmp_path / "x.npy"), "3", "--save", str(tmp_path / "out.npz")])
    assert done.exit_code == 0, done.output
    assert "no findings" in done.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["p0"], 3 * np.arange(32))
    short = CliRunner().invoke(app, ["run", ptx, "uint32:31:random", "3"])
    assert short.exit_code == 1
    assert "out_of_bounds" in short.output


def test_trace_and_disasm(ptx: str) -> None:
    traced = CliRunner().invoke(app, ["trace", ptx, "uint32:32", "0x10", "--lane", "5"])
    assert "mul.lo.u32 %r3, %r2, %r4  %r3[5] = 0x0" in traced.output
    assert "mov.u32 %r1, %tid.x  %r1[5] = 0x5" in traced.output
    listed = CliRunner().invoke(app, ["disasm", ptx])
    assert "mul.wide.u32  [9.7.1.3" in listed.output


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTXEMU_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="gcc is not on the PATH"):
        build.core_library()


def test_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    capture._dialect_runtime.cache_clear()
    with pytest.raises(BuildError, match="nvidia-cutlass-dsl is not installed"):
        capture.Launcher(b"an object file")
    capture._dialect_runtime.cache_clear()


def test_no_warnings() -> None:
    """Every C source, with all warnings as errors."""
    for source in sorted(build.NATIVE.glob("*.c")):
        command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
