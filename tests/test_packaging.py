"""What is installed is everything that runs: pyproject.toml names its packages and data files one by one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


def folder(package: str) -> Path:
    """Where the files of ``package`` lie: below the nearest of its parents that package-dir maps."""
    parts = package.split(".")
    for count in range(len(parts), 0, -1):
        parent = ".".join(parts[:count])
        if parent in FOLDERS:
            return ROOT.joinpath(FOLDERS[parent], *parts[count:])
    raise AssertionError(f"{package} has no folder")


def missing_packages(packages: list[str]) -> set[Path]:
    """Folders with Python files that are no package of ``packages``."""
    tops = [ROOT / path for path in FOLDERS.values()]
    with_code = {path.parent for top in tops for path in top.rglob("*.py")}
    return with_code - {folder(package) for package in packages}


def missing_data(patterns: dict[str, list[str]]) -> set[Path]:
    """Data files that no pattern of their package takes along."""
    data = {
        path
        for top in FOLDERS.values()
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    taken = {path for package, globs in patterns.items() for glob in globs for path in folder(package).glob(glob)}
    return data - taken


def test_every_folder_with_code_is_a_package() -> None:
    assert missing_packages(SETUPTOOLS["packages"]) == set()


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_a_package_that_is_not_named_is_missed(package: str) -> None:
    others = [name for name in SETUPTOOLS["packages"] if name != package]
    assert missing_packages(others) == {folder(package)}


def test_every_data_file_is_installed() -> None:
    assert missing_data(SETUPTOOLS["package-data"]) == set()


@pytest.mark.parametrize(("package", "pattern"), [(p, g) for p, gs in SETUPTOOLS["package-data"].items() for g in gs])
def test_data_that_no_pattern_takes_along_is_missed(package: str, pattern: str) -> None:
    patterns = {**SETUPTOOLS["package-data"]}
    patterns[package] = [glob for glob in patterns[package] if glob != pattern]
    assert missing_data(patterns) == set(folder(package).glob(pattern)) != set()
