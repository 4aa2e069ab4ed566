"""The command ``mla-spec book``: a page for each operation, with its contract, its laws, and the bugs that these find."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mla_spec.installed import LAW_MODULES, all_laws, planted_bugs
from mla_spec.judging.law import Law
from mla_spec.operations.all import OPERATIONS, Composite
from mla_spec.operations.operation import Operation
from mla_spec.text.files import write_atomically
from mla_spec.text.terminal import UsageError, shown

SHOWN = 4
"""Bugs of a law that a page shows at once; the others are folded."""

Group = tuple[str, list[Law]]
"""Why some laws are as they are, and these laws: a module of laws."""


def book(options: argparse.Namespace) -> int:
    """Write the pages into a folder and print how many they are."""
    folder = Path(options.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages().items():
            write_atomically(folder / name, text)
    except OSError as error:
        raise UsageError(f"cannot write to {shown(options.folder)}: {error.strerror}") from error
    print(f"{len(pages())} pages in {folder}")
    return 0


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    groups, bugs = _groups(), list(planted_bugs().values())
    texts = {f"{name}.md": _page(operation, groups, bugs) for name, operation in OPERATIONS.items()}
    return {"README.md": _contents(groups), **texts}


def _groups() -> list[Group]:
    """Every module of laws, in the order of the report; a law that two modules name is of the first."""
    left = all_laws().copy()
    found = []
    for name in LAW_MODULES:
        module = import_module(f"mla_spec.properties.{name}")
        names = [value.law.name for value in vars(module).values() if hasattr(value, "law")]
        found.append((module.__doc__ or "", [left.pop(law) for law in names if law in left]))
    return found


def _contents(groups: list[Group]) -> str:
    counts = {name: sum(len(_own(laws, name)) for _, laws in groups) for name in OPERATIONS}
    rows = [
        f"| [`{name}`]({name}.md) | {_plain(operation.contract.splitlines()[0].partition(': ')[2]).rstrip('.')} | {counts[name]} |"
        for name, operation in OPERATIONS.items()
    ]
    return "\n".join(
        [
            "# Operations and their laws",
            "",
            "What a subject may be asked to compute. Each page has the contract of an operation, the laws that judge it, and the",
            "planted bugs that each law finds. `mla-spec book docs/operations` writes these pages.",
            "",
            "| operation | what it computes | laws |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _page(operation: Operation | Composite, groups: list[Group], bugs: list[Any]) -> str:
    lines = [
        f"# {operation.name}",
        "",
        "```python",
        operation.call,
        "```",
        "",
        f"Returns `{operation.returns}`." if "(" in operation.returns else f"Returns {operation.returns}.",
        "",
        _plain(operation.contract),
        "",
        "## Laws",
        "",
    ]
    for why, laws in groups:
        own = _own(laws, operation.name)
        if own:
            lines += [_plain(why), ""]
        for law in own:
            lines += _law(law, bugs)
    others = [law for _, laws in groups for law in laws if operation.name in law.needs[1:]]
    if others:
        links = ", ".join(f"[{law.name}]({law.needs[0]}.md#{law.name})" for law in others)
        lines += ["## Laws of several operations", "", f"{links}.", ""]
    return "\n".join([*lines, "[All operations](README.md)", ""])


def _own(laws: Iterable[Law], operation: str) -> list[Law]:
    """Those that stand on the page of the operation: the first that they need."""
    return [law for law in laws if law.needs[0] == operation]


def _law(law: Law, bugs: list[Any]) -> Iterator[str]:
    yield from (f"### {law.name}", "", _plain(law.statement), "")
    found = sorted((bug for bug in bugs if law.name in bug.killed_by), key=lambda bug: not bug.source)
    if found:
        yield from ("Bugs that it finds:", "")
        yield from (*map(_bug, found[:SHOWN]), "")
    if found[SHOWN:]:
        yield from (f"<details><summary>{len(found) - SHOWN} more</summary>", "")
        yield from (*map(_bug, found[SHOWN:]), "", "</details>", "")


def _bug(bug: Any) -> str:
    """One line: symptom, trigger, and the public reports."""
    reports = ", ".join(f"[report]({url})" if url.startswith("https://") else url for url in bug.source)
    return f"- {bug.id}: {bug.symptom}. Trigger: {bug.shows_when}." + (f" ({reports})" if reports else "")


def _plain(text: str) -> str:
    """A docstring as Markdown."""
    return text.strip().replace("``", "`")
