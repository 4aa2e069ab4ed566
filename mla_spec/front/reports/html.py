"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape

from mla_spec.front.overview import short_replay, suspect_text
from mla_spec.front.report import outcome
from mla_spec.front.reports.account import Account, Document, declared_rows, environment_rows
from mla_spec.front.reports.heat import Heat, Square, operations_by_dtype, queries_by_head, regimes_by_law
from mla_spec.front.reports.spread import pictures, spreads
from mla_spec.front.reports.statement import LEVELS, sentence, waivers
from mla_spec.front.reports.statement import table as levels_of
from mla_spec.front.reports.style import STYLE
from mla_spec.judging.causes import Cause
from mla_spec.judging.verdict import Record
from mla_spec.text.terminal import printable

MAPS, OPEN = 6, 2
"""Failing laws of which a map of queries and heads is drawn, those with right results too first, and how many of them are seen at once."""


def html(document: Document) -> str:
    """The page."""
    title = ", ".join(account.subject.name for account in document.accounts)
    faults = "".join(tag("p", text, "note yellow") for text in document.faults)
    subjects = "".join(_subject(account, document) for account in document.accounts)
    return page(f"mla-spec: {title}", faults + subjects + section("Environment", listed(environment_rows(document))))


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def tag(name: str, text: str, css: str = "", title: str = "") -> str:
    """An element that holds text."""
    return f"<{name}{_attributes(css, title)}>{escape(printable(text, 10_000))}</{name}>"


def _attributes(css: str = "", title: str = "") -> str:
    given = {"class": css, "title": title}
    return "".join(f' {name}="{escape(printable(value))}"' for name, value in given.items() if value)


def section(title: str, content: str) -> str:
    """A part with a title; nothing where it has no content."""
    return f"<section>\n{tag('h2', title)}\n{content}</section>\n" if content else ""


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """What is seen when its summary is opened."""
    return f"<details{' open' * opened}>{tag('summary', summary)}\n{content}</details>\n"


def listed(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    items = "".join(f"{tag('dt', name)}{tag('dd', value)}\n" for name, value in rows)
    return f"<dl>\n{items}</dl>\n"


def _subject(account: Account, document: Document) -> str:
    text, color = account.headline
    verdict, _, rest = text.partition(": ")
    parts = [
        f"<header>\n{tag('h1', account.subject.name)}\n",
        f"<p>{tag('strong', verdict, f'badge {color}')} {escape(rest)} ({account.seconds:.0f} s of work)</p>\n</header>\n",
        section("Causes", "".join(_cause(n, cause) for n, cause in enumerate(account.causes, 1))),
        section("Operations and dtypes", drawn(operations_by_dtype(account)) + _LEGEND),
        section("Where results are wrong", _places(account.causes)),
        section("Laws and regimes", "".join(_regimes(heat) for heat in regimes_by_law(account))),
        section("How large errors are", pictures(spreads(account))),
        section("Laws that do not hold", "".join(map(_failure, account.records))),
        section("Not judged", _not_judged(account.records)),
        section("Statement of conformance", _statement(account, document)),
        section("What it declares", listed(declared_rows(account.subject))),
    ]
    return "".join(parts)


def _statement(account: Account, document: Document) -> str:
    header, *rows = levels_of(account)
    head = "".join(tag("th", name, title=LEVELS.get(name, "")) for name in header)  # type: ignore[call-overload]
    body = "".join(f"<tr>{tag('th', row[0])}{''.join(map(_reached, row[1:]))}</tr>\n" for row in rows)
    waived = waivers(account)
    return (
        f'{tag("p", sentence(account, document))}\n<div class="scroll"><table class="levels">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
        + (f"<h3>Waived</h3>\n{listed(waived)}" if waived else "")
        + details("What the levels say", listed(LEVELS.items()))
    )


def _reached(dtypes: str) -> str:
    css = (
        "wrong"
        if "VIOLATED" in dtypes
        else "unclear"
        if "not judged" in dtypes
        else "none"
        if dtypes == "-"
        else "exact"
    )
    return tag("td", "" if dtypes == "-" else dtypes, css)


_LEGEND = (
    '<p class="legend"><span class="exact">exact</span> bits are right; <span class="within r0">0</span>'
    '<span class="within r2">0.5</span><span class="within r4">1</span> error / bound; <span class="wrong">wrong</span>; '
    '<span class="unclear">not judged</span></p>\n'
)


def _cause(number: int, cause: Cause) -> str:
    got = "".join(tag("p", line.strip(), "code") for line in cause.lead.message.splitlines() if "got" in line)
    known = [*(finding["says"] for finding in cause.findings), *map(suspect_text, cause.suspects)]
    items = "".join(f"{tag('li', text)}\n" for text in known)
    replay = short_replay(cause.lead)
    return (
        f"<article>\n{tag('h3', f'{number}. {cause.statement}')}\n{got}"
        + (f"<ul>\n{items}</ul>\n" if items else "")
        + (f"{tag('pre', replay)}\n" if replay else "")
        + "</article>\n"
    )


def _places(causes: Iterable[Cause]) -> str:
    heats = [queries_by_head(record) for cause in causes for record in cause.alike]
    found = list({heat.note: heat for heat in heats if heat is not None}.values())
    found.sort(key=lambda heat: (len(heat.kinds) == 1, -len(heat.rows) * len(heat.columns)))
    return "".join(
        details(_spaced(heat.title), tag("p", heat.note, "code") + drawn(heat, "dense"), opened=n < OPEN)
        for n, heat in enumerate(found[:MAPS])
    )


def _regimes(heat: Heat) -> str:
    return details(f"{heat.title}: {len(heat.rows)} laws", drawn(heat, "regimes"), opened="wrong" in heat.kinds)


def drawn(heat: Heat, css: str = "") -> str:
    """A map as a table, which scrolls where it is wider than the page."""
    head = tag("th", heat.corner) + "".join(f"<th><span>{escape(name)}</span></th>" for name in heat.columns)
    rows = "".join(
        f"<tr>{tag('th', _spaced(name))}{''.join(map(_square, squares))}</tr>\n" for name, squares in heat.rows
    )
    return f'<div class="scroll"><table class="heat {css}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'


def _spaced(name: str) -> str:
    """A text that begins with the name of a law, as words that can be broken into lines."""
    law, colon, rest = name.partition(":")
    return law.removeprefix("test_").replace("_", " ") + colon + rest if law.startswith("test_") else name


def _square(square: Square) -> str:
    shade = f" r{min(4, int(square.ratio * 5))}" if square.kind == "within" and square.ratio is not None else ""
    more = tag("small", square.more) if square.more else ""
    return (
        f"<td{_attributes(square.kind + shade + ' pale' * square.pale, square.title)}>{escape(square.text)}{more}</td>"
    )


def _failure(record: Record) -> str:
    if record.verdict in ("pass", "unsupported"):
        return ""
    dtypes = ", ".join(f"{dtype} {verdict}" for dtype, verdict in record.dtypes.items())
    rows = [("law", record.law), ("waived", record.waived), ("dtypes", dtypes), ("smallest case", record.case)]
    content = (
        tag("pre", record.message)
        + listed((name, value) for name, value in rows if value)
        + (tag("pre", short_replay(record)) if record.replay else "")
    )
    return details(_spaced(f"{record.law}: {outcome(record)}"), content)


def _not_judged(records: Iterable[Record]) -> str:
    reasons = Counter(record.message for record in records if record.verdict == "unsupported")
    return listed((reason, f"{count} law{'s' * (count > 1)}") for reason, count in reasons.most_common())
