"""The mhc_quant kernel for the models' hidden dims without a GPU: ownership, what compiles, what it computes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import cutlass.utils
import pytest
import torch

import ptxemu
from megamoe.cute import arith, compiler, inspect, warp
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe.numerics import nvfp4
from megamoe_stages.mhc_quant import (
    launch,
    limits,
    narrow_places,
    reference,
    wide_cut,
    wide_kernel,
    wide_make,
    wide_mix,
)
from megamoe_stages.mhc_quant.cases import make
from megamoe_stages.mhc_quant.contract import BOUNDS
from megamoe_stages.mhc_quant.wide_cut import Cut, Spot
from tests.stages.mhc_split import split_bf16

SHARED_MEMORY = 227 * 1024  # of a CTA on both architectures
FLASH, PRO = (wide_cut.cut(hidden) for hidden in (4096, 7168))


def _spots(cut: Cut, lanes: int, rank: int = 0) -> list[list[Spot]]:
    """Those of a CTA's threads that make, or that finish, so many lanes at a time."""
    of: Any = [(rank, w, lane, w // cut.halves, w % cut.halves) for w in range(cut.busy) for lane in range(32)]
    return [[Spot(*spot) for spot in of[i : i + lanes]] for i in range(0, len(of), lanes)]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`mma` as PTX lays out its operands, of the registers of 32 lanes: (32, 4, 2) and (32, 2, 2) to (16, 8)."""
    a = left.view(8, 4, 2, 2, 2).permute(3, 0, 2, 1, 4).reshape(16, 16)  # row half, g; column half, q
    return a @ right.view(8, 4, 2, 2).permute(2, 1, 3, 0).reshape(16, 8)


@pytest.mark.parametrize("cut", [FLASH._replace(ctas=2), PRO._replace(ctas=2)])
def test_operands_are_where_mma_wants_them(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follows each lane's values through `mma`, of the second of two CTAs. fn keeps 16 bits: 2^-17 off."""
    monkeypatch.setattr(arith, "number", lambda word: word)
    monkeypatch.setattr(warp, "split_bf16", split_bf16)
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(cut.group, 4, cut.hidden, generator=generator).bfloat16().double()
    fn = torch.randn(24, 4 * cut.hidden, generator=generator)
    values, dots = fn.flatten().tolist(), torch.zeros(24, cut.group, dtype=torch.float64)
    for lanes in _spots(cut, 32, rank=1):
        for number, stream in itertools.product(range(wide_cut.PASSES), range(4)):
            parts = torch.zeros(6, 32, 4, 2, dtype=torch.float64)
            held = torch.zeros(32, 4, 2, dtype=torch.float64)
            for lane, here in enumerate(lanes):
                token, eight = here.made(number, cut)
                starts: Any = [wide_make.source_of(g, stream, eight, here, cut) for g in range(3)]
                for part, words in enumerate(wide_mix.parts_of([values[a : a + 8] for a in starts], Target.HOST)):
                    parts[part, lane] = torch.tensor(words, dtype=torch.float64)
                dims: Any = cut.dims + here.tile * wide_cut.TILE + eight * 8
                held[lane] = streams[token, stream, dims : dims + 8].view(4, 2)
            tokens = [8 * (number // cut.sides) + wide_cut.token_of(column) for column in range(8)]
            for half in range(2):
                leading, mixed, small = (
                    _product(parts[half * 3 + i], held[:, half * 2 : half * 2 + 2]) for i in range(3)
                )
                dots[:16, tokens] += leading + small
                dots[16:, tokens] += mixed[:8] + mixed[8:]
    ours, theirs = (x.view(-1, 4, 2, cut.dims)[:, :, 1].flatten(1).double() for x in (fn, streams))
    most = 2**-16 * (ours.abs() @ theirs.abs().T)
    assert bool(((dots - ours @ theirs.T).abs() <= most).all())
    assert not torch.allclose(dots, ours @ theirs.T, rtol=1e-9)  # so the bound above is not that of something else


@pytest.mark.parametrize("hidden", limits.WIDE)
def test_a_cut_covers_the_hidden_dims_and_fits(hidden: int) -> None:
    cut = wide_cut.cut(hidden)
    assert cut.ctas * cut.dims == cut.hidden == hidden
    assert cut.busy <= wide_cut.WARPS and cut.halves * wide_cut.EIGHT == cut.group
    assert cut.owned * cut.ctas >= cut.group and cut.owned < cut.busy  # the first of these warps loads
    assert cut.shared_bytes <= SHARED_MEMORY
    assert cut.stage_bytes % 1024 == cut.stream_bytes % 1024 == 0
    assert cut.factors_at % 16 == cut.fn_at % 16 == cut.partial_at % 16 == cut.sums_at % 16 == cut.arrived_at % 16 == 0
    assert (
        cut.pre_at % 16
        == cut.tile_squares_at % 16
        == cut.squares_at % 16
        == cut.norm_at % 16
        == cut.barriers_at % 8
        == 0
    )


@pytest.mark.parametrize("cut", [FLASH, PRO])
def test_every_eight_is_made_and_finished_once(cut: Cut) -> None:
    every = set(itertools.product(range(cut.tiles), range(cut.group), range(8)))
    (spots,) = _spots(cut, cut.busy * 32)
    made = [(s.tile, *s.made(number, cut)) for s in spots for number in range(wide_cut.PASSES)]
    finished = [(s.tile, s.token, 2 * s.quad + j) for s in spots for j in range(2)]
    for found in (made, finished):
        assert set(found) == every and len(found) == len(every)


@pytest.mark.parametrize("cut", [FLASH, PRO])
def test_eight_lanes_find_no_bank_twice(cut: Cut) -> None:
    """16 bytes a lane are moved for eight lanes at once."""
    zero: Any = 0
    for lanes in _spots(cut, 8):
        for number in range(2):
            making = [(s.tile, *s.made(number, cut)) for s in lanes]
            finishing = [(s.tile, s.token, 2 * s.quad + number) for s in lanes]
            for places in (making, finishing):
                banks = {wide_cut.in_stage(zero, zero, *place, cut) // 16 % 8 for place in places}
                assert len(banks) == 8


@pytest.mark.parametrize("cut", [FLASH, PRO])
def test_sums_lie_where_they_are_looked_for(cut: Cut) -> None:
    columns: Any = list(itertools.product(range(cut.halves), range(8)))
    places = [wide_cut.place_of(column, half, cut) for half, column in columns]
    assert sorted(places, key=int) == list(range(cut.group))
    for (half, column), place in zip(columns, places, strict=True):
        token = wide_cut.token_of(column) + wide_cut.EIGHT * half
        assert wide_cut.token_at(place // 4, int(place % 4), cut) == token


def test_hidden_dims_decide_which_kernel_computes_them() -> None:
    assert all(isinstance(launch.cut(hidden), Cut) for hidden in limits.WIDE)
    assert all(isinstance(launch.cut(hidden), narrow_places.Shape) for hidden in (16, 208, *limits.NARROW))


@pytest.mark.parametrize("found", [0, 1])
def test_a_device_without_room_for_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch, found: int) -> None:
    info = SimpleNamespace(get_max_active_clusters=lambda ctas: found)
    monkeypatch.setattr(cutlass.utils, "HardwareInfo", lambda index: info)
    launch.clusters_at_once.cache_clear()
    device = torch.device("cuda", 0)
    if found:
        assert launch.clusters_at_once(16, device) == found
    else:
        with pytest.raises(ArgumentError, match="x: got cuda:0, where no cluster of 16 CTAs fits") as refused:
            launch.clusters_at_once(16, device)
        assert refused.value.argument == "x"
    launch.clusters_at_once.cache_clear()


@pytest.mark.parametrize("norm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "target"), list(itertools.product((4096, 7168), (Target.SM90, Target.SM100))))
def test_the_kernel_compiles_without_spills(hidden: int, target: Target, norm_dtype: str) -> None:
    artifact = compiler.compile_kernel(wide_kernel.spec(wide_cut.cut(hidden), norm_dtype, target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 65536 // wide_cut.THREADS
    assert "cp.async.bulk.tensor" in artifact.ptx and "setmaxnreg" in artifact.ptx


@pytest.mark.parametrize(
    ("policy", "cut", "tokens", "layout", "target"),
    [
        ("lazy", wide_cut.cut(1024), 101, "128x4", Target.SM90),
        ("random", FLASH._replace(ctas=2), 90, "linear", Target.SM90),
        ("lazy", PRO._replace(ctas=2), 45, "128x4", Target.SM90),
        ("lazy", FLASH._replace(ctas=2), 90, "128x4", Target.SM100),
        ("eager", PRO._replace(ctas=2), 45, "linear", Target.SM100),
    ],
)
def test_the_emulated_kernel_computes_several_turns_and_races_nowhere(
    policy: str, cut: Cut, tokens: int, layout: str, target: Target
) -> None:
    """PTX run by `ptxemu`, whose copies arrive as late as they may: one cluster has more groups than stages."""
    clusters = 1
    inputs = make(torch.Generator().manual_seed(0), tokens=tokens, hidden=cut.hidden, scale_layout=layout, trouble=True)
    del inputs["scale_layout"]
    want = reference.mhc_quant(**inputs, scale_layout=layout)
    quantized = [want.quantized.codes, want.quantized.scales.view(torch.uint8), want.quantized.global_scale_dec]
    residual, normed, codes, scales, dec, post, comb = written = [
        torch.full_like(tensor, 7) for tensor in (want.residual, want.normed, *quantized, want.post, want.comb)
    ]
    assert -(-tokens // cut.group) > cut.stages
    artifact = compiler.compile_kernel(wide_kernel.spec(cut, "float32", target))
    numbers = (20, 1e-6, 1e-6, int(layout == "128x4"), clusters)
    report = ptxemu.run(artifact, *inputs.values(), *written, *numbers, policy=policy, seed=1)
    assert not report.findings
    for name, got in (("residual", residual), ("normed", normed), ("post", post), ("comb", comb)):
        assert _distance(got, getattr(want, name)) <= BOUNDS[name].rel_l2, name
    own = nvfp4.quantize(normed, inputs["global_scale_enc"], scale_layout=layout)
    assert torch.equal(own.codes, codes) and torch.equal(own.scales.view(torch.uint8), scales)
    assert torch.equal(dec, want.quantized.global_scale_dec)


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance where both are numbers; infinite where a NaN or an infinity is in one only."""
    a, b = got.double(), want.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    there = b.isfinite()
    return float((a[there] - b[there]).norm() / b[there].norm())
