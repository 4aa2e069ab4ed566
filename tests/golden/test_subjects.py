"""A subject is held against the golden files: by the frozen answers, and by how far its profile lets it be from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.front.cli import main
from mla_spec.golden.corpus.corpus import load
from mla_spec.golden.corpus.laws import CALLS, catches, check_golden, dtypes_of, golden_laws, refused
from mla_spec.planted_bugs import PLANTED
from mla_spec.subjects.supports import DTYPES, Supports

CASES = {case.name: case for case in load()}


@pytest.mark.parametrize("subject", [TorchAbsorbed, TorchExplicit, TorchSDPA])
def test_shipped_subjects_agree_with_every_case_that_they_can_be_asked(subject: type) -> None:
    records = check_golden(subject())
    assert len(records) == sum(case.operation in (*CALLS, "layer") for case in CASES.values())
    assert {record.verdict for record in records} <= {"pass", "unsupported"}, [r.text() for r in records]
    unsupported = {record.message for record in records if record.verdict == "unsupported"}
    refusals = {
        "takes no attn_sink",
        "refused by the subject: there is no attention sink",
    }  # of operations, and of layers
    assert unsupported == (set() if subject().supports.attention_sink else refusals)


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        ("E8", "decode-paged"),
        ("G17", "decode-long"),
        ("E8-merge", "merge-three-parts"),
        ("F18", "write-cache"),
        ("J20", "decode-sink"),
        ("J22", "prefill-sink-and-window"),
        ("X-window-of-the-first-query", "decode-window"),
        ("D17", "prefill-sink-and-window"),
        ("X-gate-left-out", "layer-gate-of-heads"),
        ("X-gates-by-element-and-head", "layer-gate-of-elements-and-sink"),
        ("X-layer-sink-left-out", "layer-gate-of-elements-and-sink"),
        ("X-query-gate-rows-of-all-heads", "layer-gate-with-queries"),
    ],
)
def test_planted_bugs_are_caught(bug: str, case: str) -> None:
    records = check_golden(PLANTED[bug].make())
    failing = {record.law for record in records if record.verdict in ("fail", "crashed")}
    assert f"golden:{case}" in failing
    assert set(catches(records)) == failing
    assert catches(records)[f"golden:{case}"] == CASES[case].catches


def test_a_case_runs_in_every_dtype_that_holds_its_inputs() -> None:
    assert dtypes_of(CASES["decode-bfloat16"], DTYPES) == DTYPES
    assert dtypes_of(CASES["decode-paged"], DTYPES) == ("float64",)
    assert dtypes_of(CASES["decode-float16"], DTYPES) == ("float64", "float32", "float16")


def test_what_a_subject_does_not_support_is_no_failure() -> None:
    some = Supports(page_sizes=(64,), causal=(True,), empty_row="unsupported", max_s=1, yarn=False)
    reasons = {name: refused(case, some) for name, case in CASES.items()}
    assert reasons["decode-paged"] == "does not support page_sizes 4"
    assert reasons["decode-not-causal"] == "does not support causal False"
    assert reasons["rope-yarn-factor"] == "does not know YaRN"
    assert refused(CASES["decode-several-queries"], replace(some, page_sizes=None)) == "takes 1 queries per sequence"
    assert not refused(CASES["rope-interleaved"], some)


def test_each_law_says_what_its_case_is_for() -> None:
    for name, (law, case) in golden_laws().items():
        assert law.statement == case.purpose == CASES[name].purpose


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records.json"
    assert main(["golden", "check", "torch-absorbed", "--json", str(records)]) == 0
    assert "golden:decode-paged" in capsys.readouterr().out
    assert {record["verdict"] for record in json.loads(records.read_text())} == {"pass"}
    assert main(["golden", "check", PLANTED["E8"].spec]) == 1
    assert "golden:decode-paged catches: " in capsys.readouterr().out


def test_a_subject_that_ends_its_process_is_told_case_by_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "import os\n"
        "from mla_spec.adapters.pytorch import TorchAbsorbed\n"
        "class Kernel(TorchAbsorbed):\n"
        "    def decode(self, *arguments, **options):\n"
        "        os._exit(0)\n"
    )
    records = tmp_path / "records.json"
    assert main(["golden", "check", f"{kernel}:Kernel", "--json", str(records)]) == 1
    verdicts = {record["law"]: record["verdict"] for record in json.loads(records.read_text())}
    asked = {name: CASES[name.removeprefix("golden:")].operation for name in verdicts}
    assert {name for name, verdict in verdicts.items() if verdict == "crashed"} == {
        name for name, operation in asked.items() if operation.startswith("decode")
    }
    assert verdicts["golden:rope-interleaved"] == "pass"
    assert main(["profile", f"{kernel}:Kernel", "--dtype", "float32", "--cases", "1"]) == 2
    assert "the process ended with exit code 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "golden check takes one SUBJECT"),
        (["verify", "torch-absorbed"], "golden verify takes no SUBJECT"),
        (["check", "torch-absorbt"], "unknown subject 'torch-absorbt'; did you mean torch-absorbed"),
    ],
)
def test_bad_usage_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["golden", *arguments]) == 2
    assert message in capsys.readouterr().err
