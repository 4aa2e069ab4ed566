"""A statement of conformance: what a run shows of a subject, level by level, and under which conditions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from typing import Literal

from mla_spec.front.overview import by_operation
from mla_spec.front.reports.account import Account, Document, code_text
from mla_spec.front.reports.heat import excess
from mla_spec.judging.verdict import Record
from mla_spec.subjects.supports import DTYPES

Level = Literal[
    "exact", "worst-case", "probable and statistical", "deterministic", "batch-invariant", "production sizes"
]

LEVELS: dict[Level, str] = {
    "exact": "laws that compare bits, or whose answer is exact, hold",
    "worst-case": "no element is further from the float64 answer than a proven bound of the declared arithmetic",
    "probable and statistical": "errors are unbiased, as small as declared, and within bounds that hold with probability 1 - 1e-9",
    "deterministic": "the same call gives the same bits",
    "batch-invariant": "a sequence or query gives the same bits alone as among others",
    "production sizes": "the laws of published widths and loads hold",
}
"""What each level says, from the elementary ones upwards."""

_PATTERNS: dict[Level, tuple[str, ...]] = {
    "production sizes": ("test_*_under_load",),
    "deterministic": ("test_*_gives_the_same_bits_again",),
    "batch-invariant": (
        "test_decode_sequences_are_independent",
        "test_prefill_sequences_are_independent",
        "test_prefill_gradients_of_sequences_are_independent",
        "test_sparse_*_are_independent",
    ),
    "probable and statistical": (
        "test_*_is_unbiased",
        "test_*_error_is_as_small_as_declared",
        "test_*_roundings_do_not_add_up",
    ),
}
"""Names of the laws of a level; other laws are exact, or worst-case where they hold a result against a bound."""

_CLAIMS = {"deterministic": "deterministic", "batch-invariant": "batch_invariant"}
"""Levels that a profile claims, and its field: where it does not, the laws compare within bounds."""

State = Literal["holds", "waived", "violated", "unclear"]


@dataclass(frozen=True)
class Finding:
    """What laws of one level say of an operation in a dtype."""

    operation: str
    dtype: str
    level: Level
    state: State


def level_of(record: Record, claimed: Iterable[str] = _CLAIMS.values()) -> Level:
    """The level of a law, where the profile has the claims ``claimed``."""
    for level, patterns in _PATTERNS.items():
        if any(fnmatchcase(record.law, pattern) for pattern in patterns) and _CLAIMS.get(level, "") in ("", *claimed):
            return level
    bounded = excess(record) is not None or any(each["judged"] == "within" for each in record.evidence)
    return "worst-case" if bounded else "exact"


def findings(account: Account) -> list[Finding]:
    """What a run says of each operation, dtype and level of which a law was judged."""
    groups: dict[tuple[str, str, Level], list[Record]] = {}
    named = {record.law: name for name, group in by_operation(list(account.records)).items() for record in group}
    for record in account.judged:
        profile = account.subject.profiles.get(record.dtype, {})
        claimed = [name for name in _CLAIMS.values() if profile.get(name, True)]
        groups.setdefault((named[record.law], record.dtype, level_of(record, claimed)), []).append(record)
    return [Finding(*key, _state(group)) for key, group in groups.items()]


def _state(group: list[Record]) -> State:
    if any(record.verdict in ("fail", "crashed") and not record.waived for record in group):
        return "violated"
    if any(record.verdict == "incomplete" and not record.waived for record in group):
        return "unclear"
    return "waived" if any(record.waived for record in group) else "holds"


def table(account: Account) -> list[tuple[str, ...]]:
    """A header, and a row of each operation: for each level the dtypes in which it is reached."""
    found = findings(account)
    levels = [level for level in LEVELS if any(each.level == level for each in found)]
    rows: list[tuple[str, ...]] = [("operation", *levels)]
    every = {each.dtype for each in found}
    for name in by_operation(list(account.records)):
        own = [each for each in found if each.operation == name]
        rows.append((name, *(_dtypes([each for each in own if each.level == level], every) for level in levels)))
    return rows


_WORDS: dict[State, str] = {
    "holds": "",
    "waived": "waived in ",
    "violated": "VIOLATED in ",
    "unclear": "not judged in ",
}


def _dtypes(found: list[Finding], every: set[str]) -> str:
    """Of one operation and level: in which dtypes it is reached, and in which it is not."""
    parts = []
    for state, word in _WORDS.items():
        dtypes = {each.dtype for each in found if each.state == state}
        named = "every dtype" if dtypes == every else ", ".join(dtype for dtype in DTYPES if dtype in dtypes)
        parts += [f"{word}{named}" if dtypes != {""} else word.removesuffix(" in ")] if dtypes else []
    return "; ".join(parts) or "-"


def sentence(account: Account, document: Document) -> str:
    """What the statement says first."""
    text, _ = account.headline
    code = code_text(account.subject)
    name = f"{account.subject.name} ({code})" if code else account.subject.name
    verdict = {"conforms": "conforms to", "violates": "violates", "incomplete": "is not fully judged by"}
    said = verdict.get(text.partition(":")[0], "is judged in part by")
    operations = ", ".join(name for name in by_operation(list(account.records)))
    suite, device = f"mla-spec {document.header.suite}", document.header.gpu or document.header.device
    if not operations:
        return f"{suite} judged no operation of {name} on {device}."
    return f"{name} {said} {suite} for {operations} on {device}."


def waivers(account: Account) -> list[tuple[str, str]]:
    """The laws that are waived, with their dtypes, and the reason with its last day."""
    rows: dict[tuple[str, str], list[str]] = {}
    for record in account.judged:
        if record.waived:
            rows.setdefault((record.law, record.waived), []).append(record.dtype)
    return [(f"{law} in {', '.join(dtypes)}", reason) for (law, reason), dtypes in rows.items()]


_COLORS = {"green": "#1f7a3a", "yellow": "#8a6100", "red": "#c62f2f"}


def badge(document: Document) -> str:
    """An SVG badge: the version of the suite, and the verdict of the gravest subject."""
    colors = [account.headline[1] for account in document.accounts]
    color = max(colors, key=list(_COLORS).index, default="yellow")
    color = max(color, "yellow", key=list(_COLORS).index) if document.faults else color
    count = len({name for account in document.accounts for name in by_operation(list(account.records))})
    said = {"green": f"conforms · {count} operation{'s' * (count != 1)}", "yellow": "incomplete", "red": "violates"}[
        color
    ]
    left, right = f"mla-spec {document.header.suite}", said
    widths = [round(6.6 * len(text)) + 14 for text in (left, right)]
    middles = [widths[0] / 2, widths[0] + widths[1] / 2]
    words = "".join(
        f'<text x="{x:g}" y="14" textLength="{width - 14}">{escape(text)}</text>'
        for x, width, text in zip(middles, widths, (left, right), strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{sum(widths)}" height="20" role="img" '
        f'aria-label="{escape(f"{left}: {right}")}"><title>{escape(f"{left}: {right}")}</title>'
        f'<rect width="{sum(widths)}" height="20" rx="3" fill="#434c58"/>'
        f'<rect x="{widths[0]}" width="{widths[1]}" height="20" rx="3" fill="{_COLORS[color]}"/>'
        f'<rect x="{widths[0]}" width="4" height="20" fill="{_COLORS[color]}"/>'
        f'<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{words}</g></svg>\n'
    )
