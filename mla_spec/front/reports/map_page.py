"""The page of envelopes: Markdown or HTML, and the file that two releases can be compared by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mla_spec.front.reports.heat import Heat, Square, ratio_text
from mla_spec.front.reports.html import details, drawn, listed, page, section, tag
from mla_spec.front.reports.markdown import md, table_of
from mla_spec.proof.envelope import MAPPED, Cell, Kind, lattice_of

SCHEMA, VERSION = "mla-spec-map", 2

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
    def operations(self) -> tuple[str, ...]:
        """Those that were mapped."""
        return tuple(dict.fromkeys(cell.operation for cell in self.cells))

    @property
    def title(self) -> str:
        """What it is of."""
        return f"Envelope of {', '.join(self.operations)}"

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
    cells = [_plain(cell) for cell in envelope.cells]
    axes = {
        operation: {name: _values(cells, operation, name) for name in ("dtype", _kind(operation), *_axes(operation))}
        for operation in envelope.operations
    }
    lines = [f'"{name}": {json.dumps(value)}' for name, value in {**head, "axes": axes}.items()]
    each = ",\n".join(map(json.dumps, cells))
    return "{" + ",\n".join(lines) + f',\n"cells": [\n{each}\n]}}\n'


def _axes(operation: str) -> tuple[str, ...]:
    return tuple(lattice_of(MAPPED[operation]).axes)


def _kind(operation: str) -> str:
    """What its classes are."""
    return lattice_of(MAPPED[operation]).kind


def _plain(cell: Cell) -> dict[str, Any]:
    """A cell as the file has it: the class under what it is, each size under its axis."""
    where = {"operation": cell.operation, "dtype": cell.dtype, _kind(cell.operation): cell.part, **cell.sizes}
    return where | {name: value for name, value in asdict(cell).items() if name not in (*where, "part", "sizes")}


def _values(cells: Sequence[dict[str, Any]], operation: str, name: str) -> list[Any]:
    return list(dict.fromkeys(cell[name] for cell in cells if cell["operation"] == operation))


def markdown(envelope: Envelope) -> str:
    """How many cells of each operation, dtype and class are right, and which are silently wrong."""
    rows = [
        (*where, *(str(Counter(cell.kind for cell in part)[kind] or "") for kind in reversed(_KINDS)))
        for where, part in _parts(envelope).items()
    ]
    header = ("operation", "dtype", "class", *(_KINDS[kind] for kind in reversed(_KINDS)))
    parts = [f"# {envelope.title} of {md(envelope.subject)}", md(envelope.headline), table_of(header, rows)]
    if envelope.wrong:
        parts += ["## Silently wrong", table_of(_HEADER, map(_row, envelope.wrong[:LISTED]))]
        more = len(envelope.wrong) - LISTED
        parts += [f"{more} more: the JSON file has all"] if more > 0 else []
    parts += ["## Environment", table_of(("what", "value"), envelope.about)]
    return "\n\n".join(parts) + "\n"


_HEADER = ("operation", "dtype", "class", "sizes", "declared", "error/bound", "case")


def _row(cell: Cell) -> tuple[str, ...]:
    declared = "yes" if cell.declared else "no"
    return (cell.operation, cell.dtype, cell.part, _said(cell), declared, ratio_text(cell.ratio), cell.case)


def _said(cell: Cell) -> str:
    """Its sizes: "heads 3, queries 2, page 16"."""
    return ", ".join(f"{name} {size}" for name, size in cell.sizes.items())


def _parts(envelope: Envelope) -> dict[tuple[str, str, str], list[Cell]]:
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in envelope.cells:
        found.setdefault((cell.operation, cell.dtype, cell.part), []).append(cell)
    return found


_LEGEND = (
    '<p class="legend"><span class="within r1">right</span><span class="refuses">refuses</span>'
    '<span class="wrong">silently wrong</span><span class="unclear">ends the process, or not judged</span> '
    "pale fields were not measured: the corners and the middle of their box are alike</p>\n"
)


def html(envelope: Envelope) -> str:
    """A map of each operation, dtype and class: the first axis down, the others across."""
    maps = {
        operation: "".join(
            details(_title(dtype, name, part), drawn(_map(part), "dense"), opened=_tells(part))
            for (of, dtype, name), part in _parts(envelope).items()
            if of == operation
        )
        for operation in envelope.operations
    }
    sizes = "".join(f"<h3>{operation}</h3>\n{each}" for operation, each in maps.items())
    wrong = "".join(
        f"<article>{tag('p', f'{cell.message}')}{tag('p', cell.case, 'code')}</article>\n"
        for cell in envelope.wrong[:LISTED]
    )
    body = [
        f"<header>\n{tag('h1', envelope.subject)}\n{tag('p', f'{envelope.title}: {envelope.headline}')}\n</header>\n",
        section("Sizes", _LEGEND + sizes),
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
    down, *across = part[0].sizes
    rows: dict[int, list[Square]] = {}
    for cell in part:
        rows.setdefault(cell.sizes[down], []).append(_square(cell))
    columns = dict.fromkeys(" × ".join(str(cell.sizes[name]) for name in across) for cell in part)
    named = tuple((str(size), tuple(squares)) for size, squares in rows.items())
    return Heat("", f"{down} ↓ {' × '.join(across)} →", tuple(columns), named)


def _square(cell: Cell) -> Square:
    kinds: dict[Kind, Any] = {"right": "within", "refuses": "refuses", "wrong": "wrong"}
    said = f": {cell.message}" if cell.message else f", error / bound {ratio_text(cell.ratio)}" if cell.measured else ""
    declared = "" if cell.declared else ", not declared"
    title = f"{_said(cell)}: {_KINDS[cell.kind]}{declared}{said}"
    return Square(kinds.get(cell.kind, "unclear"), cell.ratio, title=title, pale=not cell.measured)
