"""Prints records as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mla_spec.judging.verdict import Record, merge
from mla_spec.operations.all import KINDS, parse_case
from mla_spec.text.layout import Screen
from mla_spec.text.table import format_table

NO_LSE = "decode returns no LSE"
"""Why laws of the LSE do not apply."""

UNSEEN_WITHOUT_LSE = (
    "not seen without an LSE: in long sequences a softmax scale that is off by less than about 0.3 % (a flash kernel in "
    "bfloat16; 3 % with bfloat16 scores, TPU products or P in 8 bits), and an error of the LSE itself; docs/power.md has the card"
)
"""What stays within the bounds of outputs from 4096 keys on, by the sensitivity card."""

HEADER = ("law", "verdict", "cases", "error/bound", "worst case")


def merged(records: Iterable[Record]) -> list[Record]:
    """A record of each law and subject, from those of its dtypes."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.law, record.subject), []).append(record)
    return [merge(group) for group in groups.values()]


def record_row(record: Record) -> tuple[str, ...]:
    """The columns of ``HEADER``: "exact" stands for laws that compare bits."""
    worst = "exact" if record.verdict == "pass" else ""
    detail = (
        parse_case(record.worst_case).short_id if record.worst_case.partition(":")[0] in KINDS else record.worst_case
    )
    if record.worst is not None:
        worst = f"{record.worst:.3f}"
    if record.verdict != "pass":
        detail = "see below"
    return record.law, outcome(record), str(record.cases), worst, detail


def outcome(record: Record) -> str:
    """The verdict, or that what does not hold is waived."""
    return "waived" if record.waived else record.verdict


def report_of(records: list[Record], screen: Screen | None = None) -> str:
    """A table of the laws that apply, why others do not, what was sampled, each law that does not hold, and a summary.

    Args:
        screen: where it is shown; rows of the table are cut to its width. None where nothing is cut.
    """
    applying = [record for record in records if record.verdict != "unsupported"]
    reasons = Counter(record.message for record in records if record.verdict == "unsupported")
    table = format_table([HEADER, *map(record_row, applying)]) if applying else ""
    if screen is not None:
        table = "\n".join(screen.cut(line) for line in table.splitlines())
    parts = [table] if applying else []
    if reasons:
        parts.append(
            "\n".join(f"unsupported: {count} law{'s' * (count > 1)}, {reason}" for reason, count in reasons.items())
        )
    parts += [UNSEEN_WITHOUT_LSE] if NO_LSE in reasons else []
    notes = [f"{record.law}: {line}" for record in applying for line in record.note.splitlines()]
    parts += ["\n".join(notes)] if notes else []
    parts += _texts([record for record in applying if not record.holds])
    waived = [f"waived: {record.law}: {record.verdict}: {record.waived}" for record in applying if record.waived]
    parts += ["\n".join(waived)] if waived else []
    return "\n\n".join([*parts, f"{summary(records)} in {sum(r.seconds for r in records):.1f} s"])


def _texts(records: list[Record]) -> list[str]:
    """The records in full; of those that say the same without a case, the first."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.message, record)
    return [record.text() for record in records if record.case or first[record.message] is record]


def summary(records: list[Record]) -> str:
    """One line: how many laws hold, fail, and so on."""
    counts: dict[str, int] = {}
    for record in records:
        counts[outcome(record)] = counts.get(outcome(record), 0) + 1
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


def exit_code(records: Iterable[Record], *, part: bool = False) -> int:
    """0 conforms, 1 violates, 3 incomplete (a law could not be judged, or none applied); waived failures count nothing.

    Args:
        part: of a larger run, where it is no fault that no law applies.
    """
    records = list(records)
    wrong = {record.verdict for record in records if not record.holds}
    if wrong & {"fail", "crashed"}:
        return 1
    judged = part or any(record.verdict == "pass" for record in records)
    return 3 if wrong or not judged else 0
