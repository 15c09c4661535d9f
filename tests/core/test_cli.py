"""The command line: what each command prints and exits with, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.runtime import runtime


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["explain", "swiglu_qant"], "did you mean 'swiglu_quant'"),
        (["explain", "NVFP4-1.11"], "did you mean 'NVFP4-1.1'"),
        (["explain", "quantize", "--arch", "hopper"], "expected one like sm_90"),
        (["verify", "quantize", "--variant", "fallbak"], "did you mean 'fallback'"),
        (["verify", "quantize", "--case", "no_such_case"], "no case of quantize"),
        (["config", "--stage", "quantize=fusd"], "did you mean 'fused'"),
        (["config", "--stage", "quantize"], "not of the form ID=VALUE"),
        (["config", "--stage", "qantize=auto"], "did you mean 'quantize'"),
        (["config", "--config", "no_such_file.toml"], "no such file"),
        (["roadmap", "--chekc"], "--check"),
        (["raodmap"], "No such command 'raodmap'"),
        (["new", "quantize", "--item", "X"], "an id that no stage has"),
        (["new", "No Name", "--item", "X"], "a lower-case Python name"),
        (["run", "--model", "no_such_folder"], "no_such_folder"),
        (["run", "--file", "no_such_text.txt"], "no_such_text.txt"),
        (["run", "--dtype", "bfloat15"], "bfloat16"),
        (["run", "--device", "cdua"], "cuda"),
        (["run", "--stage", "swiglu_quant=nothing"], "swiglu_quant"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    code, _, err = call(capsys, *argv)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert "Traceback" not in err


def test_wrong_key_in_a_config_file_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "megamoe.toml"
    path.write_text('[megamoe]\ndefalt = "auto"\n')
    code, _, err = call(capsys, "config", "--config", str(path))
    assert code == 2
    assert "megamoe.defalt: unknown key, did you mean 'default'?" in err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in ("run", "roadmap", "explain", "verify", "bench", "config", "doctor", "new"):
        assert command in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--version")
    assert (code, out) == (0, "megamoe 0.1.0\n")


def test_explain_lists_every_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "explain", "quantize", "--stage", "quantize=reference", "--arch", "cpu")
    assert code == 0
    assert "on the CPU: reference (reference)" in out
    assert "because argument asks for 'reference'" in out
    assert "refused fallback" in out


def test_explain_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "explain", "--json", "--arch", "sm_90")
    assert code == 0
    decisions = {d["stage"]: d for d in json.loads(out)}
    assert len(decisions) >= 7
    assert all(d["variant"]["role"] in ("fused", "fallback") for d in decisions.values())


def test_roadmap_forms_agree(capsys: pytest.CaptureFixture[str]) -> None:
    _, table, _ = call(capsys, "roadmap")
    _, markdown, _ = call(capsys, "roadmap", "--markdown")
    _, raw, _ = call(capsys, "roadmap", "--json")
    for row in json.loads(raw):
        assert row["item"] in table
        assert f"| {row['item']} | {row['title']} |" in markdown


def test_roadmap_file_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "roadmap", "--check")
    assert code == 0, err


def test_config_shows_where_a_value_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAMOE_STAGE_NVFP4_1_1", "fallback")
    code, out, _ = call(capsys, "config", "--stage", "quantize=reference", "--json")
    assert code == 0
    use = json.loads(out)["use"]
    assert use["swiglu_quant"] == {"value": "fallback", "origin": "MEGAMOE_STAGE_NVFP4_1_1"}
    assert use["quantize"] == {"value": "reference", "origin": "argument"}


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert f"{len(runtime().stages)} torch.library operators" in out


def test_verify_records_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "verify", "quantize", "--variant", "fallback", "--cpu", "--quiet")
    assert code == 0
    assert "fallback on the CPU: " in out
    recorded = Path(out.rsplit("recorded in ", 1)[1].strip())
    record = json.loads(recorded.read_text())
    assert record["arch"] == "cpu"
    assert all(case["passed"] for case in record["cases"])


def test_bench_quick_checks_then_times() -> None:
    """In a process of its own, which must not take itself for a worker of this test run."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", "bench", "inverse_rope_quant", "--quick"],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inverse_rope_quant[" in done.stdout
    assert "fallback" in done.stdout
    assert "reference" in done.stdout
