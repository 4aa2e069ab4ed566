"""What a law says of a subject, as structured records that every front end prints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mla_spec.judging.regime_count import together
from mla_spec.judging.spread import Spread, added
from mla_spec.text.terminal import one_line, printable

Verdict = Literal["pass", "fail", "unsupported", "crashed", "incomplete"]

SEVERITY: tuple[Verdict, ...] = ("unsupported", "pass", "incomplete", "crashed", "fail")
"""Verdicts from the mildest to the gravest; a law's verdict is the gravest over its dtypes."""


LONGEST_MESSAGE = 4000
"""Characters of a message: a subject may raise an exception with a text of any length."""


class VacuousCase(Exception):
    """The bound of this case is too loose to mean anything: an error of the suite, never a pass."""


class TrivialCase(Exception):
    """Whatever the subject had returned for this case, the law would have held; the text says why."""


@dataclass(frozen=True)
class Record:
    """One law on one subject, in one dtype or in all.

    Attributes:
        law, subject: their names.
        verdict: pass, fail, unsupported, crashed or incomplete.
        cases: generated cases that ran, minimisation not counted.
        worst: largest error / bound seen, or None for laws that compare bits.
        worst_case: id of the case that gave it.
        message: why the verdict is not pass; else empty. Long ones are cut, and control characters escaped.
        case: id of the smallest failing case.
        replay: command that runs that case again.
        seconds: wall time.
        note: what of its cases a law looked at, a line a dtype, where that is not all.
        dtype: the one that gave the verdict; empty where none was asked.
        dtypes: the verdict of each dtype that was judged.
        waived: the reason of the waiver that expects this failure; empty where there is none.
        evidence: the anatomy (``mla_spec.judging.anatomy``) of the wrong result of the smallest failing case, and that of the
            one with the most elements, each with its ``case``; empty where nothing was compared.
        separation: what separates the cases that failed from those that passed (``mla_spec.judging.separation``).
        regimes: what came of the cases of each regime (``mla_spec.judging.regime_count``).
        spread: of a law that holds, how many elements have how large an error (``mla_spec.judging.spread``).
        told: which conventions its results obey, else what inputs that tell on themselves say, where they were asked for
            (``mla_spec.judging.finding``).
        cause: in the report of a run, of the law that shows a fault first what that is (``mla_spec.judging.causes``), of the
            others which law they follow.
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
    dtype: str = ""
    dtypes: dict[str, str] = field(default_factory=dict)
    waived: str = ""
    evidence: list[dict[str, Any]] = field(default_factory=list)
    separation: dict[str, Any] = field(default_factory=dict)
    regimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    spread: Spread = field(default_factory=dict)
    told: list[dict[str, str]] = field(default_factory=list)
    cause: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "subject", one_line(self.subject, 200))
        object.__setattr__(self, "message", printable(self.message, LONGEST_MESSAGE))

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong, or only what a waiver expects."""
        return self.verdict in ("pass", "unsupported") or bool(self.waived)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no number that is not finite."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def text(self) -> str:
        """The record as several lines: verdict, message, smallest case, replay command."""
        lines = [f"{self.law} [{self.subject}]: {self.verdict} after {self.cases} cases"]
        lines += [f"  {line}" for line in self.message.splitlines()]
        lines += [f"  {line}" for line in [self._elsewhere()] if line]
        if self.case:
            lines.append(f"  smallest case: {self.case}")
        if self.replay:
            lines.append(f"  replay: {self.replay}")
        return "\n".join(lines)

    def _elsewhere(self) -> str:
        """What the other dtypes gave, where one of them is as bad."""
        others = [f"{dtype}: {verdict}" for dtype, verdict in self.dtypes.items() if dtype != self.dtype]
        bad = any(verdict not in ("pass", "unsupported") for verdict in self.dtypes.values())
        return f"{self.dtype} is shown; {', '.join(others)}" if bad and others else ""


def merge(records: list[Record]) -> Record:
    """One record of a law from those of its dtypes: the gravest verdict, and the cases and time of all.

    A failure that is waived is milder than any other that is not.
    """
    gravest = max(records, key=lambda r: (not r.holds, SEVERITY.index(r.verdict)))
    measured = [r for r in records if r.worst is not None]
    worst = max(measured, key=lambda r: r.worst or 0.0) if measured else gravest
    return replace(
        gravest,
        cases=sum(r.cases for r in records),
        worst=worst.worst,
        worst_case=worst.worst_case,
        seconds=sum(r.seconds for r in records),
        note="\n".join(r.note for r in records if r.note),
        dtypes={r.dtype: _gravest(r.dtype, records) for r in records if r.dtype},
        regimes=together(r.regimes for r in records),
        spread=added(r.spread for r in records),
    )


def _gravest(dtype: str, records: list[Record]) -> Verdict:
    return max((r.verdict for r in records if r.dtype == dtype), key=SEVERITY.index)
