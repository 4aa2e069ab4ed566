"""The page of an envelope: Markdown or HTML, and the file that two releases can be compared by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mla_spec.front.reports.heat import Heat, Square, ratio_text
from mla_spec.front.reports.html import details, drawn, listed, page, section, tag
from mla_spec.front.reports.markdown import md, table_of
from mla_spec.proof.envelope import Cell, Kind

SCHEMA, VERSION = "mla-spec-map", 1

LISTED = 40
"""Cells that are silently wrong which are listed."""

_KINDS: dict[Kind, str] = {
    "wrong": "silently wrong",
    "ends the process": "ends the process",
    "not judged": "not judged",
    "refuses": "refuses",
    "right": "right",
}


@dataclass(frozen=True)
class Envelope:
    """What was found of one build on one device.

    Attributes:
        subject: its name.
        about: suite, code, device and versions, as names and values.
        cells: in the order of the axes.
    """

    subject: str
    about: tuple[tuple[str, str], ...]
    cells: tuple[Cell, ...]

    @property
    def headline(self) -> str:
        """One sentence."""
        counts = Counter(cell.kind for cell in self.cells)
        parts = [f"{counts[kind]} {word}" for kind, word in _KINDS.items() if counts[kind]]
        measured = sum(cell.measured for cell in self.cells)
        return f"{', '.join(parts)}; {measured} of {len(self.cells)} cells were measured"

    @property
    def wrong(self) -> list[Cell]:
        """The cells in which it was seen to give wrong results without a word."""
        return [cell for cell in self.cells if cell.kind == "wrong" and cell.measured]


def as_json(envelope: Envelope) -> str:
    """One cell a line, in an order of their own: two files can be compared line by line."""
    head = {"schema": SCHEMA, "version": VERSION, "subject": envelope.subject, "about": dict(envelope.about)}
    names = ("dtype", "length", "heads", "queries", "page")
    axes = {name: list(dict.fromkeys(getattr(cell, name) for cell in envelope.cells)) for name in names}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in {**head, "axes": axes}.items()]
    cells = ",\n".join(json.dumps(asdict(cell)) for cell in envelope.cells)
    return "{" + ",\n".join(lines) + f',\n"cells": [\n{cells}\n]}}\n'


def markdown(envelope: Envelope) -> str:
    """How many cells of each dtype and class of lengths are right, and which are silently wrong."""
    rows = [
        (dtype, length, *(str(Counter(cell.kind for cell in part)[kind] or "") for kind in reversed(_KINDS)))
        for (dtype, length), part in _parts(envelope).items()
    ]
    header = ("dtype", "length", *(_KINDS[kind] for kind in reversed(_KINDS)))
    parts = [f"# Envelope of decode of {md(envelope.subject)}", md(envelope.headline), table_of(header, rows)]
    if envelope.wrong:
        parts += ["## Silently wrong", table_of(_HEADER, map(_row, envelope.wrong[:LISTED]))]
        more = len(envelope.wrong) - LISTED
        parts += [f"{more} more: the JSON file has all"] if more > 0 else []
    parts += ["## Environment", table_of(("what", "value"), envelope.about)]
    return "\n\n".join(parts) + "\n"


_HEADER = ("dtype", "length", "heads", "queries", "page", "declared", "error/bound", "case")


def _row(cell: Cell) -> tuple[str, ...]:
    sizes = (str(cell.heads), str(cell.queries), str(cell.page))
    declared = "yes" if cell.declared else "no"
    return (cell.dtype, cell.length, *sizes, declared, ratio_text(cell.ratio), cell.case)


def _parts(envelope: Envelope) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in envelope.cells:
        found.setdefault((cell.dtype, cell.length), []).append(cell)
    return found


_LEGEND = (
    '<p class="legend"><span class="within r1">right</span><span class="refuses">refuses</span>'
    '<span class="wrong">silently wrong</span><span class="unclear">ends the process, or not judged</span> '
    "pale fields were not measured: the corners and the middle of their box are alike</p>\n"
)


def html(envelope: Envelope) -> str:
    """A map of each dtype and class of lengths: heads down, queries and page sizes across."""
    maps = "".join(
        details(_title(dtype, length, part), drawn(_map(part), "dense"), opened=_tells(part))
        for (dtype, length), part in _parts(envelope).items()
    )
    wrong = "".join(
        f"<article>{tag('p', f'{cell.message}')}{tag('p', cell.case, 'code')}</article>\n"
        for cell in envelope.wrong[:LISTED]
    )
    body = [
        f"<header>\n{tag('h1', envelope.subject)}\n{tag('p', f'Envelope of decode: {envelope.headline}')}\n</header>\n",
        section("Sizes", _LEGEND + maps),
        section("Silently wrong", wrong),
        section("Environment", listed(envelope.about)),
    ]
    return page(f"mla-spec map: {envelope.subject}", "".join(body))


def _tells(part: Sequence[Cell]) -> bool:
    return len({cell.kind for cell in part}) > 1 or part[0].kind == "wrong"


def _title(dtype: str, length: str, part: Sequence[Cell]) -> str:
    counts = Counter(cell.kind for cell in part)
    return f"{dtype}, {length}: " + ", ".join(f"{counts[k]} {word}" for k, word in _KINDS.items() if counts[k])


def _map(part: Sequence[Cell]) -> Heat:
    cells = {(cell.heads, cell.queries, cell.page): cell for cell in part}
    across = list(dict.fromkeys((cell.queries, cell.page) for cell in part))
    rows = tuple(
        (str(heads), tuple(_square(cells[heads, queries, page]) for queries, page in across))
        for heads in dict.fromkeys(cell.heads for cell in part)
    )
    columns = tuple(f"{queries} × {page}" for queries, page in across)
    return Heat("", "heads ↓ queries × page →", columns, rows)


def _square(cell: Cell) -> Square:
    kinds: dict[Kind, Any] = {"right": "within", "refuses": "refuses", "wrong": "wrong"}
    where = f"{cell.heads} heads, {cell.queries} queries, pages of {cell.page}"
    said = f": {cell.message}" if cell.message else f", error / bound {ratio_text(cell.ratio)}" if cell.measured else ""
    declared = "" if cell.declared else ", not declared"
    title = f"{where}: {_KINDS[cell.kind]}{declared}{said}"
    return Square(kinds.get(cell.kind, "unclear"), cell.ratio, title=title, pale=not cell.measured)
