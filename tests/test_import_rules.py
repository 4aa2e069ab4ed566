"""Imports run one way, and what must load fast loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "front",
    "proof",
    "properties",
    "golden",
    "judging",
    "operations",
    "exchange",
    "adapters",
    "subjects",
    "bounds",
    "reference",
    "text",
)
"""From the top of the house to its ground: a room imports itself and what lies below it."""

OUTSIDE = {"properties": ROOT / "properties", "golden": ROOT / "golden"}
LOADER = ROOT / "mla_spec" / "installed.py"
"""The only file that loads by name what stands above it."""

CIRCLES = {
    frozenset({f"mla_spec.reference.{a}", f"mla_spec.reference.{b}"})
    for a, b in (("config", "published"), ("config", "checkpoint"), ("published", "checkpoint"))
}
"""Modules that may import each other: a configuration is found by the name of a published model, or read from a checkpoint's
file, and both are entries that become one."""


def folder(room: str) -> Path:
    return OUTSIDE.get(room, ROOT / "mla_spec" / room)


def sources(room: str) -> list[Path]:
    return sorted(folder(room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "mla_spec" else ("mla_spec", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path) for room in ROOMS for path in sources(room)} | {"mla_spec.installed"}


@cache
def imported_modules(path: Path) -> set[str]:
    """Every module that a file names: in import statements at any depth, and in strings of a module's form."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"^mla_spec(?:\.\w+)+(?=[.:{]|$)", node.value))
    return names


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "mla_spec").iterdir() if any(path.glob("*.py"))}
    assert folders | set(OUTSIDE) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downwards(room: str) -> None:
    below = {*ROOMS[ROOMS.index(room) :], "installed"}
    assert sources(room)
    for path in sources(room):
        for name in imported_modules(path):
            if name.startswith("mla_spec.") and room_of(name) in (*ROOMS, "planted_bugs"):
                assert room_of(name) in below, f"{path.relative_to(ROOT)} imports {name}"


def test_strings_that_name_modules_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "upwards.py"
    source.write_text(
        'import_module("mla_spec.front.cli")\nx = f"mla_spec.properties.{x}"\ny = "mla_spec.adapters.pytorch:Torch"\n'
        "def f():\n    from mla_spec.golden.corpus import corpus\n",
        encoding="utf-8",
    )
    want = {"mla_spec.front.cli", "mla_spec.properties", "mla_spec.adapters.pytorch", "mla_spec.golden.corpus.corpus"}
    assert imported_modules(source) == want


def test_no_circles_but_the_one_allowed() -> None:
    graph = {
        module_name(path): {name for name in imported_modules(path) if name in MODULES and name != module_name(path)}
        for room in ROOMS
        for path in sources(room)
    }
    from_each = {a: reached(graph, a) for a in graph}
    circles = {frozenset({a, b}) for a in graph for b in from_each[a] & graph.keys() if a in from_each[b] and a < b}
    assert circles == CIRCLES


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Modules that ``start`` imports, and those that these import, and so on."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        new = graph.get(pending.pop(), set()) - seen
        seen |= new
        pending += new
    return seen


def test_reference_imports_numpy_and_the_standard_library_only() -> None:
    for path in sources("reference"):
        for name in imported_modules(path):
            top = name.split(".")[0]
            assert top in {"numpy", "mla_spec"} or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


SUBJECT_PROCESS = """
from mla_spec.installed import load_for_subjects
load_for_subjects()
from mla_spec.subjects.answering import fill_memory
fill_memory("cpu")
"""
"""What the process of every subject does before it has a subject."""


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import mla_spec", {"numpy", "torch", "pytest", "hypothesis"}),
        ("import mla_spec.front.pytest_plugin", {"numpy", "torch", "hypothesis"}),
        ("import mla_spec.front.cli", {"numpy", "torch", "pytest", "hypothesis"}),
        ("from mla_spec import MLAConfig", {"torch", "pytest", "hypothesis"}),
        (SUBJECT_PROCESS, {"torch._dynamo", "hypothesis"}),
    ],
)
def test_light_imports_load_nothing_heavy(statement: str, heavy: set[str]) -> None:
    assert not loaded_after(statement) & heavy


def test_exports_exist() -> None:
    import mla_spec

    assert all(getattr(mla_spec, name) is not None for name in mla_spec.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mla_spec.nothing  # noqa: B018
