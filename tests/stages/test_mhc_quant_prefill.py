"""The mhc_quant kernel for many tokens without a GPU: who owns what, what compiles, what the emulator computes."""

from __future__ import annotations

import itertools
from typing import Any, cast

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
    mix,
    places,
    prefill_cut,
    prefill_kernel,
    prefill_mix,
    reference,
    sm90_many,
)
from megamoe_stages.mhc_quant.cases import make
from megamoe_stages.mhc_quant.contract import BOUNDS
from megamoe_stages.mhc_quant.prefill_cut import Cut

SHARED_MEMORY = 227 * 1024  # of a CTA on both architectures
UNITS = 2
HIDDEN = UNITS * places.UNIT  # two warps' worth


def _split(low: float, high: float, target: Target) -> list[tuple[float, float]]:
    """`warp.split_bf16` on plain numbers."""
    del target
    terms, rest = [], torch.tensor([low, high])
    for _ in range(3):
        terms.append(rest.bfloat16().float())
        rest = rest - terms[-1]
    return [(float(term[0]), float(term[1])) for term in terms]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`mma` as PTX lays out its operands, of the registers of 32 lanes: (32, 4, 2) and (32, 2, 2) to (16, 8)."""
    a = left.view(8, 4, 2, 2, 2).permute(3, 0, 2, 1, 4).reshape(16, 16)  # row half, g; column half, q
    return a @ right.view(8, 4, 2, 2).permute(2, 1, 3, 0).reshape(16, 8)


def test_operands_are_where_mma_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follows each lane's values through `mma`; fn keeps 16 bits, so a product is 2^-17 off."""
    for module, name, plain in (
        (arith, "select", lambda condition, yes, no: yes if condition else no),
        (arith, "number", lambda word: word),
        (warp, "split_bf16", _split),
        (mix, "Int32", int),
    ):
        monkeypatch.setattr(module, name, plain)
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(8, 4, HIDDEN, generator=generator).bfloat16().double()
    fn = torch.randn(24, 4 * HIDDEN, generator=generator)
    values, dots = fn.flatten().tolist(), torch.zeros(24, 8, dtype=torch.float64)
    shape: Any = Cut(1, 1, UNITS, roomy=True).shape
    nothing: Any = None  # H is known where the slices are whole
    for piece in range(UNITS * places.PIECES):
        parts = torch.zeros(prefill_cut.PARTS, 32, 4, 2, dtype=torch.float64)
        for lane in range(32):
            starts: Any = [
                mix.source_of(cast("Any", piece), g, cast("Any", lane), cast("Any", 0), nothing, shape)[0]
                for g in range(3)
            ]
            for part, words in enumerate(prefill_mix.parts_of([values[at : at + 8] for at in starts], Target.HOST)):
                parts[part, lane] = torch.tensor(words, dtype=torch.float64)
        unit, stream, chunk = piece // places.PIECES, piece // 2 % 4, piece % 2
        first = unit * places.UNIT + chunk * places.CHUNK
        held = streams[:, stream, first : first + places.CHUNK].reshape(32, 4, 2)  # lane, word, half
        for half in range(2):
            leading, mixed, small = (_product(parts[half * 3 + i], held[:, half * 2 : half * 2 + 2]) for i in range(3))
            dots[:16] += leading + small
            dots[16:] += mixed[:8] + mixed[8:]
    want = fn.double() @ streams.flatten(1).T
    most = 2**-16 * (fn.abs().double() @ streams.abs().flatten(1).T)
    assert bool(((dots - want).abs() <= most).all())
    assert not torch.allclose(dots, want, rtol=1e-9)  # so the bound above is not that of something else


@pytest.mark.parametrize("hidden", limits.MANY_HIDDEN)
def test_a_cut_covers_the_hidden_dims_and_fits(hidden: int) -> None:
    cut = launch.cut_for_many(hidden)
    assert cut.hidden == hidden and cut.shape.covers == hidden
    assert cut.shared_bytes <= SHARED_MEMORY
    assert cut.owned * cut.ctas == places.GROUP
    assert cut.owned * cut.sharers == cut.warps  # every warp has its share of one token
    assert cut.team >= places.GROUP * (limits.STREAMS + 3)  # a thread sends four sums of a token, or its squares
    assert cut.staged_at % 128 == 0 and cut.staged_bytes % 128 == 0  # as the copy engine wants them
    assert places.GROUP * cut.teams <= limits.MANY  # every team has a group


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100])
def test_the_kernel_for_flash_compiles_without_spills(target: Target) -> None:
    artifact = compiler.compile_kernel(prefill_kernel.spec(launch.cut_for_many(4096), "float32", target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 65536 // (launch.cut_for_many(4096).all_warps * 32)
    assert "cp.async.bulk.tensor.3d" in artifact.ptx


def test_the_emulated_kernel_computes_several_turns_and_races_nowhere() -> None:
    """PTX run by `ptxemu`, whose copies arrive as late as they may; the counters are 0 again at the end."""
    tokens, hidden, sets = 70, 1024, 1
    inputs = make(torch.Generator().manual_seed(0), tokens=tokens, hidden=hidden, scale_layout="128x4")
    layout = inputs.pop("scale_layout")
    want = reference.mhc_quant(**inputs, scale_layout=layout)
    quantized = [want.quantized.codes, want.quantized.scales.view(torch.uint8), want.quantized.global_scale_dec]
    residual, normed, codes, scales, dec, post, comb = written = [
        torch.full_like(tensor, 7) for tensor in (want.residual, want.normed, *quantized, want.post, want.comb)
    ]
    cut = launch.cut_for_many(hidden)
    work = torch.zeros(cut.exchange_words * cut.teams * sets)
    artifact = compiler.compile_kernel(prefill_kernel.spec(cut, "float32", Target.SM90))
    report = ptxemu.run(artifact, *inputs.values(), *written, work, 20, 1e-6, 1e-6, 1, sets, policy="lazy")
    assert not report.findings
    for name, got in (("residual", residual), ("normed", normed), ("post", post), ("comb", comb)):
        reached = getattr(want, name).double()
        assert float((got.double() - reached).norm() / reached.norm()) <= BOUNDS[name].rel_l2, name
    own = nvfp4.quantize(normed, inputs["global_scale_enc"], scale_layout=layout)
    assert torch.equal(own.codes, codes) and torch.equal(own.scales.view(torch.uint8), scales)
    assert torch.equal(dec, want.quantized.global_scale_dec)
    ends = work.view(torch.int32).view(sets * cut.teams, cut.exchange_words)[:, -prefill_cut.LINE // 4 :]
    assert not ends.any()


def test_calls_of_a_stream_share_their_meeting_place_only_outside_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, device = launch.cut_for_many(1024), torch.device("cuda", 0)
    zeros, streams, capturing = torch.zeros, itertools.cycle([1, 1, 2]), [False]
    monkeypatch.setattr(launch, "_works", {})
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": next(streams)}))
    first, second, other = (launch._work(cut, 1, device) for _ in range(3))
    assert first is second and first is not other
    capturing[0] = True
    assert launch._work(cut, 1, device) is not launch._work(cut, 1, device)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"hidden": 512}, "H = 512: the kernel has 1024, 2048, 4096, 7168"),
        ({"hidden": 4096, "rows": 256}, "about 256 tokens"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_limits_name_the_reason(facts: dict[str, Any], reason: str) -> None:
    (found,) = limits.supports_many(facts)
    assert reason in found


def test_limits_take_the_models() -> None:
    for hidden in (4096, 7168):
        assert limits.supports_many({"dtype": "bfloat16", "streams": 4, "hidden": hidden, "rows": 8192}) == []


@pytest.mark.parametrize("params", [{"hidden": 512, "tokens": 64}, {"hidden": 1024, "tokens": 48}])
def test_what_the_kernel_cannot_do_is_refused_before_a_launch(params: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="64 tokens and more"):
        sm90_many.mhc_quant(**make(torch.Generator().manual_seed(0), **params))
