"""A report as annotations of GitHub Actions: one of each cause, and one of each verdict."""

from __future__ import annotations

from mla_spec.front.overview import short_replay, suspect_text
from mla_spec.front.reports.account import Account, Document
from mla_spec.judging.causes import Cause
from mla_spec.text.terminal import printable

LEVELS = {"green": "notice", "yellow": "warning", "red": "error"}


def github(document: Document) -> str:
    """Lines that the runner of GitHub Actions reads from a step's standard output."""
    lines = [line for account in document.accounts for line in _subject(account)]
    return "".join(f"{line}\n" for line in [*lines, *(annotation("warning", "mla-spec", f) for f in document.faults)])


def annotation(level: str, title: str, text: str, file: str = "") -> str:
    """One annotation, in one line whatever its text."""
    place = f"file={_escaped(file, of=':,')}," if file else ""
    return f"::{level} {place}title={_escaped(title, of=':,')}::{_escaped(text)}"


def _escaped(text: str, of: str = "") -> str:
    escaped = printable(text, 4000)
    for character in f"%\r\n{of}":
        escaped = escaped.replace(character, f"%{ord(character):02X}")
    return escaped


def _subject(account: Account) -> list[str]:
    text, color = account.headline
    path = account.subject.spec[0].rpartition(":")[0]
    file = path if path.endswith(".py") else ""
    name = f"mla-spec: {account.subject.name}"
    return [
        annotation(LEVELS[color], name, text),
        *(annotation("error", f"{name}: {cause.lead.law}", _cause(cause), file) for cause in account.causes),
    ]


def _cause(cause: Cause) -> str:
    lines = [cause.statement, *(line.strip() for line in cause.lead.message.splitlines() if "got" in line)]
    lines += [finding["says"] for finding in cause.findings]
    return "\n".join([*lines, *map(suspect_text, cause.suspects), short_replay(cause.lead)]).rstrip()
