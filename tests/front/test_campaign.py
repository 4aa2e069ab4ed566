"""Campaigns: one seed after another, on this machine or on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mla_spec.front.cli import main
from mla_spec.judging.hardest import KEPT, CorpusError, HardCase, hardest, read_hard_cases
from mla_spec.judging.plan import Cell
from mla_spec.judging.verdict import Record

KERNEL = """
import time
from mla_spec.adapters.pytorch import TorchAbsorbed

class Rope:
    name = "rope-only"

    def rope(self, x, *arguments, **options):
        time.sleep(0.02)
        return TorchAbsorbed().rope(x, *arguments, **options)

class FarOut:
    name = "wrong-far-out"

    def rope(self, x, positions, *arguments, **options):
        out = TorchAbsorbed().rope(x, positions, *arguments, **options)
        return 2 * out if (positions == 12345).any() else out
"""
LAWS = ("--law", "test_rope_preserves_norm", "--law", "test_rope_layouts_are_equivalent")
HARD = "rope:dtype=float32,seed=1,batch=1,s=1,heads=1,dim=8,layout=half,theta=10000.0,yarn=none,start=12345"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    return path


def command(kernel: Path, *more: object, subject: str = "Rope") -> list[str]:
    files = ("--records", kernel.parent / "c.jsonl", "--corpus", kernel.parent / "h.jsonl")
    return ["campaign", f"{kernel}:{subject}", *LAWS, "--examples", "4", "--jobs", "1", *map(str, (*files, *more))]


def cells(kernel: Path) -> Counter[tuple[str, str, int]]:
    lines = map(json.loads, (kernel.parent / "c.jsonl").read_text().splitlines())
    return Counter((line["law"], line["dtype"], line["seed"]) for line in lines if line["type"] == "verdict")


def test_every_cell_of_every_seed_is_judged_once_and_the_hardest_cases_are_kept(
    kernel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dtypes = ("--dtype", "float32", "--dtype", "bfloat16")
    assert main(command(kernel, "--rounds", 2, "--seed", 5, *dtypes)) == 0
    assert "complete: 8 cells of 2 seeds are judged" in capsys.readouterr().out
    assert set(cells(kernel).values()) == {1}
    assert {seed for *_, seed in cells(kernel)} == {5, 6}
    kept = read_hard_cases(str(kernel.parent / "h.jsonl"))
    assert {case.law for case in kept} == set(LAWS[1::2])
    assert main(command(kernel, "--rounds", 3, "--seed", 5, *dtypes)) == 0
    assert len(cells(kernel)) == 12
    assert set(cells(kernel).values()) == {1}


def test_later_runs_begin_with_the_hardest_cases(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = kernel.parent / "h.jsonl"
    file.write_text(json.dumps({"law": LAWS[1], "case": HARD, "worst": 0.9, "subject": "another"}) + "\n")
    once = ("--rounds", "1", "--dtype", "float32")
    assert main(command(kernel, *once, subject="FarOut")) == 1
    failed = [case for case in read_hard_cases(str(file)) if case.worst is None]
    assert [case.law for case in failed] == [LAWS[1]]
    check = [
        "check",
        f"{kernel}:FarOut",
        *LAWS[:2],
        "--examples",
        "4",
        "--seed",
        "0",
        "--dtype",
        "float32",
        "--in-process",
    ]
    assert main(check) == 0
    assert main([*check, "--begin", str(file), "-v"]) == 1
    assert "fail after 1 cases" in capsys.readouterr().out


def test_the_hardest_cases_are_few_and_in_a_fixed_order() -> None:
    def record(worst: float, verdict: str = "pass") -> tuple[Cell, Record]:
        case = f"rope:dtype=float32,seed={int(worst * 100)}"
        cell = Cell(("a",), "test_rope_preserves_norm", "float32", int(worst * 100))
        return cell, Record(
            cell.law, "a", verdict, worst=worst, worst_case=case, case=case if verdict == "fail" else ""
        )  # type: ignore[arg-type]

    judged = [record(n / 10) for n in range(1, 8)]
    kept = hardest((), judged)
    assert [case.worst for case in kept] == [0.7, 0.6, 0.5][:KEPT]
    assert hardest(kept, judged[::-1]) == kept
    failed = hardest(kept, [record(0.2, "fail")])
    assert [case.worst for case in failed] == [None, 0.7, 0.6, 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", ":1 is []; expected an object"),
        ("{", ":1: not valid JSON"),
        ('{"law": "test_rope_preserves_norm", "case": "x", "worst": 1, "subject": ""}', ":1: case 'x': unknown kind"),
        ('{"law": "no", "case": "rope:dtype=float32", "worst": 1, "subject": ""}', ":1: unknown law 'no'"),
        ('{"law": "no", "case": "rope:dtype=float32", "worst": NaN, "subject": ""}', ":1: worst is nan; expected"),
    ],
)
def test_a_corpus_that_is_none_is_refused(
    content: str, message: str, kernel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = kernel.parent / "h.jsonl"
    file.write_text(content)
    with pytest.raises(CorpusError):
        read_hard_cases(str(file))
    assert main(command(kernel, "--rounds", 1)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("mla-spec: --corpus ")
    assert err.count("\n") == 1
    assert file.read_text() == content


def test_an_interrupted_campaign_goes_on(kernel: Path) -> None:
    words = [sys.executable, "-m", "mla_spec.front.cli", *command(kernel, "--rounds", 2)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 120
    while not (kernel.parent / "c.jsonl").exists() or len(cells(kernel)) < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGTERM: " in out
    assert read_hard_cases(str(kernel.parent / "h.jsonl"))
    assert main(command(kernel, "--rounds", 2)) == 0
    assert len(cells(kernel)) == 16
    assert set(cells(kernel).values()) == {1}


def test_hours_end_a_campaign(kernel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(kernel, "--hours", 20 / 3600, "--dtype", "float32")) in (0, 3)
    assert "time limit: " in capsys.readouterr().out


def test_without_ray_it_is_said(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(command(kernel, "--ray", "local")) == 2
    assert "--ray needs Ray, which is not installed: pip install 'mla-spec[ray]'" in capsys.readouterr().err


def test_a_lost_node_of_a_cluster_loses_no_cell(kernel: Path) -> None:
    """Two nodes, of which one is killed: the verdicts of every cell are those of one machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    try:
        words = command(kernel, "--rounds", 2, "--ray", cluster.address)
        process = subprocess.Popen([sys.executable, "-m", "mla_spec.front.cli", *words])
        end = time.monotonic() + 300
        while not (kernel.parent / "c.jsonl").exists() or len(cells(kernel)) < 3:
            assert time.monotonic() < end
            time.sleep(0.1)
        cluster.remove_node(lost, allow_graceful=False)
        assert process.wait(300) == 0
    finally:
        cluster.shutdown()
    assert len(cells(kernel)) == 16
    assert set(cells(kernel).values()) == {1}


def test_a_hard_case_is_plain_data() -> None:
    assert HardCase("a", HARD, None, "b").parsed.id.startswith("rope:dtype=float32,seed=1,")
