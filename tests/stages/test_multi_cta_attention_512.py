"""The head_dim 512 attention kernel for sm_90a, emulated: whole launches, the arguments from the host side."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cutlass import Int32, cute
from cutlass.cute.runtime import make_ptr

import ptxemu
from megamoe.cute import compiler
from megamoe.cute.host import dtype_name
from megamoe.cute.inspect import kernels
from megamoe.testing import compare
from megamoe.testing.guards import same_bytes
from megamoe_stages.multi_cta_attention import contract, kernel_512, launch_512, limits
from megamoe_stages.multi_cta_attention.cases import D512, make
from megamoe_stages.multi_cta_attention.contract import AttentionOutput
from megamoe_stages.multi_cta_attention.pieces_512 import Order, turn_at
from megamoe_stages.multi_cta_attention.reference import multi_cta_attention as reference
from megamoe_stages.multi_cta_attention.shape_512 import (
    BLOCK_BYTES,
    DIM,
    DTYPES,
    GROUP,
    MASKED,
    MASKED_NARROW,
    NARROW,
    ROWS,
    SHAPES,
    SHARED_BYTES,
    THREADS,
    WIDE,
    Shape,
    shape_for,
)

SMS = 2  # so that CTAs take several pieces of rows
PROBLEMS: dict[str, dict[str, Any]] = {
    "several-tiles-of-keys": {"lq": [70], "lk": [330], "heads": 2, "kv_heads": 2, "sink": True},
    "tails-and-empty-sequences": {"lq": [5, 0, 67, 1], "lk": [9, 4, 127, 200], "heads": 6, "window": 50, "sink": True},
    "full": {"lq": [20, 31], "lk": [45, 31], "causal": False, "heads": 3, "kv_heads": 1},
    "full-window": {"lq": [20], "lk": [245], "causal": False, "window": 7},
    "more-queries-than-keys": {"lq": [9, 3], "lk": [4, 0], "heads": 16, "kv_heads": 1, "sink": True},
    "one-tile-one-query": {"lq": [1], "lk": [64], "heads": 64, "kv_heads": 1},
    "group-of-7": {"lq": [25], "lk": [60], "heads": 14, "kv_heads": 2},
    "wide-scores": {"lq": [40], "lk": [200], "gain": 30.0, "heads": 2},
    "mask": {"lq": [40, 5], "lk": [130, 21], "mask": 0.3, "causal": False, "heads": 6, "sink": True},
    "mask-narrow-causal-window": {"lq": [30], "lk": [190], "mask": 0.5, "mask_columns": 170, "window": 60},
    "mask-nothing": {"lq": [8], "lk": [30], "mask": 0.0, "heads": 2, "sink": True},
    "mask-few-keys": {"lq": [20, 20], "lk": [1, 70], "mask": 0.02, "causal": False, "kv_heads": 4},
    "entries": {"lq": [40, 6, 3], "lk": [100, 25, 4], "entries": 9, "mask": 0.5, "window": 20, "sink": True},
    "entries-all": {"lq": [5, 30], "lk": [12, 260], "entries": 140, "kv_heads": 1},
    "entries-no-columns": {"lq": [7], "lk": [80], "entries": 70, "mask": 1.0, "mask_columns": 0},
    "entries-full": {"lq": [33, 50], "lk": [90, 300], "entries": 66, "mask": 0.4, "causal": False, "heads": 2},
    "fp16": {"lq": [70, 9], "lk": [330, 20], "heads": 2, "dtype": "float16", "sink": True},
    "fp16-entries": {"lq": [40, 3], "lk": [100, 4], "dtype": "float16", "entries": 9, "mask": 0.5, "window": 20},
    "heads-one-by-one": {"lq": [i % 3 for i in range(70)], "lk": [7 * i % 11 for i in range(70)]},
    "forty-sequences": {"lq": [i % 3 for i in range(40)], "lk": [7 * i % 11 for i in range(40)], "sink": True},
}


def inputs(name: str) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(0), head_dim=512, **PROBLEMS[name])


def emulated(a: dict[str, Any], shape: Shape | None = None, policy: str = "eager", seed: int = 0) -> AttentionOutput:
    """What `sm90.multi_cta_attention` would return, its launch on the emulator; no tensor is empty."""
    out = contract.fake(a["q"], a["k"], a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"], softmax_scale=1.0)
    out.out.fill_(torch.nan), out.lse.fill_(torch.nan)
    arguments = launch_512.attend(
        a["q"],
        a["k"],
        a["v"],
        a["cu_seqlens_q"],
        a["cu_seqlens_k"],
        a.get("sink"),
        a.get("mask"),
        out,
        softmax_scale=a["softmax_scale"],
        causal=a["causal"],
        window=a["window"],
        entries=a.get("entries", 0),
        sms=SMS,
    )
    shape = shape or (MASKED if "mask" in a or "entries" in a else WIDE)
    shape = shape._replace(dtype=dtype_name(a["q"]))
    artifact = compiler.compile_kernel(kernel_512.spec(shape))
    ptxemu.run(artifact, *arguments, policy=policy, seed=seed).raise_for_findings()
    return out


def unlike(got: AttentionOutput, a: dict[str, Any]) -> list[compare.LeafResult]:
    results = compare.compare(compare.leaves(got), compare.leaves(reference(**a)), {**contract.BOUNDS, **D512})
    return [result for result in results if not result.passed]


@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_the_reference(name: str) -> None:
    given = inputs(name)
    assert not unlike(emulated(given), given)


@pytest.mark.parametrize("name", ["tails-and-empty-sequences", "full", "fp16", "heads-one-by-one"])
def test_one_cta_a_cluster_matches_the_reference(name: str) -> None:
    given = inputs(name)
    assert not unlike(emulated(given, NARROW), given)


@pytest.mark.parametrize("lk", [[50, 70, 30], [130, 9, 64]], ids=["one-tile", "tiles"])
@pytest.mark.parametrize(
    ("shape", "entries"),
    [(WIDE, 0), (NARROW, 0), (MASKED, 0), (MASKED, 7), (MASKED_NARROW, 7)],
    ids=["wide", "narrow", "masked", "entries", "entries-narrow"],
)
def test_no_nan_reaches_another_sequence(shape: Shape, entries: int, lk: list[int]) -> None:
    """Tiles reach behind a sequence's end, and 0 times NaN is NaN."""
    masked: dict[str, Any] = {"mask": 0.8, "entries": entries} if shape.masked else {}
    given = make(torch.Generator().manual_seed(0), head_dim=512, lq=[20, 5, 10], lk=lk, heads=2, **masked)
    clean = emulated(given, shape)
    for name in ("k", "v"):
        given[name][lk[0] : -lk[2]] = torch.nan
    got = emulated(given, shape, policy="random")
    own = [*range(20), *range(25, 35)]
    assert got.out[20:25].isnan().all()
    assert same_bytes(got.out[own], clean.out[own])
    assert same_bytes(got.lse[own], clean.lse[own])


@pytest.mark.parametrize("policy", ["lazy", "random"])
@pytest.mark.parametrize("name", ["several-tiles-of-keys", "group-of-7"])
def test_no_order_of_events_matters(name: str, policy: str) -> None:
    """Copies and products as late as they may be, warps in any order: the same bytes."""
    given = inputs(name)
    first, second = emulated(given), emulated(given, policy=policy, seed=5)
    assert same_bytes(first.out, second.out)
    assert same_bytes(first.lse, second.lse)


@cute.jit  # type: ignore[untyped-decorator]
def order_on_host(out: cute.Pointer, queries: Int32, heads: Int32, kv_heads: Int32, offsets: Int32) -> None:
    q, k = (cute.make_tensor(out, cute.make_layout((queries, n, DIM))) for n in (heads, kv_heads))
    order = kernel_512.order_of(q, k, cute.make_tensor(out, cute.make_layout(offsets)), Int32(132), WIDE)
    numbers = cute.make_tensor(out, cute.make_layout(3))
    numbers[0], numbers[1], numbers[2] = order


@functools.cache
def order_kernel() -> Callable[..., None]:
    pointer = make_ptr(Int32, 0, cute.AddressSpace.gmem, assumed_align=4)
    return cute.compile(order_on_host, pointer, *[Int32(1)] * 4)  # type: ignore[no-any-return]


class Divisor(NamedTuple):
    """Plain numbers in the place of the kernel's fast divisions."""

    divisor: int

    def __rdivmod__(self, number: int) -> tuple[int, int]:
        return divmod(number, self.divisor)


def loads(lengths: list[int], kv_heads: int) -> list[float]:
    """What each cluster has to do, in tiles of keys; a piece costs 2.6 more than its tiles (as measured)."""
    numbers = torch.zeros(3, dtype=torch.int32)
    pointer = make_ptr(Int32, numbers.data_ptr(), cute.AddressSpace.gmem, assumed_align=4)
    order_kernel()(pointer, sum(lengths), kv_heads, kv_heads, len(lengths) + 1)
    most, together, clusters = numbers.tolist()
    assert clusters == 66
    line = sorted((i for length in lengths for i in range(-(-length // (2 * ROWS)))), reverse=True)  # by levels
    taken = taken_by_clusters(kv_heads, len(line), most, together, clusters)
    return [sum(2 * (line[piece] + 1) + 2.6 for _, piece in own) for own in taken]


def taken_by_clusters(
    kv_heads: int, pieces: int, most: int, together: int, clusters: int
) -> list[list[tuple[int, int]]]:
    """The kv heads and numbers of the pieces that each cluster has, as `piece_of` finds them: all of them, each once.

    Args:
        kv_heads: Of the keys.
        pieces: That a kv head has.
        most: That it can have.
        together: Kv heads whose pieces come together; divides all.
        clusters: Of the launch.
    """
    turns = -(-most * together // clusters)
    number_at: Callable[..., Any] = turn_at  # plain ints here
    numbers_of: Callable[..., Order] = Order
    order = numbers_of(*map(Divisor, (most, together, clusters, turns)), kv_heads // together * turns)
    taken: list[list[tuple[int, int]]] = [[] for _ in range(clusters)]
    for cluster, turn in itertools.product(range(clusters), range(order.all_turns)):
        several, number = number_at(turn, cluster, order)
        piece, head = divmod(number, together)
        if piece < pieces:
            taken[cluster].append((several * together + head, piece))
    every = list(itertools.product(range(kv_heads), range(pieces)))
    assert sorted(itertools.chain.from_iterable(taken)) == every  # a list: one that two clusters have shows too
    return taken


def test_every_piece_of_every_head_is_taken_once() -> None:
    """Also where clusters do not divide the pieces, or there are more of them than pieces come together."""
    chosen = random.Random(0)
    for _ in range(400):
        kv_heads, most = chosen.randint(1, 24), chosen.randint(1, 90)
        together = chosen.choice([n for n in range(1, kv_heads + 1) if kv_heads % n == 0])
        clusters = chosen.randint(1, min(kv_heads * most, 80))
        taken_by_clusters(kv_heads, chosen.randint(0, most), most, together, clusters)


@pytest.mark.parametrize(
    ("lengths", "kv_heads"),
    [([8192, *[128] * 20], 16), ([9000], 16), ([8192, 2048], 16), ([3000], 16), ([7000], 8), ([4096, *[128] * 20], 16)],
    ids=["long-and-short", "two-turns-a-head", "two-sequences", "groups", "fewer-heads", "half-as-long"],
)
def test_clusters_have_as_much_to_do_as_each_other(lengths: list[int], kv_heads: int) -> None:
    done = loads(lengths, kv_heads)
    assert max(done) * len(done) / sum(done) < 1.02


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_scales_that_are_not_positive(scale: float) -> None:
    given = {**inputs("full"), "softmax_scale": scale}
    assert not unlike(emulated(given), given)


@pytest.mark.parametrize("shape", [shape._replace(dtype=dtype) for dtype in DTYPES for shape in SHAPES])
def test_compiles_within_a_minute_and_does_not_spill(shape: Shape) -> None:
    artifact = compiler.compile_kernel(kernel_512.spec(shape))
    assert artifact.seconds < 60
    assert not [k for k in kernels(artifact.cubin) if k.spills]


def test_registers_of_a_cta_are_those_of_its_launch() -> None:
    """Warpgroups that ask for more than the others gave back wait forever, which no emulator shows."""
    given = 65536 // THREADS // 8 * 8 * (THREADS // GROUP)
    assert given >= kernel_512.PRODUCER_REGISTERS + 2 * kernel_512.CONSUMER_REGISTERS


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_memory_holds_what_a_kernel_needs(shape: Shape) -> None:
    regions = [0, shape.weights_at, shape.ring_at, shape.barriers_at, shape.ready_at, shape.tops_at, shape.totals_at]
    regions += [shape.fetched_at, shape.record_at, shape.record_at + 32, shape.shared_bytes]
    assert regions == sorted(set(regions))
    assert shape.shared_bytes <= SHARED_BYTES
    assert shape.ring_at % BLOCK_BYTES == 0


def test_what_takes_which_kernel() -> None:
    assert shape_for(None) == shape_for(4096) == WIDE
    assert shape_for(128) == NARROW
    assert shape_for(128, masked=True) == MASKED_NARROW
    assert shape_for(None, masked=True) == MASKED
    assert shape_for(128, dtype="float16") == NARROW._replace(dtype="float16")
    assert not limits.supports({"head_dim": 512, "masked": True})
    assert not limits.supports({"dtype": "bfloat16", "head_dim": 512, "v_dim": 512})
    assert not limits.supports({"dtype": "float16", "head_dim": 512, "entries": True})
    assert "float32" in limits.supports({"dtype": "float32", "head_dim": 512})[0]
    assert "256" in limits.supports({"head_dim": 512, "v_dim": 256})[0]
