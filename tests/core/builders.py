"""Stages, records and registries that tests make up; no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamoe import registry
from megamoe.hookspecs import hookimpl
from megamoe.model import Arch, CaseResult, Decision, Evidence, Kind, Role, Speed, Stage, Variant
from megamoe.registry import Registry

SM90, SM100 = Arch(90), Arch(100)
PASSED = CaseResult("small", True, 0.0, 0.0)
FAILED = CaseResult("small", False, 1.0, 0.0, "out: half of the bytes differ")


def variant(name: str, role: Role | None = None, **more: Any) -> Variant:
    """A variant; its role is its name when that is one."""
    return Variant(name, role or Role(name), f"made_up.{name}:run", **more)


REFERENCE, FALLBACK = variant("reference"), variant("fallback")


def stage(*fused: Variant, id: str = "mul", package: str = "made_up") -> Stage:
    """A stage of the given variants beside a reference and a fallback."""
    variants = (REFERENCE, FALLBACK, *fused)
    return Stage(id, "A product", f"{package}.contract", f"{package}.cases:CASES", variants)


def record(
    name: str,
    arch: Arch | None = SM90,
    *,
    kind: Kind = Kind.VERIFIED,
    fingerprint: str = "now",
    cases: tuple[CaseResult, ...] = (PASSED,),
    speeds: tuple[Speed, ...] = (),
    packages: Mapping[str, str] | None = None,
    origin: str = "local",
    stage_id: str = "mul",
) -> Evidence:
    """A record of the variant `name`."""
    return Evidence(
        stage_id, name, arch, kind, fingerprint, cases, speeds, packages or {}, "a GPU", "2026-01-02", "0.1.0", origin
    )


def items(stages: Mapping[str, Stage] | None = None, /, **raw: Mapping[str, Any]) -> Registry:
    """A registry of the given items; `title` and `status` have defaults."""
    return registry.parse(
        {"schema": 1, "item": {key: {"title": key, "status": "experimental", **item} for key, item in raw.items()}},
        stages,
    )


class Plugin:
    """A plugin object with the hooks it is given."""

    def __init__(
        self,
        declares: Any = None,
        *,
        variants: Mapping[str, Sequence[Variant]] | None = None,
        refuses: Mapping[str, str] | None = None,
        seen: list[Decision] | None = None,
    ) -> None:
        if declares is not None:
            self.megamoe_stage = _hook(lambda: declares)
        if variants is not None:
            self.megamoe_variants = _hook(lambda stage: variants.get(stage, ()))
        if refuses is not None:
            self.megamoe_refuse = _hook(lambda stage, variant: refuses.get(variant.name))
        if seen is not None:
            self.megamoe_decided = _hook(lambda decision: seen.append(decision))


def _hook(function: Any) -> Any:
    return hookimpl(function)


def write_package(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """Writes a package of Python sources by module name; an __init__ is added where there is none."""
    root = folder / name
    for module, text in {"__init__": "", **files}.items():
        path = root / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


def write_distribution(folder: Path, name: str, entries: Mapping[str, str]) -> Path:
    """Writes what importlib.metadata takes for an installed distribution with entry points of group "megamoe"."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {target}" for key, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[megamoe]", *lines, ""]))
    return info
