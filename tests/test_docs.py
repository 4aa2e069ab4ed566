"""What the documents name exists: rooms, files, functions, fields, exit codes."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mla_spec.front.report import exit_code
from mla_spec.judging.verdict import Record
from tests.test_import_rules import ROOMS

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STABILITY = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
FOLDERS = r"(?:mla_spec|properties|golden|tests|examples|benchmarks|docs)/"


def named_paths(text: str) -> set[str]:
    return set(re.findall(rf"`({FOLDERS}[\w./]*)`", text))


def named_definitions(text: str) -> set[tuple[str, str]]:
    """(name, file) of "`name` in `file`", "`name` of `file`" and "`name` ... (`file`)" within a few words."""
    joined = " ".join(text.split())
    return set(re.findall(rf"`(\w+)` (?:in|of|for Hypothesis) \(?`({FOLDERS}[\w/]*\.py)`", joined))


def missing_definitions(text: str) -> set[tuple[str, str]]:
    return {(name, path) for name, path in named_definitions(text) if name not in defined(ROOT / path)}


def defined(path: Path) -> set[str]:
    """Names of functions, classes and constants at the top of a file."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_rooms_are_those_that_imports_are_held_to() -> None:
    table = ARCHITECTURE.partition("<!-- rooms: begin -->")[2].partition("<!-- rooms: end -->")[0]
    rows = re.findall(r"^\| (\w+) \| `([\w/]+)/` \|", table, flags=re.MULTILINE)
    assert tuple(name for name, _ in rows) == ROOMS
    assert [folder for _, folder in rows if not list((ROOT / folder).glob("*.py"))] == []
    assert [folder for name, folder in rows if Path(folder).name != name] == []


@pytest.mark.parametrize("text", [ARCHITECTURE, STABILITY], ids=["architecture", "stability"])
def test_paths_exist(text: str) -> None:
    assert named_paths(text)
    assert {path for path in named_paths(text) if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("text", [ARCHITECTURE, STABILITY], ids=["architecture", "stability"])
def test_functions_lie_in_the_files_named(text: str) -> None:
    assert named_definitions(text)
    assert missing_definitions(text) == set()


def test_every_stop_of_the_trip_names_a_function() -> None:
    trip = ARCHITECTURE.partition("## One trip")[2].partition("## Written by hand")[0]
    stops = re.split(r"^\d+\. ", trip, flags=re.MULTILINE)[1:]
    assert len(stops) == 10
    assert [stop for stop in stops if not named_definitions(stop)] == []


def test_a_function_that_has_moved_is_found() -> None:
    moved = ARCHITECTURE.replace("`run_law` in `mla_spec/judging/run.py`", "`run_law` in `mla_spec/judging/judge.py`")
    assert missing_definitions(moved) == {("run_law", "mla_spec/judging/judge.py")}


def test_every_field_of_a_report_is_promised() -> None:
    table = STABILITY.partition("## Fields of reports")[2].partition("## Golden files")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(cells)) == [field.name for field in fields(Record)]


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (["pass", "unsupported"], 0),
        (["pass", "fail"], 1),
        (["crashed", "incomplete"], 1),
        (["pass", "incomplete"], 3),
        (["unsupported"], 3),
    ],
)
def test_exit_codes_are_as_promised(verdicts: list[str], code: int) -> None:
    assert exit_code(Record("law", "subject", verdict) for verdict in verdicts) == code
    assert re.search(rf"^\| {code} \|", STABILITY, flags=re.MULTILINE)
