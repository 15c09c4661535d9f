"""What planning costs once it is done: a planned call of each op beside a direct call, of a variant that does nothing.

The difference of the two medians is the dispatcher's: at most 2 us is asked for.
"""

from __future__ import annotations

from typing import Any

import pytest

import megamoe
from megamoe import ops
from megamoe.model import Stage
from megamoe.plugins import load


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a variant that takes no time."""


@pytest.mark.parametrize("how", ["direct", "planned"])
def bench_planned_call(stage: Stage, how: str, benchmark: Any) -> None:
    this = megamoe.op(stage.id)
    cases = load(stage.cases)
    case = next(name for name, value in cases.items() if value.bench and not value.gpu_only)
    inputs = cases[case].inputs(case)
    given = [p for p in this.signature.parameters if p.name in inputs]
    args = tuple(inputs[p.name] for p in given if not p.keyword_only)
    kwargs = {p.name: inputs[p.name] for p in given if p.keyword_only}
    benchmark.group = f"planned call of {stage.id}"
    benchmark.name = how
    with megamoe.use(None):
        session = ops._session.get()
        assert session is not None
        session.of(stage.id)[this._problem(*args, **kwargs)] = nothing
        function = nothing if how == "direct" else this
        benchmark.pedantic(function, args=args, kwargs=kwargs, rounds=200, iterations=1000, warmup_rounds=5)
