from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from megamoe import job
from megamoe.errors import ArgumentError, CheckpointError, UnknownNameError
from megamoe.integrations.transformers import enable, is_enabled
from megamoe.job import RunOptions, RunResult, main
from megamoe.job.passes import Checker, bounds_of_call, run_pass
from megamoe.job.small_model import build_small_model
from megamoe.job.tape import Tape, hold, record
from megamoe.job.text import Codec, codec_for, default_prompt, read_prompt
from megamoe.model import Decision, Role, Variant
from megamoe.numerics.nvfp4 import quantize
from megamoe.ops import op
from megamoe.runtime import runtime
from megamoe.testing.cases import Bound
from tests.integration.tiny import tiny_model

PROMPT, DECODED = 150, 3


@pytest.fixture(scope="module")
def result(shared_model: DeepseekV4ForCausalLM) -> Iterator[RunResult]:
    """The main job on the shared small model, with a shortened prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "build_small_model", lambda **options: shared_model)
        yield job.run(RunOptions(decode=DECODED, max_prompt=PROMPT))
    assert not is_enabled(shared_model)


def test_every_op_ran_within_its_bound(result: RunResult) -> None:
    assert result.ok
    assert {row.stage for row in result.ops} == set(runtime().stages)
    assert {row.stage for row in result.ops if not row.calls} == {"multi_cta_attention"}  # but attention_quant
    for row in (row for row in result.ops if row.calls):
        assert row.ok, row
        assert row.seconds > 0
        assert row.variant
        assert row.why
        assert row.items
        assert row.error <= row.bound


def test_the_fallbacks_were_checked_against_the_references(result: RunResult) -> None:
    rows = {row.stage: row for row in result.ops}
    assert rows["fp4_kv_decode"].variant == rows["attention_quant"].variant == ("fallback",)
    assert rows["fp4_kv_decode"].error > 0  # the same bits would mean that nothing was compared


def test_distances(result: RunResult) -> None:
    ours, plain, nvfp4 = result.distances
    assert (ours.of, ours.from_) == (main.OURS, main.REFERENCE)
    assert ours.positions == plain.positions == 128 + DECODED
    # The fallbacks flip some roundings to FP4 that the references do not; NVFP4 itself costs more than that.
    assert 0 < ours.relative_l2 < nvfp4.relative_l2
    # What a run loses to the plain model is what NVFP4 costs, not what the variants add to it.
    assert plain.relative_l2 == pytest.approx(nvfp4.relative_l2, rel=0.2)
    assert all(d.kl >= 0 and 0 < d.argmax_agreement <= 1 and d.max_abs > 0 for d in result.distances)


def test_speed_and_text(result: RunResult) -> None:
    assert (result.speed.prompt_tokens, result.speed.decoded_tokens) == (PROMPT, DECODED)
    assert result.speed.prefill_tokens_per_s > 0
    assert result.speed.decode_tokens_per_s > 0
    assert default_prompt().startswith(result.prompt)
    assert len(result.completion) > 0
    assert result.codec == "bytes"


def test_json(result: RunResult) -> None:
    tree = json.loads(result.to_json())
    assert tree["ok"] is True
    assert tree["speed"]["decode_tokens_per_s"] == pytest.approx(result.speed.decode_tokens_per_s)
    assert tree["ops"][0]["stage"] == result.ops[0].stage
    assert tree["hook_points"]["decode"] == "megamoe"


def test_an_op_that_is_off_says_so(shared_model: DeepseekV4ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "build_small_model", lambda **options: shared_model)
    found = job.run(RunOptions(prompt="a few words", decode=1, config={"NVFP4-1.3": "off", "quantize": "reference"}))
    rows = {row.stage: row for row in found.ops}
    assert (rows["mhc_quant"].calls, rows["mhc_quant"].choice) == (0, "off")
    assert rows["mhc_quant"].why == "off (argument)"
    assert rows["quantize"].variant == ("reference",)
    assert found.hook_points["hyper_connections"] == "own"
    assert found.ok


def test_a_checkpoint_folder(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    found = job.run(RunOptions(model=tmp_path, prompt="0123456789 !", decode=2))
    assert found.model == str(tmp_path)
    assert found.ok
    assert found.speed.prompt_tokens == 12


def test_a_wrong_variant_is_caught() -> None:
    """The checker must see an error, also one in an argument that the op writes to."""
    checker = Checker()
    decision = Decision("fp4_kv_decode", Variant("broken", Role.FUSED, "x:y"), "a test", ())
    reference = op("fp4_kv_decode").reference

    def broken(*args: Any, **kwargs: Any) -> Any:
        out = reference(*args, **kwargs)
        args[1][0, 0, 0, 0] ^= 1  # k_codes
        return out

    codes = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    scales = torch.ones(1, 1, 4, 1).to(torch.float8_e4m3fn)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    args = (torch.randn(1, 1, 2, 16), codes, scales, table, lengths, torch.ones(()))
    kwargs = {"k_new": torch.randn(1, 1, 1, 16), "softmax_scale": 0.25}
    checker.called("fp4_kv_decode", decision, broken, args, kwargs)
    worst = checker.records["fp4_kv_decode"].worst
    assert worst is not None
    assert not worst.passed
    assert worst.name == "k_codes"


def test_small_nvfp4_outputs_get_slack_and_nothing_else_does() -> None:
    bounds = {"out": Bound(0.05, "a reason"), "same": Bound(), "plain": Bound(0.01, "another")}

    def of_call(rows: int) -> dict[str, Bound]:
        packed = quantize(torch.randn(rows, 256), torch.tensor(1.0))
        return bounds_of_call(bounds, {"out": packed, "same": packed, "plain": torch.randn(rows, 256)})

    small, large = of_call(6), of_call(60000)
    assert small["out"].rel_l2 == pytest.approx(0.05 * (1 + 3 * 3.4 / 96**0.5))
    assert large["out"].rel_l2 == pytest.approx(0.05, rel=0.02)
    assert (small["same"], small["plain"]) == (bounds["same"], bounds["plain"])


def test_held_picks_are_used(model: DeepseekV4ForCausalLM) -> None:
    ids = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(1))
    with record(model) as tape:
        free = run_pass(model, ids, 2)
    assert len(tape.picks) == 5  # three top-k routers, two indexers
    assert all(len(picks) == 3 for picks in tape.picks.values())
    with hold(model, tape):
        held = run_pass(model, ids, 2, free.tokens)
    torch.testing.assert_close(held.logits, free.logits, rtol=1e-5, atol=1e-5)
    router = "model.layers.2.mlp.gate"
    other = {**tape.picks, router: [(picks + 1) % 16 for picks in tape.picks[router]]}
    with hold(model, Tape(other)):
        moved = run_pass(model, ids, 2, free.tokens)
    assert not torch.allclose(moved.logits, free.logits, rtol=1e-2, atol=1e-2)
    assert torch.equal(run_pass(model, ids, 2).logits, free.logits)  # nothing is held any more


def test_held_picks_hold_under_quantisation(model: DeepseekV4ForCausalLM, weights: Any) -> None:
    ids = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(1))
    with record(model) as tape:
        run_pass(model, ids, 1)
    enable(model, weights=weights)
    with hold(model, tape), record(model) as again:
        run_pass(model, ids, 1)
    assert all(
        torch.equal(a, b) for name in tape.picks for a, b in zip(tape.picks[name], again.picks[name], strict=True)
    )


def test_a_tape_of_another_run_is_refused(model: DeepseekV4ForCausalLM) -> None:
    ids = torch.zeros(1, 20, dtype=torch.int64)
    with record(model) as tape:
        run_pass(model, ids, 1)
    with hold(model, tape), pytest.raises(ArgumentError, match="tape: got no pick left"):
        run_pass(model, ids, 2)
    with hold(model, tape), pytest.raises(ArgumentError, match=r"tape: got picks \(.*20, .*expected picks \(.*10, "):
        run_pass(model, ids[:, :10], 1)


def test_the_small_model_leaves_nothing_at_zero(shared_model: DeepseekV4ForCausalLM) -> None:
    for name, tensor in [*shared_model.named_parameters(), *shared_model.named_buffers()]:
        spread = tensor.float().std() if tensor.numel() > 1 else (tensor - 1).abs()
        assert spread > 0, name
    table = shared_model.model.layers[0].mlp.gate.tid2eid
    assert all(len(set(row)) == len(row) for row in table.tolist())
    config = shared_model.config
    assert set(config.layer_types) == {
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
    assert set(config.mlp_layer_types) == {"hash_moe", "moe"}
    assert config.rope_parameters["compress"]["rope_type"] == "yarn"


def test_the_small_model_is_its_seed() -> None:
    def first(seed: int) -> Tensor:
        weight: Tensor = build_small_model(seed=seed, dtype=torch.bfloat16).lm_head.weight
        return weight

    before = torch.get_rng_state()
    one = first(1)
    assert one.dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are spent
    assert torch.equal(one, first(1))
    assert not torch.equal(one, first(2))


def test_prompts(tmp_path: Path) -> None:
    assert 1000 < len(default_prompt()) < 1500
    file = tmp_path / "text.txt"
    file.write_text("Grüße", "utf-8")
    assert read_prompt(None, file) == "Grüße"
    assert read_prompt("abc", None) == "abc"
    with pytest.raises(ArgumentError, match="only one of the two"):
        read_prompt("abc", file)
    with pytest.raises(ArgumentError, match=r"--file: got .*absent\.txt \(No such file"):
        read_prompt(None, tmp_path / "absent.txt")
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ArgumentError, match="UTF-8"):
        read_prompt(None, file)
    with pytest.raises(ArgumentError, match="an empty text"):
        read_prompt("", None)


def test_bytes_and_a_tokenizer(tmp_path: Path) -> None:
    codec = codec_for(None, 256)
    assert codec == Codec()
    ids = codec.encode("Grüße")
    assert ids.shape == (1, 7)
    assert codec.decode(ids[0]) == "Grüße"
    with pytest.raises(CheckpointError, match="64 tokens are too few"):
        codec_for(tmp_path, 64)
    vocabulary = {"tide": 0, "mill": 1, "[UNK]": 2}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
            }
        )
    )
    words = codec_for(tmp_path, 64)
    assert words.encode("mill tide mill").tolist() == [[1, 0, 1]]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        codec_for(tmp_path, 64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (RunOptions(device="cudda"), UnknownNameError, "did you mean 'cuda'"),
        (RunOptions(dtype="bfloat"), UnknownNameError, "did you mean 'bfloat16'"),
        (RunOptions(decode=-1), ArgumentError, "--decode: got -1"),
        (RunOptions(max_prompt=0), ArgumentError, "--max-prompt: got 0"),
        (RunOptions(model=Path("absent")), CheckpointError, "no such folder"),
        (RunOptions(config={"quantise": "off"}), UnknownNameError, "did you mean 'quantize'"),
    ],
)
def test_wrong_options(options: RunOptions, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        job.run(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu() -> None:
    with pytest.raises(ArgumentError, match="--device: got cuda, expected cpu"):
        job.run(RunOptions(device="cuda"))
