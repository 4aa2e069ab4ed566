"""One screen that says what came of a check: verdict, operations by dtype, causes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from mla_spec.front.report import summary
from mla_spec.installed import operation_names
from mla_spec.judging.causes import Cause, causes, needs
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import KINDS, parse_case
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.layout import Screen
from mla_spec.text.table import format_table

SHOWN = 3
"""Causes that are shown; the rest are counted."""

LAWS = "laws of several operations"


def overview(
    records: list[Record], screen: Screen, found: list[Cause] | None = None, *, part: bool = False, quick: str = ""
) -> str:
    """The screen.

    Args:
        found: the causes, where they are known already.
        part: whether more is to be judged.
        quick: of a quick check, what it has not asked.
    """
    found = causes(record for record in records if not record.holds) if found is None else found
    blocks = [
        _verdict(records, found, screen, part, bool(quick)),
        screen.wrapped(quick, rest="  ") if quick else [],
        _table(records, screen),
        _remarks(records, screen),
        *(_first_cause(cause, screen) for cause in found[:1]),
        *(_later_cause(number, cause, found[0], screen) for number, cause in enumerate(found[1:SHOWN], 2)),
    ]
    if len(found) > SHOWN:
        blocks.append([f"{len(found) - SHOWN} more causes: -v has all laws that fail"])
    return "\n".join(line for block in blocks for line in block)


def headline(records: list[Record], found: list[Cause], *, part: bool = False, quick: bool = False) -> tuple[str, str]:
    """What came of a run in one sentence, and its color: green where the subject conforms, yellow where nobody knows, red."""
    ran = [record for record in records if record.verdict != "unsupported"]
    wrong = sum(record.verdict in ("fail", "crashed") and not record.holds for record in ran)
    unclear = sum(record.verdict == "incomplete" and not record.holds for record in ran)
    if wrong:
        few = f"{len(found)} cause{'s' * (len(found) > 1)}"
        return f"violates: {wrong} of {len(ran)} laws fail, by {few}", "red"
    if unclear or not any(record.verdict == "pass" for record in ran):
        return f"incomplete: {unclear} of {len(ran)} laws could not be judged", "yellow"
    if part:
        return f"so far, of a part of the run: {summary(ran)}", "yellow"
    return f"{'passes a quick check' if quick else 'conforms'}: {summary(ran)}", "green"


def _verdict(records: list[Record], found: list[Cause], screen: Screen, part: bool, quick: bool) -> list[str]:
    text, style = headline(records, found, part=part, quick=quick)
    seconds = sum(record.seconds for record in records)
    return [screen.paint(screen.cut(f"{text} ({seconds:.0f} s of work)"), style, "bold")]


def _operation(record: Record, faulty: set[str]) -> str:
    """The operation under which a law is counted: one that is wrong, where the law fails and needs such a one."""
    named = needs(record)
    if not record.holds and (wrong := [name for name in named if name in faulty]):
        return wrong[0]
    return named[0] if named else LAWS


def by_operation(records: list[Record]) -> dict[str, list[Record]]:
    """The records of laws that apply, by the operation that each is counted under, in the order of reports."""
    single = {record.law: needs(record) for record in records}
    faulty = {names[0] for record in records if not record.holds and len(names := single[record.law]) == 1}
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.verdict != "unsupported":
            groups.setdefault(_operation(record, faulty), []).append(record)
    return {name: groups[name] for name in (*operation_names(), LAWS) if name in groups}


def dtypes_of(records: list[Record]) -> list[str]:
    """The dtypes in which laws were judged, the widest first."""
    return [d for d in DTYPES if any(d in r.dtypes or d == r.dtype for r in records if r.verdict != "unsupported")]


def _table(records: list[Record], screen: Screen) -> list[str]:
    """A row an operation; where some fail, the others are one paragraph."""
    groups = by_operation(records)
    order = list(groups)
    bad = [name for name in order if not all(record.holds for record in groups[name])]
    shown = bad or order
    dtypes = dtypes_of(records)
    rows = [("laws that hold", *dtypes, "error/bound"), *(_row(name, groups[name], dtypes) for name in shown)]
    lines = [screen.cut(line) for line in format_table(rows).splitlines()] if shown else []
    lines[1:] = [screen.paint(line, "red") for line in lines[1:]] if bad else lines[1:]
    if bad and (rest := [f"{name} {len(groups[name])}" for name in order if name not in bad]):
        lines += [screen.paint(line, "green") for line in screen.wrapped(f"all hold: {', '.join(rest)}", rest="  ")]
    return lines


def _row(name: str, records: list[Record], dtypes: list[str]) -> tuple[str, ...]:
    worst = max((r.worst for r in records if r.worst is not None), default=None)
    return (name, *(held(records, dtype) for dtype in dtypes), "exact" if worst is None else f"{worst:.3f}")


def held(records: list[Record], dtype: str) -> str:
    """How many laws hold in a dtype, of how many where some do not."""
    verdicts = [verdict for r in records for d, verdict in (r.dtypes or {r.dtype: r.verdict}).items() if d == dtype]
    judged = [verdict for verdict in verdicts if verdict != "unsupported"]
    held = judged.count("pass")
    return "-" if not judged else str(held) if held == len(judged) else f"{held} of {len(judged)}"


def _remarks(records: list[Record], screen: Screen) -> list[str]:
    """What does not apply, what was waived or sampled, and what could not be judged."""
    lines = []
    if count := sum(record.verdict == "unsupported" for record in records):
        reasons = Counter(record.message for record in records if record.verdict == "unsupported")
        why = "; ".join(reason for reason, _ in reasons.most_common())
        lines.append(screen.cut(f"{_laws(count)} {'do' if count > 1 else 'does'} not apply: {why}"))
    if waived := Counter(record.waived for record in records if record.waived):
        lines += [screen.cut(f"{_laws(count)} waived: {reason}") for reason, count in waived.items()]
    lines += [line for sentence in _refusals(records) for line in screen.wrapped(sentence, rest="  ")]
    for record in records:
        notes = (note for note in record.note.splitlines() if _REFUSED.fullmatch(note) is None)
        lines += [line for note in notes for line in screen.wrapped(f"{record.law}: {note}", rest="  ")]
        if record.verdict == "incomplete" and not record.holds:
            lines += screen.wrapped(f"not judged: {record.law}: {record.message}", rest="  ", most=2)
    return lines


_REFUSED = re.compile(r"([0-9]+) of ([0-9]+) cases refused by the subject: (.*)")
"""A note that some cases of a law were refused."""


def _refusals(records: list[Record]) -> list[str]:
    """How many cases were refused, and for what reasons, in one sentence for all laws."""
    found = [match for r in records for note in r.note.splitlines() if (match := _REFUSED.fullmatch(note))]
    if not found:
        return []
    laws = sum(any(map(_REFUSED.fullmatch, r.note.splitlines())) for r in records)
    refused, cases = (sum(int(match[i]) for match in found) for i in (1, 2))
    reasons = "; ".join(dict.fromkeys(match[3] for match in found))
    return [f"{refused} of {cases} cases of {_laws(laws)} refused by the subject: {reasons}"]


def _laws(count: int) -> str:
    return f"{count} law{'s' * (count > 1)}"


_INDENT = "   "


def _first_cause(cause: Cause, screen: Screen) -> list[str]:
    """What is wrong, the worst element, known faults that look like it, and how to run the smallest case again."""
    lines = screen.wrapped(f"1. {cause.statement}", rest=_INDENT, most=3)
    lines[0] = screen.paint(lines[0], "bold")
    if shown := [line for line in cause.lead.message.splitlines() if "got" in line]:
        lines.append(screen.cut(f"{_INDENT}{shown[0].strip()}"))
    if cause.declare:
        lines += screen.wrapped(cause.declare, _INDENT, _INDENT, most=2)
    lines += _found_out(cause, screen, 3)
    for suspect, most in zip(cause.suspects, (3, 2), strict=False):
        lines += screen.wrapped(suspect_text(suspect), _INDENT, _INDENT, most=most)
    return lines + screen.command(short_replay(cause.lead), _INDENT)


def _later_cause(number: int, cause: Cause, first: Cause, screen: Screen) -> list[str]:
    """What is wrong; in one line where the first cause looks like the same fault."""
    ids = [{suspect["id"] for suspect in each.suspects} for each in (first, cause)]
    if both := sorted(ids[0] & ids[1]):
        count = len(cause.alike) + len(cause.follows)
        return [screen.cut(f"{number}. {_laws(count)} of {cause.operation}: the same wrong numbers as {both[0]} too")]
    lines = screen.wrapped(f"{number}. {cause.statement}", rest=_INDENT, most=2)
    lines[0] = screen.paint(lines[0], "bold")
    if cause.declare:
        lines += screen.wrapped(cause.declare, _INDENT, _INDENT, most=2)
    lines += _found_out(cause, screen, 2)
    for suspect in cause.suspects[:1]:
        lines += screen.wrapped(suspect_text(suspect), _INDENT, _INDENT, most=2)
    return lines


def _found_out(cause: Cause, screen: Screen, most: int) -> list[str]:
    """What was found out, in so many lines at most."""
    return screen.wrapped(found_out(cause.findings), _INDENT, _INDENT, most=most) if cause.findings else []


def found_out(findings: Iterable[dict[str, str]]) -> str:
    """What was found out of a fault, in one sentence."""
    return f"found out: {'; '.join(finding['says'].rstrip('.') for finding in findings)}"


def suspect_text(suspect: dict[str, object]) -> str:
    """A suspect in one sentence."""
    source = f" {suspect['source']}" if suspect.get("source") else ""
    declare = f" Right if it declares {suspect['declare']}." if suspect.get("declare") else ""
    return f"same wrong numbers as {suspect['id']}: {suspect['claim']}{declare}{source}"


def short_replay(record: Record) -> str:
    """The command that runs the smallest case again, without fields of the case that have their default."""
    if not record.replay or record.case.partition(":")[0] not in KINDS:
        return record.replay
    return record.replay.replace(record.case, parse_case(record.case).short_id)
