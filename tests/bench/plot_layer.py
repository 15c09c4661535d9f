"""Draws what `expert_layer` measured, time against tokens beside the floor, and prints its table: a script.

python -m tests.bench.plot_layer layer.json stages/megamoe_stages/swiglu_quant/experts.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import typer

BANDWIDTH, FLOPS = 4.6e12, 686e12  # of an H200, sustained: the floor
CURVES = {
    "experts w4a16": ("bf16 activations", "C0", "o-"),
    "experts w4a4": ("NVFP4 activations", "C1", "s-"),
    "experts bf16": ("bf16 weights, torch grouped_mm", "C2", "^--"),
    "experts fallback": ("fallback", "C3", "v--"),
}


def draw(known: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the spaced times of L1 and L2 together.

    Args:
        known: What `expert_layer` wrote.
        path: Of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted((p for p in known["points"] if "spaced_us" in p), key=lambda p: p["tokens"])
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, (label, color, style) in CURVES.items():
        found = [(p["tokens"], p["spaced_us"][name]) for p in points if name in p["spaced_us"]]
        if found:
            axes.loglog(*zip(*found, strict=True), style, color=color, label=label, markersize=4)
    floor = [max(p["weight_bytes"] / BANDWIDTH, p["flops"] / FLOPS) * 1e6 for p in points]
    axes.loglog([p["tokens"] for p in points], floor, "k:", label="floor: live weights at 4.6 TB/s, 686 TFLOP/s")
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds, L1 and L2")
    axes.set_title(
        f"Experts of DeepSeek-V4 ({known['model']['hidden']} x {known['model']['intermediate']}), {known['device']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


ROWS = {  # what is measured, by its name in a table
    "experts w4a16": "L1 and L2, bf16 activations",
    "experts w4a4": "L1 and L2, NVFP4 activations",
    "experts bf16": "L1 and L2, bf16 weights: torch grouped_mm, compiled activation",
    "experts fallback": "L1 and L2, fallback",
    "L1 w4a16": "L1 fused, bf16",
    "L1 separate w4a16": "L1 as GEMM and activation, bf16",
    "L1 w4a4": "L1 fused, NVFP4",
    "L1 separate w4a4": "L1 as GEMM and activation, NVFP4",
    "L2": "L2",
    "permute": "permute",
    "combine": "combine",
    "layer w4a16": "permute, L1, L2, combine, bf16",
}


def table(known: dict[str, Any]) -> str:
    """Markdown: spaced microseconds, what fusing gains, shares of the layer, then sustained ones with the SM clock."""
    points = sorted((p for p in known["points"] if "spaced_us" in p), key=lambda p: p["tokens"])
    lines = ["| us | " + " | ".join(f"T = {p['tokens']}" for p in points) + " |", "|---" * (len(points) + 1) + "|"]

    def row(title: str, cells: list[str]) -> None:
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for name, title in ROWS.items():
        row(title, [f"{p['spaced_us'][name]:.1f}" if name in p["spaced_us"] else "" for p in points])
    for mode, title in (("w4a16", "bf16"), ("w4a4", "NVFP4")):
        fused, apart = f"L1 {mode}", f"L1 separate {mode}"
        both = [(p["spaced_us"].get(fused), p["spaced_us"].get(apart)) for p in points]
        row(f"fusing L1 gains, {title}", [f"{a / f - 1:+.1%}" if f and a else "" for f, a in both])
    shares = [
        (p["spaced_us"].get("permute"), p["spaced_us"].get("combine"), p["spaced_us"].get("layer w4a16"))
        for p in points
    ]
    row(
        "permute and combine alone, of the layer", [f"{(a + b) / c:.1%}" if a and b and c else "" for a, b, c in shares]
    )
    for name, title in ROWS.items():
        cells = [
            f"{p['sustained_us'][name]:.1f} ({p['sm_mhz'][name]})" if name in p["sustained_us"] else "" for p in points
        ]
        row(f"sustained (SM MHz): {title}", cells)
    return "\n".join(lines)


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("measured", type=Path, nargs="+", help="JSON files of one model; later ones add sizes")
    parser.add_argument("png", type=Path)
    options = parser.parse_args()
    known, *others = (json.loads(path.read_text()) for path in options.measured)
    known["points"] += [point for other in others for point in other["points"]]
    draw(known, options.png)
    typer.echo(f"{known['device']}, {known['model']}\n\n{table(known)}")


if __name__ == "__main__":
    main()
