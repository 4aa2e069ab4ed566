"""What the documents name exists: rooms, files, functions, commands, options, fields, exit codes."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mla_spec.bounds.profile import Accumulator, Profile, RopeProfile
from mla_spec.front.cli import main
from mla_spec.front.report import exit_code
from mla_spec.judging.verdict import Record
from mla_spec.subjects.supports import Supports
from tests.test_import_rules import ROOMS

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STABILITY = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "golden" / "README.md"])
TOPS = ("mla_spec", "properties", "golden", "tests", "docs", "benchmarks", "examples")
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


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def missing_files(page: Path, text: str) -> set[str]:
    """Names of files in backquotes for which there is none: by their path, or without a folder anywhere in the product."""
    names = set(re.findall(r"`([\w./-]*\w\.(?:py|md|json|toml|txt|yml|cpp))`", text))
    return {
        name for name in names if not ("/" in name and has(page, name)) and not ("/" not in name and anywhere(name))
    }


def has(page: Path, name: str) -> bool:
    return (ROOT / name).exists() or (page.parent / name).exists()


def anywhere(name: str) -> bool:
    return (ROOT / name).exists() or any(next((ROOT / top).rglob(name), None) for top in TOPS)


def test_files_named_on_any_page_exist(page: Path) -> None:
    assert missing_files(page, page.read_text(encoding="utf-8")) == set()


def test_a_file_that_is_gone_is_found() -> None:
    text = "`driver.py`, `mla_spec/subjects/driver.py`, `gone.py`, `subjects/driver.py`, `mla_spec.subjects.driver`"
    assert missing_files(ROOT / "README.md", text) == {"gone.py", "subjects/driver.py"}


def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_commands_have_the_options_named(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, rest in set(re.findall(r"mla-spec ([a-z]+)\b([^`\n|]*)", page.read_text(encoding="utf-8"))):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z][\w-]*", rest)) <= known, f"mla-spec {command}{rest}"


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
    assert len(stops) == 11
    assert [stop for stop in stops if not named_definitions(stop)] == []


def test_a_function_that_has_moved_is_found() -> None:
    moved = ARCHITECTURE.replace("`run_law` in `mla_spec/judging/run.py`", "`run_law` in `mla_spec/judging/judge.py`")
    assert missing_definitions(moved) == {("run_law", "mla_spec/judging/judge.py")}


def test_every_field_of_a_report_is_promised() -> None:
    table = STABILITY.partition("## Fields of reports")[2].partition("## Golden files")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(cells)) == [field.name for field in fields(Record)]


@pytest.mark.parametrize("declared", [Supports, Profile, Accumulator, RopeProfile], ids=lambda cls: cls.__name__)
def test_every_field_of_a_declaration_is_promised(declared: type) -> None:
    (cell,) = re.findall(rf"^\| `{declared.__name__}` \| (.*) \|$", STABILITY, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", cell) == [field.name for field in fields(declared)]


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
