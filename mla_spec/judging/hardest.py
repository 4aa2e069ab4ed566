"""Hard cases in a file: those that came nearest to their bounds, or failed. Later runs begin with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.plan import Judged
from mla_spec.judging.renamed import RENAMED
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.text.files import read_text, write_atomically
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Mistyped, read_object

KEPT = 3
"""Cases of a law and dtype that are kept, beside those that failed."""

KEPT_FAILURES = 10


class CorpusError(ValueError):
    """A file of hard cases cannot be used; the text is one sentence."""


@dataclass(frozen=True)
class HardCase:
    """A case to begin with.

    Attributes:
        law: its name.
        case: id of the case.
        worst: its largest error / bound; None where it failed.
        subject: the one on which that was seen.
    """

    law: str
    case: str
    worst: float | None
    subject: str

    @property
    def parsed(self) -> Case:
        return parse_case(self.case)


def read_hard_cases(path: str) -> tuple[HardCase, ...]:
    """The hard cases of a file, JSON objects, one a line.

    Raises:
        CorpusError: the file cannot be read, or a line is no case of a law.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{shown(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return tuple(_hard_case(line, f"{shown(path)}:{n}") for n, line in enumerate(lines, 1) if line.strip())


def _hard_case(line: str, where: str) -> HardCase:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not valid JSON") from error
    try:
        found: HardCase = read_object(HardCase, entry, where)
        found.parsed  # noqa: B018 - raises where there is no such case
    except Mistyped as error:
        raise CorpusError(str(error)) from error
    except ValueError as error:
        raise CorpusError(f"{where}: {error}") from error
    if found.law not in all_laws() and found.law not in RENAMED:
        raise CorpusError(f"{where}: unknown law {shown(found.law)}")
    return found


def write_hard_cases(path: str, cases: Iterable[HardCase]) -> None:
    """Write a file of hard cases whole; OSError where that is not possible."""
    write_atomically(path, "".join(json.dumps(asdict(each)) + "\n" for each in cases))


def hardest(known: Iterable[HardCase], judged: Iterable[Judged]) -> tuple[HardCase, ...]:
    """Of cases known before and those that records name, the hardest of each law and dtype, in a fixed order."""
    found: dict[tuple[str, str], HardCase] = {}
    for each in (*known, *(case for cell, record in judged for case in _named(cell.law, record))):
        before = found.get((each.law, each.case))
        if before is None or _hardness(each) > _hardness(before):
            found[each.law, each.case] = each
    groups: dict[tuple[str, str, bool], list[HardCase]] = {}
    for each in sorted(found.values(), key=lambda each: (each.law, -_hardness(each), each.case)):
        groups.setdefault((each.law, each.parsed.dtype, each.worst is None), []).append(each)
    return tuple(each for (*_, failed), group in groups.items() for each in group[: KEPT_FAILURES if failed else KEPT])


def _named(law: str, record: Record) -> list[HardCase]:
    """The cases that a record names."""
    named = []
    if record.worst is not None and record.worst_case:
        named.append(HardCase(law, record.worst_case, record.worst, record.subject))
    if record.verdict in ("fail", "crashed") and record.case:
        named.append(HardCase(law, record.case, None, record.subject))
    return named


def _hardness(case: HardCase) -> float:
    return float("inf") if case.worst is None else case.worst
