from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamoe.contracts import E4M3Tensor
from megamoe.errors import PluginError
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.signature import Signature


class Both(NamedTuple):
    out: Tensor
    quantized: NVFP4Tensor
    lse: Tensor


def everything(
    x: Tensor,
    a: Tensor | NVFP4Tensor,
    w: NVFP4Tensor,
    bias: Tensor | None = None,
    *,
    limit: float | None = 10.0,
    eps: float = 1e-6,
    iters: int = 20,
    window: int | None = None,
    fast: bool = False,
    scale_layout: str = "linear",
    zero_guard: str | None = None,
    softmax_scale: float,
) -> Both:
    raise AssertionError


EVERY = [*inspect.signature(everything).parameters]


def plain(x: Tensor) -> Tensor:
    raise AssertionError


def quantized(x: Tensor, *, scale_layout: str = "linear") -> NVFP4Tensor:
    raise AssertionError


def cache(q: Tensor, k: Tensor, v: E4M3Tensor | None = None) -> Tensor:
    raise AssertionError


def _nvfp4(layout: str = "linear") -> NVFP4Tensor:
    return NVFP4Tensor(torch.zeros(2, 8), torch.ones(2, 1, dtype=torch.float8_e4m3fn), torch.zeros(()), layout)


def test_schema_of_every_kind_of_parameter() -> None:
    assert Signature.of(everything).schema() == (
        "(Tensor x, Tensor a, Tensor? a_scales, Tensor? a_global_scale_dec, str? a_scale_layout, "
        "Tensor w, Tensor w_scales, Tensor w_global_scale_dec, str w_scale_layout, Tensor? bias=None, *, "
        "float? limit=10.0, float eps=1e-06, int iters=20, int? window=None, bool fast=False, "
        'str scale_layout="linear", str? zero_guard=None, float softmax_scale) '
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    assert Signature.of(plain).schema() == "(Tensor x) -> Tensor"
    assert Signature.of(cache, ("k", "v")).schema() == "(Tensor q, Tensor(a0!) k, Tensor(a1!)? v=None) -> Tensor"


@pytest.mark.parametrize(
    ("function", "mutates"), [(everything, ()), (plain, ()), (quantized, ()), (cache, ("k", "v")), (cache, ("k",))]
)
def test_torch_accepts_the_schema(function: Any, mutates: tuple[str, ...]) -> None:
    parsed = torch._C.parse_schema(f"made_up::op{Signature.of(function, mutates).schema()}")
    mutable = [a.name for a in parsed.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutable == list(mutates)
    defaults = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}
    if function is everything:
        assert defaults["eps"] == 1e-6
        assert defaults["scale_layout"] == "linear"
        assert "softmax_scale" not in defaults


@settings(max_examples=50)
@given(
    a=st.sampled_from(["plain", "linear", "128x4"]),
    w=st.sampled_from(["linear", "128x4"]),
    bias=st.sampled_from(["absent", "none", "given"]),
    keywords=st.fixed_dictionaries(
        {"softmax_scale": st.just(0.5)},
        optional={
            "limit": st.none() | st.just(3.0),
            "iters": st.integers(0, 9),
            "window": st.none() | st.just(4),
            "fast": st.booleans(),
            "scale_layout": st.just("128x4"),
            "zero_guard": st.just("amax"),
        },
    ),
    positional=st.integers(0, 4),
)
def test_flatten_and_back(a: str, w: str, bias: str, keywords: dict[str, Any], positional: int) -> None:
    signature = Signature.of(everything)
    given: dict[str, Any] = {"x": torch.zeros(3), "a": torch.zeros(1) if a == "plain" else _nvfp4(a), "w": _nvfp4(w)}
    given |= {} if bias == "absent" else {"bias": None if bias == "none" else torch.ones(2)}
    args = list(given.values())[:positional]
    rest = dict(list(given.items())[positional:])
    bound = signature.bind(args, {**rest, **keywords})
    assert set(bound) == {p.name for p in signature.parameters}
    flat, named = signature.flatten(bound)
    assert len(flat) == 1 + 4 + 4 + 1
    back = signature.unflatten(flat, named)
    assert set(back) == set(bound)
    for name, value in bound.items():
        if isinstance(value, NVFP4Tensor):
            parts = (value.codes, value.scales, value.global_scale_dec)
            assert all(_same(m, t) for m, t in zip(parts, _parts(back[name]), strict=True))
            assert back[name].scale_layout == value.scale_layout
        else:
            assert back[name] is value
    defaults = {"limit": 10.0, "eps": 1e-6, "iters": 20, "window": None, "fast": False, "scale_layout": "linear"}
    for name, value in defaults.items():
        assert bound[name] == keywords.get(name, value)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether they are one tensor, perhaps seen twice."""
    return left.data_ptr() == right.data_ptr() and left.dtype == right.dtype and left.shape == right.shape


def test_e4m3_crosses_as_bytes() -> None:
    """torch.compile's fake tensors know little of float8."""
    signature = Signature.of(cache, ("k", "v"))
    v = torch.ones(3, dtype=torch.float8_e4m3fn)
    flat, _ = signature.flatten(signature.bind([torch.zeros(1), torch.zeros(2), v], {}))
    assert flat[2].dtype == torch.uint8
    assert _same(signature.unflatten(flat, {})["v"], v)
    assert signature.unflatten([flat[0], flat[1], None], {})["v"] is None
    bound: dict[str, Any] = {**dict.fromkeys(EVERY), "a": _nvfp4(), "w": _nvfp4()}
    packed, _ = Signature.of(everything).flatten(bound)
    assert [t.dtype for t in packed if isinstance(t, Tensor)].count(torch.uint8) == 2


def _parts(value: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value.codes, value.scales, value.global_scale_dec


def test_results_flatten_and_come_back_with_the_layout_that_was_asked_for() -> None:
    signature = Signature.of(everything)
    result = Both(torch.zeros(1), _nvfp4("128x4"), torch.ones(1))
    flat = signature.flatten_result(result)
    assert isinstance(flat, tuple)
    assert len(flat) == 5
    back = signature.unflatten_result(flat, {"scale_layout": "128x4"})
    assert isinstance(back, Both)
    assert back.out is result.out
    assert back.lse is result.lse
    assert back.quantized.codes is result.quantized.codes
    assert back.quantized.scale_layout == "128x4"


def test_single_results() -> None:
    x = torch.zeros(1)
    assert Signature.of(plain).flatten_result(x) is x
    assert Signature.of(plain).unflatten_result(x, {}) is x
    flat = Signature.of(quantized).flatten_result(_nvfp4())
    assert Signature.of(quantized).unflatten_result(flat, {"scale_layout": "linear"}).shape == (2, 16)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (0, {}, "missing a required argument: 'q'"),
        (1, {}, "missing a required argument: 'k'"),
        (4, {}, "takes 3 positional arguments but 4 were given"),
        (2, {"vv": None}, "unexpected keyword argument 'vv'"),
        (2, {"k": None}, "multiple values for argument 'k'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_as_in_a_plain_call(
    args: int, kwargs: dict[str, Any], words: str
) -> None:
    tensors = [torch.zeros(1)] * args
    with pytest.raises(TypeError, match=words):
        Signature.of(cache).bind(tensors, kwargs)
    with pytest.raises(TypeError):
        cache(*tensors, **kwargs)


def test_keyword_only_stays_keyword_only() -> None:
    with pytest.raises(TypeError, match="takes 1 positional"):
        Signature.of(quantized).bind([torch.zeros(1), "128x4"], {})


def _bad_list(x: list[Tensor]) -> Tensor: ...  # type: ignore[empty-body]
def _bad_none(x: NVFP4Tensor | None) -> Tensor: ...  # type: ignore[empty-body]
def _bad_keyword(*, x: NVFP4Tensor) -> Tensor: ...  # type: ignore[empty-body]
def _bad_bare(x) -> Tensor: ...  # type: ignore[empty-body, no-untyped-def]
def _bad_star(*x: Tensor) -> Tensor: ...  # type: ignore[empty-body]
def _bad_return(x: Tensor) -> int: ...  # type: ignore[empty-body]
def _bad_nothing(x: Tensor) -> None: ...
def _bad_layout(x: Tensor) -> NVFP4Tensor: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_bad_list, "parameter 'x' is annotated"),
        (_bad_none, "parameter 'x' is annotated"),
        (_bad_keyword, "parameter 'x' is annotated"),
        (_bad_bare, "parameter 'x' is annotated"),
        (_bad_star, "plain named parameters only"),
        (_bad_return, "returns <class 'int'>"),
        (_bad_nothing, "returns"),
        (_bad_layout, "no parameter 'scale_layout'"),
    ],
)
def test_what_an_op_cannot_have(function: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        Signature.of(function)


@pytest.mark.parametrize("name", ["absent", "a", "iters"])
def test_only_tensors_can_be_mutated(name: str) -> None:
    with pytest.raises(PluginError, match=f"mutates '{name}'"):
        Signature.of(everything, (name,))
