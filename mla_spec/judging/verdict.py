"""What a law says of a subject, as structured records that every front end prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "unsupported", "crashed", "incomplete"]

SEVERITY: tuple[Verdict, ...] = ("unsupported", "pass", "incomplete", "crashed", "fail")
"""Verdicts from the mildest to the gravest; a law's verdict is the gravest over its dtypes."""


class VacuousCase(Exception):
    """The bound of this case is too loose to mean anything: an error of the suite, never a pass."""


class TrivialCase(Exception):
    """Whatever the subject had returned for this case, the law would have held; the text says why."""


@dataclass(frozen=True)
class Record:
    """One law on one subject.

    Attributes:
        law, subject: their names.
        verdict: pass, fail, unsupported, crashed or incomplete.
        cases: generated cases that ran, minimisation not counted.
        worst: largest error / bound seen, or None for laws that compare bits.
        worst_case: id of the case that gave it.
        message: why the verdict is not pass; else empty.
        case: id of the smallest failing case.
        replay: command that runs that case again.
        seconds: wall time.
        note: what of the cases was looked at, where that is not all; one line for each dtype.
    """

    law: str
    subject: str
    verdict: Verdict
    cases: int = 0
    worst: float | None = None
    worst_case: str = ""
    message: str = ""
    case: str = ""
    replay: str = ""
    seconds: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """The record as several lines: verdict, message, smallest case, replay command."""
        lines = [f"{self.law} [{self.subject}]: {self.verdict} after {self.cases} cases"]
        lines += [f"  {line}" for line in self.message.splitlines()]
        if self.case:
            lines.append(f"  smallest case: {self.case}")
        if self.replay:
            lines.append(f"  replay: {self.replay}")
        return "\n".join(lines)


def merge(records: list[Record]) -> Record:
    """One record of a law from those of its dtypes: the gravest verdict, and the cases and time of all."""
    gravest = max(records, key=lambda r: SEVERITY.index(r.verdict))
    measured = [r for r in records if r.worst is not None]
    worst = max(measured, key=lambda r: r.worst or 0.0) if measured else gravest
    return Record(
        law=gravest.law,
        subject=gravest.subject,
        verdict=gravest.verdict,
        cases=sum(r.cases for r in records),
        worst=worst.worst,
        worst_case=worst.worst_case,
        message=gravest.message,
        case=gravest.case,
        replay=gravest.replay,
        seconds=sum(r.seconds for r in records),
        note="\n".join(r.note for r in records if r.note),
    )
