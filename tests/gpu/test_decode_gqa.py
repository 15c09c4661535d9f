"""fp4_kv_decode for grouped queries on a GPU: the same bits every time, and captured graphs that follow lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.testing.guards import same_bytes
from megamoe_stages.fp4_kv_decode.cases import make
from megamoe_stages.fp4_kv_decode.contract import BOUNDS
from megamoe_stages.fp4_kv_decode.reference import fp4_kv_decode as reference

pytestmark = pytest.mark.gpu
D128: dict[str, Any] = {"heads": 64, "kv_heads": 8, "head_dim": 128, "page": 64, "new": None, "sink": True}


def inputs(**problem: Any) -> dict[str, Any]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compiled for sm_90a")
    made = make(torch.Generator().manual_seed(0), **{**D128, **problem})
    return {key: value.cuda() if isinstance(value, Tensor) else value for key, value in made.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("queries", [1, 2])
def test_twenty_times_the_same_bits(queries: int) -> None:
    """Parts are merged in one order, whichever CTA is the last to arrive."""
    from megamoe_stages.fp4_kv_decode.sm90 import fp4_kv_decode

    a = inputs(lengths=[9000, 1, 300, 0, 4097], queries=queries)
    first = fp4_kv_decode(**a)
    for _ in range(19):
        again = fp4_kv_decode(**a)
        assert same_bytes(first.out, again.out)
        assert same_bytes(first.lse, again.lse)


def test_a_captured_graph_follows_the_lengths() -> None:
    from megamoe_stages.fp4_kv_decode.sm90 import fp4_kv_decode

    a = inputs(lengths=[3000, 2500, 700])
    for side in ("k", "v"):  # no NaN beyond the lengths, which grow
        a[f"{side}_scales"].view(torch.uint8).clamp_(max=0x40)
    fp4_kv_decode(**a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fp4_kv_decode(**a)
    for lengths in ([3000, 2500, 700], [1, 2, 700], [0, 2501, 64], [2999, 0, 0]):
        a["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        want = reference(**a)
        assert error(got.out, want.out) < BOUNDS["out"].rel_l2
        finite = want.lse.isfinite()
        assert same_bytes(got.lse.isfinite(), finite)
        assert error(got.lse[finite], want.lse[finite]) < BOUNDS["lse"].rel_l2


def test_launches_on_several_streams_do_not_meet() -> None:
    """Every stream and every graph counts arrivals for itself, and leaves its counters as it found them."""
    from megamoe_stages.fp4_kv_decode.sm90 import fp4_kv_decode

    problems = [inputs(lengths=lengths) for lengths in ([9000, 1, 300], [5000, 4097], [12000])]
    want = [fp4_kv_decode(**a) for a in problems]
    graphs, replayed = [], []
    for a in problems:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            replayed.append(fp4_kv_decode(**a))
    streams = [torch.cuda.Stream() for _ in problems]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for _ in range(50):
        eager = []
        for a, graph, stream in zip(problems, graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                eager.append(fp4_kv_decode(**a))
        torch.cuda.synchronize()
        for results in (eager, replayed):
            for got, expected in zip(results, want, strict=True):
                assert same_bytes(got.out, expected.out)
                assert same_bytes(got.lse, expected.lse)
