"""The figures of the book can be drawn, and each is in a chapter."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'mla-spec[figures]')")

BOOK = Path(__file__).resolve().parents[1] / "docs" / "book"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", BOOK / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_figure_is_in_a_chapter(figures: ModuleType) -> None:
    shown = {name for page in BOOK.glob("*.md") for name in re.findall(r"\(figures/(\w+)\.svg\)", page.read_text())}
    there = {path.stem for path in (BOOK / "figures").iterdir()}
    assert shown == there == set(figures.FIGURES)


@pytest.mark.parametrize("name", ["cache", "yarn", "bound"])
def test_the_same_bytes_each_time(figures: ModuleType, tmp_path: Path, name: str) -> None:
    first = figures.draw(name, tmp_path).read_bytes()
    assert figures.draw(name, tmp_path).read_bytes() == first
    assert b"<svg" in first
