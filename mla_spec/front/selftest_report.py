"""Prints the results of ``mla-spec selftest`` as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mla_spec.proof.selftest import BugResult, Matrix
from mla_spec.text.files import write_atomically
from mla_spec.text.table import format_table

BEGIN, END = "<!-- mla-spec selftest: begin -->", "<!-- mla-spec selftest: end -->"
"""Between these lines of a Markdown file the score stands."""

TITLE = "# Planted bugs\n"
"""With which a file begins that holds the whole matrix."""

HEADER = ("bug", "law", "verdict", "cases", "seconds", "case")


def report(matrix: Matrix) -> str:
    """One row per kill, then what the matrix as a whole says."""
    rows = [row for result in matrix.results for row in _rows(result)]
    return f"{format_table([HEADER, *rows])}\n\n{summary(matrix)}"


def summary(matrix: Matrix, *, short: bool = False) -> str:
    """Score, survivors, and of a complete matrix the laws that killed nothing and the sole killers, counted if ``short``."""
    lines = [matrix.score, f"surviving: {_names(result.bug for result in matrix.survivors)}"]
    if matrix.complete:
        lines.append(f"laws that killed nothing: {_names(matrix.idle_laws)}")
        lines.append(f"laws that kill nothing alone or first (after the fewest cases): {_names(matrix.late_laws)}")
        sole = matrix.sole_killers
        named = _names(f"{law} ({', '.join(bugs)})" for law, bugs in sole.items())
        counted = f"{len(sole)} laws kill {sum(map(len, sole.values()))} bugs that no other law kills"
        lines.append(counted if short else f"sole killers: {named}")
    else:
        lines.append("not every law on every bug: neither laws that killed nothing nor sole killers can be named")
    return "\n".join(lines)


def _rows(result: BugResult) -> list[tuple[str, ...]]:
    if result.survives:
        return [(result.bug, f"{len(result.records)} laws", "survives", "", "", "")]
    return [
        (result.bug, record.law, record.verdict, str(record.cases), f"{record.seconds:.1f}", record.case)
        for record in result.kills
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def markdown(matrix: Matrix, tables: Sequence[str] = (), *, short: bool = False) -> str:
    """The summary and other tables; between them, unless ``short``, a table with one row per bug."""
    header = "| bug | symptom | killed by | others | cases | seconds |\n|---|---|---|---|---|---|"
    rows = [
        f"| {result.bug} | {result.symptom} | {_first(result)} | {_others(result) if matrix.complete else ''} | "
        f"{result.cases_to_kill} | {result.seconds_to_kill:.1f} |"
        for result in matrix.results
    ]
    paragraphs = summary(matrix, short=short).split("\n")
    return "\n\n".join([*paragraphs, *([] if short else ["\n".join([header, *rows])]), *tables])


def _others(result: BugResult) -> int:
    """How many laws kill it beside the first."""
    return max(0, len(result.kills) - 1)


def _first(result: BugResult) -> str:
    return "**survives**" if result.survives else f"`{result.kills[0].law}`"


def require_markdown(path: str) -> None:
    """Raise ValueError where ``write_markdown`` would replace what it has not written, OSError where the file cannot be read."""
    content = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    if content and not content.startswith(TITLE) and (BEGIN not in content or END not in content):
        raise ValueError(f"{path} has other text; expected a matrix, or the marks {BEGIN} and {END}")


def write_markdown(path: str, matrix: Matrix, tables: Sequence[str] = (), short_tables: Sequence[str] = ()) -> None:
    """Write the Markdown to a file, or the short one between the two marks of a file that has them.

    Args:
        tables, short_tables: what follows in the one and the other.

    Raises:
        OSError: the file cannot be written.
    """
    file = Path(path)
    content = file.read_text(encoding="utf-8") if file.exists() else ""
    if BEGIN not in content or END not in content:
        write_atomically(file, f"{TITLE}\n{markdown(matrix, tables)}\n")
        return
    before, rest = content.split(BEGIN, 1)
    text = f"{before}{BEGIN}\n{markdown(matrix, short_tables, short=True)}\n{END}{rest.split(END, 1)[1]}"
    write_atomically(file, text)
