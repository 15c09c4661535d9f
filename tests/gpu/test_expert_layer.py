"""Two expert layers of DeepSeek-V4 Flash's real size: a prompt, then decoding under a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.nn.experts import Experts
from megamoe.numerics.nvfp4 import NVFP4Tensor, dequantize
from megamoe.ops import op, use
from megamoe_stages.grouped_gemm.sweep import MODELS
from tests.bench.expert_layer import FALLBACK, LIMIT, fused_variants, random_weights

pytestmark = pytest.mark.gpu
FLASH = MODELS["flash"]
PROMPT, BATCH, STEPS, SCALING = 2048, 8, 64, 1.5


class Layer:
    """A router and its experts, prepared for the kernels; on plain weights too, for the fallback."""

    def __init__(self, generator: torch.Generator) -> None:
        device, enc = generator.device, torch.tensor(26.88, device=generator.device)
        gate_up = random_weights(generator, FLASH.experts, 2 * FLASH.intermediate, FLASH.hidden)
        down = random_weights(generator, FLASH.experts, FLASH.hidden, FLASH.intermediate)
        self.plain = Experts(gate_up, down, limit=LIMIT, activation_scale_enc=enc)
        self.experts = Experts(gate_up, down, limit=LIMIT, activation_scale_enc=enc).prepare(always=True)
        self.router = torch.randn(FLASH.experts, FLASH.hidden, device=device, generator=generator) / 64
        self.bias = torch.randn(FLASH.experts, device=device, generator=generator) / 10
        self.enc = torch.tensor(2688 / 6.0, device=device)

    def __call__(self, x: Tensor, mode: str, experts: Experts | None = None) -> Tensor:
        """x (T, H) bf16 plus what its experts say, with rms 1."""
        indices, weights = route(x.float() @ self.router.T, self.bias)
        given = op("quantize")(x, self.enc) if mode == "w4a4" else x
        out = (experts or self.experts)(given, indices, weights, dtype=torch.float32)
        return torch.nn.functional.rms_norm(x.float() + out, (FLASH.hidden,)).bfloat16()


@pytest.fixture(scope="module")
def layers() -> Iterator[list[Layer]]:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("two layers, plain and prepared, take 14.5 GB, and the fallback decodes one to bf16")
    generator = torch.Generator("cuda").manual_seed(3)
    made = [Layer(generator) for _ in range(2)]
    yield made
    made.clear()
    torch.cuda.empty_cache()


def route(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    indices, weights = op("moe_route")(logits, bias, top_k=FLASH.top_k, scaling=SCALING)
    return indices, weights


def inputs(tokens: int, seed: int = 5) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(tokens, FLASH.hidden, device="cuda", generator=generator).bfloat16()


def forward(layers: list[Layer], x: Tensor, mode: str) -> Tensor:
    for layer in layers:
        x = layer(x, mode)
    return x


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def by_hand(layer: Layer, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One token through its experts in fp64, from dequantised weights, nothing in between quantised."""
    gate_up, down = layer.plain.weight("gate_up"), layer.plain.weight("down")
    assert isinstance(gate_up, NVFP4Tensor)
    assert isinstance(down, NVFP4Tensor)
    total = torch.zeros(FLASH.hidden, dtype=torch.float64, device=x.device)
    for e, weight in zip(indices.tolist(), weights.tolist(), strict=True):
        one = [NVFP4Tensor(w.codes[e], w.scales[e], w.global_scale_dec[e]) for w in (gate_up, down)]
        gate, up = (dequantize(one[0]).double() @ x.double()).chunk(2)
        hidden = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
        total += weight * (dequantize(one[1]).double() @ hidden)
    return total


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_prompt(layers: list[Layer], mode: str) -> None:
    """2048 tokens: each layer near the fallback's and near the sums in fp64, and the same bytes every time."""
    x = inputs(PROMPT)
    with use(fused_variants()):
        for layer in layers:
            indices, weights = route(x.float() @ layer.router.T, layer.bias)
            given = op("quantize")(x, layer.enc) if mode == "w4a4" else x
            out = layer.experts(given, indices, weights, dtype=torch.float32)
            with use(FALLBACK):
                plain = layer.plain(given, indices, weights, dtype=torch.float32)
            assert relative(out, plain) <= 5e-2, "gate and up of the fallback pass through bf16: swiglu_quant's bound"
            values = dequantize(given) if isinstance(given, NVFP4Tensor) else given
            for token in (0, 1000, PROMPT - 1):
                want = by_hand(layer, values[token], indices[token], weights[token])
                assert relative(out[token], want) <= 0.13, "NVFP4 of the hidden activations alone: about 0.095"
            for _ in range(5):
                assert torch.equal(layer.experts(given, indices, weights, dtype=torch.float32), out)
            x = layer(x, mode)
    assert x.isfinite().all()


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_decoding_under_a_graph(layers: list[Layer], mode: str) -> None:
    """64 steps, each fed with what the one before gave: the same bytes from a graph as without one, twice."""
    with use(fused_variants()):
        start = forward(layers, inputs(PROMPT), mode)[-BATCH:].clone()
        eager = start
        for _ in range(STEPS):
            eager = forward(layers, eager, mode)
        state = start.clone()
        graph = captured(lambda: state.copy_(forward(layers, state, mode)))
        for _ in range(2):
            state.copy_(start)
            for _ in range(STEPS):
                graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(state, eager)
    assert state.isfinite().all()
    assert not torch.equal(state, start)


@pytest.mark.parametrize("tokens", [1, BATCH, 300])
def test_nothing_waits_for_the_device(layers: list[Layer], tokens: int) -> None:
    """Neither the kernels nor the fallback's launches."""
    x = inputs(tokens)
    indices, weights = route(x.float() @ layers[0].router.T, layers[0].bias)
    for choice, experts in ((fused_variants(), layers[0].experts), (FALLBACK, layers[0].plain)):
        with use(choice):
            experts(x, indices, weights)  # compiles and plans
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                experts(x, indices, weights)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_prepared_weights_come_back_bit_for_bit(layers: list[Layer]) -> None:
    for name in ("gate_up", "down"):
        given, back = (experts.weight(name) for experts in (layers[0].plain, layers[0].experts))
        assert isinstance(given, NVFP4Tensor)
        assert isinstance(back, NVFP4Tensor)
        assert torch.equal(given.codes, back.codes)
        assert torch.equal(given.scales.view(torch.uint8), back.scales.view(torch.uint8))
        assert torch.equal(given.global_scale_dec, back.global_scale_dec)
        assert given.scale_layout == back.scale_layout


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of one call; what the warm-up writes is written again before the replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
