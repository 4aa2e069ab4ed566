"""The lane in small, on the CPU: every step runs, or says why not, and the page can be written from what it leaves."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import lane
import pytest
import report
from steps import ROOT, Setting, Step, steps

from mla_spec.installed import all_laws, planted_bugs
from mla_spec.judging.verdict import Record

Result = dict[str, Any]
NEVER = Path("nowhere")
ON_CPU = Setting("cpu", NEVER, jobs=2, rehearse=True)
ON_GPU = Setting("cuda", NEVER, jobs=8, rehearse=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a rehearsal leaves."""
    folder = tmp_path_factory.mktemp("rehearsal")
    arguments = ["--device", "cpu", "--rehearse", "--out", str(folder), "--brought", str(folder / "nothing")]
    arguments += ["--jobs", "1"]  # the other core runs other tests
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu" / "lane.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> list[Result]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_step_ran_or_says_why_not(results: list[Result]) -> None:
    assert results[0]["run"]["device"] == "cpu"
    assert [line["step"] for line in results[1:]] == [step.name for step in steps(ON_CPU)]
    for line in results[1:]:
        assert line["status"] in ("done", "left out"), line["log"]
        assert bool(line.get("reason")) == (line["status"] == "left out")
    left_out = {line["step"] for line in results if line.get("status") == "left out"}
    assert left_out == {"cuda-graphs", "triton-half", "triton-float32", "triton-tf32", "flashinfer"}


def test_what_ran_found_something_and_nothing_wrong(results: list[Result]) -> None:
    for line in results[1:]:
        verdicts = {record["verdict"] for record in line["records"] if "verdict" in record}
        assert verdicts <= {"pass", "unsupported"}, line["records"]
        if line["status"] == "done" and line["step"] not in ("machine", "products", "tests"):
            assert line["records"], line["step"]
    by_step = {line.get("step"): line for line in results}
    assert len(by_step["shipped"]["records"]) == len(all_laws())
    assert by_step["machine"]["data"]["device"] == "cpu"
    assert by_step["products"]["data"]["float32"] == {"1 + x - 1": 23, "x + 1 - 1": 23}
    assert [record["killed"] for record in by_step["selftest"]["records"]] == [True]
    assert by_step["sensitivity"]["records"]
    assert "4 skipped" in by_step["tests"]["log"] or "4 passed" in by_step["tests"]["log"]


def test_records_are_whole(out: Path, results: list[Result]) -> None:
    """What the results shorten stands in the file of records."""
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    whole = [line for line in lines if line.get("type", "verdict") == "verdict"]
    assert len(whole) == sum(len(line.get("records", ())) for line in results)
    laws = [record for record in whole if "verdict" in record]
    assert {record["law"] for record in laws} == set(all_laws())
    assert {"subject", "dtype", "cases", "message", "case", "replay", "seconds"} <= set(laws[0])


def test_the_page_is_written_from_the_results(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    write_page(target, str(out / "results.jsonl"))
    text = target.read_text()
    assert "## cpu, " in text
    assert "(rehearsal)" in text
    for step in steps(ON_CPU):
        assert step.title in text
    assert "1 of 1 planted bugs that ran were killed; surviving: none." in text
    assert "- FlashInfer's MLA wrapper: left out: needs CUDA." in text


def write_page(target: Path, *results: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "report.py"), *results, "--markdown", str(target)]
    subprocess.run(command, check=True)


def test_the_committed_page_is_what_the_committed_results_give(tmp_path: Path) -> None:
    write_page(tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text == (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert ("Not run on hardware yet." in text) == (not list(report.RESULTS.glob("*.jsonl")))


def test_the_package_is_found_where_it_is_not_installed(tmp_path: Path) -> None:
    """Without site-packages' links to the source tree, as on a machine that knows nothing of it."""
    lane.link_tree(tmp_path)
    paths = os.pathsep.join([str(tmp_path), sysconfig.get_paths()["purelib"]])
    modules = ("front.cli", "properties.hazards", "golden.corpus.corpus", "planted_bugs.catalogue", "installed")
    code = "".join(f"import mla_spec.{name}\nprint(mla_spec.{name}.__file__)\n" for name in modules)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.split())


@pytest.mark.parametrize("setting", [ON_CPU, ON_GPU], ids=["cpu", "gpu"])
def test_steps_name_what_exists(setting: Setting) -> None:
    every = steps(setting)
    assert len({step.name for step in every}) == len(every)
    for step in every:
        words = step.command
        laws = {word for option, word in itertools.pairwise(words) if option == "--law"}
        bugs = {word for option, word in itertools.pairwise(words) if option == "--bug"}
        assert laws <= set(all_laws())
        assert bugs <= set(planted_bugs())
        files = [word.partition(":")[0] for word in words if ".py" in word]
        assert all((ROOT / file).is_file() for file in files)


def test_a_gpu_runs_what_a_rehearsal_leaves_out() -> None:
    left_out = {step.name: step.left_out for step in steps(ON_GPU)}
    assert left_out["cuda-graphs"] == ""
    assert "not brought along" in left_out["triton-half"] or "not installed" in left_out["triton-half"]
    assert "collect.py --flashinfer" in left_out["flashinfer"]
    expected = {step.name for step in steps(ON_GPU) if step.expected}
    assert expected == {"triton-tf32", "cublas-tf32"}


WRITES_AND_HANGS = """
import subprocess, sys, time
open(sys.argv[1], "a").write('{"law": "a", "subject": "b", "verdict": "fail", "message": "m"}\\n{"law": "c"')
print("began", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""


def test_a_step_that_is_killed_leaves_what_it_has_written(tmp_path: Path) -> None:
    made = lane.Lane(tmp_path, limit=60)
    hangs = Step("hangs", "Hangs", (sys.executable, "-c", WRITES_AND_HANGS, str(made.records)), limit=3)
    start = time.monotonic()
    made.run(hangs, dict(os.environ))
    assert time.monotonic() - start < 30
    (result,) = [json.loads(line) for line in made.results.read_text().splitlines()]
    assert (result["status"], result["reason"]) == ("killed", "took more than 3 s")
    assert [record["law"] for record in result["records"]] == ["a"]
    assert "began" in made.log.read_text()


def test_a_step_for_which_no_time_is_left_says_so(tmp_path: Path) -> None:
    made = lane.Lane(tmp_path, limit=lane.GRACE)
    made.run(Step("late", "Late", (sys.executable, "-c", "print(1)"), limit=3), dict(os.environ))
    (result,) = [json.loads(line) for line in made.results.read_text().splitlines()]
    assert (result["status"], result["reason"]) == ("left out", "no time was left")


@pytest.mark.parametrize("command", [("-c", "raise SystemExit(1)"), ("-m", "json.tool", "--nothing")])
def test_a_command_that_cannot_work_has_failed(command: tuple[str, ...], tmp_path: Path) -> None:
    made = lane.Lane(tmp_path, limit=60)
    made.run(Step("wrong", "Wrong", (sys.executable, *command), limit=30), dict(os.environ))
    (result,) = [json.loads(line) for line in made.results.read_text().splitlines()]
    assert result["status"] == "failed"


def run_of(**fields: Any) -> list[Result]:
    record = Record("test_law", "kernel", "fail", cases=3, message="out[0]: got 1, want 2", replay="mla-spec check x")
    step = {
        "step": "s",
        "title": "Title",
        "command": "mla-spec check x",
        "status": "done",
        "seconds": 1.0,
        "expected": "",
    }
    return [
        {"run": {"device": "cuda", "date": "2026-01-02", "rehearsal": False}},
        step | {"records": [record.as_dict()]} | fields,
    ]


def test_each_violation_is_shown_with_its_cause() -> None:
    text = report.page([run_of()], {})
    assert "| Title | kernel | 0 | 1 | 0 | 0 | 0 | 1 |" in text
    assert "test_law [kernel]: fail. Cause: not known yet." in text
    assert "out[0]: got 1, want 2\n  replay: mla-spec check x" in text
    assert "1 laws that did not hold have no known cause" in text
    known = report.page([run_of()], {"s test_law[kernel]": "the kernel drops a key"})
    assert "Cause: the kernel drops a key." in known
    assert "no known cause" not in known


def test_a_step_that_failed_is_a_doubt() -> None:
    assert "- Title: failed: exit code 2." in report.page([run_of(status="failed", exit=2, records=[])], {})
    assert "- Title: done: exit code 1." in report.page([run_of(exit=1, records=[])], {})


def test_a_violation_of_what_is_not_declared_is_expected() -> None:
    text = report.page([run_of(expected="TF32")], {})
    assert "Cause: expected: TF32." in text
    assert "no known cause" not in text
    crashed = Record("test_law", "kernel", "crashed", message="illegal memory access").as_dict()
    assert "Cause: not known yet." in report.page([run_of(expected="TF32", records=[crashed])], {})


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": "s"}\n')
    with pytest.raises(report.BadResults, match="does not begin with a line of the run"):
        report.read(path)
    path.write_text('{"run": {}}\n{"step": "s"}\n')
    with pytest.raises(report.BadResults, match="a step lacks command"):
        report.read(path)
