"""The permutation against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.errors import ArgumentError
from megamoe_stages.moe_permute import kernel, launch
from megamoe_stages.moe_permute.fallback import moe_permute as fallback
from megamoe_stages.moe_permute.limits import MAX_EXPERTS, MAX_VISITS, supports
from megamoe_stages.moe_permute.reference import moe_permute as reference

EXPERTS, TOP_K = 16, 6


@pytest.mark.parametrize("run", [reference, fallback])
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_is_a_stable_sort_by_expert(run: object, tokens: int, dtype: torch.dtype) -> None:
    indices = torch.randint(0, EXPERTS - 3, (tokens, TOP_K), generator=torch.Generator().manual_seed(2)).to(dtype)
    got = run(indices, EXPERTS)  # type: ignore[operator]
    visits = [(e, t) for e in range(EXPERTS) for t in range(tokens) for slot in range(TOP_K) if indices[t, slot] == e]
    assert got.tokens.tolist() == [t for _, t in visits]
    counts = [sum(e == expert for e, _ in visits) for expert in range(EXPERTS)]
    assert got.offsets.tolist() == [sum(counts[:e]) for e in range(EXPERTS + 1)]
    for t in range(tokens):
        for slot in range(TOP_K):
            assert visits[int(got.rows[t, slot])] == (int(indices[t, slot]), t)
    assert got.rows.flatten().sort().values.tolist() == list(range(tokens * TOP_K))


def test_slots_of_one_token_at_one_expert_keep_their_order() -> None:
    indices = torch.tensor([[2, 0, 2], [2, 2, 0]])
    for run in (reference, fallback):
        assert run(indices, 3).rows.tolist() == [[2, 0, 3], [4, 5, 1]]


def test_fallback_never_waits_for_the_device() -> None:
    """Fake tensors have no values: anything that reads one back fails."""
    with FakeTensorMode():
        order = fallback(torch.empty(33, TOP_K, dtype=torch.int64), EXPERTS)
    assert order.offsets.shape == (EXPERTS + 1,)


def test_limits() -> None:
    assert not supports({"experts": MAX_EXPERTS, "visits": 49152})
    assert "513 experts" in supports({"experts": MAX_EXPERTS + 1, "visits": 6})[0]
    assert supports({"experts": 8, "visits": MAX_VISITS + 1})


def test_a_cut_has_a_thread_for_every_expert_and_room_in_shared_memory() -> None:
    for shape in kernel.SHAPES:
        assert shape.threads >= MAX_EXPERTS
        assert shape.shared_bytes <= 227 * 1024


def test_wrong_arguments_are_named() -> None:
    indices = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="experts"):
        reference(indices, 0)
    with pytest.raises(ArgumentError, match="indices"):
        fallback(indices[:, :0], 4)
    with pytest.raises(ArgumentError, match="CUDA"):
        launch.moe_permute(indices, 4)
    with pytest.raises(ArgumentError, match="600 experts"):
        launch.moe_permute(indices, 600)


def test_more_visits_get_more_threads() -> None:
    cuts = [kernel.cut(visits) for visits in (6, 1024, 1025, 12288, 12289, 1 << 20)]
    assert cuts == [shape for shape in kernel.SHAPES for _ in range(2)]
