"""The pages of the operations are those that the command writes, and hold every law once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from mla_spec.front.book import pages
from mla_spec.front.cli import main
from mla_spec.installed import all_laws, planted_bugs
from mla_spec.operations.all import OPERATIONS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "operations"


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return pages()


def test_the_pages_are_what_the_command_writes(written: dict[str, str]) -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    old = sorted(name for name in {*written, *there} if written.get(name) != there.get(name))
    assert old == [], "run `mla-spec book docs/operations`"


def test_there_is_a_page_for_each_operation(written: dict[str, str]) -> None:
    assert set(written) == {"README.md", *(f"{name}.md" for name in OPERATIONS)}


def test_every_law_is_on_one_page(written: dict[str, str]) -> None:
    headings = Counter(name for text in written.values() for name in re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert headings == Counter(list(all_laws()))


def test_every_bug_is_on_a_page(written: dict[str, str]) -> None:
    named = {name for text in written.values() for name in re.findall(r"^- ([\w-]+): ", text, re.MULTILINE)}
    assert set(planted_bugs()) - named == set()


def test_links_lead_to_headings(written: dict[str, str]) -> None:
    for text in written.values():
        for page, heading in re.findall(r"\]\((\w+\.md)#?(\w*)\)", text):
            assert heading == "" or f"### {heading}\n" in written[page]


def test_the_command_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["book", str(tmp_path / "new" / "pages")]) == 0
    assert "20 pages in " in capsys.readouterr().out
    assert (tmp_path / "new" / "pages" / "decode.md").read_text(encoding="utf-8").startswith("# decode\n")


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["book", str(tmp_path / "file" / "pages")]) == 2
    assert "cannot write to" in capsys.readouterr().err
