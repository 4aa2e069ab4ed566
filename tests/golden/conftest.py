"""A copy of the corpus, to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mla_spec.golden.corpus import corpus, figures


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed corpus."""
    root = tmp_path / "corpus"
    root.mkdir()
    shutil.copytree(corpus.installed() / "arrays", root / "arrays")
    for name in ("manifest.json", *figures.DOCUMENTS):
        shutil.copy(corpus.installed() / name, root / name)
    return root
