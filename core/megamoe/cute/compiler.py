"""Compiles CuTe DSL kernels, for this machine's GPU or any other, and keeps them on disk.

A kernel is described by a KernelSpec: a `@cute.jit` launcher, and the fake arguments it is compiled for (no GPU memory,
and no GPU, is needed). What comes out, an object file with the host code of the launch and the cubin in it, follows the
TVM-FFI calling convention: torch tensors go in as they are, and the stream is torch's current one.

The cache key is a hash of the launcher's source, of every first-party source that it imports, of the compiler's
versions, and of the spec. An entry is a folder that appears by one rename, so a reader never sees half of one; a lock
file keeps several processes from compiling the same kernel at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

try:
    import fcntl
except ImportError:  # no such locks on Windows: there two processes may compile the same kernel, and one result stays
    fcntl = None  # type: ignore[assignment]

_ENTRY = "launch"  # name of the function in every object file
_one_at_a_time = threading.Lock()  # the DSL keeps global state while it traces


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile.

    Attributes:
        name: For people and files, unique within its stage: "quantize_linear_bf16".
        arch: What to compile for: "sm_90a", "sm_100a".
        function: The `@cute.jit` launcher. Its parameters before the stream are what a launch passes.
        arguments: Gives the arguments to compile with: fake tensors, a fake stream, compile-time values.
        key: Everything that `arguments` depends on, as plain values.
    """

    name: str
    arch: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    key: tuple[str | int | float | bool | None, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A compiled kernel on disk.

    Attributes:
        spec: What was compiled.
        folder: Holds kernel.o, kernel.cubin, kernel.ptx and facts.json.
        seconds: How long the compiler took.
        cached: It lay there already.
    """

    spec: KernelSpec
    folder: Path
    seconds: float
    cached: bool

    @property
    def object_file(self) -> Path:
        """Host code of the launch with the cubin inside."""
        return self.folder / "kernel.o"

    @property
    def cubin(self) -> bytes:
        """The machine code."""
        return (self.folder / "kernel.cubin").read_bytes()

    @property
    def ptx(self) -> str:
        """The PTX it came from."""
        return (self.folder / "kernel.ptx").read_text()


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where compiled kernels lie: MEGAMOE_CACHE_DIR, or the user's cache folder."""
    named = environ.get("MEGAMOE_CACHE_DIR")
    return (Path(named) if named else platformdirs.user_cache_path("megamoe")) / "kernels"


def load(spec: KernelSpec) -> Callable[..., None]:
    """The launch function of a kernel: takes torch tensors and numbers by position, runs on torch's current stream.

    Keep the result: a second call compiles nothing but reads the cache again.
    """
    from cutlass.cute.runtime import load_module

    module = load_module(str(compile_kernel(spec).object_file), enable_tvm_ffi=True)
    launch: Callable[..., None] = module[_ENTRY]
    return launch


def compile_kernel(spec: KernelSpec, *, fresh: bool = False) -> Artifact:
    """Compiles a kernel unless the cache holds it.

    Args:
        spec: What to compile.
        fresh: Compile although the cache holds it; the entry is replaced.
    """
    folder = cache_folder() / f"{spec.name}-{spec.arch}-{cache_key(spec)}"
    if not fresh and (found := _found(spec, folder)):
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time, _locked(folder.with_name(f".{folder.name}.lock")):
        if not fresh and (found := _found(spec, folder)):  # another process was first
            return found
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
            built = Path(scratch) / "entry"
            seconds = _compile(spec, built)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            built.rename(folder)
    return Artifact(spec, folder, seconds, cached=False)


def cache_key(spec: KernelSpec) -> str:
    """Hash of all that decides what the compiler makes of a spec."""
    facts = [
        _sources(spec.function.__module__),
        spec.function.__qualname__,
        spec.arch,
        list(spec.key),
        *_versions(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@functools.cache
def _sources(module: str) -> str:
    """Hash of a module and of its first-party imports, as the evidence's fingerprint takes them."""
    # by name: a kernel does not depend on the code that finds its sources, so that must stay out of its fingerprint
    evidence = importlib.import_module("megamoe.evidence")
    found = evidence.sources(frozenset({module}), frozenset({"megamoe", module.partition(".")[0]}))
    digest = hashlib.sha256()
    for name, path in sorted(found.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    import cutlass

    ffi = importlib.metadata.version("apache-tvm-ffi")
    return (cutlass.__version__, str(cutlass.CUDA_VERSION), ffi, platform.python_version(), platform.machine())


def _found(spec: KernelSpec, folder: Path) -> Artifact | None:
    try:
        seconds = json.loads((folder / "facts.json").read_text())["seconds"]
    except FileNotFoundError:
        return None
    return Artifact(spec, folder, seconds, cached=True)


def _compile(spec: KernelSpec, folder: Path) -> float:
    from cutlass import cute

    folder.mkdir()
    start = time.perf_counter()
    options = f"--gpu-arch {spec.arch} --enable-tvm-ffi --keep-ptx --keep-cubin --dump-dir {folder}"
    compiled = cute.compile(spec.function, *spec.arguments(), options=options)
    for dumped in list(folder.iterdir()):  # the DSL names its dumps after the whole signature
        dumped.unlink()
    (folder / "kernel.cubin").write_bytes(compiled.artifacts.CUBIN)
    (folder / "kernel.ptx").write_text(compiled.artifacts.PTX)
    compiled.export_to_c(str(folder / "kernel.o"), function_name=_ENTRY)
    seconds = time.perf_counter() - start
    facts = {"name": spec.name, "arch": spec.arch, "key": list(spec.key), "seconds": seconds}
    (folder / "facts.json").write_text(json.dumps(facts))
    return seconds


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
