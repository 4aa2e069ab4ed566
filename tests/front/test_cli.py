"""The command line, through its entry point and as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mla_spec.bounds.profile import Profile
from mla_spec.front.cli import main
from mla_spec.properties.fixed import decode
from mla_spec.subjects.supports import DTYPES, Supports
from mla_spec.text.files import write_atomically

GOOD = """
from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit

class Good(TorchAbsorbed):
    name = "good"

class Wrong(TorchExplicit):
    name = "wrong"
    def scores(self, q, k, softmax_scale):
        return super().scores(q, k, softmax_scale * 1.1)

class NeedsArguments(TorchAbsorbed):
    def __init__(self, model):
        pass

def decode(*args, **kwargs):
    return TorchAbsorbed().decode(*args, **kwargs)

number = 3
"""


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel.py"
    path.write_text(GOOD)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    quick = ["--in-process"] if arguments[0] == "check" else []
    seed = ["--seed", "0"] if arguments[0] == "check" and "--seed" not in arguments else []
    code = main([*arguments, *quick, *seed])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_conforming_subject_gets_0_and_a_table(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "check", f"{kernel}:Good", "-v", "--examples", "8", "--law", "test_decode_agrees_with_reference"
    )
    assert code == 0
    assert "good: offers rope, absorb, " in out
    assert "profile bfloat16 default, probabilities=float32, form=absorbed" in out
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("law "))
    row = lines[header + 1]
    assert lines[header].split() == ["law", "verdict", "cases", "error/bound", "worst", "case"]
    assert row.split()[:2] == ["test_decode_agrees_with_reference", "pass"]
    assert int(row.split()[2]) == 8 + sum(len(decode.rare(Supports(), Profile.default(dtype))) for dtype in DTYPES)
    assert "decode:dtype=" in row
    assert "1 pass in" in out


def test_a_violation_gets_1_and_its_replay_fails_too(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    law = "test_decode_agrees_with_reference"
    code, out, _ = run(capsys, "check", f"{kernel}:Wrong", "-v", "--law", law)
    assert code == 1
    replay = next(line for line in out.splitlines() if line.strip().startswith("replay:")).split("mla-spec ")[1]
    code, out, _ = run(capsys, *replay.split())
    assert code == 1
    assert f"{law} [wrong]: fail after 1 cases" in out
    code, _, _ = run(capsys, *replay.replace(":Wrong", ":Good").split())
    assert code == 0


def test_a_bare_function_needs_a_signature(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    law = ("--law", "test_decode_agrees_with_reference", "--examples", "4")
    code, _, err = run(capsys, "check", f"{kernel}:decode", *law)
    assert code == 2
    assert "is a bare function; name its operation with --signature" in err
    code, _, _ = run(capsys, "check", f"{kernel}:decode", "--signature", "decode", *law)
    assert code == 0


def test_nothing_that_applies_is_incomplete(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "check", f"{kernel}:decode", "--signature", "decode", "--law", "test_rope_preserves_norm"
    )
    assert code == 3
    assert "does not offer rope" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "torch-absorb"], "unknown subject 'torch-absorb'; did you mean torch-absorbed"),
        (["check", "no_such_module:Kernel"], "importing no_such_module failed with ModuleNotFoundError"),
        (["check", "missing.py:Kernel"], "no such file: missing.py"),
        (["check", "{kernel}:Absent"], "has no attribute 'Absent'"),
        (["check", "{kernel}:NeedsArguments"], "making the object failed with TypeError"),
        (["check", "{kernel}:number"], "int is not a subject"),
        (["check", "{kernel}:decode", "--signature", "prefil"], "unknown operation 'prefil'"),
        (["check", "torch-explicit", "--law", "test_decode_agrees"], "unknown law 'test_decode_agrees'; did you mean"),
        (["check", "torch-explicit", "--dtype", "bf16"], "unknown dtype 'bf16'; known are float64"),
        (["check", "torch-explicit", "--examples", "0"], "--examples must be at least 1, got 0"),
        (["check", "torch-explicit", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["check", "torch-explicit", "--case", "decode:s=1"], "--case needs exactly one --law"),
        (["check", "torch-explicit", "--law", "test_absorb_splits_kv_b_proj", "--case", "x"], "unknown kind 'x'"),
        (["cache", "DeepSeekV3"], "unknown model 'DeepSeekV3'; did you mean DeepSeek-V3"),
        (["cache", "DeepSeek-V4-Pro"], "not MLA"),
        (["cache", "missing/config.json"], "missing/config.json: cannot be read: No such file or directory"),
        (["check", "torch-explicit", "--config", "missing.json"], "missing.json: cannot be read: No such file"),
        (["cache", "DeepSeek-V3", "--dtype", "int3"], "unknown number format 'int3'"),
        (["cache", "DeepSeek-V3", "--layout", "fp6"], "unknown cache layout 'fp6'; known layouts are fp8_per_tensor"),
        (["cache", "DeepSeek-V3", "--layout", "indexer_fp8"], "indexer_fp8 stores rows of 128 elements; DeepSeek-V3"),
        (["cache", "DeepSeek-V3", "--tokens", "-1"], "tokens must be at least 1, got -1"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["sensitivity", "torch-explicit", "--cases", "0"], "--cases must be at least 1, got 0"),
        (["soundness", "--first", "-5"], "--first must be at least 0, got -5"),
        (["golden", "certify", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["check", "torch-explicit", "--rtol", "1e-2"], "unrecognized arguments: --rtol 1e-2"),
    ],
)
def test_bad_usage_is_one_sentence_and_2(
    arguments: list[str], message: str, kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *(a.replace("{kernel}", kernel) for a in arguments))
    assert code == 2
    assert message in err
    assert err.startswith("mla-spec: ")
    assert err.count("\n") == 1
    assert not out


def test_records_are_appended_as_they_are_made(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "records.jsonl"
    laws = ("test_decode_agrees_with_reference", "test_decode_lse_agrees_with_reference")
    for law in laws:
        run(capsys, "check", f"{kernel}:Good", "--law", law, "--examples", "4", "--records", str(target))
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["law"] for line in lines if line["type"] == "verdict" and line["dtype"] == "float16"] == list(laws)
    code, _, err = run(capsys, "check", f"{kernel}:Good", "--records", str(tmp_path / "no" / "x.jsonl"))
    assert code == 2
    assert "cannot write" in err


@pytest.mark.parametrize("command", ["check", "selftest", "sensitivity torch-absorbed"])
def test_a_device_that_cannot_be_used_is_a_usage_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *command.split(), "--device", "cuda:99")
    assert code == 2
    assert "device 'cuda:99' cannot be used" in err


def test_json_holds_the_records(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "records.json"
    law = ("--law", "test_absorb_splits_kv_b_proj", "--examples", "4")
    code, _, _ = run(capsys, "check", f"{kernel}:Good", *law, "--json", str(target))
    assert code == 0
    (record,) = json.loads(target.read_text())
    assert (record["law"], record["verdict"]) == ("test_absorb_splits_kv_b_proj", "pass")
    code, _, err = run(capsys, "check", f"{kernel}:Good", *law, "--json", str(tmp_path / "no" / "x.json"))
    assert code == 2
    assert "cannot write" in err


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_cache_prints_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "cache", "deepseek-v3", "--tokens", "100", "--page-size", "64", "--batch", "2")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert rows["MLA"][1:] == ["576", "1152", "70272", str(2 * 128 * 70272), "70.272", "17.156", "MiB"]
    assert rows["MHA"][1:4] == ["40960", "81920", str(81920 * 61)]


@pytest.mark.parametrize(
    ("model", "layout", "per_token", "page_of_64", "layers", "share"),
    [
        ("DeepSeek-V3", "fp8_ds_mla", 656, 41984, 61, "56.9"),
        ("DeepSeek-V3", "fp8_per_tensor", 576, 36864, 61, "50.0"),
        ("DeepSeek-V3", "nvfp4_ds_mla", 352, 22528, 61, "30.6"),
        ("GLM-5.2 / 5.3", "indexer_fp8", 132, 8448, 21, "3.1"),
    ],
)
def test_cache_prints_the_bytes_of_a_layout(
    model: str,
    layout: str,
    per_token: int,
    page_of_64: int,
    layers: int,
    share: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--tokens", "100", "--page-size", "64", "--batch", "2", "--layout", layout)
    code, out, _ = run(capsys, "cache", model, *arguments)
    assert code == 0
    header, first, second = (line.split() for line in out.splitlines()[1:4])
    assert header[-5:] == [layout, "is", "KB/token", "in", "pages"]
    assert first[0] == layout
    assert first[2:5] == [str(per_token), str(layers * per_token), str(4 * layers * page_of_64)]
    assert second[0] == "MLA"
    assert second[5:7] == [share, "%"]


def test_models_are_listed_with_what_is_unverified(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert "DeepSeek-V3 " in out
    assert "rope_scaling.mscale" in out
    assert "DeepSeek-V4" not in out


def test_laws_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "laws")
    assert code == 0
    assert "test_absorbed_equals_explicit" in out


def test_version_and_help_as_a_process() -> None:
    for argument in ("--version", "--help"):
        done = subprocess.run(
            [sys.executable, "-m", "mla_spec.front.cli", argument], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "mla-spec" in done.stdout


def test_the_first_failing_case_may_stay_as_it_is(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    law = ("--law", "test_decode_agrees_with_reference", "--dtype", "float32", "--examples", "3", "--seed", "0")
    fixed = [case.id for case in decode.rare(Supports(), Profile.default("float32"))]
    for options, same in (((), False), (("--no-minimise",), True)):
        code, out, _ = run(capsys, "check", f"{kernel}:Wrong", "-v", *law, *options)
        assert code == 1
        assert any(f"smallest case: {case}" in out for case in fixed) == same
