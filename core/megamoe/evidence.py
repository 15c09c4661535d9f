"""Evidence on disk: what it is tied to (the fingerprint), where it lies (shipped, local), how it is read."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megamoe.errors import RegistryError
from megamoe.model import Arch, CaseResult, Evidence, Kind, Speed, Stage, Variant
from megamoe.registry import describe

CPU = "cpu"  # how a record spells "no GPU"


class _Record(BaseModel):
    """The JSON form of an Evidence."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    version: Literal[1] = Field(alias="schema")
    stage: str
    variant: str
    arch: str
    kind: Kind
    fingerprint: str
    cases: tuple[CaseResult, ...]
    speeds: tuple[Speed, ...] = ()
    packages: Mapping[str, str] = Field(default_factory=dict)
    device: str = ""
    date: str = ""
    megamoe: str = ""


# --- fingerprint ------------------------------------------------------------------------------------------------------


def fingerprint(stage: Stage, variant: Variant) -> str:
    """Hash of every source that decides what a variant computes and what it was tried on.

    That is the import closure, within the top-level packages that the stage's own modules belong to and megamoe, of the
    variant, its reference, the contract and the cases. Comments count: a record says "these very files".
    """
    roots = [t.partition(":")[0] for t in (variant.target, stage.reference.target, stage.contract, stage.cases)]
    packages = {"megamoe", *(root.partition(".")[0] for root in roots)}
    files = sources(frozenset(roots), frozenset(packages))
    digest = hashlib.sha256()
    for module, path in sorted(files.items()):
        digest.update(module.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def closure(stage: Stage, variant: Variant) -> list[str]:
    """Names of the modules whose sources the fingerprint covers."""
    roots = [t.partition(":")[0] for t in (variant.target, stage.reference.target, stage.contract, stage.cases)]
    return sorted(sources(frozenset(roots), frozenset({"megamoe", *(root.partition(".")[0] for root in roots)})))


def sources(roots: frozenset[str], packages: frozenset[str]) -> dict[str, Path]:
    """Files of some modules and of all they import, functions too, within the given top-level packages."""
    todo, seen = list(roots), dict[str, Path]()
    while todo:
        module = todo.pop()
        if module in seen or module.partition(".")[0] not in packages:
            continue
        path = _source(module)
        if path is not None:
            seen[module] = path
            todo += _imports(module, path, path.stat().st_mtime_ns)
    return seen


def _source(module: str) -> Path | None:
    """File of a module, found without importing any of it; None for what is no module of Python source."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for root in spec.submodule_search_locations or ():
        base = Path(root).joinpath(*rest)
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


@functools.lru_cache(maxsize=1024)
def _imports(module: str, path: Path, _mtime: int) -> tuple[str, ...]:
    """Modules that a source imports, inside functions too; a package only when a name comes from its __init__."""
    found: list[str] = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if _source(name)]
            found += modules + ([base] if len(modules) < len(inner) else [])
    return tuple(found)


# --- where records lie ------------------------------------------------------------------------------------------------


def shipped_folder(stage: Stage) -> Path | None:
    """The `evidence` folder beside the stage's modules; None when the stage is not a package on disk."""
    source = _source(stage.contract)
    return source.parent / "evidence" if source else None


def local_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where this machine's own records lie: MEGAMOE_EVIDENCE_DIR, or the user's state folder."""
    named = environ.get("MEGAMOE_EVIDENCE_DIR")
    return Path(named) if named else platformdirs.user_state_path("megamoe") / "evidence"


def shipped(stage: Stage) -> list[Evidence]:
    """Records that ship with a stage.

    Raises:
        RegistryError: A record is unreadable, or speaks of another stage.
    """
    folder = shipped_folder(stage)
    return [_of(stage, read(path, "shipped"), path) for path in _files(folder)]


def local(stage: Stage, folder: Path | None = None) -> tuple[list[Evidence], list[str]]:
    """This machine's records of a stage, and a line about each file that could not be used."""
    records, problems = [], []
    for path in _files((folder or local_folder()) / stage.id):
        try:
            records.append(_of(stage, read(path, "local"), path))
        except RegistryError as error:
            problems.append(str(error))
    return records, problems


def _files(folder: Path | None) -> Iterator[Path]:
    return iter(sorted(folder.glob("*.json")) if folder and folder.is_dir() else ())


def _of(stage: Stage, record: Evidence, path: Path) -> Evidence:
    if record.stage != stage.id:
        raise RegistryError(f"{path.name}: speaks of stage {record.stage!r} but lies with {stage.id!r}")
    return record


def read(path: Path, origin: str) -> Evidence:
    """Reads one record.

    Raises:
        RegistryError: Not JSON, or not a record; names the key.
    """
    try:
        raw = _Record.model_validate_json(path.read_bytes())
        arch = None if raw.arch == CPU else Arch.parse(raw.arch)
    except ValidationError as error:
        raise RegistryError(f"{path.name}: {describe(error, _Record)}") from error
    except ValueError as error:
        raise RegistryError(f"{path.name}: arch: {error}") from error
    return Evidence(
        raw.stage,
        raw.variant,
        arch,
        raw.kind,
        raw.fingerprint,
        raw.cases,
        raw.speeds,
        dict(raw.packages),
        raw.device,
        raw.date,
        raw.megamoe,
        origin,
    )


def write(record: Evidence, folder: Path) -> Path:
    """Writes a record into `folder`, whole or not at all; an older one of the same variant, arch and kind goes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.variant}-{record.arch or CPU}-{record.kind}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", suffix=".tmp", delete=False) as file:
        file.write(json.dumps(_as_json(record), indent=1) + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
    return path


def _as_json(record: Evidence) -> dict[str, Any]:
    raw = _Record(
        version=1,
        stage=record.stage,
        variant=record.variant,
        arch=str(record.arch or CPU),
        kind=record.kind,
        fingerprint=record.fingerprint,
        cases=record.cases,
        speeds=record.speeds,
        packages=record.packages,
        device=record.device,
        date=record.date,
        megamoe=record.version,
    )
    return raw.model_dump(mode="json", by_alias=True)
