from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe import registry
from megamoe.errors import RegistryError, nearest
from megamoe.model import Role
from megamoe.registry import Blocker, Item, Registry
from tests.core.builders import items, stage, variant

STAGES = {"mul": stage(variant("sm90", Role.FUSED))}
BLOCKER = {"id": "b", "kind": "upstream", "summary": "s"}


def _one(**item: Any) -> dict[str, Any]:
    return {"schema": 1, "item": {"A-1": {"title": "t", "status": "planned", **item}}}


def _refused(raw: Any) -> str:
    with pytest.raises(RegistryError) as error:
        registry.parse(raw, STAGES)
    return str(error.value)


def _misspell(word: str, position: int, letter: str) -> str:
    position %= len(word)
    return word[:position] + letter + word[position + 1 :]


letters = st.sampled_from("qxz")


@given(st.sampled_from(sorted(set(Item.model_fields) - {"title", "status"})), st.integers(0, 20), letters)
def test_unknown_key_of_an_item_names_the_nearest(key: str, position: int, letter: str) -> None:
    wrong = _misspell(key, position, letter)
    message = _refused(_one(**{wrong: ""}))
    assert f"item.A-1.{wrong}: unknown key, did you mean {nearest(wrong, Item.model_fields)!r}?" in message
    assert nearest(wrong, Item.model_fields) == key


@given(st.sampled_from(["variants", "archs", "until", "since"]), st.integers(0, 20), letters)
def test_unknown_key_of_a_blocker_names_the_nearest(key: str, position: int, letter: str) -> None:
    wrong = _misspell(key, position, letter)
    assert f"blocker.0.{wrong}: unknown key, did you mean {key!r}?" in _refused(_one(blocker=[{**BLOCKER, wrong: ""}]))


def test_unknown_key_of_the_file_names_the_nearest() -> None:
    assert "itme: unknown key, did you mean 'item'?" in _refused({**_one(), "itme": {}})


@pytest.mark.parametrize("key", ["title", "status"])
def test_missing_key_is_named(key: str) -> None:
    raw = _one()
    del raw["item"]["A-1"][key]
    assert f"item.A-1.{key}: missing" in _refused(raw)


def test_missing_and_unknown_schema() -> None:
    assert "schema" in _refused({"item": {}})
    assert "schema" in _refused({"schema": 2, "item": {}})


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"status": "expermental"}, ["item.A-1.status", "'experimental'", "'expermental'"]),
        ({"status": "blocked"}, ["item.A-1.status"]),
        ({"targets": ["sm90"]}, ["item.A-1.targets", "not an architecture: 'sm90'"]),
        ({"stage": "mull"}, ['item."A-1".stage', "did you mean 'mul'?"]),
        ({"depends": ["A-2"]}, ['item."A-1".depends', "did you mean 'A-1'?"]),
        ({"blocker": [{**BLOCKER, "kind": "upsteam"}]}, ["blocker.0.kind", "'upstream'", "'upsteam'"]),
        ({"blocker": [{**BLOCKER, "archs": ["hopper"]}]}, ["blocker.0.archs", "hopper"]),
        ({"blocker": [{**BLOCKER, "until": ">=4.9"}]}, ["blocker.0.until", "not a requirement"]),
        ({"blocker": [{**BLOCKER, "until": ""}]}, ["blocker.0.until", "not a requirement"]),
        ({"blocker": [BLOCKER, BLOCKER]}, ["two blockers have one id"]),
        ({"stage": "mul", "blocker": [{**BLOCKER, "variants": ["sm9O"]}]}, ["blocker 'b'", "did you mean 'sm90'?"]),
    ],
)
def test_wrong_values_are_named(item: dict[str, Any], words: list[str]) -> None:
    message = _refused(_one(**item))
    for word in words:
        assert word in message, message


def test_names_of_stages_are_not_checked_without_stages() -> None:
    assert registry.parse(_one(stage="mull")).item["A-1"].stage == "mull"


@given(st.integers(1, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_circle_is_found_and_spelt_out(length: int, tail: int, rng: Any) -> None:
    """A tail of items that leads into a circle; keys in any order."""
    circle = [f"C{i}" for i in range(length)]
    depends = {key: [circle[(i + 1) % length]] for i, key in enumerate(circle)}
    depends |= {f"T{i}": [f"T{i + 1}" if i + 1 < tail else "C0"] for i in range(tail)}
    order = list(depends)
    rng.shuffle(order)
    with pytest.raises(RegistryError, match="depend on each other in a circle") as error:
        items(**{key: {"depends": depends[key]} for key in order})
    shown = str(error.value).rpartition(": ")[2].split(" -> ")
    assert shown[0] == shown[-1]
    assert set(shown) == set(circle)
    assert all(after in depends[before] for before, after in zip(shown, shown[1:], strict=False))


@given(st.integers(1, 7), st.data())
def test_what_has_no_circle_is_accepted(count: int, data: st.DataObject) -> None:
    """Each item may depend on any earlier one."""
    table = {
        f"I{i}": {
            "depends": data.draw(st.lists(st.sampled_from([f"I{j}" for j in range(i)]), unique=True)) if i else []
        }
        for i in range(count)
    }
    shuffled = data.draw(st.permutations(list(table)))
    assert set(items(**{key: table[key] for key in shuffled}).item) == set(table)


def test_items_of_a_stage() -> None:
    made = items(STAGES, A={"stage": "mul"}, B={}, C={"stage": "mul"})
    assert list(made.of_stage("mul")) == ["A", "C"]
    assert made.of_stage("add") == {}


@pytest.mark.parametrize(
    ("until", "packages", "cleared"),
    [
        ("dsl>=4.9", {"dsl": "4.8.1"}, False),
        ("dsl>=4.9", {"dsl": "4.9.0"}, True),
        ("dsl>=4.9", {"dsl": "4.10.0.dev1"}, True),
        ("dsl>=4.9", {}, False),
        (None, {"dsl": "4.9.0"}, False),
    ],
)
def test_a_blocker_is_cleared_by_what_it_waits_for(until: str | None, packages: dict[str, str], cleared: bool) -> None:
    assert Blocker(id="b", kind="upstream", summary="s", until=until).cleared_by(packages) is cleared


def test_architectures_lose_their_suffix() -> None:
    made = items(A={"targets": ["sm_90a", "sm_100f"], "blocker": [{**BLOCKER, "archs": ["sm_100a"]}]}).item["A"]
    assert made.targets == ("sm_90", "sm_100")
    assert made.blocker[0].archs == ("sm_100",)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"schema = ", "registry.toml: "), (b"\xff\xfe", "decode"), (None, "there is no such file")],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "registry.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RegistryError, match=words):
        registry.load(path)


def test_a_folder_is_no_registry(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="directory"):
        registry.load(tmp_path)


def test_the_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\n[item.X]\ntitle = "only"\nstatus = "done"\n')
    monkeypatch.setenv("MEGAMOE_REGISTRY", str(path))
    assert list(registry.load().item) == ["X"]


def test_the_projects_own_registry_is_sound() -> None:
    from megamoe.plugins import Plugins

    own: Registry = registry.load(stages=Plugins(external=False).stages)
    assert {"NVFP4-1.1", "NVFP4-1.2", "NVFP4-1.3", "NVFP4-2", "NVFP4-3", "D2"} <= set(own.item)
