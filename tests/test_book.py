"""Every snippet of the book and of the quick start runs and prints what stands below it; quoted lines are in the files named.

A block's info string says what it is: `python` is run, or written to a file where its first line is a comment with the file's
name; `python PATH` quotes lines of a file; `sh` is run by bash; `text` is what the block above it prints, "..." standing for
anything. The blocks of a page share one namespace and one folder.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "docs" / "book").glob("[0-9]*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "quick_start.md",
    ROOT / "docs" / "quick_check.md",
    ROOT / "docs" / "book" / "README.md",
    *CHAPTERS,
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
KINDS = {"python", "sh", "text", "", "sh check", "sh test", "sh vllm-cpu"}
"""The named blocks of shell are run by continuous integration; a block without a kind is not run."""

Block = tuple[str, str]


def blocks(text: str) -> list[Block]:
    """(info string, content) of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run_page(text: str, folder: Path) -> list[str]:
    """Run the blocks of a page; what is wrong with each that does not do what it says."""
    namespace: dict[str, Any] = {}
    printed, wrong = "", []
    for kind, content in blocks(text):
        if kind == "text":
            if not doctest.OutputChecker().check_output(content, printed, FLAGS):
                wrong.append(f"expected\n{content}\ngot\n{printed}")
        elif kind.startswith("python "):
            wrong += [f"{kind} has no line {line!r}" for line in missing_lines(ROOT / kind.split()[1], content)]
        elif kind == "python":
            printed = run_python(content, namespace, folder)
        elif kind == "sh":
            printed = run_shell(content, folder)
    return wrong


def missing_lines(path: Path, content: str) -> list[str]:
    """The lines of ``content`` that no line of the file is, indentation aside."""
    there = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    return [line.strip() for line in content.splitlines() if line.strip() not in there]


def run_python(content: str, namespace: dict[str, Any], folder: Path) -> str:
    """Run a block, or write it to the file that its first line names; what it prints."""
    if named := re.match(r"# (\w+\.py)\n", content):
        (folder / named[1]).write_text(content, encoding="utf-8")
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(content, "<page>", "exec"), namespace)
    return out.getvalue()


def run_shell(content: str, folder: Path) -> str:
    """Run a block by bash, with the commands that are installed beside this Python; what it prints, errors included."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", content],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_snippets_do_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = run_page(page.read_text(encoding="utf-8"), tmp_path)
    assert wrong == [], "\n\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    kinds = {kind for kind, _ in blocks(page.read_text(encoding="utf-8"))}
    assert {kind for kind in kinds if not kind.startswith("python ")} <= KINDS


def test_a_page_can_fail(tmp_path: Path) -> None:
    good = "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n"
    quote = "```python mla_spec/reference/mla.py\nn, v = config.qk_nope_head_dim, config.v_head_dim\n```\n"
    assert run_page(good + quote, tmp_path) == []
    assert len(run_page(good.replace("1 + 1", "1 + 2"), tmp_path)) == 1
    assert len(run_page(quote.replace("v_head_dim", "q_head_dim"), tmp_path)) == 1


def test_every_chapter_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "book" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\w+\.md)\)", contents) == [path.name for path in CHAPTERS]
