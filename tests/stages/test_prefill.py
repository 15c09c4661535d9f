"""The GEMM for many rows an expert: its shared memory, its places, and its kernels in the emulator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Generator

import ptxemu
from megamoe.cute import compiler, weight_pieces
from megamoe.cute.compiler import KernelSpec
from megamoe.cute.host import empty_result
from megamoe.cute.weight_pieces import Shape
from megamoe.numerics.gate_up import interleave
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.testing import guards
from megamoe_stages.grouped_gemm import limits, prefill, prefill_kernel, sm90
from megamoe_stages.grouped_gemm.cases import CASES, make
from megamoe_stages.grouped_gemm.prefill import Cut
from megamoe_stages.grouped_gemm.reference import grouped_gemm
from megamoe_stages.swiglu_quant import prefill as swiglu_prefill
from megamoe_stages.swiglu_quant import prefill_kernel as swiglu_prefill_kernel
from megamoe_stages.swiglu_quant.cases import make as make_swiglu
from megamoe_stages.swiglu_quant.reference import swiglu_quant
from ptxemu.report import Report

SHARED_BYTES = 227 * 1024  # of a CTA on sm_90
CTAS = 2  # in the emulator: each takes turns with another
MOST_ROWS = ((99, 99), (0, 99), (0, 0))  # each takes another shape
UNEVEN = (3, 0, 1, 40, 0, 70)  # no rows, few, one piece, two pieces


@pytest.fixture
def policy() -> str:
    """When asynchronous operations complete in the emulator; a test may choose."""
    return "random"


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch, policy: str) -> Iterator[list[Report]]:
    """Kernels launch into the emulator; a report a launch."""
    seen: list[Report] = []

    def emulated(spec: KernelSpec) -> Callable[..., None]:
        artifact = compiler.compile_kernel(spec)

        def launch(*args: Any) -> None:
            seen.append(ptxemu.run(artifact, *args, policy=policy, seed=len(seen)))

        return launch

    monkeypatch.setattr(compiler, "load", emulated)
    monkeypatch.setattr(prefill, "processors", lambda _: CTAS)
    forget_launchers()
    yield seen
    forget_launchers()


def forget_launchers() -> None:
    for module in (prefill, swiglu_prefill):
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


@pytest.mark.parametrize("shape", [*prefill_kernel.EXPERTS, *prefill_kernel.DENSE, *swiglu_prefill_kernel.EXPERTS])
def test_a_cta_has_the_shared_memory(shape: Shape) -> None:
    assert shape.shared_bytes <= SHARED_BYTES
    assert shape.stage_bytes % 1024 == 0  # where the pattern of swizzled rows begins anew
    assert shape.weights_at % 2048 == 0
    assert sorted(shape.widths) == list(shape.widths)
    assert all(width % 8 == 0 for width in shape.widths)
    assert shape.stages < weight_pieces.ORDERS  # a piece is told anew only when all have passed it


def test_the_limits_are_those_of_the_kernel() -> None:
    assert limits.MAX_EXPERTS == weight_pieces.MAX_EXPERTS


def test_packed_rows_of_experts_are_aligned_and_apart() -> None:
    generator = Generator().manual_seed(0)
    counts = torch.randint(0, 20, (300,), generator=generator).tolist()
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    places = [weight_pieces.packed_start(start, expert) for expert, start in enumerate(starts[:-1])]
    assert all(place % weight_pieces.ALIGNMENT == 0 for place in places)
    assert all(first + count <= second for (first, second), count in zip(pairwise(places), counts, strict=False))
    assert places[-1] + counts[-1] + 128 <= weight_pieces.packed_capacity(starts[-1], len(counts), 128)


@pytest.mark.parametrize(
    "params",
    [
        {"n": 48, "k": 64, "values": "integers"},
        {"n": 320, "k": 144, "a": "nvfp4", "values": "integers"},
        {"n": 128, "k": 64, "values": "one_hot", "alphas": 2},
    ],
    ids=["bf16", "nvfp4", "one-hot"],
)
@pytest.mark.parametrize("most", MOST_ROWS)
def test_gemm_is_exact_in_the_emulator(
    reports: list[Report], monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], most: tuple[int, ...]
) -> None:
    monkeypatch.setattr(prefill, "MOST_ROWS", most)
    given = make(Generator().manual_seed(1), rows=UNEVEN, **params)
    expected = grouped_gemm(**given)
    index = torch.arange(expected.shape[0], dtype=torch.int32)
    out = torch.full_like(expected, math.nan)
    prefill.run(given["a"], given["weights"].with_layout("hopper"), given["offsets"], index, out)
    assert len(reports) == 2
    for report in reports:
        report.raise_for_findings()
    assert guards.same_bytes(out, expected)


@pytest.mark.parametrize(
    "rows",
    [
        (1,) * (CTAS * (weight_pieces.ORDERS + 2)),  # a piece each, of one stage: the places for orders come again
        (0, 1, 0),  # a CTA finds none
    ],
    ids=["many", "fewer-than-ctas"],
)
def test_ctas_take_pieces_until_none_is_left_and_leave_the_counter_at_0(
    reports: list[Report], monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...]
) -> None:
    taken = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(prefill, "counters", lambda *_: taken)
    given = make(Generator().manual_seed(3), rows=rows, n=48, k=64, values="integers")
    expected = grouped_gemm(**given)
    index = torch.arange(expected.shape[0], dtype=torch.int32)
    for _ in range(2):
        out = torch.full_like(expected, math.nan)
        prefill.run(given["a"], given["weights"].with_layout("hopper"), given["offsets"], index, out)
        for report in reports:
            report.raise_for_findings()
        assert guards.same_bytes(out, expected)
        assert int(taken) == 0


@pytest.mark.parametrize("policy", ["random", "tma_lazy"])  # the latter: a copy lands when somebody has to have it
@pytest.mark.parametrize("a", ["bf16", "nvfp4"])
@pytest.mark.parametrize(
    ("rows", "n", "k", "number", "sharing", "tiles"),
    [
        (11, 320, 448, 0, 3, 1),
        (60, 320, 448, 0, 2, 2),
        (200, 144, 512, 1, 3, 2),
        (2500, 144, 128, 1, 1, 20),
        *(  # three pieces of weight rows: in a cluster of two, one CTA has none
            (600, 2 * shape.rows + 64, 448, number, 1, -(-600 // shape.tokens))
            for number, shape in enumerate(prefill_kernel.DENSE[2:], 2)
        ),
    ],
)
def test_one_expert_is_exact_however_it_is_cut(
    reports: list[Report],
    monkeypatch: pytest.MonkeyPatch,
    a: str,
    rows: int,
    n: int,
    k: int,
    number: int,
    sharing: int,
    tiles: int,
) -> None:
    dense = prefill_kernel.DENSE[number]
    ctas = -(-n // dense.rows) * tiles * sharing if sharing > 1 else 4
    monkeypatch.setattr(prefill, "cut", lambda *_, **__: Cut(dense, ctas, sharing, tiles))
    given = make(Generator().manual_seed(2), rows=(rows,), n=n, k=k, a=a, values="integers")
    expected = grouped_gemm(**given)
    out = torch.full_like(expected, math.nan)
    prefill.run(given["a"], given["weights"].with_layout("hopper"), given["offsets"], None, out)
    assert len(reports) == (2 if a == "nvfp4" else 1)  # bf16 activations are read as they are
    for report in reports:
        report.raise_for_findings()
    assert guards.same_bytes(out, expected)


@pytest.mark.parametrize("rows", [1, 9, 16, 64, 100, 128, 256, 512, 1000, 8192])
@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (4096, 8192), (1536, 4096), (64, 128), (7168, 3072)])
def test_how_one_expert_is_cut(rows: int, n: int, k: int) -> None:
    codes = torch.empty(1, n, k // 2, dtype=torch.uint8, device="meta")
    cut = prefill.cut(rows, NVFP4Tensor(codes, codes, codes), 132, dense=True)
    together = cut.shape.cluster
    pieces = -(-n // (cut.shape.rows * together)) * together * cut.tiles
    assert cut.sharing <= k // weight_pieces.STAGE_K  # every CTA has some of k
    assert cut.ctas == min(132, pieces * cut.sharing)
    assert cut.sharing == 1 or pieces * cut.sharing <= 132  # no CTA has two pieces


@pytest.mark.parametrize(
    ("n", "k", "rows", "piece", "cluster", "tiles", "sharing"),
    [
        (8192, 8192, 16, (128, 64), 1, 1, 2),
        (8192, 8192, 64, (128, 64), 1, 1, 2),
        (8192, 8192, 128, (128, 128), 1, 1, 2),
        (8192, 8192, 256, (128, 128), 1, 2, 1),
        (8192, 8192, 384, (128, 192), 1, 2, 1),
        (8192, 8192, 512, (128, 256), 1, 2, 1),
        (8192, 8192, 1024, (128, 256), 1, 4, 1),
        (8192, 8192, 2048, (128, 256), 2, 8, 1),
        (8192, 8192, 8192, (256, 144), 2, 57, 1),
        (4096, 8192, 64, (128, 64), 1, 1, 4),
        (4096, 8192, 512, (128, 128), 1, 4, 1),
        (4096, 8192, 1024, (128, 256), 1, 4, 1),
        (4096, 8192, 2048, (128, 256), 2, 8, 1),
        (4096, 8192, 8192, (256, 144), 2, 57, 1),
        (7168, 3072, 1024, (128, 152), 1, 7, 1),
        (7168, 3072, 2048, (256, 152), 1, 14, 1),
        (7168, 3072, 8192, (128, 256), 2, 32, 1),
        (1536, 4096, 16, (128, 64), 1, 1, 8),
        (1536, 4096, 64, (128, 64), 1, 2, 5),
        (1536, 4096, 1024, (128, 128), 1, 11, 1),
        (1536, 4096, 2048, (128, 192), 1, 11, 1),
        (1536, 4096, 8192, (128, 256), 2, 32, 1),
    ],
)
def test_one_expert_is_cut_as_was_fastest(
    n: int, k: int, rows: int, piece: tuple[int, int], cluster: int, tiles: int, sharing: int
) -> None:
    codes = torch.empty(1, n, k // 2, dtype=torch.uint8, device="meta")
    cut = prefill.cut(rows, NVFP4Tensor(codes, codes, codes), 132, dense=True)
    assert (cut.shape.rows, cut.shape.tokens) == piece
    assert (cut.shape.cluster, cut.tiles, cut.sharing) == (cluster, tiles, sharing)


def test_cases_of_one_expert_reach_every_shape() -> None:
    reached = set()
    for case in CASES.values():
        rows, n, k = (case.params[name] for name in ("rows", "n", "k"))
        if len(rows) == 1 and rows[0] > sm90.MOST_ROWS and case.params.get("layout") == "hopper":
            direct = case.params.get("a") != "nvfp4"
            if direct and (case.params.get("indexed") or k % weight_pieces.BLOCK_K):
                continue  # goes the way of several experts
            codes = torch.empty(1, -(-n // 64) * 64, -(-k // 128) * 64, dtype=torch.uint8, device="meta")
            shape = prefill.cut(rows[0], NVFP4Tensor(codes, codes, codes), 132, dense=True).shape
            reached.add(prefill._reading(shape, direct=direct))
    assert reached == {prefill._reading(s, direct=direct) for s in prefill_kernel.DENSE for direct in (False, True)}


@pytest.mark.parametrize(
    "params",
    [{"k": 64, "a": "nvfp4", "scale_layout": "128x4"}, {"k": 1024}],
    ids=["nvfp4-128x4", "more-stages-than-the-ring-has"],
)
@pytest.mark.parametrize("most", MOST_ROWS)
def test_fused_gemm_is_exact_in_the_emulator(
    reports: list[Report], monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], most: tuple[int, ...]
) -> None:
    monkeypatch.setattr(prefill, "MOST_ROWS", most)
    sizes: dict[str, Any] = {"rows": UNEVEN, "intermediate": 48, "values": "saturated", "limit": None}
    given = make_swiglu(Generator().manual_seed(1), **sizes, **params)
    expected = swiglu_quant(**given)
    enc = given["global_scale_enc"]
    out = empty_result(expected.shape, enc, given["scale_layout"])
    out.codes.fill_(0xAA)
    out.scales.view(torch.uint8).fill_(0x55)
    weights = interleave(given["weights"], given["order"]).with_layout("hopper")
    taken = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(swiglu_prefill, "counters", lambda *_: taken)
    swiglu_prefill.run(given["a"], weights, given["offsets"], None, None, enc, math.inf, out)
    for report in reports:
        report.raise_for_findings()
    assert guards.same_bytes(out, expected)
    assert int(taken) == 0
