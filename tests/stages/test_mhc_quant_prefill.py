"""The mhc_quant kernel for many tokens without a GPU: who owns what, what compiles, what the emulator computes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import ptxemu
from megamoe.cute import arith, compiler, inspect, warp
from megamoe.cute.arith import Target
from megamoe.errors import ArgumentError
from megamoe.numerics import nvfp4
from megamoe_stages.mhc_quant import (
    limits,
    places,
    prefill_cut,
    prefill_kernel,
    prefill_launch,
    prefill_mix,
    reference,
    sm90_many,
)
from megamoe_stages.mhc_quant.cases import make
from megamoe_stages.mhc_quant.contract import BOUNDS

SHARED_MEMORY = 227 * 1024  # of a CTA on both architectures
HIDDEN = 4 * places.CHUNK


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
        (arith, "number", lambda word: word),
        (warp, "split_bf16", _split),
        (prefill_mix, "Int64", int),
    ):
        monkeypatch.setattr(module, name, plain)
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(8, 4, HIDDEN, generator=generator).bfloat16().double()
    fn = torch.randn(24, 4 * HIDDEN, generator=generator)
    values, dots = fn.flatten().tolist(), torch.zeros(24, 8, dtype=torch.float64)
    for piece in range(HIDDEN // places.CHUNK * limits.STREAMS):
        parts = torch.zeros(prefill_cut.PARTS, 32, 4, 2, dtype=torch.float64)
        for lane in range(32):
            of: Any = (piece, lane)
            starts: Any = [prefill_mix.source_of(of[0], g, of[1], cast("Any", 4 * HIDDEN)) for g in range(3)]
            for part, words in enumerate(prefill_mix.parts_of([values[at : at + 8] for at in starts], Target.HOST)):
                parts[part, lane] = torch.tensor(words, dtype=torch.float64)
        chunk, stream = divmod(piece, limits.STREAMS)
        first = chunk * places.CHUNK
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
    cut = prefill_launch.cut(hidden)
    assert cut.tiles * cut.wide * cut.ctas == cut.hidden == hidden
    assert cut.groups * cut.across == prefill_cut.WARPS and cut.chunks * cut.across * places.CHUNK == cut.wide
    assert cut.owned * cut.ctas == cut.batch and cut.owned % prefill_cut.WARPS == 0  # tokens for every warp
    assert cut.steps % prefill_kernel.STEPS == 0  # whose lines are in registers
    assert cut.runs * prefill_cut.RUN == hidden and cut.runs % prefill_cut.AHEAD == 0
    assert cut.shared_bytes <= SHARED_MEMORY
    assert cut.fn_bytes % 128 == cut.sums_at % 16 == cut.tile_at % 16 == cut.barriers_at % 8 == 0


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100])
def test_the_kernel_for_flash_compiles_without_spills(target: Target) -> None:
    artifact = compiler.compile_kernel(prefill_kernel.spec(prefill_launch.cut(4096), "float32", target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 65536 // prefill_launch.cut(4096).threads
    assert "cp.async.bulk.shared" in artifact.ptx


@pytest.mark.parametrize(("policy", "hidden", "tokens"), [("lazy", 1024, 131), ("random", 1024, 70)])
def test_the_emulated_kernel_computes_several_turns_and_races_nowhere(policy: str, hidden: int, tokens: int) -> None:
    """PTX run by `ptxemu`, whose copies arrive as late as they may: one cluster has several batches."""
    clusters = 1
    inputs = make(torch.Generator().manual_seed(0), tokens=tokens, hidden=hidden, scale_layout="128x4", trouble=True)
    layout = inputs.pop("scale_layout")
    want = reference.mhc_quant(**inputs, scale_layout=layout)
    quantized = [want.quantized.codes, want.quantized.scales.view(torch.uint8), want.quantized.global_scale_dec]
    residual, normed, codes, scales, dec, post, comb = written = [
        torch.full_like(tensor, 7) for tensor in (want.residual, want.normed, *quantized, want.post, want.comb)
    ]
    cut = prefill_launch.cut(hidden)
    pieces = torch.zeros(prefill_mix.piece_bytes(hidden), dtype=torch.uint8)
    order = ptxemu.run(compiler.compile_kernel(prefill_mix.spec(Target.SM90)), inputs["fn"], pieces)
    artifact = compiler.compile_kernel(prefill_kernel.spec(cut, "float32", Target.SM90))
    numbers = (20, 1e-6, 1e-6, 1, clusters)
    report = ptxemu.run(artifact, *inputs.values(), *written, pieces, *numbers, policy=policy, seed=1)
    assert not order.findings and not report.findings
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


@pytest.mark.parametrize("params", [{"hidden": 512, "tokens": 64}, {"hidden": 3072, "tokens": 48}])
def test_what_the_kernel_cannot_do_is_refused_before_a_launch(params: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="H"):
        sm90_many.mhc_quant(**make(torch.Generator().manual_seed(0), **params))
