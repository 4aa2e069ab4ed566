"""Imports run one way, and what must load fast loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "reference": ROOT / "mla_spec" / "reference",
    "harness": ROOT / "mla_spec" / "harness",
    "adapters": ROOT / "mla_spec" / "adapters",
    "properties": ROOT / "properties",
    "golden": ROOT / "golden",
}
ALLOWED = {
    "reference": {"reference"},
    "harness": {"reference", "harness"},
    "adapters": {"reference", "harness", "adapters"},
    "properties": {"reference", "harness", "properties"},
    "golden": {"reference", "harness", "golden"},
}


def imported_modules(path: Path) -> set[str]:
    """Every module named by an import statement of a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", FOLDERS)
def test_imports_run_one_way(room: str) -> None:
    files = list(FOLDERS[room].glob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            if name.startswith("mla_spec."):
                assert name.split(".")[1] in ALLOWED[room], f"{path.name} imports {name}"


def test_reference_imports_numpy_and_the_standard_library_only() -> None:
    for path in FOLDERS["reference"].glob("*.py"):
        for name in imported_modules(path):
            top = name.split(".")[0]
            assert top in {"numpy", "mla_spec"} or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import mla_spec", {"numpy", "torch", "pytest", "hypothesis"}),
        ("import mla_spec.harness.pytest_plugin", {"numpy", "torch", "hypothesis"}),
        ("import mla_spec.harness.cli", {"numpy", "torch", "pytest", "hypothesis"}),
        ("from mla_spec import MLAConfig", {"torch", "pytest", "hypothesis"}),
    ],
)
def test_light_imports_load_nothing_heavy(statement: str, heavy: set[str]) -> None:
    assert not loaded_after(statement) & heavy


def test_exports_exist() -> None:
    import mla_spec

    assert all(getattr(mla_spec, name) is not None for name in mla_spec.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mla_spec.nothing  # noqa: B018
