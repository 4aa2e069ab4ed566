"""What changed between the records of two versions of a kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_spec.front.cli import main
from mla_spec.front.reports.account import read_document
from mla_spec.front.reports.difference import Step, differences

KERNEL = """
from mla_spec.adapters.pytorch import TorchAbsorbed

class Right:
    name = "rope"
    factor = {}

    def rope(self, x, *arguments, **options):
        return self.factor.get(str(x.dtype), 1) * TorchAbsorbed().rope(x, *arguments, **options)

class Wrong(Right):
    factor = {"torch.float32": 2}

class Other(Right):
    name = "other"

    def rope(self, x, *arguments, **options):
        return TorchAbsorbed().rope(x.double(), *arguments, **options).to(x.dtype)
"""
LAWS = ("test_rope_agrees_with_reference", "test_rope_preserves_norm")


def recorded(name: str, folder: Path, *options: str, laws: tuple[str, ...] = LAWS) -> str:
    (folder / "kernel.py").write_text(KERNEL)
    file = folder / f"{name}{len(list(folder.iterdir()))}.jsonl"
    asked = [word for law in laws for word in ("--law", law)]
    given = options or ("--dtype", "float32", "--dtype", "bfloat16")
    command = [
        "check",
        f"{folder / 'kernel.py'}:{name}",
        *asked,
        *given,
        "--examples",
        "8",
        "--seed",
        "0",
        "--in-process",
    ]
    assert main([*command, "--records", str(file)]) in (0, 1)
    return str(file)


def test_a_law_that_fails_now_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = recorded("Right", tmp_path), recorded("Wrong", tmp_path)
    capsys.readouterr()
    assert main(["diff", right, wrong]) == 1
    out = capsys.readouterr().out
    assert out.startswith("rope: 2 worse, 0 better, of 4 cells\n")
    joined = " ".join(out.split())
    assert f"worse: {LAWS[0]} in float32: pass, now fail: rope output is 2 times what it should be" in joined
    assert "bfloat16" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["diff", wrong, right]) == 0
    assert "0 worse, 2 better" in capsys.readouterr().out
    assert main(["diff", wrong, wrong, "-v"]) == 0
    assert "still wrong:\n  test_rope_agrees_with_reference in float32: fail, now fail" in capsys.readouterr().out


def test_equal_runs_differ_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = recorded("Right", tmp_path)
    capsys.readouterr()
    assert main(["diff", one, one]) == 0
    assert capsys.readouterr().out == "rope: 0 worse, 0 better, of 4 cells\n"


def test_errors_that_moved_in_the_same_cases_are_shown(tmp_path: Path) -> None:
    right, other = recorded("Right", tmp_path), recorded("Other", tmp_path)
    (found,) = differences(read_document([right]), read_document([other]))
    assert found.same_cases
    assert {step.change for step in found.steps} == {"same"}
    assert [step for step in found.moved if step.dtype == "float32"]
    growth = [(step.new_ratio or 0) - (step.old_ratio or 0) for step in found.moved]
    assert growth == sorted(growth, reverse=True)
    seeded = recorded("Other", tmp_path, "--dtype", "float32")
    lines = [json.loads(line) for line in Path(seeded).read_text().splitlines()]
    lines[0]["seed"] = 1
    for line in lines:
        line |= {"seed": 1} if line["type"] == "verdict" else {}
    Path(seeded).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = differences(read_document([right]), read_document([seeded]))
    assert not found.same_cases
    assert found.moved == []
    assert "seed: 0, now 1" in found.runs


def test_what_is_judged_no_more_is_worse_if_it_passed(tmp_path: Path) -> None:
    both, one = recorded("Right", tmp_path), recorded("Right", tmp_path, "--dtype", "float32")
    (found,) = differences(read_document([both]), read_document([one]))
    assert {(step.dtype, step.change) for step in found.steps} == {("float32", "same"), ("bfloat16", "worse")}
    (found,) = differences(read_document([one]), read_document([both]))
    assert {(step.dtype, step.change) for step in found.steps} == {("float32", "same"), ("bfloat16", "judged now")}


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        ("pass", "fail", "worse"),
        ("pass", "unsupported", "worse"),
        ("pass", "waived", "same"),
        ("waived", "fail", "worse"),
        ("incomplete", "fail", "worse"),
        ("crashed", "fail", "still wrong"),
        ("fail", "incomplete", "better"),
        ("fail", "unsupported", "judged no more"),
        ("absent", "fail", "worse"),
        ("unsupported", "pass", "judged now"),
        ("unsupported", "absent", "same"),
    ],
)
def test_each_change_has_a_name(old: str, new: str, change: str) -> None:
    assert Step("law", "float32", old, new, None, None, "").change == change


def test_changes_are_data_too(tmp_path: Path) -> None:
    right, wrong, path = recorded("Right", tmp_path), recorded("Wrong", tmp_path), tmp_path / "changes.json"
    assert main(["diff", right, wrong, "--json", str(path)]) == 1
    (found,) = json.loads(path.read_text())
    assert {each["law"] for each in found["changes"]} == set(LAWS)
    assert {each["change"] for each in found["changes"]} == {"worse"}
    assert found["cells"] == 4


def test_another_subject_of_several_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two, path = recorded("Right", tmp_path), tmp_path / "two.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in Path(two).read_text().splitlines()]
    more = [line | {"spec": ["kernel.py:Third"], "name": "third"} for line in lines if line["type"] == "subject"]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:2], *more, *lines[2:]]))
    capsys.readouterr()
    assert main(["diff", two, str(path)]) == 2
    assert capsys.readouterr().err == "mla-spec: the subject 'third' is in the new run only; the old one has rope\n"
    assert main(["diff", two, str(tmp_path / "gone")]) == 2
