"""What the user wants: a file, then environment variables, then arguments; the last wins, and each keeps its origin."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megamoe.errors import ConfigError, UnknownNameError, nearest
from megamoe.model import Stage
from megamoe.registry import Registry, describe

Use = Literal["auto", "fused", "fallback", "reference", "off"]
Demand = Literal["verified", "verified-here", "emulated"]
OnRefusal = Literal["error", "fallback"]
USES: tuple[str, ...] = get_args(Use)
FILES = ("megamoe.toml", "pyproject.toml")
# What else the environment may say; anything else that begins with MEGAMOE_ is a mistake.
VARIABLES = ("MEGAMOE_CONFIG", "MEGAMOE_DEFAULT", "MEGAMOE_EVIDENCE")
OTHER_VARIABLES = ("MEGAMOE_PLUGINS", "MEGAMOE_REGISTRY", "MEGAMOE_EVIDENCE_DIR", "MEGAMOE_CACHE_DIR")
_STAGE_PREFIX = "MEGAMOE_STAGE_"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _StageTable(_Table):
    use: str | None = None
    on_refusal: OnRefusal | None = None


class _Megamoe(_Table):
    default: Use | None = None
    evidence: Demand | None = None
    stage: Mapping[str, _StageTable] = Field(default_factory=dict)


class _File(_Table):
    megamoe: _Megamoe = _Megamoe()


@dataclass(frozen=True, slots=True)
class Setting:
    """One value and where it came from."""

    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration.

    Attributes:
        default: Choice for a stage that has none of its own: auto, fused, fallback, reference or off.
        evidence: What `auto` demands of a fused variant: verified, verified-here or emulated.
        use: Choice by stage id: one of the above, or a variant's name.
        on_refusal: By stage id, what happens when a choice other than auto cannot run: error or fallback.
    """

    default: Setting = Setting("auto", "built-in")
    evidence: Setting = Setting("verified", "built-in")
    use: Mapping[str, Setting] = field(default_factory=dict)
    on_refusal: Mapping[str, Setting] = field(default_factory=dict)

    def choice(self, stage_id: str) -> str:
        """What is wanted for a stage: auto, fused, fallback, reference, off or a variant's name."""
        return self.use.get(stage_id, self.default).value

    def names(self, stage_id: str) -> bool:
        """Whether a variant or a role is asked for of this very stage, and not only by the default."""
        return stage_id in self.use and self.use[stage_id].value not in ("auto", "off")

    def origin(self, stage_id: str) -> str:
        """Where `choice` came from."""
        return self.use.get(stage_id, self.default).origin

    def refusal(self, stage_id: str) -> str:
        """What to do when a named choice cannot run: "error" or "fallback"."""
        return self.on_refusal.get(stage_id, Setting("error", "built-in")).value


@dataclass(frozen=True, slots=True)
class Names:
    """What a configuration may speak of: stages by id or by the id of a roadmap item."""

    stages: Mapping[str, Stage]
    registry: Registry

    def stage_id(self, name: str) -> str:
        """The stage that a stage id or an item id means.

        Raises:
            UnknownNameError: Neither; names the nearest.
        """
        if name in self.stages:
            return name
        item = self.registry.item.get(name)
        if item is None:
            with_code = [key for key, value in self.registry.item.items() if value.stage]
            raise UnknownNameError("stage or item", name, [*self.stages, *with_code])
        if item.stage is None:
            raise ConfigError(f"item {name!r} has no code of its own, so there is nothing to choose")
        return item.stage

    def check_use(self, stage_id: str, value: str) -> str:
        """Returns `value` when it is a word of the config or a variant of the stage; ConfigError otherwise."""
        known = [*USES, *(v.name for v in self.stages[stage_id].variants)]
        if value not in known:
            raise ConfigError(f"{stage_id}: {UnknownNameError('variant or choice', value, dict.fromkeys(known))}")
        return value


def load(
    names: Names,
    path: Path | str | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Config:
    """Builds the effective configuration.

    Args:
        names: Stages and items that exist.
        path: A file to read instead of the one that would be found.
        overrides: Stage or item id to choice; the strongest layer.
        environ: Default os.environ.
        folder: Where to look for a file, upwards; default the working directory.

    Raises:
        ConfigError, UnknownNameError: A key, id or value that does not exist; the nearest one is named.
    """
    environ = os.environ if environ is None else environ
    config = Config()
    file = Path(path) if path else find(environ, folder or Path.cwd())
    if file is not None:
        config = _apply_file(config, file, names)
    config = _apply_environment(config, environ, names)
    return override(config, names, overrides or {})


def override(
    config: Config,
    names: Names,
    use: Mapping[str, str],
    *,
    default: str | None = None,
    evidence: str | None = None,
) -> Config:
    """The configuration with arguments on top: stage or item id to choice, and the two general settings.

    A new `default` also drops the stages' own choices, so that default="reference" means all of them.

    Raises:
        ConfigError, UnknownNameError: An id or value that does not exist; the nearest one is named.
    """
    kept = {} if default is not None else dict(config.use)
    for name, value in use.items():
        stage_id = names.stage_id(name)
        kept[stage_id] = Setting(names.check_use(stage_id, value), "argument")
    if default is not None:
        config = replace(config, default=Setting(_one_of("default", default, USES), "argument"))
    if evidence is not None:
        config = replace(config, evidence=Setting(_one_of("evidence", evidence, get_args(Demand)), "argument"))
    return replace(config, use=kept)


def find(environ: Mapping[str, str], folder: Path) -> Path | None:
    """The file in MEGAMOE_CONFIG, or the nearest megamoe.toml or pyproject.toml with [tool.megamoe] above `folder`."""
    if named := environ.get("MEGAMOE_CONFIG"):
        return Path(named)
    for place in (folder, *folder.parents):
        for name in FILES:
            candidate = place / name
            if candidate.is_file() and (name != "pyproject.toml" or "megamoe" in _read(candidate).get("tool", {})):
                return candidate
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _apply_file(config: Config, path: Path, names: Names) -> Config:
    raw = _read(path)
    if path.name == "pyproject.toml":
        raw = {"megamoe": raw.get("tool", {}).get("megamoe", {})}
    try:
        table = _File.model_validate(raw).megamoe
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, _File)}") from error
    use, on_refusal = dict(config.use), dict(config.on_refusal)
    for name, stage in table.stage.items():
        stage_id = _in(str(path), names, name)
        if stage.use is not None:
            given = Setting(_checked(str(path), names, stage_id, stage.use), f"{path.name} [megamoe.stage.{name}]")
            _agree(str(path), stage_id, use.get(stage_id), given)
            use[stage_id] = given
        if stage.on_refusal is not None:
            given = Setting(stage.on_refusal, f"{path.name} [megamoe.stage.{name}]")
            _agree(str(path), stage_id, on_refusal.get(stage_id), given)
            on_refusal[stage_id] = given
    return Config(
        default=Setting(table.default, path.name) if table.default else config.default,
        evidence=Setting(table.evidence, path.name) if table.evidence else config.evidence,
        use=use,
        on_refusal=on_refusal,
    )


def _apply_environment(config: Config, environ: Mapping[str, str], names: Names) -> Config:
    use: dict[str, Setting] = {}
    by_variable = dict(_stage_variables(names))
    default, evidence = config.default, config.evidence
    for variable, value in environ.items():
        if not variable.startswith("MEGAMOE_") or variable in ("MEGAMOE_CONFIG", *OTHER_VARIABLES):
            continue
        if variable == "MEGAMOE_DEFAULT":
            default = Setting(_one_of(variable, value, USES), variable)
        elif variable == "MEGAMOE_EVIDENCE":
            evidence = Setting(_one_of(variable, value, get_args(Demand)), variable)
        elif variable in by_variable:
            stage_id = by_variable[variable]
            given = Setting(_checked(variable, names, stage_id, value), variable)
            _agree("environment", stage_id, use.get(stage_id), given)
            use[stage_id] = given
        else:
            near = nearest(variable, [*VARIABLES, *OTHER_VARIABLES, *by_variable])
            hint = f"did you mean {near}?" if near else f"known: {', '.join(VARIABLES)}, {_STAGE_PREFIX}<ID>"
            raise ConfigError(f"environment variable {variable} means nothing here; {hint}")
    return replace(config, default=default, evidence=evidence, use={**config.use, **use})


def _agree(where: str, stage_id: str, other: Setting | None, given: Setting) -> None:
    """A stage may be named by its own id and by its items' ids in one layer, but not with different values."""
    if other is not None and other.value != given.value:
        raise ConfigError(f"{where}: {given.origin} and {other.origin} disagree about {stage_id}")


def _stage_variables(names: Names) -> Iterator[tuple[str, str]]:
    with_code = {key: item.stage for key, item in names.registry.item.items() if item.stage}
    for name, stage_id in {**with_code, **{key: key for key in names.stages}}.items():
        yield _STAGE_PREFIX + re.sub(r"\W", "_", name).upper(), stage_id


def _one_of(where: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(f"{where}: {UnknownNameError('choice', value, known)}")
    return value


def _checked(where: str, names: Names, stage_id: str, value: str) -> str:
    try:
        return names.check_use(stage_id, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _in(where: str, names: Names, name: str) -> str:
    try:
        return names.stage_id(name)
    except (UnknownNameError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error
