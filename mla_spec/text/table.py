"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable


def format_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as left-aligned columns, two spaces apart; the last column is not padded."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    )
