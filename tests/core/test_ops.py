"""Ops: planning once, sessions, observers, threads, errors, and what a planned call costs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import megamoe
from megamoe import ops
from megamoe.errors import ArgumentError, ConfigError, UnknownNameError
from megamoe.model import Decision
from megamoe.numerics.nvfp4 import NVFP4Tensor

quantize = megamoe.op("quantize")
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def called(
        self, stage_id: str, decision: Decision, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.calls.append((stage_id, decision.variant.name))
        return run(*args, **kwargs)


def chosen(**choices: str) -> str:
    seen = Recorder()
    with megamoe.use(choices, observer=seen):
        quantize(X)
    return seen.calls[0][1]


def test_op_by_stage_and_by_item() -> None:
    assert megamoe.op("NVFP4-1.1") is megamoe.op("swiglu_quant")
    with pytest.raises(UnknownNameError, match="did you mean 'swiglu_quant'"):
        megamoe.op("swiglu_qant")


def test_default_on_the_cpu_is_the_fallback() -> None:
    assert chosen() == "fallback"
    assert quantize.decide(X).variant.name == "fallback"


def test_use_nests_and_ends() -> None:
    seen = Recorder()
    with megamoe.use({"quantize": "reference"}, observer=seen):
        quantize(X)
        with megamoe.use({"quantize": "fallback"}, observer=seen):
            quantize(X)
        quantize(X)
    assert [name for _, name in seen.calls] == ["reference", "fallback", "reference"]
    assert ops.current_config().choice("quantize") == "auto"


def test_an_observer_sees_inner_sessions_too_and_plans_are_kept() -> None:
    session = ops.Session(ops.resolve({"quantize": "reference"}))
    seen = Recorder()
    with megamoe.use(None, observer=seen):
        for _ in range(2):
            with megamoe.use(session):
                quantize(X)
    with megamoe.use(session):
        quantize(X)
    assert seen.calls == [("quantize", "reference")] * 2
    assert len(session.plans["quantize"]) == 1


def test_default_argument_means_every_stage() -> None:
    with megamoe.use({"quantize": "fallback"}), megamoe.use({"default": "reference"}):
        assert quantize.decide(X).variant.name == "reference"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"quantise": "auto"}, "did you mean 'quantize'"),
        ({"quantize": "fusd"}, "did you mean 'fused'"),
        ({"NVFP4-0.1": "auto"}, "no code of its own"),
        ({"default": "refrence"}, "did you mean 'reference'"),
    ],
)
def test_wrong_choices_name_the_nearest(choices: dict[str, str], words: str) -> None:
    with pytest.raises((UnknownNameError, ConfigError), match=words), megamoe.use(choices):
        pass


def test_off_cannot_be_called() -> None:
    with megamoe.use({"quantize": "off"}), pytest.raises(ConfigError, match="quantize is off"):
        quantize(X)


def test_config_file(tmp_path: Any) -> None:
    path = tmp_path / "my.toml"
    path.write_text('[megamoe.stage.quantize]\nuse = "reference"\n')
    with megamoe.use(path):
        assert quantize.decide(X).variant.name == "reference"


def test_wrong_arguments_are_named_however_wrong() -> None:
    for value in (None, [1.0], X.to(torch.int8), torch.randn(3, 7)):
        with pytest.raises(ArgumentError) as error:
            quantize(value)
        assert error.value.argument == "x"


def test_same_kind_of_problem_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decisions: list[Any] = []
    whole = ops.Op._decide

    def counted(this: ops.Op, config: Any, problem: Any) -> Decision:
        decisions.append(problem)
        return whole(this, config, problem)

    monkeypatch.setattr(ops.Op, "_decide", counted)
    with megamoe.use(None, observer=None):
        for rows in (33, 40, 64):
            quantize(torch.randn(rows, 64))
        assert len(decisions) == 1
        quantize(torch.randn(65, 64))
        assert len(decisions) == 2


def test_explain_is_the_decision() -> None:
    decision = megamoe.explain("quantize", arch="cpu")
    assert decision.variant.name == "fallback"
    with pytest.raises(ValueError, match="not an architecture"):
        megamoe.explain("quantize", arch="hopper")


def test_threads_do_not_share_a_session_and_agree() -> None:
    expected = quantize(X)
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        name = ("fallback", "reference")[index % 2]
        for _ in range(50):
            seen = Recorder()
            with megamoe.use({"quantize": name}, observer=seen):
                out = quantize(X)
            if seen.calls != [("quantize", name)] or not torch.equal(out.codes, expected.codes):
                wrong.append(f"{index}: {seen.calls}")

    with megamoe.use({"default": "reference"}):  # other threads must not see this
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_compiled_call_under_use() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = megamoe.op("quantize")(x * 2).codes
        return codes

    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), scaled(X))


def test_compiles_with_dynamic_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize(x, scale_layout="128x4").scales.view(torch.uint8), dynamic=True)
    for rows in (3, 130, 257):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), quantize(x, scale_layout="128x4").scales.view(torch.uint8))


def test_nvfp4_tensor_is_a_pytree() -> None:
    tensor = quantize(X)
    leaves, spec = torch.utils._pytree.tree_flatten(tensor)
    assert len(leaves) == 3
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), NVFP4Tensor)


def test_a_planned_call_is_a_lookup() -> None:
    """What it costs is shown by tests/bench/bench_planned_call.py; that it does no more than this is checked here."""
    functions: list[str] = []

    def profile(frame: Any, event: str, arg: object) -> None:
        if event == "call":
            functions.append(frame.f_code.co_name)

    with megamoe.use(None):
        quantize(X)
        session = ops._session.get()
        assert session is not None
        session.of("quantize")[quantize._problem(X)] = nothing
        sys.setprofile(profile)
        quantize(X)
        sys.setprofile(None)
    assert functions == ["__call__", "is_compiling", "is_scripting", "problem", "bucket", "nothing"]


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a variant that takes no time."""
