"""Draws what `expert_layer` measured, time against tokens beside the floor: a script.

python -m tests.bench.plot_layer layer.json stages/megamoe_stages/swiglu_quant/experts.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("measured", type=Path, nargs="+", help="JSON files of one model; later ones add sizes")
    parser.add_argument("png", type=Path)
    options = parser.parse_args()
    known, *others = (json.loads(path.read_text()) for path in options.measured)
    known["points"] += [point for other in others for point in other["points"]]
    draw(known, options.png)


if __name__ == "__main__":
    main()
