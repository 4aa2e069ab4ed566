"""A file of a package is loaded alone: its package is not imported, and nothing that stood for it remains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mla_spec.adapters import interpreted

FILE = "ops/kernel.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "heavy_package" / "ops"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('needs a GPU')\n", encoding="utf-8")
    (folder / "kernel.py").write_text(
        "from heavy_package.platforms import current\n\n\ndef kernel():\n    return current\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "heavy_package"


def test_a_file_is_loaded_without_its_package(package: str) -> None:
    made = interpreted.load_interpreted(package, FILE, {"heavy_package.platforms": {"current": "cpu"}})
    assert made.kernel() == "cpu"
    assert not [name for name in sys.modules if name.startswith(package)]


def test_stubs_do_not_remain_after_a_failure(package: str) -> None:
    with pytest.raises(ImportError, match="current"):
        interpreted.load_interpreted(package, FILE, {"heavy_package.platforms": {}})
    assert not [name for name in sys.modules if name.startswith(package)]


def test_what_is_missing_is_named(package: str) -> None:
    assert interpreted.unavailable("no_such_package", FILE) == "no_such_package is not installed"
    missing = interpreted.unavailable(package, "ops/other.py")
    assert missing in ("triton is not installed", "this version of heavy_package has no ops/other.py")
