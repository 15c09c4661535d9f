"""The mhc_quant kernel for few hidden dims without a GPU, and what both fused kernels refuse."""

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
from megamoe_stages.mhc_quant import limits, narrow_kernel, reference, sm90, sm100
from megamoe_stages.mhc_quant import narrow_mix as mix
from megamoe_stages.mhc_quant import narrow_places as places
from megamoe_stages.mhc_quant.cases import CASES, make
from megamoe_stages.mhc_quant.contract import BOUNDS
from megamoe_stages.mhc_quant.narrow_places import Shape
from tests.stages.mhc_split import split_bf16

SHARED_MEMORY = 227 * 1024  # of a CTA on both architectures
UNITS = 2
HIDDEN = UNITS * places.UNIT  # two warps' worth


def _inputs(**params: Any) -> dict[str, Any]:
    return make(torch.Generator().manual_seed(0), **{"tokens": 3, "hidden": 32, **params})


def _stored(fn: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What a CTA of two warps a team keeps of fn (24, 4 * HIDDEN): (slots, registers, values of one)."""
    for module, name, plain in (
        (arith, "select", lambda condition, yes, no: yes if condition else no),
        (arith, "number", lambda word: word),
        (warp, "split_bf16", split_bf16),
        (mix, "Int32", int),
        (mix, "Uint32", lambda _: (0.0, 0.0)),
    ):
        monkeypatch.setattr(module, name, plain)
    shape = Shape(1, 1, UNITS, whole=True)
    given: Any = None  # H is known where the slices are whole
    slots = torch.full((UNITS * places.PIECES * places.PARTS * 32, 4, 2), torch.nan, dtype=torch.float64)
    values = fn.flatten().tolist()
    places_of_lanes: Any = itertools.product(range(UNITS * places.PIECES), range(32))
    for piece, lane in places_of_lanes:
        starts: Any = [mix.source_of(piece, group, lane, cast("Any", 0), given, shape)[0] for group in range(3)]
        for part, four in enumerate(mix.parts_of([values[at : at + 8] for at in starts], Target.HOST)):
            slot: Any = mix.slot_of(piece, part, lane)
            assert slots[slot].isnan().all()  # written once
            slots[slot] = torch.tensor(four, dtype=torch.float64)
    assert not slots.isnan().any()
    return slots


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`mma` as PTX lays out its operands, of the registers of 32 lanes: (32, 4, n) and (32, 2, n) to (16, 8)."""
    n = left.shape[-1]
    a = left.view(8, 4, 2, 2, n).permute(3, 0, 2, 1, 4).reshape(16, 8 * n)  # row half, g; column half, q
    return a @ right.view(8, 4, 2, n).permute(2, 1, 3, 0).reshape(8 * n, 8)


def test_operands_are_where_mma_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follows each lane's values of the streams and of fn through `mma` as PTX lays it out."""
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(8, 4, HIDDEN, generator=generator, dtype=torch.float64)
    fn = torch.randn(24, 4 * HIDDEN, generator=generator)
    slots, dots = _stored(fn, monkeypatch), torch.zeros(24, 8, dtype=torch.float64)
    for unit, stream, chunk in itertools.product(range(UNITS), range(4), range(2)):
        piece = unit * places.PIECES + stream * 2 + chunk
        of = slots.view(-1, places.PARTS, 32, 4, 2)[piece]
        first = unit * places.UNIT + chunk * places.CHUNK
        words = streams[:, stream, first : first + places.CHUNK].reshape(32, 4, 2)  # lane, word, half
        for half in range(2):
            steps = [_product(of[half * 5 + i], words[:, half * 2 : half * 2 + 2]) for i in range(5)]
            hi, last, mid, lo, last_lo = steps
            dots[:16] += hi + mid + lo
            dots[16:] += last[:8] + last[8:] + last_lo[8:]
            assert not last_lo[:8].any()
    assert torch.allclose(dots, fn.double() @ streams.flatten(1).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden", [16, 32, 208, *limits.NARROW])
def test_a_cluster_covers_the_hidden_dims_and_fits(hidden: int) -> None:
    shape = places.cut(hidden)
    assert shape.covers >= hidden and shape.whole == (shape.covers == hidden)
    assert shape.shared_bytes <= SHARED_MEMORY
    assert shape.owned * shape.ctas == places.GROUP
    assert shape.team >= places.GROUP * (limits.STREAMS + 1)  # a thread copies 16 bytes of the factors
    assert shape.team >= places.GROUP // 4 * shape.ctas  # and sends four sums of squares
    assert shape.team_words % 4 == 0  # 16 bytes at once


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"streams": 2}, "2 streams"),
        ({"hidden": 7184}, "H = 7184"),
        ({"hidden": 272}, "H = 272"),
        ({"hidden": 5120}, "H = 5120: the kernels have any up to 256, and 512, 1024, 2048, 4096, 7168"),
        ({"rows": 2**17, "hidden": 4096}, "about 131072 tokens of 4096: the kernels count up to 536870911 values"),
    ],
)
def test_limits_name_the_reason(facts: dict[str, Any], reason: str) -> None:
    (found,) = limits.supports(facts)
    assert reason in found


def test_limits_take_the_models() -> None:
    assert limits.supports({}) == []
    for hidden, rows in itertools.product((4096, 7168), (1, 65536)):
        facts: dict[str, str | int] = {"dtype": "bfloat16", "streams": 4, "hidden": hidden, "rows": rows}
        assert limits.supports(facts) == []


@pytest.mark.parametrize("variant", [sm90.mhc_quant, sm100.mhc_quant])
@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"streams": 2}, "2 streams"),
        ({"hidden": 7184}, "H = 7184"),
        ({"hidden": 528}, "H = 528"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_before_a_launch(
    variant: Any, params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ArgumentError, match=reason):
        variant(**_inputs(**params))


@pytest.mark.parametrize("name", ["x", "f", "post", "comb", "fn", "norm_weight"])
def test_unaligned_data_is_refused_by_name(name: str) -> None:
    inputs = _inputs()
    tensor = inputs[name]
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    with pytest.raises(ArgumentError, match=f"{name}.*multiple of 16"):
        sm90.mhc_quant(**{**inputs, name: moved.copy_(tensor)})


@pytest.mark.parametrize("scale_layout", ["linear", "128x4"])
def test_no_tokens_need_no_launch(scale_layout: str) -> None:
    inputs = _inputs(tokens=0, scale_layout=scale_layout)
    out = sm90.mhc_quant(**inputs)
    assert out.residual.shape == (0, 4, 32) and out.quantized.codes.shape == (0, 16)
    assert out.quantized.global_scale_dec == 1 / inputs["global_scale_enc"]


def test_every_bf16_case_of_four_streams_is_supported() -> None:
    for name, case in CASES.items():
        params = dict(case.params)
        dtype = str(params.get("dtype", torch.bfloat16)).removeprefix("torch.")
        facts: dict[str, Any] = {
            "dtype": dtype,
            "streams": params.get("streams", 4),
            "hidden": params.get("hidden", 256),
        }
        assert (not limits.supports(facts)) == (dtype == "bfloat16" and facts["streams"] == 4), name


@pytest.mark.parametrize("module", [sm90, sm100])
def test_declared_kernels_have_names_of_their_own(module: Any) -> None:
    names = [spec.name for spec in module.kernels()]
    assert len(set(names)) == len(names)
    assert {spec.arch for spec in module.kernels()} == {"sm_90a" if module is sm90 else "sm_100a"}
    assert {f"mhc_quant_wide_{h}_{dtype}" for h in (4096, 7168) for dtype in ("float32", "bfloat16")} <= set(names)


@pytest.mark.parametrize("target", [Target.SM90, Target.SM100])
def test_the_kernel_of_two_ctas_compiles_without_spills(target: Target) -> None:
    shape = places.cut(512)
    assert shape.ctas == 2
    artifact = compiler.compile_kernel(narrow_kernel.spec(shape, "float32", target))
    (found,) = inspect.kernels(artifact.cubin)
    assert not found.spills
    assert found.registers <= 65536 // (shape.all_warps * 32)
    assert "st.async" in artifact.ptx and "mma.sync.aligned.m16n8k16" in artifact.ptx


def test_the_emulated_kernel_computes_a_case_and_races_nowhere() -> None:
    """PTX run by `ptxemu`, whose asynchronous copies and stores arrive as late as they may."""
    tokens, hidden = 19, 208
    inputs = _inputs(tokens=tokens, hidden=hidden, scale_layout="128x4")
    layout = inputs.pop("scale_layout")
    want = reference.mhc_quant(**inputs, scale_layout=layout)
    read = tuple(inputs.values())
    quantized = [want.quantized.codes, want.quantized.scales.view(torch.uint8), want.quantized.global_scale_dec]
    residual, normed, codes, scales, dec, post, comb = written = [
        torch.full_like(tensor, 7) for tensor in (want.residual, want.normed, *quantized, want.post, want.comb)
    ]
    artifact = compiler.compile_kernel(narrow_kernel.spec(places.cut(hidden), "float32", Target.SM90))
    report = ptxemu.run(artifact, *read, *written, 20, 1e-6, 1e-6, 1, 1, policy="lazy")
    assert not report.findings
    for name, got in (("residual", residual), ("normed", normed), ("post", post), ("comb", comb)):
        reached = getattr(want, name).double()
        assert float((got.double() - reached).norm() / reached.norm()) <= BOUNDS[name].rel_l2, name
    own = nvfp4.quantize(normed, inputs["global_scale_enc"], scale_layout=layout)
    assert torch.equal(own.codes, codes) and torch.equal(own.scales.view(torch.uint8), scales)
    assert torch.equal(dec, want.quantized.global_scale_dec)
