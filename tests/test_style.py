"""The tree is formatted, linted and typed, and speaks of the product alone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=lambda command: " ".join(command),
)
def test_development_tools_are_content(command: list[str]) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (pip install --group dev)")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_literal_tolerance() -> None:
    words = re.compile(r"\b(rtol|atol|rel_tol|abs_tol|tolerance)\s*=\s*[0-9.]")
    for folder in ("mla_spec", "properties", "golden"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not words.search(path.read_text(encoding="utf-8")), path
