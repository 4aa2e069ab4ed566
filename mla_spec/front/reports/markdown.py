"""A report as GitHub-flavored Markdown: for a pull request, or the summary of a job."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from mla_spec.front.overview import by_operation, dtypes_of, held, short_replay, suspect_text
from mla_spec.front.report import outcome
from mla_spec.front.reports.account import Account, Document, declared_rows, environment_rows
from mla_spec.front.reports.heat import excess, ratio_text
from mla_spec.front.reports.statement import LEVELS, sentence, table, waivers
from mla_spec.judging.causes import Cause
from mla_spec.judging.verdict import Record
from mla_spec.text.terminal import one_line, printable

MARKS = {"green": "✅", "yellow": "⚠️", "red": "❌"}

LONGEST = 50
"""Failing laws that are shown in full: GitHub takes no summary of more than 1 MiB."""


def markdown(document: Document) -> str:
    """The text."""
    parts = [_subject(account, document) for account in document.accounts]
    parts += [f"⚠️ {md(fault)}" for fault in document.faults]
    parts.append(_details("Environment", table_of(("what", "value"), environment_rows(document))))
    return "\n\n".join(parts) + "\n"


def md(text: str) -> str:
    """Text in one line in which nothing is markup, nor a mention of a person or an issue."""
    escaped = re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", escape(one_line(text, 2000), quote=False))
    return re.sub(r"^([+-])", r"\\\1", escaped).replace("@", "&#64;")


def code(text: str, language: str = "") -> str:
    """A block of code, whatever backquotes it has."""
    text = printable(text, 4000)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, whatever its cells hold."""
    lines = ["| " + " | ".join(map(md, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n\n{content}\n\n</details>"


def _subject(account: Account, document: Document) -> str:
    text, color = account.headline
    verdict, _, rest = text.partition(": ")
    failing = [record for record in account.records if record.verdict not in ("pass", "unsupported")]
    parts = [
        f"## {MARKS[color]} {md(account.subject.name)} {verdict}",
        f"{md(rest)} ({account.seconds:.0f} s of work)",
        _operations(account),
        *(_cause(number, cause) for number, cause in enumerate(account.causes, 1)),
    ]
    if failing:
        shown = "\n\n".join(map(_failure, failing[:LONGEST]))
        more = f"\n\n{len(failing) - LONGEST} more" if len(failing) > LONGEST else ""
        parts.append(_details(f"Laws that do not hold ({len(failing)})", shown + more))
    reasons = Counter(record.message for record in account.records if record.verdict == "unsupported")
    if reasons:
        rows = [(reason, str(count)) for reason, count in reasons.most_common()]
        parts.append(_details(f"Laws that do not apply ({reasons.total()})", table_of(("reason", "laws"), rows)))
    parts.append(_details("Statement of conformance", _statement(account, document, "")))
    return "\n\n".join(parts)


def statement(document: Document) -> str:
    """The statement of conformance alone."""
    parts = [_statement(account, document, "# Statement of conformance") for account in document.accounts]
    parts += [f"⚠️ {md(fault)}" for fault in document.faults]
    parts.append("## Conditions\n\n" + table_of(("what", "value"), environment_rows(document)))
    parts.append("## Levels\n\n" + table_of(("level", "says"), LEVELS.items()))
    return "\n\n".join(parts) + "\n"


def _statement(account: Account, document: Document, title: str) -> str:
    rows, waived = table(account), waivers(account)
    parts = [*([title] if title else []), md(sentence(account, document))]
    parts += [table_of(rows[0], rows[1:])] if rows[1:] else []
    parts += ["Waived:\n\n" + table_of(("law", "reason"), waived)] if waived else []
    parts.append("Declared:\n\n" + table_of(("what", "value"), declared_rows(account.subject)))
    return "\n\n".join(parts)


def _operations(account: Account) -> str:
    """How many laws hold, by operation and dtype."""
    records = list(account.records)
    dtypes = dtypes_of(records)
    rows = [
        (
            name,
            *(held(group, dtype) for dtype in dtypes),
            ratio_text(max((r for r in map(excess, group) if r is not None), default=None)) or _exact(group),
        )
        for name, group in by_operation(records).items()
    ]
    return table_of(("laws that hold", *dtypes, "error/bound"), rows) if rows else "No law applies."


def _exact(group: list[Record]) -> str:
    """What stands for a ratio where there is none."""
    return "exact" if any(record.verdict == "pass" for record in group) else "-"


def _cause(number: int, cause: Cause) -> str:
    got = [md(line) for line in cause.lead.message.splitlines() if "got" in line][:1]
    known = [*(md(finding["says"]) for finding in cause.findings), *map(_linked, cause.suspects)]
    lines = [f"**{number}. {md(cause.statement)}**", *got, *(f"* {text}" for text in known)]
    replay = f"\n\n{code(short_replay(cause.lead), 'sh')}" if cause.lead.replay else ""
    return "\n\n".join(lines[: 1 + len(got)]) + "".join(f"\n{line}" for line in ["", *lines[1 + len(got) :]]) + replay


def _linked(suspect: dict[str, object]) -> str:
    """A suspect with its source as a link."""
    source = str(suspect.get("source", ""))
    text = md(suspect_text({**suspect, "source": ""}))
    return f"{text} <{source}>" if re.fullmatch(r"https://[\w./%#?=&-]+", source) else f"{text} {md(source)}".rstrip()


def _failure(record: Record) -> str:
    waived = f", waived: {md(record.waived)}" if record.waived else ""
    replay = f"\n\n{code(short_replay(record), 'sh')}" if record.replay else ""
    return f"`{record.law}`: {outcome(record)} in {record.dtype or 'every dtype'}{waived}\n\n{code(record.message)}{replay}"
