from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamoe.numerics.nvfp4 import NVFP4Tensor, quantize
from megamoe.testing.guards import (
    GUARD_BYTES,
    Guarded,
    aliases,
    changed_inputs,
    clone,
    guarded_inputs,
    same_bytes,
)

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.float8_e4m3fn]


def _quantized(value: float = 1.0) -> NVFP4Tensor:
    return quantize(torch.full((2, 16), value), torch.tensor(100.0))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _reach(tensor: Tensor, byte: int) -> Tensor:
    """The byte at an offset from the start of a tensor, as a kernel that miscounts would reach it."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage[tensor.storage_offset() * tensor.element_size() + byte]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7)])
def test_every_fresh_buffer_is_poisoned(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape, dtype=dtype)
    with Guarded(0x3C) as guard:
        made = [
            torch.empty(shape, dtype=dtype),
            torch.empty_like(like),
            like.new_empty(shape),
            torch.empty_strided(like.shape, like.stride(), dtype=dtype),
            like.new_empty_strided(like.shape, like.stride()),
        ]
    for tensor in made:
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (like.shape, like.dtype, like.stride())
        assert (_raw(tensor) == 0x3C).all()
    assert guard.overruns() == []


def test_poison_of_ff_is_nan() -> None:
    with Guarded(0xFF):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            assert torch.empty(3, dtype=dtype).isnan().all()
        assert torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()


def test_what_is_initialised_is_not_poisoned() -> None:
    with Guarded(0xFF):
        assert not torch.zeros(3).any()
        assert torch.tensor([1.0, 2.0]).tolist() == [1.0, 2.0]
        assert torch.empty(0, 3).shape == (0, 3)


def test_outside_the_block_nothing_is_guarded() -> None:
    with Guarded(0x3C) as guard:
        torch.empty(3)
    size = torch.empty(3).untyped_storage().nbytes()
    assert size < GUARD_BYTES
    assert guard.overruns() == []


@given(st.integers(1, 40), st.sampled_from(DTYPES), st.data())
def test_a_single_byte_written_outside_is_found(count: int, dtype: torch.dtype, data: st.DataObject) -> None:
    size = count * dtype.itemsize
    before = data.draw(st.booleans())
    byte = data.draw(st.integers(-GUARD_BYTES, -1) if before else st.integers(size, size + GUARD_BYTES - 1))
    with Guarded(0xFF) as guard:
        tensor = torch.empty(count, dtype=dtype)
        tensor.zero_()
    assert guard.overruns() == []
    _reach(tensor, byte).fill_(0)
    side = "before" if before else "after"
    assert guard.overruns() == [f"1 bytes written {side} a buffer of {size} bytes"]


@given(st.integers(0, 39))
def test_bytes_written_inside_are_no_overrun(byte: int) -> None:
    with Guarded(0xFF) as guard:
        tensor = torch.empty(10)
    _reach(tensor, byte).fill_(0)
    assert guard.overruns() == []


def test_inputs_keep_values_strides_and_alignment() -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(6, 5),
        "t": torch.randn(6, 5).t(),
        "s": torch.tensor(3.0),
        "w": _quantized(),
        "e": torch.empty(0, 4),
        "n": None,
        "k": 3,
    }
    guard = Guarded(0xFF)
    given = guarded_inputs(arguments, guard)
    assert changed_inputs(given, arguments) == []
    for name in ("x", "t", "s"):
        assert torch.equal(given[name], arguments[name])
        assert given[name].stride() == arguments[name].stride()
        assert given[name].data_ptr() % 16 == 0
        assert given[name].data_ptr() != arguments[name].data_ptr()
    assert isinstance(given["w"], NVFP4Tensor)
    assert (given["n"], given["k"]) == (None, 3)
    _reach(given["x"], 6 * 5 * 4).fill_(0)
    assert guard.overruns() == ["1 bytes written after a buffer of 120 bytes"]


@pytest.mark.parametrize("field", ["codes", "scales", "global_scale_dec"])
def test_a_written_input_is_named(field: str) -> None:
    arguments = {"x": torch.zeros(3), "w": _quantized(), "k": 3}
    given = guarded_inputs(arguments, Guarded(0xFF))
    getattr(given["w"], field).view(-1).view(torch.uint8)[0] ^= 1
    assert changed_inputs(given, arguments) == ["w"]
    given["x"][1] = -0.0  # equal as a number, not as bytes
    assert changed_inputs(given, arguments) == ["x", "w"]
    assert changed_inputs(given, arguments, ("w",)) == ["x"]


def test_same_bytes() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bytes(torch.zeros(2, 3), torch.zeros(3, 2))
    assert not same_bytes(torch.zeros(1), None)
    assert same_bytes(_quantized(), _quantized())
    assert not same_bytes(_quantized(), _quantized(-1.0))


def test_a_clone_is_another_tensor() -> None:
    before = _quantized()
    after = clone(before)
    after.codes.zero_()
    assert before.codes.any()
    assert clone(3) == 3


def test_an_output_in_an_arguments_memory_is_named() -> None:
    x = torch.zeros(4, 8)
    assert aliases({"view": x[1:], "copy": x.clone(), "empty": x[:0]}, {"x": x}) == ["view"]
