"""The bandwidth sweep's table, file and plot, from made-up points; the measuring itself needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamoe.cli import main
from megamoe.errors import MegamoeError
from megamoe.ops import op
from megamoe.runtime import runtime
from megamoe.testing import roofline
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quantize", "--sweep"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(MegamoeError, match="needs a GPU"):
        next(roofline.sweep(runtime().stages["quantize"]))


def test_a_part_of_an_op_can_be_swept() -> None:
    """The activation of swiglu_quant: 4.5625 bytes a result; what torch.compile gets gives the right codes."""
    subject = roofline.subject_of(runtime().stages["swiglu_quant"])
    inputs = subject.cases["flash 64x2048 128x4"].inputs("flash 64x2048 128x4")
    assert subject.bytes_moved(**inputs) == 64 * 2048 * 4.5625
    got, want = subject.fallback(**inputs), subject.expected(**inputs)
    assert torch.equal(got.codes, want.codes)
    assert set(subject.variants(inputs)) == {"fused_act", "fallback"}


def test_an_op_that_is_not_bound_by_memory_is_not_swept() -> None:
    with pytest.raises(MegamoeError, match="no SWEEP"):
        roofline.subject_of(runtime().stages["multi_cta_attention"])


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
