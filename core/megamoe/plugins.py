"""Finds the plugins, checks what they declare, and gives each hook a typed method."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement

from megamoe import hookspecs
from megamoe.errors import PluginError, UnknownNameError
from megamoe.model import Decision, Role, Stage, Variant

BUILTIN = "megamoe_stages"
RESERVED = frozenset({"auto", "off", *Role})  # words of the config; a variant may carry its own role's


@dataclass(frozen=True, slots=True)
class Broken:
    """A third-party plugin that could not be loaded."""

    name: str
    distribution: str
    error: str


class Plugins:
    """Every stage and hook that is installed.

    Args:
        builtin: Package whose sub-packages are the stages that ship with megamoe.
        external: Also load entry points of group "megamoe"; MEGAMOE_PLUGINS=0 turns them off.
        extra: Further plugin objects (tests).

    Raises:
        PluginError: A built-in or extra plugin is broken. A broken third-party one lands in `broken`.
    """

    def __init__(self, builtin: str = BUILTIN, *, external: bool = True, extra: Iterable[object] = ()) -> None:
        self.broken: list[Broken] = []
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._providers: dict[str, str] = {}
        package = importlib.import_module(builtin)
        for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
            if found.ispkg:
                name = f"{builtin}.{found.name}"
                self._register(importlib.import_module(name), name, "megamoe")
        if external and os.environ.get("MEGAMOE_PLUGINS") != "0":
            self._load_external()
        for index, plugin in enumerate(extra):
            self._register(plugin, f"extra.{index}", "extra")
        try:
            self._manager.check_pending()  # pluggy itself says nothing of a misspelt hook
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {_plugin_name(error)}: {error}") from error
        self.stages: Mapping[str, Stage] = self._assemble()

    def stage(self, stage_id: str) -> Stage:
        """The stage of that id.

        Raises:
            UnknownNameError: There is none; names the nearest.
        """
        if stage_id not in self.stages:
            raise UnknownNameError("stage", stage_id, self.stages)
        return self.stages[stage_id]

    def refusals(self, stage: str, variant: Variant) -> list[str]:
        """Reasons that plugins hold against a variant (hook megamoe_refuse)."""
        answers = self._calls("megamoe_refuse", stage=stage, variant=variant)
        return [f"{reason} (plugin {name})" for name, reason in answers if reason]

    def decided(self, decision: Decision) -> None:
        """Tells the observers (hook megamoe_decided)."""
        for _ in self._calls("megamoe_decided", decision=decision):
            pass

    def _register(self, plugin: object, name: str, provider: str) -> None:
        try:
            self._manager.register(plugin, name=name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {name}: {error}") from error
        self._providers[name] = provider

    def _load_external(self) -> None:
        for entry in importlib.metadata.entry_points(group=hookspecs.PROJECT):
            distribution = entry.dist.name if entry.dist else "?"
            name = f"{distribution}:{entry.name}"  # two distributions may use one name
            try:
                self._register(entry.load(), name, distribution)
                self._manager.check_pending()
                self._assemble()  # a stage that cannot be accepted is its own plugin's fault alone
            except Exception as error:  # whatever a stranger's import raises
                if self._manager.has_plugin(name):
                    self._manager.unregister(name=name)
                self.broken.append(Broken(entry.name, distribution, f"{type(error).__name__}: {error}"))

    def _calls(self, hook: str, **arguments: object) -> Iterator[tuple[str, Any]]:
        """Calls every implementation and says whose answer it is, which pluggy's own call does not."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            given = [arguments[name] for name in implementation.argnames]
            yield implementation.plugin_name, implementation.function(*given)

    def _assemble(self) -> dict[str, Stage]:
        table: dict[str, Stage] = {}
        for plugin, declared in self._calls("megamoe_stage"):
            if not isinstance(declared, Stage):
                got = type(declared).__name__
                raise PluginError(f"plugin {plugin}: megamoe_stage returned {got}, expected a Stage")
            if declared.id in table:
                raise PluginError(f"plugin {plugin}: stage {declared.id!r} is declared twice")
            own = [replace(v, provider=self._providers[plugin]) for v in declared.variants]
            for other, more in self._calls("megamoe_variants", stage=declared.id):
                own += [replace(v, provider=self._providers[other]) for v in more or ()]
            table[declared.id] = check_stage(replace(declared, variants=tuple(own)), plugin)
        return dict(sorted(table.items()))


def check_stage(stage: Stage, plugin: str) -> Stage:
    """Returns the stage, or raises PluginError naming the plugin and what is wrong with its declaration."""

    def wrong(what: str) -> PluginError:
        return PluginError(f"plugin {plugin}: stage {stage.id!r} {what}")

    if not stage.id.isidentifier():
        raise wrong("needs an id that is a Python name")
    names = [v.name for v in stage.variants]
    if doubled := {n for n in names if names.count(n) > 1}:
        raise wrong(f"has two variants named {min(doubled)!r}")
    roles = [v.role for v in stage.variants]
    if roles.count(Role.REFERENCE) != 1:
        raise wrong(f"needs exactly one reference variant, it has {roles.count(Role.REFERENCE)}")
    if Role.FALLBACK not in roles:
        raise wrong("needs a fallback variant")
    for variant in stage.variants:
        if not re.fullmatch(r"[A-Za-z][\w-]*", variant.name):
            raise wrong(f"has a variant named {variant.name!r}: letters, digits, _ and - only, as it names files")
        if variant.name in RESERVED and variant.name != variant.role:
            raise wrong(f"calls a {variant.role} variant {variant.name!r}, a word of the config")
        for target in filter(None, (variant.target, variant.supports)):
            if target.count(":") != 1:
                raise wrong(f"variant {variant.name!r}: {target!r} is not of the form 'package.module:function'")
        for need in variant.needs:
            try:
                Requirement(need)
            except InvalidRequirement as error:
                raise wrong(f"variant {variant.name!r}: {need!r} is not a requirement: {error}") from error
    return stage


def load(target: str) -> Any:
    """Imports "package.module:name".

    Raises:
        PluginError: The module has no such name. An ImportError passes through: a dependency may be missing.
    """
    module, _, name = target.partition(":")
    imported = importlib.import_module(module)
    try:
        return getattr(imported, name)
    except AttributeError as error:
        raise PluginError(f"{target!r}: module {module!r} has no {name!r}") from error


def _plugin_name(error: pluggy.PluginValidationError) -> str:
    plugin = error.plugin
    return getattr(plugin, "__name__", None) or type(plugin).__name__
