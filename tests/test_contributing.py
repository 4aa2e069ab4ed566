"""CONTRIBUTING.md names files that exist, and its table of operations says where they lie."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from mla_spec.installed import all_laws, planted_bugs
from mla_spec.operations.all import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


class Row(NamedTuple):
    """Where everything about one operation lies."""

    operation: str
    operations: str
    reference: str
    bounds: str
    strategies: str
    laws: str
    planted_bugs: str
    golden_cases: str


FOLDERS = {
    "operations": "mla_spec/operations",
    "reference": "mla_spec/reference",
    "bounds": "mla_spec/bounds",
    "strategies": "properties/strategies",
    "laws": "properties",
    "planted_bugs": "tests/planted_bugs",
    "golden_cases": "golden/cases",
}
WITHOUT_BOUND = {"absorb", "write_cache", "shard_layer", "gather_gradients"}
"""Operations that move numbers and compute none."""

IN_THE_CORPUS = {"quantize_cache": "pack", "dequantize_cache": "unpack"}


def rows(text: str) -> dict[str, Row]:
    _, _, rest = text.partition("<!-- operations: begin -->\n")
    lines = rest.partition("<!-- operations: end -->")[0].splitlines()[2:]
    table = [Row(*(cell.strip(" `") for cell in line.strip("|").split("|"))) for line in lines]
    return {row.operation: row for row in table}


ROWS = rows(TEXT)


def files(row: Row) -> list[Path]:
    """The files that a row names; but for the bounds of operations that move bits, none may be left out."""
    named = {column: getattr(row, column) for column in FOLDERS}
    if row.operation in WITHOUT_BOUND:
        assert not named.pop("bounds")
    return [ROOT / FOLDERS[column] / (name or "nothing named") for column, name in named.items()]


def test_every_operation_has_a_row() -> None:
    assert list(ROWS) == list(OPERATIONS)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.operation)
def test_its_files_exist(row: Row) -> None:
    assert [path for path in files(row) if not path.is_file()] == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_its_module_states_its_contract(name: str) -> None:
    module = import_module(f"mla_spec.operations.{ROWS[name].operations.removesuffix('.py')}")
    assert module.__doc__ == OPERATIONS[name].contract


@pytest.mark.parametrize("name", OPERATIONS)
def test_its_laws_lie_in_the_module_named(name: str) -> None:
    module = import_module(f"mla_spec.properties.{ROWS[name].laws.removesuffix('.py')}")
    assert any(name in value.law.needs for value in vars(module).values() if hasattr(value, "law"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_module_of_bugs_holds_one_that_a_law_of_the_operation_kills(name: str) -> None:
    laws = all_laws()
    module = f"mla_spec.planted_bugs.{ROWS[name].planted_bugs.removesuffix('.py')}"
    bugs = [bug for bug in planted_bugs().values() if bug.make.__module__ == module]
    assert any(name in laws[law].needs for bug in bugs for law in bug.killed_by)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_golden_cases_named_hold_the_operation(name: str) -> None:
    module = import_module(f"mla_spec.golden.cases.{ROWS[name].golden_cases.removesuffix('.py')}")
    manifest = json.loads((ROOT / "golden" / "manifest.json").read_text(encoding="utf-8"))
    operation = IN_THE_CORPUS.get(name, name)
    assert operation in {case["operation"] for case in manifest["cases"]}
    assert re.search(rf'"{operation}"', Path(str(module.__file__)).read_text(encoding="utf-8"))


def test_a_row_with_a_file_that_is_gone_is_found() -> None:
    gone = rows(TEXT.replace("`paging.py`", "`gone.py`"))["decode"]
    assert [path.name for path in files(gone) if not path.is_file()] == ["gone.py"]


def test_every_path_in_the_text_exists() -> None:
    paths = re.findall(r"`((?:\.ci|mla_spec|properties|golden|tests|docs)/[\w./*]*)`", TEXT)
    assert len(paths) > 10
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


def test_an_operation_has_few_rooms() -> None:
    """The contract, the adapter, the cases, the laws, the corpus: one that is no everyday word shows how many name it."""
    folders = (ROOT / name for name in ("mla_spec", "properties", "golden", "examples", "benchmarks"))
    named = [
        path.relative_to(ROOT)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if re.search(r"\bsparse_decode\b", path.read_text(encoding="utf-8"))
    ]
    assert Path("mla_spec/operations/sparse.py") in named
    assert len(named) <= 10, named
