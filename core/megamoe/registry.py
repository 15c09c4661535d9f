"""registry.toml: what people decided about each roadmap item, checked against itself and against the code."""

from __future__ import annotations

import importlib.resources
import os
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megamoe.errors import RegistryError, UnknownNameError, nearest
from megamoe.model import Arch, Stage, Status

FILE = "registry.toml"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Blocker(_Table):
    """Something that keeps an item, or some of its variants, from being used.

    Attributes:
        id: Name within the item.
        kind: Whose problem it is.
        summary: One line.
        variants: Variants it holds back; empty for every fused variant of the item's stage.
        archs: Architectures it holds for; empty for all.
        until: Requirement that lifts it once installed, such as "nvidia-cutlass-dsl>=4.9".
        url: Where it is discussed.
        since: When it was found.
    """

    id: str
    kind: Literal["upstream", "hardware", "numerics", "performance", "design"]
    summary: str
    variants: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    until: str | None = None
    url: str | None = None
    since: date | None = None

    @field_validator("archs")
    @classmethod
    def _archs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _architectures(value)

    @field_validator("until")
    @classmethod
    def _until(cls, value: str | None) -> str | None:
        try:
            Requirement(value if value is not None else "x")
        except InvalidRequirement as error:
            raise ValueError(f"{value!r} is not a requirement such as 'nvidia-cutlass-dsl>=4.9'") from error
        return value

    def cleared_by(self, packages: Mapping[str, str]) -> bool:
        """Whether the installed packages satisfy `until`."""
        if self.until is None:
            return False
        need = Requirement(self.until)
        have = packages.get(need.name)
        return have is not None and need.specifier.contains(have, prereleases=True)


class Item(_Table):
    """A line of the roadmap."""

    title: str
    status: Status
    stage: str | None = None
    targets: tuple[str, ...] = ()
    effort: str = ""
    depends: tuple[str, ...] = ()
    source: str = ""
    note: str = ""
    blocker: tuple[Blocker, ...] = ()

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _architectures(value)


class Registry(_Table):
    """The whole file."""

    version: Literal[1] = Field(alias="schema")
    item: Mapping[str, Item]

    def of_stage(self, stage_id: str) -> dict[str, Item]:
        """The items that a stage implements."""
        return {key: item for key, item in self.item.items() if item.stage == stage_id}


def _architectures(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Arch.parse(name)) for name in value)


def find() -> Path:
    """The registry file: MEGAMOE_REGISTRY, the checkout's own, or the copy in the installed package."""
    if named := os.environ.get("MEGAMOE_REGISTRY"):
        return Path(named)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / FILE).is_file():
        return checkout / FILE  # an editable install also has a copy, older than the checkout's
    return Path(str(importlib.resources.files("megamoe") / FILE))


def load(path: Path | None = None, stages: Mapping[str, Stage] | None = None) -> Registry:
    """Reads and checks a registry.

    Args:
        path: Default `find()`.
        stages: When given, ids of stages and variants must exist there.

    Raises:
        RegistryError: The file is missing, not TOML, or has an unknown key or id (the nearest is named).
    """
    path = path or find()
    try:
        raw = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise RegistryError(f"{path}: there is no such file") from error
    except OSError as error:
        raise RegistryError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path.name}: {error}") from error
    return parse(raw, stages, name=path.name)


def parse(raw: Mapping[str, Any], stages: Mapping[str, Stage] | None = None, *, name: str = FILE) -> Registry:
    """Checks an already decoded registry; see `load`."""
    try:
        registry = Registry.model_validate(raw)
    except ValidationError as error:
        raise RegistryError(f"{name}: {describe(error, Registry)}") from error
    for problem in _problems(registry, stages):
        raise RegistryError(f"{name}: {problem}")
    return registry


def _problems(registry: Registry, stages: Mapping[str, Stage] | None) -> Iterator[str]:
    for key, item in registry.item.items():
        where = f'item."{key}"'
        for needed in item.depends:
            if needed not in registry.item:
                yield f"{where}.depends: {UnknownNameError('item', needed, registry.item)}"
        ids = [blocker.id for blocker in item.blocker]
        if len(set(ids)) < len(ids):
            yield f"{where}: two blockers have one id"
        if stages is None or item.stage is None:
            continue
        if item.stage not in stages:
            yield f"{where}.stage: {UnknownNameError('stage', item.stage, stages)}"
            continue
        names = [v.name for v in stages[item.stage].variants]
        for blocker in item.blocker:
            for variant in blocker.variants:
                if variant not in names:
                    yield f"{where}.blocker {blocker.id!r}: {UnknownNameError('variant', variant, names)}"
    if cycle := _cycle(registry):
        yield f"items depend on each other in a circle: {' -> '.join(cycle)}"


def _cycle(registry: Registry) -> list[str]:
    done: set[str] = set()

    def walk(key: str, path: list[str]) -> list[str]:
        if key in path:
            return [*path[path.index(key) :], key]
        if key in done or key not in registry.item:
            return []
        for needed in registry.item[key].depends:
            if found := walk(needed, [*path, key]):
                return found
        done.add(key)
        return []

    return next((found for key in registry.item if (found := walk(key, []))), [])


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a pydantic error as one line that names the place and, for a wrong key, the nearest one."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    where = ".".join(f'"{p}"' if "." in p else p for p in place)
    if first["type"] == "extra_forbidden":
        near = nearest(place[-1], _keys(root, place[:-1]))
        return f"{where}: unknown key" + (f", did you mean {near!r}?" if near else "")
    if first["type"] == "missing":
        return f"{where}: missing"
    message = first["msg"].removeprefix("Value error, ")
    if not place:  # the whole text is no JSON, or no table
        return message
    return f"{where}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def _keys(model: type[BaseModel], place: list[str]) -> list[str]:
    """Keys that are allowed at a place inside nested tables."""
    here: Any = model
    skip = False  # the next part is a key or an index of a container, not a field
    for part in place:
        if skip:
            skip = False
        elif isinstance(here, type) and issubclass(here, BaseModel):
            fields = {f.alias or name: f.annotation for name, f in here.model_fields.items()}
            annotation = fields.get(part)
            here = _table_in(annotation)
            skip = here is not annotation
    if isinstance(here, type) and issubclass(here, BaseModel):
        return [f.alias or name for name, f in here.model_fields.items()]
    return []


def _table_in(annotation: Any) -> Any:
    """The BaseModel inside Mapping[str, X] or tuple[X, ...]; keys and indices of those are passed over."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _table_in(argument)) is not None:
            return found
    return None
