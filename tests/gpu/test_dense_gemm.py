"""The dense GEMM on a GPU: CTAs that share a piece count each other, on several streams and in graphs at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.testing.guards import same_bytes
from megamoe_stages.grouped_gemm import prefill
from megamoe_stages.grouped_gemm.cases import make
from megamoe_stages.grouped_gemm.reference import grouped_gemm as reference

pytestmark = pytest.mark.gpu
SIZES = ((1, 1536, 4096), (40, 1536, 4096), (16, 2048, 4096), (64, 1100, 4160), (300, 1536, 4096))  # M, N, K


def inputs(rows: int, n: int, k: int) -> dict[str, Any]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compiled for sm_90a")
    given = make(torch.Generator().manual_seed(rows), rows=(rows,), n=n, k=k, layout="hopper", values="integers")
    return {name: None if value is None else value.to("cuda") for name, value in given.items()}


def test_launches_on_several_streams_do_not_meet() -> None:
    from megamoe_stages.grouped_gemm.sm90 import grouped_gemm

    problems = [inputs(*size) for size in SIZES]
    for (rows, _, _), a in zip(SIZES, problems, strict=True):
        assert prefill.cut(rows, a["weights"], prefill.processors(torch.device("cuda")), dense=True).sharing > 1
    want = [reference(**a) for a in problems]
    for a, expected in zip(problems, want, strict=True):
        assert same_bytes(grouped_gemm(**a), expected)
    graphs, replayed = [], []
    for a in problems:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            replayed.append(grouped_gemm(**a))
    streams = [torch.cuda.Stream() for _ in problems]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for _ in range(20):
        eager = []
        for a, graph, stream in zip(problems, graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                eager += [grouped_gemm(**a), grouped_gemm(**a)]
        torch.cuda.synchronize()
        for number, expected in enumerate(want):
            for got in (replayed[number], *eager[2 * number : 2 * number + 2]):
                assert same_bytes(got, expected)
        for out in replayed:
            out.zero_()
        torch.cuda.synchronize()  # or a replay on another stream might come before
