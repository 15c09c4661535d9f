"""The dense GEMM on a GPU: CTAs that share a piece count each other, on several streams and in graphs at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.testing.guards import same_bytes
from megamoe_stages.grouped_gemm import prefill, prefill_kernel
from megamoe_stages.grouped_gemm.cases import make
from megamoe_stages.grouped_gemm.reference import grouped_gemm as reference

pytestmark = pytest.mark.gpu
SIZES = ((1, 1536, 4096), (40, 1536, 4096), (16, 2048, 4096), (64, 1100, 4160), (300, 1536, 4096))  # M, N, K


def inputs(rows: int, n: int, k: int, a: str = "bf16") -> dict[str, Any]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compiled for sm_90a")
    generator = torch.Generator().manual_seed(rows)
    given = make(generator, rows=(rows,), n=n, k=k, layout="hopper", values="integers", a=a)
    return {name: None if value is None else value.to("cuda") for name, value in given.items()}


@pytest.mark.parametrize("a", ["bf16", "nvfp4"])
@pytest.mark.parametrize("number", range(len(prefill_kernel.DENSE)))
def test_every_shape_is_exact(monkeypatch: pytest.MonkeyPatch, number: int, a: str) -> None:
    shape, rows, n = prefill_kernel.DENSE[number], 1200, 1100  # an odd number of pieces of weight rows
    tiles = -(-rows // shape.tokens)
    ctas = min(132, -(-n // (shape.rows * shape.cluster)) * shape.cluster * tiles)
    monkeypatch.setattr(prefill, "cut", lambda *_, **__: prefill.Cut(shape, ctas, 1, tiles))
    given = inputs(rows, n, 4160, a=a)
    out = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")
    for _ in range(20):
        out.fill_(torch.nan)
        prefill.run(given["a"], given["weights"], given["offsets"], None, out)
        assert same_bytes(out, reference(**given))


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
