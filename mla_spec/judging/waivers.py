"""Waivers: failures that are expected, each with its reason and the day on which it ends. ``docs/waivers.md`` shows a file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date, datetime
from fnmatch import fnmatchcase
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.plan import Cell, Judged
from mla_spec.judging.renamed import RENAMED, current_name
from mla_spec.judging.verdict import Record
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.files import read_text
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Mistyped, read_object


class WaiverError(ValueError):
    """A file of waivers cannot be used; the text is one sentence."""


@dataclass(frozen=True)
class Waiver:
    """Failures that are expected.

    Attributes:
        law, subject, dtype: patterns of shell style; a cell that matches all three is meant. ``subject`` is the name that the
            subject has itself, or the one by which it was asked for.
        reason: for people.
        expires: the last day.
    """

    law: str
    reason: str
    expires: date
    dtype: str = "*"
    subject: str = "*"

    def covers(self, cell: Cell, name: str) -> bool:
        """Whether it expects a failure of ``cell``, of a subject that has ``name`` itself."""
        named = fnmatchcase(name, self.subject) or (bool(cell.spec) and fnmatchcase(cell.spec[0], self.subject))
        return fnmatchcase(cell.law, self.law) and fnmatchcase(cell.dtype, self.dtype) and named

    def __str__(self) -> str:
        of = "" if self.subject == "*" else f" of {self.subject}"
        return f"{self.law}{'' if self.dtype == '*' else f' [{self.dtype}]'}{of}"


@dataclass(frozen=True)
class Waivers:
    """The waivers of a file; none where there is no file."""

    every: tuple[Waiver, ...] = ()

    def apply(self, cell: Cell, record: Record) -> Record:
        """The record, waived where it does not hold and a waiver covers it."""
        if record.verdict in ("pass", "unsupported"):
            return replace(record, waived="")
        found = next((each for each in self.every if each.covers(cell, record.subject)), None)
        return replace(record, waived="" if found is None else f"{found.reason} (until {found.expires})")

    def outcomes(self, judged: Iterable[Judged]) -> list[tuple[str, str]]:
        """Each waiver, as text, with the verdict of a cell that it covers."""
        judged = list(judged)
        return [
            (str(waiver), record.verdict)
            for waiver in self.every
            for cell, record in judged
            if waiver.covers(cell, record.subject)
        ]

    def needless(self, judged: Iterable[Judged]) -> list[str]:
        """A sentence for each waiver that covers cells of which none fails."""
        return needless(self.outcomes(judged))


def needless(outcomes: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence for each waiver of which no cell fails."""
    verdicts: dict[str, list[str]] = {}
    for waiver, verdict in outcomes:
        verdicts.setdefault(waiver, []).append(verdict)
    return [
        f"the waiver of {waiver} is not needed: none of its {len(found)} cells fails, {found.count('pass')} pass"
        for waiver, found in verdicts.items()
        if all(verdict in ("pass", "unsupported") for verdict in found)
    ]


def read_waivers(path: str, today: date | None = None) -> Waivers:
    """The waivers of a TOML file.

    Args:
        today: the day it is; a waiver that ended before is an error.

    Raises:
        WaiverError: the file cannot be read, or a waiver is none, has expired, or matches no law or dtype that exists.
    """
    try:
        content = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise WaiverError(f"{shown(path)}: not TOML in UTF-8: {getattr(error, 'strerror', None) or error}") from error
    entries = content.pop("waiver", None)
    if content or not isinstance(entries, list):
        raise WaiverError(f"{shown(path)}: expected tables [[waiver]] and nothing else")
    return Waivers(tuple(_waiver(entry, f"{shown(path)}: waiver {n}", today) for n, entry in enumerate(entries, 1)))


def _waiver(entry: Any, where: str, today: date | None) -> Waiver:
    if isinstance(entry, dict) and isinstance(entry.get("expires"), datetime):
        raise WaiverError(f"{where}: expires is {entry['expires']}; expected a day without a time, such as 2027-01-31")
    try:
        waiver: Waiver = read_object(Waiver, entry, where)
    except Mistyped as error:
        raise WaiverError(str(error)) from error
    if waiver.law in RENAMED:
        waiver = replace(waiver, law=current_name(waiver.law))
    if not waiver.reason.strip():
        raise WaiverError(f"{where} of {waiver.law} has no reason")
    if waiver.expires < (today or date.today()):
        raise WaiverError(f"{where} of {waiver.law} expired on {waiver.expires}")
    for field, known in (("law", all_laws()), ("dtype", DTYPES)):
        pattern = getattr(waiver, field)
        if not any(fnmatchcase(name, pattern) for name in known):
            raise WaiverError(f"{where}: no {field} matches {shown(pattern)}")
    return waiver
