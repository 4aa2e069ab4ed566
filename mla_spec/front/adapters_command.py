"""The command ``mla-spec adapters``: whose code can be checked by name, and whether it can run here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

from mla_spec.adapters.signatures import SIGNATURES
from mla_spec.installed import FROM_FILES, SHIPPED, operation_names
from mla_spec.subjects.contract import offers
from mla_spec.subjects.find import unavailable
from mla_spec.text.table import format_table

HEADER = ("adapter", "version", "here", "offers")


def adapters() -> str:
    """Every adapter that ships, and every public kernel whose signature is known, each with what it offers."""
    versions = packages_distributions()
    shipped = [_shipped(name, path, versions) for name, path in SHIPPED.items()]
    shipped += [(f"{name}:FILE.py", "-", "runs on a file of yours", "layer") for name in FROM_FILES]
    known = [_known(name, versions) for name in SIGNATURES]
    return f"{format_table([HEADER, *shipped])}\n\n{format_table([('--signature', *HEADER[1:]), *known])}"


def _shipped(name: str, path: str, versions: Mapping[str, list[str]]) -> tuple[str, str, str, str]:
    module, _, attribute = path.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    offered = [operation for operation in operation_names() if offers(found, operation)]
    listed = "all operations" if len(offered) == len(operation_names()) else ", ".join(offered)
    return (
        name,
        _version(getattr(found, "package", "torch"), versions),
        unavailable(name) or getattr(found, "runs", "runs"),
        listed,
    )


def _known(name: str, versions: Mapping[str, list[str]]) -> tuple[str, str, str, str]:
    """A GPU's kernel has been run by nobody here, whatever is installed."""
    row = SIGNATURES[name]
    package = row.call.partition(":")[0].partition(".")[0]
    here = "runs"
    if row.hardware:
        here = f"never run on hardware: needs {row.hardware}"
    elif find_spec(package) is None:
        here = f"{package} is not installed"
    return name, _version(package, versions), here, row.operation


def _version(package: str, versions: Mapping[str, list[str]]) -> str:
    """Of the distribution that holds a package, with its name where that is another; "-" where none is installed."""
    for distribution in versions.get(package, [package]):
        try:
            number = version(distribution)
        except PackageNotFoundError:
            continue
        return number if distribution == package else f"{distribution} {number}"
    return "-"
