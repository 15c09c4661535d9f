from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe import config
from megamoe.config import USES, Config, Names
from megamoe.errors import ConfigError, UnknownNameError
from megamoe.model import Role
from tests.core.builders import items, stage, variant

STAGES = {
    "mul": stage(variant("mul_sm90", Role.FUSED)),
    "add": stage(variant("add_sm90", Role.FUSED), id="add"),
}
NAMES = Names(
    STAGES, items(STAGES, **{"M-1.1": {"stage": "mul"}, "M-2": {"stage": "mul"}, "A-1": {"stage": "add"}, "X": {}})
)
DEMANDS = ("verified", "verified-here", "emulated")
VARIABLE = {"mul": "MEGAMOE_STAGE_MUL", "M-1.1": "MEGAMOE_STAGE_M_1_1", "add": "MEGAMOE_STAGE_ADD"}

uses = st.sampled_from(USES)
maybe = st.none() | uses


def _toml(table: dict[str, Any]) -> str:
    """A configuration as TOML; keys are quoted."""
    lines = ["[megamoe]", *(f'{key} = "{value}"' for key, value in table.items() if isinstance(value, str))]
    for name, keys in table.get("stage", {}).items():
        lines += [f'[megamoe.stage."{name}"]', *(f'{key} = "{value}"' for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _load(folder: Path, text: str | None = None, environ: dict[str, str] | None = None, **use: str) -> Config:
    path = folder / "megamoe.toml"
    if text is not None:
        path.write_text(text)
    return config.load(NAMES, path if text is not None else None, use, environ=environ or {}, folder=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def test_built_in_values(tmp_path: Path) -> None:
    made = _load(tmp_path)
    assert (made.choice("mul"), made.origin("mul"), made.refusal("mul")) == ("auto", "built-in", "error")
    assert made.evidence.value == "verified"


@given(in_file=maybe, in_environment=maybe, in_argument=maybe, default=st.tuples(maybe, maybe))
def test_the_last_layer_wins_and_keeps_its_origin(
    folder: Path,
    in_file: str | None,
    in_environment: str | None,
    in_argument: str | None,
    default: tuple[str | None, str | None],
) -> None:
    table: dict[str, Any] = {"stage": {"M-1.1": {"use": in_file}} if in_file else {}}
    table |= {"default": default[0]} if default[0] else {}
    environ = {VARIABLE["mul"]: in_environment} if in_environment else {}
    environ |= {"MEGAMOE_DEFAULT": default[1]} if default[1] else {}
    made = _load(folder, _toml(table), environ, **({"M-2": in_argument} if in_argument else {}))

    defaults = [(default[1], "MEGAMOE_DEFAULT"), (default[0], "megamoe.toml"), ("auto", "built-in")]
    wanted_default = next((value, origin) for value, origin in defaults if value)
    layers = [
        (in_argument, "argument"),
        (in_environment, "MEGAMOE_STAGE_MUL"),
        (in_file, "megamoe.toml [megamoe.stage.M-1.1]"),
        wanted_default,
    ]
    wanted = next((value, origin) for value, origin in layers if value)
    assert (made.choice("mul"), made.origin("mul")) == wanted
    assert (made.choice("add"), made.origin("add")) == wanted_default


@given(st.none() | st.sampled_from(DEMANDS), st.none() | st.sampled_from(DEMANDS), st.none() | st.sampled_from(DEMANDS))
def test_layers_of_the_evidence_demanded(folder: Path, file: str | None, env: str | None, argument: str | None) -> None:
    environ = {"MEGAMOE_EVIDENCE": env} if env else {}
    made = config.override(
        _load(folder, _toml({"evidence": file} if file else {}), environ), NAMES, {}, evidence=argument
    )
    layers = [(argument, "argument"), (env, "MEGAMOE_EVIDENCE"), (file, "megamoe.toml"), ("verified", "built-in")]
    assert (made.evidence.value, made.evidence.origin) == next(layer for layer in layers if layer[0])


@given(st.sampled_from(sorted(VARIABLE)), st.sampled_from([*USES, "own"]))
def test_a_stage_goes_by_its_id_or_its_items(folder: Path, name: str, value: str) -> None:
    stage_id = NAMES.stage_id(name)
    value = f"{stage_id}_sm90" if value == "own" else value
    by_file = _load(folder, _toml({"stage": {name: {"use": value}}}))
    by_environment = _load(folder, "", {VARIABLE[name]: value})
    by_argument = _load(folder, "", None, **{name: value})
    assert by_file.choice(stage_id) == by_environment.choice(stage_id) == by_argument.choice(stage_id) == value


def test_on_refusal_comes_from_the_file(tmp_path: Path) -> None:
    made = _load(tmp_path, _toml({"stage": {"M-1.1": {"on_refusal": "fallback"}}}))
    assert (made.refusal("mul"), made.refusal("add")) == ("fallback", "error")
    assert made.on_refusal["mul"].origin == "megamoe.toml [megamoe.stage.M-1.1]"


def test_a_new_default_drops_the_stages_own_choices(tmp_path: Path) -> None:
    made = _load(tmp_path, _toml({"stage": {"mul": {"use": "off"}, "add": {"use": "off"}}}))
    made = config.override(made, NAMES, {"add": "fused"}, default="reference")
    assert (made.choice("mul"), made.choice("add")) == ("reference", "fused")


def test_override_leaves_its_argument_alone(tmp_path: Path) -> None:
    before = _load(tmp_path)
    config.override(before, NAMES, {"mul": "off"}, default="fused")
    assert (before.choice("mul"), before.default.value) == ("auto", "auto")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[megamo]", ["megamo: unknown key", "'megamoe'"]),
        ('[megamoe]\ndefualt = "auto"', ["megamoe.defualt: unknown key", "'default'"]),
        ('[megamoe]\ndefault = "fusd"', ["megamoe.default", "'fused'", "'fusd'"]),
        ('[megamoe]\nevidence = "verifed"', ["megamoe.evidence", "'verified'", "'verifed'"]),
        ('[megamoe.stage.mul]\nues = "auto"', ["megamoe.stage.mul.ues: unknown key", "'use'"]),
        ('[megamoe.stage.mul]\non_refusal = "eror"', ["megamoe.stage.mul.on_refusal", "'error'"]),
        ('[megamoe.stage.mull]\nuse = "auto"', ["'mull'", "did you mean 'mul'?"]),
        ('[megamoe.stage."M-1.2"]\nuse = "auto"', ["'M-1.2'", "did you mean 'M-1.1'?"]),
        ('[megamoe.stage.X]\nuse = "auto"', ["'X' has no code of its own"]),
        ('[megamoe.stage.mul]\nuse = "mul_sm80"', ["mul", "did you mean 'mul_sm90'?"]),
        ('[megamoe.stage.mul]\nuse = "add_sm90"', ["mul", "'add_sm90'"]),
        ("[megamoe.stage.mul]\nuse = 3", ["megamoe.stage.mul.use", "string", "got 3"]),
        ("[megamoe", ["megamoe.toml"]),
        (
            '[megamoe.stage.mul]\nuse = "off"\n[megamoe.stage.M-2]\nuse = "auto"',
            ["[megamoe.stage.mul]", "[megamoe.stage.M-2]", "disagree about mul"],
        ),
        (
            '[megamoe.stage.mul]\non_refusal = "error"\n[megamoe.stage.M-2]\non_refusal = "fallback"',
            ["[megamoe.stage.mul]", "[megamoe.stage.M-2]", "disagree about mul"],
        ),
    ],
)
def test_mistakes_in_a_file_name_the_place_and_the_nearest(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text)
    for word in (str(tmp_path / "megamoe.toml"), *words):
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MEGAMOE_DEFALT": "auto"}, ["MEGAMOE_DEFALT", "did you mean MEGAMOE_DEFAULT?"]),
        ({"MEGAMOE_STAGE_MULL": "auto"}, ["MEGAMOE_STAGE_MULL", "did you mean MEGAMOE_STAGE_MUL?"]),
        ({"MEGAMOE_DEFAULT": "fusd"}, ["MEGAMOE_DEFAULT", "did you mean 'fused'?"]),
        ({"MEGAMOE_EVIDENCE": "verifed"}, ["MEGAMOE_EVIDENCE", "did you mean 'verified'?"]),
        ({"MEGAMOE_STAGE_MUL": "mul_sm80"}, ["MEGAMOE_STAGE_MUL", "did you mean 'mul_sm90'?"]),
        ({"MEGAMOE_STAGE_MUL": "off", "MEGAMOE_STAGE_M_2": "auto"}, ["MEGAMOE_STAGE_MUL", "MEGAMOE_STAGE_M_2"]),
        ({"MEGAMOE_CONFIG": "nowhere/mine.toml"}, ["nowhere/mine.toml", "no such file"]),
    ],
)
def test_mistakes_in_the_environment_name_the_variable_and_the_nearest(
    tmp_path: Path, environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, None, environ)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_variables_of_one_stage_may_agree_and_others_are_ignored(tmp_path: Path) -> None:
    environ = {"MEGAMOE_STAGE_MUL": "off", "MEGAMOE_STAGE_M_2": "off", "MEGAMOE_PLUGINS": "0", "PATH": "auto"}
    assert _load(tmp_path, None, environ).choice("mul") == "off"


def test_mistakes_in_arguments(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mul'"):
        _load(tmp_path, None, None, mull="auto")
    with pytest.raises(ConfigError, match="did you mean 'mul_sm90'"):
        _load(tmp_path, None, None, mul="mul_sm80")
    with pytest.raises(ConfigError, match="default.*did you mean 'fused'"):
        config.override(Config(), NAMES, {}, default="fusd")
    with pytest.raises(ConfigError, match="evidence.*did you mean 'emulated'"):
        config.override(Config(), NAMES, {}, evidence="emulate")


def test_the_nearest_file_upwards_is_read(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.megamoe]\ndefault = "off"\n')
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.other]\n")
    assert config.load(NAMES, environ={}, folder=inner).default == config.Setting("off", "pyproject.toml")
    (tmp_path / "a" / "megamoe.toml").write_text('[megamoe]\ndefault = "fused"\n')
    assert config.load(NAMES, environ={}, folder=inner).default == config.Setting("fused", "megamoe.toml")
    (tmp_path / "named.toml").write_text('[megamoe]\ndefault = "reference"\n')
    named = {"MEGAMOE_CONFIG": str(tmp_path / "named.toml")}
    assert config.load(NAMES, environ=named, folder=inner).default == config.Setting("reference", "named.toml")
    given = config.load(NAMES, tmp_path / "pyproject.toml", environ=named, folder=inner)
    assert given.default.value == "off"


def test_mistakes_in_pyproject_are_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.megamoe]\ndefualt = "off"\n')
    with pytest.raises(ConfigError, match=r"pyproject\.toml.*did you mean 'default'"):
        config.load(NAMES, environ={}, folder=tmp_path)
