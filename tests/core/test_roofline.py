"""The bandwidth sweep's table, file and plot, from made-up points; the measuring itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from megamoe.cli import main
from megamoe.errors import MegamoeError
from megamoe.ops import op
from megamoe.runtime import runtime
from megamoe.testing import rivals, roofline
from megamoe.testing.roofline import Point

POINTS = [
    Point("quantize", "small", 10**6, {"fused": 4.0, "copy": 2.0}, 1980),
    Point("quantize", "large", 10**9, {"fused": 300.0, "fallback": 6000.0, "copy": 240.0}, 1755),
]


def test_table_gives_time_and_share_of_the_copy() -> None:
    head, _, small, large = roofline.table(POINTS).splitlines()
    assert head.startswith("| size | MB | copy us | TB/s | fused us (of the copy) | fallback us (of the copy) |")
    assert small == "| small | 1.00 | 2.00 | 0.50 | 4.00 (50%) |  |"
    assert large == "| large | 1000.00 | 240.00 | 4.17 | 300.00 (80%) | 6000.00 (4%) |"


def test_points_read_back_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "sweep.json", tmp_path / "bandwidth.png"
    roofline.write(POINTS, file)
    assert roofline.read(file) == POINTS
    assert main(["bench", "quantize", "--plot", str(picture), "--json", str(file)]) == 0
    assert capsys.readouterr().out == roofline.table(POINTS) + "\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_each_model_and_layout_has_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of two models lie between each other: one line through all would go up and down."""
    drawn: dict[str, list[float]] = {}
    plot = Axes.plot

    def watched(self: Axes, x: list[float], y: list[float], *style: Any, label: str, **options: Any) -> Any:
        drawn[label] = x
        return plot(self, x, y, *style, label=label, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    sizes = {"flash 4x4096 linear": 3, "pro 4x7168 linear": 5, "flash 8x4096 linear": 6, "flash 4x4096 128x4": 4}
    us = {"copy": 1.0, "fused": 2.0}
    points = [
        Point("mhc_quant", case, n * 10**6, us | {"fallback": 9.0} if n > 4 else us, 1980) for case, n in sizes.items()
    ]
    roofline.plot(points, tmp_path / "sweep.png")
    assert drawn == {
        "copy": [3, 4, 5, 6],
        "fused flash linear": [3, 6],
        "fused flash 128x4": [4],
        "fused pro linear": [5],
        "fallback flash linear": [6],
        "fallback pro linear": [5],
    }
    drawn.clear()
    roofline.plot([Point("moe_combine", f"pro {n}x6x4096", n * 10**6, us, 1980) for n in (2, 1)], tmp_path / "s.svg")
    assert drawn == {"copy": [1, 2], "fused pro": [1, 2]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quantize", "--sweep"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(MegamoeError, match="needs a GPU"):
        next(roofline.sweep(runtime().stages["quantize"]))


def test_flops_give_the_nearer_of_two_roofs(tmp_path: Path) -> None:
    points = [
        Point("grouped_gemm", "L2 T 1", 10**6, {"fused": 2.0, "copy": 1.5, "matmul": 0.5}, 1980, 10**7, "a GPU"),
        Point("grouped_gemm", "L2 T 64", 10**6, {"fused": 8.0, "copy": 1.5, "matmul": 4.0}, 1980, 10**9, "a GPU"),
    ]
    assert [p.roof for p in points] == ["copy", "matmul"]
    head, _, small, large = roofline.table(points).splitlines()
    assert head == "| size | GFLOP | MB | roof us | fused us (TFLOP/s, of the roof) |"
    assert small == "| L2 T 1 | 0.01 | 1.00 | 1.50 (copy) | 2.00 (5, 75%) |"
    assert large == "| L2 T 64 | 1.00 | 1.00 | 4.00 (matmul) | 8.00 (125, 50%) |"
    roofline.plot(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_activation_of_swiglu_quant_is_swept() -> None:
    """4.5625 bytes a result; what torch.compile gets gives the right codes."""
    subject = roofline.subject_of(runtime().stages["swiglu_quant"])
    inputs = subject.cases["flash 64x2048 128x4"].inputs("flash 64x2048 128x4")
    assert subject.bytes_moved(**inputs) == 64 * 2048 * 4.5625
    assert subject.compiled is not None
    got, want = subject.compiled(**inputs), subject.expected(**inputs)
    assert torch.equal(got.codes, want.codes)
    assert set(subject.calls(**inputs)) == {"fused_act", "fallback"}


def test_an_op_without_sizes_or_an_unknown_part_is_not_swept() -> None:
    with pytest.raises(MegamoeError, match="no SWEEP"):
        roofline.subject_of(runtime().stages["moe_route"])
    with pytest.raises(MegamoeError, match="no part of swiglu_quant's sweep 'expert'; did you mean 'experts'"):
        roofline.subject_of(runtime().stages["swiglu_quant"], "expert")


def test_words_that_no_size_has() -> None:
    subject = roofline.subject_of(runtime().stages["quantize"])
    assert list(roofline.sizes(subject, "pro linear 64x")) == ["pro 64x7168 linear"]
    with pytest.raises(MegamoeError, match="no size's name holds all of 'profi'; there are: flash"):
        roofline.sizes(subject, "profi")


def test_options_of_a_sweep_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quantize", "--only", "pro"]) == 2
    assert "--only: goes with --sweep" in " ".join(capsys.readouterr().err.split())


def test_a_rival_that_nothing_runs_is_left_out() -> None:
    q = torch.zeros(1, 1, 4, 8)
    assert rivals.sdpa(q, torch.zeros(1, 1, 4, 16), q, scale=1.0) == {}


_GEMM = {"model": "tiny", "tokens": 5}
_ATTENTION = {"lq": [20], "lk": [20], "heads": 2, "kv_heads": 2, "head_dim": 64}
_V4 = {"lengths": [40, 16], "new": None, "heads": 4, "kv_heads": 1, "head_dim": 64, "shared": True, "window": 8}
# stage, part, arguments of its maker, bytes moved, flops
SMALL: list[tuple[str, str | None, dict[str, Any], int | None, int]] = [
    ("grouped_gemm", None, {**_GEMM, "kind": "bf16"}, None, 2 * 30 * 128 * 64),
    ("grouped_gemm", None, {**_GEMM, "kind": "nvfp4"}, None, 2 * 30 * 128 * 64),
    ("swiglu_quant", "experts", {**_GEMM, "kind": "nvfp4"}, None, 2 * 30 * 128 * 128),
    ("multi_cta_attention", None, _ATTENTION, 2 * 4 * 20 * 2 * 64 + 4 * 40, 2 * 2 * 210 * 128),
    ("multi_cta_attention", None, {**_ATTENTION, "window": 3, "sink": True}, None, 2 * 2 * (20 * 3 - 3) * 128),
    ("attention_quant", None, {**_ATTENTION, "groups": 1}, 2 * 3 * 20 * 2 * 64 + 4 * 40 + 40 * 36, 2 * 2 * 210 * 128),
    ("fp4_kv_decode", None, {"lengths": [64] * 2, "new": None, "head_dim": 32}, 2 * 128 * 36, 2 * 128 * 4 * 64),
    ("fp4_kv_decode", None, _V4, 16 * 36, 2 * 16 * 4 * 128),
    ("fp4_kv_decode", None, {**_V4, "extra": [40, 40], "extra_picked": 8}, 28 * 36, 2 * 28 * 4 * 128),
]


@pytest.mark.parametrize(("name", "part", "params", "moved", "flops"), SMALL)
def test_what_a_sweep_times_is_right(
    name: str, part: str | None, params: dict[str, Any], moved: int | None, flops: int
) -> None:
    """Small sizes on the CPU: rivals give what the op's reference gives, work is counted as it is done."""
    subject = replace(roofline.subject_of(runtime().stages[name], part), expected=op(name).reference)
    make = next(iter(subject.cases.values())).make
    first, second = (make(torch.Generator().manual_seed(seed), **params) for seed in (0, 1))
    timed = roofline.checked(subject, "small", [first, second])
    assert "fallback" in timed
    assert all(len(calls) == 2 for calls in timed.values())
    if name in ("multi_cta_attention", "fp4_kv_decode") and not params.get("window"):
        assert any(rival.startswith("SDPA") for rival in timed)
    assert subject.flops is not None
    assert subject.flops(**first) == flops
    if moved is not None:
        assert subject.bytes_moved(**first) == moved


def test_a_wrong_variant_is_not_timed() -> None:
    subject = replace(
        roofline.subject_of(runtime().stages["moe_combine"]),
        calls=lambda outputs, rows, weights, dtype=None: {"wrong": lambda: outputs[: rows.shape[0]].clone()},
    )
    inputs = subject.cases["flash 8x6x4096"].inputs("any")
    with pytest.raises(MegamoeError, match=r"small: wrong is wrong, so it is not timed: out: .* bytes differ"):
        roofline.checked(subject, "small", [inputs])


def test_bytes_moved_are_those_of_the_issue() -> None:
    """2.5625 a value of quantize and inverse_rope_quant, 20.5625 a token and hidden dim of mhc_quant."""
    from megamoe_stages.inverse_rope_quant.cases import make as rope
    from megamoe_stages.mhc_quant.cases import make as mhc
    from megamoe_stages.quantize.cases import make as quantize

    generator = torch.Generator().manual_seed(0)
    for name, inputs, values, each in (
        ("quantize", quantize(generator, shape=(4, 64)), 256, 2.5625),
        ("inverse_rope_quant", rope(generator, tokens=3), 3 * 4 * 128, 2.5625),
        ("mhc_quant", mhc(generator, tokens=2), 2 * 256, 20.5625),
    ):
        assert op(name)._contract.bytes_moved(**inputs) == values * each
