"""Builds the native parts with gcc on first use, into the user's cache, keyed by what they are built from."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs

from ptxemu.errors import BuildError

NATIVE = Path(__file__).with_name("native")
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-frounding-math", "-ffp-contract=off", "-Wall", "-Wextra")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where built libraries lie: PTXEMU_CACHE_DIR, or the user's cache folder."""
    named = environ.get("PTXEMU_CACHE_DIR")
    return Path(named) if named else platformdirs.user_cache_path("ptxemu")


def core_library() -> Path:
    """The interpreter, built if need be.

    Raises:
        BuildError: There is no gcc, or it failed.
    """
    sources = [path for path in sorted(NATIVE.glob("*.c")) if path.name != "runtime.c"]
    return library("core", sources, headers=sorted(NATIVE.glob("*.h")), flags=_vector_flags(), libraries=("-lm",))


def library(
    name: str,
    sources: Sequence[Path],
    *,
    headers: Sequence[Path] = (),
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    salt: str = "",
) -> Path:
    """Compiles C sources into a shared library.

    Args:
        name: Of the library, for people.
        sources: What to compile.
        headers: What they include; part of the key.
        flags: More flags for the compiler.
        libraries: What to link after the sources.
        salt: More that the key depends on.

    Raises:
        BuildError: There is no gcc, or it failed.
    """
    command = [*_FLAGS, *flags]
    digest = hashlib.sha256("\0".join([*command, *libraries, salt, platform.machine(), *platform.libc_ver()]).encode())
    for path in (*sources, *headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    built = cache_folder() / f"{name}-{digest.hexdigest()[:16]}.so"
    if not built.exists():
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise BuildError(f"the {name} library", "gcc is not on the PATH; install it (Debian: apt install gcc)")
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent, prefix=".") as scratch:
            fresh = Path(scratch) / built.name
            run = [compiler, *command, *map(str, sources), *libraries, "-o", str(fresh)]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"the {name} library", f"gcc failed:\n{done.stderr.strip()[-2000:]}")
            fresh.rename(built)  # a reader never sees half of it
    return built


@functools.cache
def _vector_flags() -> tuple[str, ...]:
    """Wide vectors and fused multiply-add where the processor has them."""
    try:
        features = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        features = set()
    return ("-march=x86-64-v3",) if {"avx2", "fma", "bmi2", "movbe"} <= features else ()
