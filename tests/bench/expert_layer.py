"""Times the expert layer of DeepSeek-V4 on a GPU, beside its parts, its fallback and a bf16 layer: a script.

    python -m tests.bench.expert_layer --model flash --tokens 1 8 32 64 128 512 2048 8192 --json layer.json

All weights are resident and random, routing is uniform. "experts" is L1 and L2, from the permutation's metadata to one
row per (token, expert); "layer" is all of it, permutation to combine. Everything is captured in CUDA graphs, over
several routings so that few tokens meet weights that are not in the L2. Two figures: spaced (one replay after 20 ms of
rest), and for whole layers and pairs of GEMMs sustained (back to back, where the power cap decides), with the SM clock
during the latter. All sizes are checked before any is timed, the bf16 layer's too. For Pro not all weights fit 80 GB
at once: two runs, with `--skip bf16` and with `--skip fallback`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from megamoe.model import Role
from megamoe.nn.experts import Experts
from megamoe.nn.weights import rearranged
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import Session, op, resolve, use
from megamoe.plugins import load
from megamoe.runtime import runtime
from megamoe.testing import compare
from megamoe_stages.grouped_gemm.sweep import MODELS, TOKENS, Model, to_bf16

LIMIT = 10.0
REST = 0.02  # seconds before a spaced replay
LASTING = ("experts", "layer")  # functions with a sustained figure
LEAD = 400_000  # clocks that the device sleeps before it, so that the host's launch stays out of the time
TURNS = 5
NVFP4_ERROR = 0.13  # of values rounded to E2M1 under E4M3 block scales; 0.095 for normal ones
SLOW = 5e3  # microseconds from which on a function gets two turns
SUSTAINED = 0.08  # seconds of back-to-back replays before those that are timed, and as many again
OPS = ("moe_route", "moe_permute", "swiglu_quant", "grouped_gemm", "moe_combine")
FALLBACK = {"swiglu_quant": "fallback_fused_act", "grouped_gemm": "fallback"}
Call = Callable[[], Any]


class Inputs(NamedTuple):
    """One routing of T tokens: activations in both modes, and what the router and the permutation made of them."""

    x: Tensor  # (T, H) bf16
    x4: NVFP4Tensor
    indices: Tensor  # (T, k) int32
    weights: Tensor  # (T, k) fp32
    tokens: Tensor  # (M,) int32
    rows: Tensor  # (T, k) int32
    offsets: Tensor  # (E + 1,) int32


def random_weights(generator: torch.Generator, experts: int, rows: int, k: int) -> NVFP4Tensor:
    """Random codes, block scales of 0.5 to 2 and global scales round 0.01, made on the device."""
    device = generator.device
    words = torch.randint(-(2**63), 2**63 - 1, (experts, rows, k // 16), device=device, generator=generator)
    scales = torch.randint(0x30, 0x40, (experts, rows, k // 16), dtype=torch.uint8, device=device, generator=generator)
    alphas = 0.005 + 0.01 * torch.rand(experts, device=device, generator=generator)
    return NVFP4Tensor(words.view(torch.uint8), scales.view(torch.float8_e4m3fn), alphas)


def random_inputs(generator: torch.Generator, model: Model, tokens: int) -> Inputs:
    """Normal activations and uniform routing with positive weights."""
    device = generator.device
    x = torch.randn(tokens, model.hidden, device=device, generator=generator).bfloat16()
    picks = torch.rand(tokens, model.experts, device=device, generator=generator).topk(model.top_k).indices.int()
    weights = torch.rand(tokens, model.top_k, device=device, generator=generator) + 0.1
    weights = 1.5 * weights / weights.sum(1, keepdim=True)
    order = op("moe_permute")(picks, model.experts)
    x4 = op("quantize")(x, torch.tensor(2688 / 6.0, device=device))
    return Inputs(x, x4, picks, weights, *order)


class Bench:
    """The layers of one model, and what is timed on them.

    Args:
        model: Sizes.
        device: "cuda".
        bf16: Also a layer with bf16 weights (12.9 GB for Flash, 50.7 for Pro), made when the first function is.
        fallback: Also the fallback's layer; else its weights go when the bf16 ones come.
        seed: Of everything random.
    """

    def __init__(self, model: Model, device: str, *, bf16: bool, fallback: bool, seed: int = 0) -> None:
        self.model = model
        self.wanted, self.keeps = bf16, fallback
        self.generator = torch.Generator(device).manual_seed(seed)
        gate_up = random_weights(self.generator, model.experts, 2 * model.intermediate, model.hidden)
        down = random_weights(self.generator, model.experts, model.hidden, model.intermediate)
        self.enc = torch.tensor(26.88, device=device)
        self.plain: Experts | None = Experts(gate_up, down, limit=LIMIT, activation_scale_enc=self.enc)
        self.layer = Experts(gate_up, down, limit=LIMIT, activation_scale_enc=self.enc).prepare(always=True)
        self.gate_up_in_order = rearranged(gate_up)
        self.bf16: list[Tensor] = []
        self.activate = torch.compile(_activate, dynamic=True)

    def make_bf16(self) -> None:
        """The bf16 weights where they are wanted; once."""
        if not self.wanted or self.bf16 or self.plain is None:
            return
        for name in ("gate_up", "down"):
            kept = getattr(self.plain, name)
            self.bf16.append(to_bf16(kept.operand))
            if not self.keeps:
                delattr(self.plain, name)
                del kept
        self.plain = self.plain if self.keeps else None

    def first(self, x: Tensor | NVFP4Tensor, given: Inputs, layer: Experts) -> NVFP4Tensor:
        """L1 of a layer."""
        hidden: NVFP4Tensor = op("swiglu_quant")(
            x,
            layer.gate_up.operand,
            given.offsets,
            self.enc,
            row_index=given.tokens,
            limit=LIMIT,
            order=layer.gate_up.order,
        )
        return hidden

    def second(self, hidden: NVFP4Tensor, given: Inputs, layer: Experts) -> Tensor:
        """L2 of a layer."""
        outputs: Tensor = op("grouped_gemm")(hidden, layer.down.operand, given.offsets)
        return outputs

    def separate(self, x: Tensor | NVFP4Tensor, given: Inputs) -> NVFP4Tensor:
        """L1 as the GEMM kernel and a launch for activation and quantisation."""
        activate = load("megamoe_stages.swiglu_quant.fused_act:activate")
        gate_up = op("grouped_gemm")(x, self.gate_up_in_order, given.offsets, given.tokens)
        hidden: NVFP4Tensor = activate(gate_up, self.enc, limit=LIMIT)
        return hidden

    def library(self, given: Inputs) -> Tensor:
        """The bf16 layer from metadata to rows: gather, torch's grouped GEMM, compiled activation, grouped GEMM."""
        ends = given.offsets[1:]
        gate_up = grouped_mm(given.x[given.tokens], self.bf16[0].mT, offs=ends)
        return grouped_mm(self.activate(gate_up), self.bf16[1].mT, offs=ends)

    def functions(self, given: Inputs, fused: Mapping[str, str]) -> dict[str, Call]:
        """What is timed, on one routing."""
        found: dict[str, Call] = {}
        with use(fused):
            hidden = self.first(given.x4, given, self.layer)
            outputs = self.second(hidden, given, self.layer)
        for mode, x in (("w4a16", given.x), ("w4a4", given.x4)):
            found[f"experts {mode}"] = under(fused, partial(self._both, x, given, self.layer))
            found[f"L1 {mode}"] = under(fused, partial(self.first, x, given, self.layer))
            found[f"L1 separate {mode}"] = under(fused, partial(self.separate, x, given))
            found[f"layer {mode}"] = under(fused, partial(self.layer, x, given.indices, given.weights))
        found["L2"] = under(fused, lambda: self.second(hidden, given, self.layer))
        logits = torch.randn(given.indices.shape[0], self.model.experts, device=self.enc.device)
        found["route"] = under(fused, lambda: op("moe_route")(logits, top_k=self.model.top_k, scaling=1.5))
        found["permute"] = under(fused, lambda: op("moe_permute")(given.indices, self.model.experts))
        found["combine"] = under(fused, lambda: op("moe_combine")(outputs, given.rows, given.weights, dtype="bfloat16"))
        if self.plain is not None:
            found["experts fallback"] = under(FALLBACK, partial(self._both, given.x4, given, self.plain))
        if self.bf16:
            found["experts bf16"] = lambda: self.library(given)
        return found

    def check(self, given: Inputs, fused: Mapping[str, str]) -> None:
        """Compares L1 in both modes, L2 and the layer with their fallbacks, within the ops' own bounds.

        Raises:
            RuntimeError: Something is out of bounds.
        """
        assert self.plain is not None, "checked before the bf16 weights take its place"
        for mode, x in (("w4a16", given.x), ("w4a4", given.x4)):
            with use(fused):
                hidden = self.first(x, given, self.layer)
                outputs = self.second(hidden, given, self.layer)
                out = self.layer(x, given.indices, given.weights, dtype=torch.float32)
                again = self.layer(x, given.indices, given.weights, dtype=torch.float32)
                apart = self.separate(x, given)
            with use(FALLBACK):
                plain_hidden = self.first(x, given, self.plain)
                _compare(f"L1 {mode}", hidden, plain_hidden, "swiglu_quant")
                _compare(f"L1 separate {mode}", apart, plain_hidden, "swiglu_quant")
                _compare(f"L2 {mode}", outputs, self.second(hidden, given, self.plain), "grouped_gemm")
            if not torch.equal(out, again):
                raise RuntimeError(f"layer {mode}: two runs differ")
            want = op("moe_combine").reference(outputs, given.rows, given.weights, dtype="float32")
            if not torch.equal(out, want):
                raise RuntimeError(f"layer {mode}: not the weighted sum of its own rows")

    def check_library(self, given: Inputs, fused: Mapping[str, str]) -> None:
        """Compares the bf16 layer with ours, which rounds to NVFP4 between its GEMMs.

        Raises:
            RuntimeError: They are further apart than that rounding makes them.
        """
        with use(fused):
            ours = self._both(given.x, given, self.layer).float()
        error = float((self.library(given).float() - ours).norm() / ours.norm())
        if not error <= NVFP4_ERROR:
            raise RuntimeError(f"experts bf16: relative error {error:.2e}")

    def _both(self, x: Tensor | NVFP4Tensor, given: Inputs, layer: Experts) -> Tensor:
        return self.second(self.first(x, given, layer), given, layer)


def run(
    model: Model,
    tokens: Sequence[int],
    skip: Sequence[str],
    *,
    device: str,
    show: Callable[[str], None],
    timed: bool = True,
    turns: int = TURNS,
) -> Iterator[dict[str, Any]]:
    """Measures one model, but for functions whose names hold one of `skip`; yields what is known after each size."""
    bf16, fallback = (not any(word in f"experts {kind}" for word in skip) for kind in ("bf16", "fallback"))
    bench = Bench(model, device, bf16=bf16, fallback=fallback)
    fused = fused_variants()
    show(f"{torch.cuda.get_device_name()}; {model}; variants {fused}")
    points: list[dict[str, Any]] = []
    known = {"model": model._asdict(), "variants": fused, "device": torch.cuda.get_device_name(), "points": points}
    right: dict[int, list[Inputs]] = {}
    for count in tokens:
        sets = [random_inputs(bench.generator, model, count) for _ in range(_sets(count))]
        try:
            bench.check(sets[0], fused)
            right[count] = sets
        except Exception as error:  # the other sizes are still worth their time
            show(f"T={count}: not timed: {error}")
            points.append({"tokens": count, "failed": str(error)})
    bench.make_bf16()
    for count in list(right) if bench.bf16 else ():
        try:
            bench.check_library(right[count][0], fused)
        except RuntimeError as error:
            show(f"T={count}: not timed: {error}")
            points.append({"tokens": count, "failed": str(error)})
            del right[count]
    show(f"right: T = {', '.join(map(str, right))}")
    yield known
    for count, sets in right.items() if timed else ():
        calls: dict[str, list[Call]] = {}
        for given in sets:
            for name, call in bench.functions(given, fused).items():
                if not any(word in name for word in skip) and not (name in calls and name == "experts fallback"):
                    calls.setdefault(name, []).append(call)
        spaced, sustained, clocks = measure(calls, turns=turns, lasting=LASTING)
        live = statistics.mean(int((given.offsets.diff() > 0).sum()) for given in sets)
        point = {
            "tokens": count,
            "live_experts": live,
            "weight_bytes": live * 3 * model.hidden * model.intermediate * 9 / 16,
            "flops": 6.0 * count * model.top_k * model.hidden * model.intermediate,
            "spaced_us": spaced,
            "sustained_us": sustained,
            "sm_mhz": clocks,
        }
        points.append(point)
        show(table(point))
        yield known


def measure(
    calls: Mapping[str, Sequence[Call]], *, turns: int = TURNS, lasting: tuple[str, ...] = ("",)
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Microseconds a call, spaced and sustained, and the SM clock of the latter; functions take turns.

    Args:
        calls: Name to one callable a routing; they go into one CUDA graph.
        turns: Spaced replays of each.
        lasting: How the names of those begin that get a sustained figure too.
    """
    graphs = {name: (_captured(some), len(some)) for name, some in calls.items()}
    spaced: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name, (graph, count) in graphs.items():
            if turn < 2 or spaced[name][0] < SLOW:
                torch.cuda.synchronize()
                time.sleep(REST)
                spaced[name].append(_timed(graph) / count)
    sustained, clocks = {}, {}
    for name, (graph, count) in graphs.items():
        if not name.startswith(lasting):
            continue
        replays = max(1, round(SUSTAINED * 1e6 / (spaced[name][0] * count)))
        for _ in range(replays):
            graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        while not start.query():  # type: ignore[no-untyped-call]
            time.sleep(0.001)
        time.sleep(SUSTAINED / 2)
        clocks[name] = sm_clock()
        end.synchronize()
        sustained[name] = start.elapsed_time(end) * 1e3 / (replays * count)
    return {name: statistics.median(us) for name, us in spaced.items()}, sustained, clocks


def table(point: Mapping[str, Any]) -> str:
    """A point for people."""
    lines = [
        f"T={point['tokens']}: {point['live_experts']:.1f} experts, {point['weight_bytes'] / 1e6:.1f} MB of weights"
    ]
    whole = point["spaced_us"]
    for name, us in whole.items():
        mode = name.rpartition(" ")[2]
        base = whole.get(f"layer {mode}" if f"layer {mode}" in whole else "layer w4a16")
        share = f"  {us / base:6.1%} of the layer" if name in ("route", "permute", "combine") else ""
        rate = ""
        if name.startswith("experts"):
            rate = f"  {point['weight_bytes'] / us / 1e6:5.2f} TB/s {point['flops'] / us / 1e6:6.1f} TFLOP/s"
        lasting = ""
        if name in point["sustained_us"]:
            lasting = f"  sustained {point['sustained_us'][name]:9.2f} at {point['sm_mhz'][name]} MHz"
        lines.append(f"  {name:<18} {us:9.2f} us{lasting}{rate}{share}")
    return "\n".join(lines)


def sm_clock() -> int:
    """MHz now, by nvidia-smi's library, or else by nvidia-smi."""
    try:
        return torch.cuda.clock_rate()
    except (ImportError, ModuleNotFoundError, RuntimeError):
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()  # compiles and plans
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _timed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(LEAD)  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def under(choice: Mapping[str, str], call: Call) -> Call:
    session = Session(resolve(choice))

    def run_it() -> Any:
        with use(session):
            return call()

    return run_it


def fused_variants() -> dict[str, str]:
    """The fused variant that can run here of each op of the layer, with or without evidence."""
    found = {}
    for name in OPS:
        stage = runtime().stage(name)
        for variant in stage.variants:
            if variant.role is Role.FUSED and not runtime().hard_refusals(stage, variant):
                found[name] = variant.name
    return found


def _compare(what: str, got: Any, want: Any, stage: str) -> None:
    for result in compare.compare({"out": got}, {"out": want}, op(stage).bounds):
        if not result.passed:
            raise RuntimeError(f"{what}: {result.reason}")


def _activate(gate_up: Tensor) -> Tensor:
    """SwiGLU of (M, 2I), clamped, in fp32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)).bfloat16()


def _sets(tokens: int) -> int:
    """Routings in one graph: few tokens touch little of the weights, which the L2 would keep."""
    return 12 if tokens <= 8 else 3 if tokens <= 512 else 1


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="flash")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="leave out functions named like this")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--turns", type=int, default=TURNS, help="spaced replays of each function")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    known_so_far = run(
        MODELS[options.model],
        options.tokens,
        options.skip,
        device="cuda",
        show=partial(print, flush=True),
        timed=not options.check,
        turns=options.turns,
    )
    for known in known_so_far:
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
