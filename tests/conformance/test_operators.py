"""Every op as a torch.library operator: opcheck, and torch.compile in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.model import Stage
from megamoe.ops import op
from megamoe.plugins import load
from megamoe.testing import guards


def _case(stage: Stage) -> tuple[str, dict[str, Any]]:
    """The smallest case with rows."""
    from tests.conformance.test_variants import _smallest

    name = _smallest(load(stage.cases), stage, stage.reference)[0]
    return name, load(stage.cases)[name].inputs(name)


def test_opcheck(stage: Stage) -> None:
    this = op(stage.id)
    _, inputs = _case(stage)
    flat, keywords = this.signature.flatten(this.arguments(**inputs))
    torch.library.opcheck(getattr(torch.ops.megamoe, stage.id).default, tuple(flat), keywords)


@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph(stage: Stage) -> None:
    this = op(stage.id)
    _, inputs = _case(stage)
    mine = {key: guards.clone(value) for key, value in inputs.items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **arguments: this(**arguments), fullgraph=True, backend="aot_eager")
    expected = this.signature.flatten_result(this(**inputs))
    got = this.signature.flatten_result(compiled(**mine))
    for a, b in zip(_list(expected), _list(got), strict=True):
        assert guards.same_bytes(a, b)


def _list(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)
