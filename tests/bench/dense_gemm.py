"""Times the dense NVFP4 GEMM, `grouped_gemm` of one expert, beside quack-kernels' `gemm_w4a16` on a GPU: a script.

    python -m tests.bench.dense_gemm --shape 8192 8192 --rows 1 16 64 256 1024 8192 --json dense.json

bf16 activations. Everything is captured in CUDA graphs over as many sets of weights as do not fit the L2 together.
Spaced (one replay after a rest) and sustained times, with the SM clock, as in `expert_layer`. Our result is compared
with the reference's before it is timed, quack's with ours. Without the package `quack` only our kernels are timed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from megamoe.numerics import fragments
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import op
from tests.bench import expert_layer
from tests.bench.expert_layer import Call, measure, random_weights

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES = ((8192, 8192), (4096, 8192), (1536, 4096))  # N, K; DeepSeek-V4 Flash's wo_b and its shared expert's like
ROTATED = 160e6  # bytes of weights in a graph
BOUND = 5e-3  # of two bf16 roundings


def calls(n: int, k: int, rows: int, generator: torch.Generator, fused: dict[str, str]) -> dict[str, list[Call]]:
    """What is timed, checked: name to a callable for each set of weights."""
    device = generator.device
    found: dict[str, list[Call]] = {"megamoe": []}
    a = torch.randn(rows, k, device=device, generator=generator).bfloat16()
    offsets = torch.tensor([0, rows], dtype=torch.int32, device=device)
    quack = importlib.import_module("quack.gemm_w4") if importlib.util.find_spec("quack") else None
    for number in range(max(1, round(ROTATED / (n * k * 9 / 16)))):
        plain = random_weights(generator, 1, n, k)
        prepared = plain.with_layout(fragments.HOPPER)
        ours = expert_layer.under(fused, partial(op("grouped_gemm"), a, prepared, offsets))
        if number == 0:
            _near("megamoe", ours(), op("grouped_gemm").reference(a, plain, offsets))
        found["megamoe"].append(ours)
        if quack:
            theirs = _quack(quack, a, plain)
            if number == 0:
                _near("quack", theirs(), ours())
            found.setdefault("quack", []).append(theirs)
    return found


def _quack(quack: Any, a: Tensor, plain: NVFP4Tensor) -> Call:
    blob, strip = quack.prepare_w4_weight(plain.codes[0], plain.scales[0], "nvfp4")
    out = torch.empty(a.shape[0], blob.shape[0] * 64, dtype=torch.bfloat16, device=a.device)
    scale = float(plain.global_scale_dec[0])
    return partial(quack.gemm_w4a16, a, blob, strip, scale, out, wformat="nvfp4")


def _near(name: str, got: Tensor, want: Tensor) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error <= BOUND:
        raise RuntimeError(f"{name}: relative error {error:.2e}")


def run(shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Measures all; prints and returns the points."""
    fused = expert_layer.fused_variants()
    generator = torch.Generator("cuda").manual_seed(1)
    typer.echo(f"{torch.cuda.get_device_name()}; variants {fused}")
    points: list[dict[str, Any]] = []
    for n, k in shapes:
        for m in rows:
            spaced, sustained, clocks = measure(calls(n, k, m, generator, fused))
            points.append({"n": n, "k": k, "rows": m, "spaced_us": spaced, "sustained_us": sustained, "sm_mhz": clocks})
            ratio = spaced.get("quack", 0.0) / spaced["megamoe"]
            text = "  ".join(f"{x} {us:8.2f} us ({sustained[x]:8.2f} at {clocks[x]} MHz)" for x, us in spaced.items())
            rates = (
                f"{2e-6 * m * n * k / spaced['megamoe']:6.1f} TFLOP/s {n * k * 9 / 16e6 / spaced['megamoe']:5.2f} TB/s"
            )
            typer.echo(f"{n} x {k}, M = {m:5}: {text}  {rates}  {ratio:.2f}x")
    return points


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    points = run(options.shape or SHAPES, options.rows)
    if options.json:
        options.json.write_text(json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    main()
