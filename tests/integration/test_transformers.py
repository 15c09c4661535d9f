from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, DynamicCache

from megamoe.config import Config
from megamoe.errors import ArgumentError, UnknownNameError
from megamoe.integrations.transformers import LayerScales, calibrate, disable, enable, is_enabled
from megamoe.integrations.transformers.scales import default_scales
from megamoe.integrations.weights import Weights
from megamoe.model import Decision
from megamoe.ops import use
from tests.integration.tiny import tiny_model

EXACT = 1e-5  # relative L2 in fp32: other orders of sums; measured 1.3e-6
NVFP4 = 0.6  # relative L2 of a random net's logits: routing flips; measured 0.41, and about 1.4 for unrelated logits
LENGTH = 150  # window 128 is full, one HCA entry, more CSA entries than the indexer picks (16)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def in_chunks(model: DeepseekV4ForCausalLM, ids: Tensor, *chunks: int, cache: Any = None) -> Tensor:
    """Logits of `ids`, fed in chunks of these sizes with the cache; the last size repeats."""
    cache = cache or DynamicCache(config=model.config)
    sizes = list(chunks)
    done, logits = 0, []
    while done < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(model(ids[:, done : done + size], past_key_values=cache, use_cache=True).logits)
        done += size
    return torch.cat(logits, dim=1)


class Calls:
    """An observer that counts."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def called(self, stage_id: str, decision: Decision, run: Any, args: Any, kwargs: Any) -> Any:
        self.of[stage_id] = self.of.get(stage_id, 0) + 1
        return run(*args, **kwargs)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(shared_model: DeepseekV4ForCausalLM, ids: Tensor) -> Tensor:
    """Logits of the plain model."""
    assert not is_enabled(shared_model)
    with torch.no_grad():
        logits: Tensor = shared_model(ids).logits
    return logits


def test_exact_prefill_matches(model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor) -> None:
    handle = enable(model, exact=True)
    assert all(handle.hook_points.values())
    calls = Calls()
    with use(observer=calls):
        assert relative(model(ids).logits, plain) < EXACT
    assert set(calls.of) == {"multi_cta_attention", "moe_route", "moe_permute", "moe_combine"}  # the others quantise


def test_exact_decode_token_by_token_matches(model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor) -> None:
    enable(model, exact=True)
    one = ids[:1]
    assert relative(in_chunks(model, one, 120, 1), plain[:1]) < EXACT  # across the filling of the window at 128


def test_exact_decode_from_the_first_token_matches(model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor) -> None:
    enable(model, exact=True)
    assert relative(in_chunks(model, ids[:1, :9], 1), plain[:1, :9]) < EXACT


def test_exact_prompt_in_chunks_matches(model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor) -> None:
    enable(model, exact=True)
    assert relative(in_chunks(model, ids, 50, 7, 1, 92), plain) < EXACT


def test_exact_generate_is_the_same(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    prompt = ids[:, :40]
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    enable(model, exact=True)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)


def test_exact_beam_search_is_the_same(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    prompt = ids[:1, :20]
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=2)
    enable(model, exact=True)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=2), wanted)


def test_exact_without_hyper_connections_matches(model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor) -> None:
    enable(model, {"mhc_quant": "off"}, exact=True)
    assert relative(model(ids).logits, plain) < EXACT


def test_exact_with_the_models_own_core_attention_matches(
    model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor
) -> None:
    handle = enable(model, {"multi_cta_attention": "off"}, exact=True)
    assert not handle.hook_points["prefill"]
    assert relative(in_chunks(model, ids[:1], 140, 1), plain[:1]) < EXACT


def test_hidden_states_are_still_recorded(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    wanted = model(ids[:, :20], output_hidden_states=True).hidden_states
    enable(model, exact=True)
    found = model(ids[:, :20], output_hidden_states=True).hidden_states
    assert len(found) == len(wanted)
    assert all(relative(a, b) < EXACT for a, b in zip(found, wanted, strict=True))


def test_a_hook_that_changes_the_streams_is_heard(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    """The next layer must not start from what was prepared for the streams before the change."""
    remove = model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        wanted = model(ids[:, :20]).logits
        enable(model, exact=True)
        assert relative(model(ids[:, :20]).logits, wanted) < EXACT
    finally:
        remove.remove()


def test_disable_restores_every_bit(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    prompt = ids[:, :30]
    before = model(prompt).logits
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    handle = enable(model)
    assert is_enabled(model)
    assert not torch.equal(model(prompt).logits, before)
    disable(model)
    disable(model)
    assert not is_enabled(model)
    assert not handle.active
    assert forwards == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(prompt).logits, before)


def test_handle_as_context_manager(model: DeepseekV4ForCausalLM) -> None:
    with enable(model, exact=True):
        assert is_enabled(model)
    assert not is_enabled(model)


def test_another_model_is_not_touched(model: DeepseekV4ForCausalLM) -> None:
    other = tiny_model()
    prompt = torch.arange(20)[None]
    before = other(prompt).logits
    enable(model, exact=True)
    assert torch.equal(other(prompt).logits, before)
    assert not is_enabled(other)


def test_nvfp4_stays_near_the_model_and_uses_every_op(
    model: DeepseekV4ForCausalLM, ids: Tensor, plain: Tensor, weights: Weights
) -> None:
    enable(model, weights=weights)
    calls = Calls()
    with use(observer=calls):
        logits = in_chunks(model, ids, LENGTH - 3, 1)
    layers, passes = 4, 4  # a prompt and three tokens
    assert 1e-3 < relative(logits, plain) < NVFP4
    assert calls.of == {
        "mhc_quant": (2 * layers - 1) * passes,  # every boundary between two sublayers
        "moe_route": layers * passes,
        "moe_permute": layers * passes,
        "swiglu_quant": layers * passes,
        "inverse_rope_quant": layers * (passes - 1),
        "grouped_gemm": 3 * layers * passes,  # the experts' second, wo_a, wo_b
        "moe_combine": layers * passes,
        "quantize": layers * passes,  # z; the experts' input comes out of mhc_quant
        "attention_quant": layers,  # the prompt
        "fp4_kv_decode": calls.of["fp4_kv_decode"],
    }
    attends, fills = 3 * 4, 4 + 3  # both caches of a layer in one call
    assert attends + fills <= calls.of["fp4_kv_decode"] <= attends + fills + 3 * 3  # and new compressed entries


def test_nvfp4_decode_follows_nvfp4_prefill(model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights) -> None:
    """Only the KV cache is quantised differently: a step must land near the prompt's last position."""
    enable(model, weights=weights)
    prompt = ids[:1, :140]
    whole = model(prompt).logits[:, -1:]
    step = in_chunks(model, prompt, 139, 1)[:, -1:]
    unrelated = model(ids[1:, :140]).logits[:, -1:]
    assert relative(step, whole) < 0.5 * relative(unrelated, whole)


def test_nvfp4_generate_repeats_itself(model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights) -> None:
    enable(model, weights=weights)
    first, again = (model.generate(ids[:, :30], max_new_tokens=5, do_sample=False) for _ in range(2))
    assert first.shape == (2, 35)
    assert torch.equal(first, again)


def test_a_copied_or_reordered_cache_is_noticed(model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights) -> None:
    """The pages beside a cache must never be another sequence's."""
    enable(model, weights=weights)
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids[:, :30], 28, 1, cache=cache)  # the pages exist now
    token = ids[:, 30:31]
    twin = copy.deepcopy(cache)
    wanted = model(token, past_key_values=cache, use_cache=True).logits
    assert torch.equal(model(token, past_key_values=copy.deepcopy(twin), use_cache=True).logits, wanted)
    twin.reorder_cache(torch.tensor([1, 0]))
    swapped = model(token.flip(0), past_key_values=twin, use_cache=True).logits
    torch.testing.assert_close(swapped.flip(0), wanted, rtol=1e-4, atol=1e-4)


def test_two_threads_do_not_meet(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    enable(model, exact=True)
    prompts = [ids[:1, :20], ids[1:, :20]]
    wanted = [model(p).logits for p in prompts]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[i] = model(prompts[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(2))


def test_off_leaves_the_models_own_code(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    prompt = ids[:, :30]
    before = model(prompt).logits
    handle = enable(model, {"default": "off"})
    assert not any(handle.hook_points.values())
    assert torch.equal(model(prompt).logits, before)


@pytest.mark.parametrize(
    ("off", "own"),
    [
        ("swiglu_quant", {"experts"}),
        ("moe_route", {"router"}),
        ("moe_permute", {"experts"}),
        ("moe_combine", {"experts"}),
        ("grouped_gemm", {"experts", "attention_output"}),
        ("quantize", {"attention_output"}),
        ("inverse_rope_quant", {"attention_output"}),
        ("mhc_quant", {"hyper_connections"}),
        ("fp4_kv_decode", {"decode"}),
        ("multi_cta_attention", {"prefill"}),
        ("attention_quant", set()),  # then in two ops
    ],
)
def test_one_op_off(model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights, off: str, own: set[str]) -> None:
    handle = enable(model, {off: "off"}, weights=weights)
    assert {name for name, on in handle.hook_points.items() if not on} == own
    logits = in_chunks(model, ids[:1, :12], 11, 1)  # an op that is off raises when it is called
    assert logits.isfinite().all()


def test_the_config_given_to_enable_is_in_force(model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights) -> None:
    enable(model, {"default": "reference"}, weights=weights)
    reference = model(ids[:, :12]).logits
    with use({"default": "reference"}):
        enable(model, weights=weights)
        assert torch.equal(model(ids[:, :12]).logits, reference)


def test_calibrated_scales_lie_within_the_bounds_and_are_used(
    model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights
) -> None:
    scales, bounds = calibrate(model, ids[:, :60]), default_scales(model)
    for found, bound in zip(scales, bounds, strict=True):
        for name in ("normed", "product", "o", "z"):
            assert 0 < getattr(found, name) <= getattr(bound, name)
    first = model.model.layers[0]
    seen: list[Tensor] = []
    remove = first.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    model(ids[:, :60])
    remove.remove()
    assert scales[0].normed == pytest.approx(float(seen[0]))
    handle = enable(model, scales=[LayerScales(z=scales[0].z), *scales[1:]], weights=weights)
    assert handle.scales[0] == LayerScales(bounds[0].normed, bounds[0].product, bounds[0].o, scales[0].z)
    assert handle.scales[1] == scales[1]
    with pytest.raises(ArgumentError, match="model: got an enabled model"):
        calibrate(model, ids)


def test_wrong_arguments(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ArgumentError, match="model: got Linear"):
        enable(torch.nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match="scales: got 1 layers, expected 4"):
        enable(model, scales=[LayerScales()])
    with pytest.raises(UnknownNameError, match="did you mean 'mhc_quant'"):
        enable(model, {"mhc_quan": "off"})
    with pytest.raises(ArgumentError, match="input_ids"):
        calibrate(model, ids[:, :0])
    assert not is_enabled(model)


def test_weights_of_other_hook_points_are_refused(model: DeepseekV4ForCausalLM) -> None:
    weights = enable(model, {"swiglu_quant": "off"}).weights
    with pytest.raises(ArgumentError, match=r"weights\.experts: got layers \[\], expected all"):
        enable(model, weights=weights)


def test_padding_is_refused(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    enable(model, exact=True)
    mask = torch.ones(2, 10, dtype=torch.int64)
    model(ids[:, :10], attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(ArgumentError, match=r"attention_mask: .* no padding"):
        model(ids[:, :10], attention_mask=mask)
    prepared = torch.zeros(2, 1, 10, 10).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    model(ids[:, :10], attention_mask={"sliding_attention": prepared})
    with pytest.raises(ArgumentError, match=r"attention_mask: .* no padding"):
        model(ids[:, :10], attention_mask={"sliding_attention": prepared.index_fill(3, torch.tensor([0]), -torch.inf)})


def test_training_is_refused(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    enable(model, exact=True)
    model.train()
    try:
        with torch.enable_grad(), pytest.raises(ArgumentError, match=r"expected model\.eval\(\)"):
            model(ids[:, :4])
    finally:
        model.eval()


def test_a_plain_config_object_is_taken(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    enable(model, Config(), exact=True)
    assert model(ids[:1, :4]).logits.isfinite().all()


def test_each_prompt_takes_the_ops_that_the_configuration_at_its_call_names(
    model: DeepseekV4ForCausalLM, ids: Tensor, weights: Weights
) -> None:
    enable(model, weights=weights)
    given: list[dict[str, str]] = [{}, {"multi_cta_attention": "fallback"}, {"attention_quant": "off"}]
    seen, logits = [], []
    for config in given:
        calls = Calls()
        with use(config, observer=calls):
            logits.append(model(ids[:1, :5]).logits)
        seen.append({name for name in calls.of if "attention" in name or "rope" in name})
    apart = {"multi_cta_attention", "inverse_rope_quant"}
    assert seen == [{"attention_quant"}, apart, apart]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
