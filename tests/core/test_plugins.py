from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe import plugins
from megamoe.errors import PluginError, UnknownNameError
from megamoe.hookspecs import hookimpl
from megamoe.model import Decision, Gate, Role, Stage, Variant
from megamoe.plugins import Plugins
from megamoe.runtime import Runtime
from tests.core.builders import FALLBACK, REFERENCE, Plugin, items, stage, variant, write_distribution
from tests.core.conftest import MakePackage

FUSED = variant("sm90", Role.FUSED)
STAGE_SOURCE = """
    from megamoe.hookspecs import hookimpl
    from megamoe.model import Role, Stage, Variant

    @hookimpl
    def megamoe_stage():
        return Stage("{id}", "A sum", "m.contract", "m.cases:CASES", (
            Variant("reference", Role.REFERENCE, "m:f"), {more}
        ))
"""
FALLBACK_SOURCE = 'Variant("fallback", Role.FALLBACK, "m:f")'


def _stage_of(*variants: Variant) -> Stage:
    return replace(stage(), variants=variants)


# --- declarations -----------------------------------------------------------------------------------------------------


def test_stages_are_sorted_and_variants_carry_their_provider(no_stages: str) -> None:
    made = Plugins(no_stages, extra=[Plugin(stage()), Plugin(stage(id="add"))])
    assert list(made.stages) == ["add", "mul"]
    assert {v.provider for v in made.stage("mul").variants} == {"extra"}


def test_unknown_stage_names_the_nearest(no_stages: str) -> None:
    with pytest.raises(UnknownNameError, match="no stage 'mull'; did you mean 'mul'"):
        Plugins(no_stages, extra=[Plugin(stage())]).stage("mull")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (None, "returned NoneType, expected a Stage"),
        (_stage_of(FALLBACK), "needs exactly one reference variant, it has 0"),
        (_stage_of(REFERENCE, replace(REFERENCE, name="r2"), FALLBACK), "exactly one reference variant, it has 2"),
        (_stage_of(REFERENCE), "needs a fallback variant"),
        (_stage_of(REFERENCE, FALLBACK, FUSED, FUSED), "has two variants named 'sm90'"),
        (stage(variant("auto", Role.FUSED)), "calls a fused variant 'auto', a word of the config"),
        (stage(variant("off", Role.FUSED)), "'off', a word of the config"),
        (stage(id="not a name"), "needs an id that is a Python name"),
        (stage(replace(FUSED, target="made_up.run")), "'made_up.run' is not of the form 'package.module:function'"),
        (stage(replace(FUSED, supports="made_up.run")), "'made_up.run' is not of the form"),
        (stage(replace(FUSED, needs=(">=4.8",))), "'>=4.8' is not a requirement"),
    ],
)
def test_what_is_wrong_with_a_stage_is_named(no_stages: str, declared: object, words: str) -> None:
    class Bad:
        @hookimpl
        def megamoe_stage(self) -> object:
            return declared

    with pytest.raises(PluginError, match=re.escape(words)):
        Plugins(no_stages, extra=[Bad()])


@pytest.mark.parametrize("role", Role)
def test_a_role_is_no_name_for_another_role(no_stages: str, role: Role) -> None:
    other = Role.FUSED if role is not Role.FUSED else Role.FALLBACK
    kept = [v for v in (REFERENCE, FALLBACK) if v.name != role]
    named = [*kept, Variant(role.value, other, "m:f"), Variant("mine", role, "m:f")]
    with pytest.raises(PluginError, match=f"'{role}', a word of the config"):
        Plugins(no_stages, extra=[Plugin(_stage_of(*named))])
    assert Plugins(no_stages, extra=[Plugin(stage(variant("fused")))]).stages


def test_a_stage_declared_twice_blames_the_second(no_stages: str) -> None:
    with pytest.raises(PluginError, match=r"plugin extra\.1: stage 'mul' is declared twice"):
        Plugins(no_stages, extra=[Plugin(stage()), Plugin(stage())])


def test_a_misspelt_hook_is_an_error_that_names_it(no_stages: str) -> None:
    class Misspelt:
        @hookimpl
        def megamoe_stages(self) -> Stage:
            return stage()

    with pytest.raises(PluginError, match="Misspelt.*megamoe_stages"):
        Plugins(no_stages, extra=[Misspelt()])


def test_a_misspelt_argument_is_an_error_that_names_it(no_stages: str) -> None:
    class Misspelt:
        @hookimpl
        def megamoe_refuse(self, stagge: str) -> str | None:
            return None

    with pytest.raises(PluginError, match="stagge"):
        Plugins(no_stages, extra=[Misspelt()])


def test_built_in_stages_are_found_in_the_package(make_package: MakePackage) -> None:
    name = make_package({"add/__init__": STAGE_SOURCE.format(id="add", more=FALLBACK_SOURCE), "no_stage": "1 / 0"})
    made = Plugins(name, external=False)
    assert list(made.stages) == ["add"]
    assert {v.provider for v in made.stages["add"].variants} == {"megamoe"}


def test_a_broken_built_in_stage_is_an_error(make_package: MakePackage) -> None:
    name = make_package({"add/__init__": STAGE_SOURCE.format(id="add", more="")})
    with pytest.raises(PluginError, match=f"plugin {name}.add: .* needs a fallback"):
        Plugins(name, external=False)


def test_the_projects_own_stages_load_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, megamoe.plugins as p; p.Plugins(external=False); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the other hooks --------------------------------------------------------------------------------------------------


def test_variants_are_added_with_their_provider(no_stages: str) -> None:
    other = Plugin(variants={"mul": [FUSED]})
    made = Plugins(no_stages, extra=[Plugin(stage()), other, Plugin(stage(id="add"))])
    assert [v.name for v in made.stages["mul"].variants] == ["reference", "fallback", "sm90"]
    assert made.stages["mul"].variants[-1].provider == "extra"
    assert [v.name for v in made.stages["add"].variants] == ["reference", "fallback"]


def test_added_variants_are_checked_too(no_stages: str) -> None:
    with pytest.raises(PluginError, match="two variants named 'fallback'"):
        Plugins(no_stages, extra=[Plugin(stage()), Plugin(variants={"mul": [FALLBACK]})])


def test_refusals_say_which_plugin(no_stages: str) -> None:
    veto, other = Plugin(refuses={"sm90": "recalled"}), Plugin(refuses={"sm90": "and slow", "fallback": ""})
    made = Plugins(no_stages, extra=[Plugin(stage(FUSED)), veto, other])
    assert made.refusals("mul", FUSED) == ["recalled (plugin extra.1)", "and slow (plugin extra.2)"]
    assert made.refusals("mul", FALLBACK) == []


def test_a_veto_reaches_the_decision(no_stages: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    veto = Plugin(refuses={"fallback": "recalled"})
    runtime = Runtime(Plugins(no_stages, extra=[Plugin(stage()), veto]), items())
    decision = runtime.decide(runtime.stage("mul"), runtime.machine(None))
    assert decision.variant.name == "reference"
    assert [(r.variant, r.gate, r.reason) for r in decision.refusals] == [
        ("fallback", Gate.CONFIG, "recalled (plugin extra.1)")
    ]


def test_observers_see_a_decision(no_stages: str) -> None:
    seen: list[Decision] = []
    decision = Decision("mul", FUSED, "why", ())
    made = Plugins(no_stages, extra=[Plugin(seen=seen), Plugin(seen=seen)])
    made.decided(decision)
    assert seen == [decision, decision]


# --- third parties ----------------------------------------------------------------------------------------------------

Install = Callable[..., None]


@pytest.fixture
def install(make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs distributions, each with entry points that are given as sources."""
    monkeypatch.delenv("MEGAMOE_PLUGINS", raising=False)
    make_package({})  # puts the folder on the path

    def put(distribution: str, **sources: str) -> None:
        targets = {name: make_package({"__init__": source}) for name, source in sources.items()}
        write_distribution(tmp_path / "packages", distribution, targets)

    return put


GOOD = STAGE_SOURCE.format(id="add", more=FALLBACK_SOURCE)


def test_a_third_partys_stage_is_found_with_its_distribution(no_stages: str, install: Install) -> None:
    install("fast-add", add=GOOD)
    made = Plugins(no_stages)
    assert made.broken == []
    assert {v.provider for v in made.stages["add"].variants} == {"fast-add"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        (GOOD.replace("def megamoe_stage", "def megamoe_stages"), "megamoe_stages"),
        (GOOD.replace("megamoe_stage()", "megamoe_stage(stagge)"), "stagge"),
        (STAGE_SOURCE.format(id="add", more=""), "needs a fallback variant"),
        (STAGE_SOURCE.format(id="mul", more=FALLBACK_SOURCE), "stage 'mul' is declared twice"),
        (GOOD.replace("return Stage", "raise RuntimeError('no licence')\n        return Stage"), "no licence"),
        ("from megamoe.hookspecs import hookimpl\n@hookimpl\ndef megamoe_variants(stage): return 7", "TypeError"),
    ],
)
def test_a_broken_third_party_is_reported_and_does_no_harm(
    make_package: MakePackage, install: Install, source: str, words: str
) -> None:
    builtin = make_package({"mul/__init__": STAGE_SOURCE.format(id="mul", more=FALLBACK_SOURCE)})
    install("a-broken", bad=source)
    install("z-good", good=STAGE_SOURCE.format(id="sub", more=FALLBACK_SOURCE))
    made = Plugins(builtin)
    assert list(made.stages) == ["mul", "sub"]
    (broken,) = made.broken
    assert (broken.name, broken.distribution) == ("bad", "a-broken")
    assert words in broken.error


def test_two_distributions_may_use_one_name(no_stages: str, install: Install) -> None:
    install("one", fast=GOOD)
    install("two", fast=STAGE_SOURCE.format(id="sub", more=FALLBACK_SOURCE))
    made = Plugins(no_stages)
    assert list(made.stages) == ["add", "sub"]
    assert made.broken == []


def test_third_parties_can_be_turned_off(no_stages: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fast-add", add=GOOD)
    assert list(Plugins(no_stages, external=False).stages) == []
    monkeypatch.setenv("MEGAMOE_PLUGINS", "0")
    assert list(Plugins(no_stages).stages) == []


# --- targets ----------------------------------------------------------------------------------------------------------


def test_load(make_package: MakePackage) -> None:
    name = make_package({"good": "value = 3", "bad": "raise AttributeError('of its own')"})
    assert plugins.load(f"{name}.good:value") == 3
    assert isinstance(plugins.load(f"{name}:__name__"), str)
    with pytest.raises(PluginError, match=f"module '{name}.good' has no 'valeu'"):
        plugins.load(f"{name}.good:valeu")
    with pytest.raises(AttributeError, match="of its own"):
        plugins.load(f"{name}.bad:value")
    with pytest.raises(ModuleNotFoundError):
        plugins.load(f"{name}.absent:value")


def test_a_module_is_a_plugin_as_well(no_stages: str) -> None:
    module = types.ModuleType("mine")
    module.megamoe_stage = Plugin(stage()).megamoe_stage  # type: ignore[attr-defined]
    assert list(Plugins(no_stages, extra=[module]).stages) == ["mul"]
