"""`megamoe new`: the folder of a new stage, its test and its registry item, from the templates of this package."""

from __future__ import annotations

import importlib.resources
import keyword
from pathlib import Path
from string import Template

import tomlkit

from megamoe import registry, roadmap
from megamoe.errors import ArgumentError, MegamoeError
from megamoe.runtime import Runtime, runtime

STAGES = Path("stages") / "megamoe_stages"


def create(stage: str, *, item: str, title: str, current: Runtime | None = None) -> list[Path]:
    """Writes a new stage into the checkout.

    Args:
        stage: Id of the op, a Python name that no stage has.
        item: Id of its roadmap item; made with status "planned" unless it exists.
        title: One line.
        current: What is installed; default the process's runtime.

    Returns:
        Paths written, relative to the checkout.

    Raises:
        ArgumentError: `stage` is not a name, or is taken.
        MegamoeError: This is not a checkout.
    """
    current = current or runtime()
    root = roadmap.path().parent
    if not stage.isidentifier() or keyword.iskeyword(stage) or stage != stage.lower():
        raise ArgumentError("stage", repr(stage), "a lower-case Python name such as 'swiglu_quant'")
    if stage in current.stages or (root / STAGES / stage).exists():
        raise ArgumentError("stage", repr(stage), "an id that no stage has")
    if not (root / STAGES).is_dir():
        raise MegamoeError(f"a new stage is written into a checkout; there is no {STAGES} beside {registry.FILE}")
    values = {"stage": stage, "title": title.strip().rstrip("."), "item": item}
    written = []
    for template in sorted((importlib.resources.files("megamoe") / "templates" / "stage").iterdir(), key=str):
        name = template.name.removesuffix(".txt")
        path = Path("tests") / "stages" / f"test_{stage}.py" if name == "test.py" else STAGES / stage / name
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(Template(template.read_text()).substitute(values))
        written.append(path)
    if item not in current.registry.item:
        _add_item(root / registry.FILE, item, stage, values["title"])
        written.append(Path(registry.FILE))
    return written


def _add_item(path: Path, item: str, stage: str, title: str) -> None:
    document = tomlkit.parse(path.read_text())
    table = tomlkit.table()
    table.update({"title": title, "stage": stage, "status": "planned", "targets": ["sm_90", "sm_100"]})
    items = document["item"]
    if not isinstance(items, dict):
        raise MegamoeError(f"{path.name}: 'item' is not a table")
    items[item] = table
    path.write_text(tomlkit.dumps(document))
