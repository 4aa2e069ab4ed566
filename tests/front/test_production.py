"""``mla-spec check --production`` and the pytest options that do the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mla_spec.front.cli import main

pytest_plugins = ["pytester"]

SAMPLED = "test_decode_agrees_under_load"
LAW = ("--law", SAMPLED, "--law", "test_decode_is_exact_under_load", "--dtype", "float32", "-v", "--seed", "0")
SHAPE = {"operation": "decode", "seqlens": [70, 3], "num_heads": 4, "kv_lora_rank": 6, "qk_rope_head_dim": 2}
WRONG = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class OneHead(TorchAbsorbed):
    def decode(self, *args, **kwargs):
        out, lse = super().decode(*args, **kwargs)
        out[:, :, 3] = 0
        return out, lse
"""


@pytest.fixture
def workload(tmp_path: Path) -> str:
    path = tmp_path / "shapes.jsonl"
    path.write_text(json.dumps(SHAPE) + "\n")
    return str(path)


def test_a_small_budget_is_kept_and_the_sample_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "torch-absorbed", *LAW, "--production", "--budget", "0.5", "--in-process"]) == 0
    out = capsys.readouterr().out
    note = max((line for line in out.splitlines() if line.startswith(f"{SAMPLED}: ")), key=len)
    stated = re.search(
        r": (\d+) sequences × (\d+) heads × (\d) quer\w+ over [12] to \d+ keys in float32: the reference judges 64 of (\d+) "
        r"rows at random and \d+ at corners; probability that a fault escapes it: one sequence of \1 with 0, "
        r"one head of \2 with ([\d.]+), .*one row with ([\d.]+); 0\.5 s were too few for \d+ larger loads$",
        note,
    )
    assert stated is not None
    b, h, s, rows = (int(stated[i]) for i in range(1, 5))
    assert rows == b * h * s
    assert float(stated[5]) == 1 - min(64, h) / h
    assert float(stated[6]) == pytest.approx(1 - 64 / rows, abs=5e-4)


def test_recorded_shapes_run_in_a_worker_and_the_record_has_the_note(
    workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.json"
    assert main(["check", "torch-absorbed", *LAW, "--workload", workload, "--jobs", "1", "--json", str(records)]) == 0
    sampled, exact = json.loads(records.read_text())
    assert sampled["note"].startswith(
        "2 sequences × 4 heads × 1 query over 3 to 70 keys in float32: the reference judges 8"
    )
    assert exact["note"] == ""
    assert sampled["note"] in capsys.readouterr().out


def test_a_failure_is_replayed_with_the_option(
    workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(WRONG)
    assert (
        main(["check", f"{path}:OneHead", *LAW[:2], "--workload", workload, "--seed", "0", "--in-process", "-v"]) == 1
    )
    (replay,) = [line for line in capsys.readouterr().out.splitlines() if "replay: " in line]
    arguments = replay.partition("mla-spec ")[2].split()
    assert arguments[-1] == "--production"
    assert main([*arguments, "--in-process"]) == 1
    assert re.search(
        r"sequence \d, head 3, query 0 \(\d+ keys\): out\[0, 0, 0, \d\]: got 0\.0", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "3"], "--budget is of --production, which is not given"),
        (["--production", "--budget", "0"], "--budget must be positive, got 0.0"),
        (["--workload", "none.jsonl"], "--workload none.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_bad_usage_is_one_sentence_and_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "torch-absorbed", *arguments]) == 2
    assert capsys.readouterr().err == f"mla-spec: {message}\n"


def test_a_bad_line_names_the_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shapes.jsonl"
    path.write_text(json.dumps({**SHAPE, "num_heads": "many"}))
    assert main(["check", "torch-absorbed", "--workload", str(path)]) == 2
    err = capsys.readouterr().err
    assert err == f'mla-spec: --workload {path}:1: num_heads is "many"; expected an integer of at least 1\n'


def test_pytest_runs_the_laws_where_it_is_asked_to(pytester: pytest.Pytester, workload: str) -> None:
    law = ("--pyargs", "mla_spec.properties.test_load", "-k", "test_decode_agrees_under", "-rs", "-p", "no:xdist")
    common = (*law, "--mla-impl", "torch-absorbed", "--mla-seed", "0", "--mla-in-process")
    done = pytester.runpytest_subprocess(*common)
    done.assert_outcomes(skipped=1, deselected=8)
    done.stdout.fnmatch_lines(["*not asked for: --production*"])
    pytester.runpytest_subprocess(*common, "--mla-workload", workload).assert_outcomes(passed=1, deselected=8)
    small = ("--mla-production", "--mla-budget", "0.5")
    pytester.runpytest_subprocess(*common, *small).assert_outcomes(passed=1, deselected=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mla-production", "--mla-budget", "-1"), "*--mla-budget must be positive, got -1.0*"),
        (("--mla-workload", "none.jsonl"), "*--mla-workload none.jsonl: cannot be read: No such file or directory*"),
    ],
)
def test_bad_options_of_pytest_are_one_sentence(
    options: tuple[str, ...], message: str, pytester: pytest.Pytester
) -> None:
    law = ("--pyargs", "mla_spec.properties.test_load", "-k", "test_decode_agrees_under", "-p", "no:xdist")
    done = pytester.runpytest_inprocess(*law, "--mla-impl", "torch-absorbed", *options)
    assert done.ret != 0
    done.stdout.fnmatch_lines([message])
