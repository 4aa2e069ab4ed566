"""From the records of a run to causes: which laws fail for the same reason, and which only follow."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.anatomy import Anatomy
from mla_spec.judging.error_text import pattern_text, place_text, separation_text
from mla_spec.judging.narrowing import NOT_MADE_FOR, declaration
from mla_spec.judging.verdict import Record


@dataclass
class Cause:
    """Failures that one fault explains.

    Attributes:
        lead: the most elementary law that fails.
        alike: laws whose results are wrong by the same pattern, ``lead`` first.
        follows: laws that judge a number which ``lead`` shows to be wrong.
        findings: what was found out by asking the subject again (``mla_spec.judging.finding``), the finest first; filled in by who
            asks.
        suspects: faults that give the same wrong numbers, the likeliest first; filled in by who tries them.
    """

    lead: Record
    alike: list[Record] = field(default_factory=list)
    follows: list[Record] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)
    suspects: list[dict[str, Any]] = field(default_factory=list)

    @property
    def operation(self) -> str:
        """The operation whose numbers are wrong; empty where the law is of none."""
        return next(iter(needs(self.lead)), "")

    @property
    def statement(self) -> str:
        """One sentence: how many laws, what is wrong, where, and in which cases."""
        count = f"{len(self.alike)} law{'s' * (len(self.alike) > 1)}" + f" of {self.operation}" * bool(self.operation)
        follow = f" ({len(self.follows)} more follow)" * bool(self.follows)
        return f"{count}{follow}: {error_text(self.lead)}"

    @property
    def declare(self) -> str:
        """Where laws crash alike, which field of ``Supports`` takes what they crash on away, as a sentence; or ""."""
        if self.lead.verdict != "crashed":
            return ""
        lines = [line for record in self.alike for line in record.message.splitlines()]
        found = [line.partition("Supports(")[2][:-1] for line in lines if line.startswith(NOT_MADE_FOR)]
        field = declaration((record.law for record in self.alike), found)
        return f"{NOT_MADE_FOR} Supports({field})" if field else ""

    def as_dict(self) -> dict[str, Any]:
        """The cause as data: what is wrong, which laws say so, what may be the fault, and what to try."""
        declare = [f"declare {suspect['declare']}" for suspect in self.suspects if "declare" in suspect]
        return {
            "statement": self.statement,
            "operation": self.operation,
            "laws": [record.law for record in self.alike],
            "follows": [record.law for record in self.follows],
            "findings": self.findings,
            "suspects": self.suspects,
            "try": [*declare, *([self.lead.replay] if self.lead.replay else [])],
        }


def with_causes(records: Iterable[Record], found: Iterable[Cause]) -> list[Record]:
    """The records, of which those that fail bear their cause, or the law of which they follow."""
    bears: dict[str, dict[str, Any]] = {}
    for cause in found:
        bears |= {record.law: {"follows": cause.lead.law} for record in (*cause.alike, *cause.follows)}
        bears[cause.lead.law] = cause.as_dict()
    return [replace(record, cause=bears.get(record.law, {})) for record in records]


def needs(record: Record) -> tuple[str, ...]:
    """The operations of a record's law; none for laws that are not of the suite, such as those of golden files."""
    law = all_laws().get(record.law)
    return () if law is None else law.needs


def richest(record: Record) -> Anatomy:
    """The anatomy that shows the most; empty where nothing was compared."""
    return record.evidence[-1] if record.evidence else {}


def error_text(record: Record) -> str:
    """What is wrong, where, and in which cases only."""
    anatomy = richest(record)
    if not anatomy:
        return next(iter(record.message.splitlines()), record.verdict)
    parts = [pattern_text(anatomy), place_text(anatomy, needs(record)), separation_text(record.separation)]
    return ", ".join(part for part in parts if part)


def causes(records: Iterable[Record]) -> list[Cause]:
    """One cause for each operation and pattern, the elementary laws first."""
    found: list[Cause] = []
    failing = [record for record in records if record.verdict in ("fail", "crashed")]
    for record in sorted(failing, key=_rank):
        known = [cause for cause in found if cause.operation in needs(record) or not cause.operation]
        same = [cause for cause in known if _signature(cause.lead) == _signature(record)]
        if same:
            same[0].alike.append(record)
        elif known and record.verdict == "fail":
            known[0].follows.append(record)
        else:
            found.append(Cause(record, [record]))
    return found


def _rank(record: Record) -> tuple[bool, int, bool]:
    """Laws of few operations first, and those that compare with the exact result before those that compare bits."""
    return record.verdict == "crashed", len(needs(record)), richest(record).get("judged") != "within"


def _signature(record: Record) -> tuple[Any, ...]:
    """What failures of one pattern have in common."""
    anatomy = richest(record)
    if not anatomy:
        return (record.verdict, re.sub(r"[0-9]+", "#", record.message.partition(" (")[0]))
    value = anatomy["value"]
    return (anatomy["what"], anatomy["pattern"], f"{value:.3g}" if isinstance(value, float) else value)
