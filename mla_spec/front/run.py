"""What ``mla-spec check`` keeps of a run while it goes on: records, progress, and what is left to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mla_spec.judging.causes import Cause
from mla_spec.judging.plan import Cell, Judged
from mla_spec.judging.records import (
    CauseLine,
    EndLine,
    FoundOut,
    NamedSuspect,
    RecordFile,
    RecordsError,
    Run,
    RunLine,
    SubjectLine,
    read_records,
)
from mla_spec.judging.session import Asked, verdict_line
from mla_spec.judging.verdict import Record
from mla_spec.judging.waivers import Waivers
from mla_spec.text.layout import Screen
from mla_spec.text.terminal import UsageError, show_progress, shown

INTERRUPTED = 130
"""The exit code of a run that a signal ended."""


@dataclass
class Progress:
    """Counts cells, and names one that is running, with the rate and the time that is left."""

    total: int
    done: int = 0
    start: float = field(default_factory=time.monotonic)

    def __call__(self, cell: Cell) -> None:
        """Say that ``cell`` is running."""
        show_progress(Screen.of(sys.stderr).cut(self.text(cell, time.monotonic() - self.start)))

    def text(self, cell: Cell, seconds: float) -> str:
        """The line, so many seconds after the start."""
        if not self.done or seconds <= 0:
            return f"[{self.done}/{self.total}] {cell}"
        rate = self.done / seconds
        minutes, rest = divmod(int((self.total - self.done) / rate), 60)
        return f"[{self.done}/{self.total}, {rate:.1f}/s, {minutes}:{rest:02} left] {cell}"

    def counted(self, judged: Iterable[Judged]) -> Iterator[Judged]:
        """The same, each counted as it comes."""
        for each in judged:
            self.done += 1
            yield each


@dataclass
class Store:
    """The records of a run in memory, and in a file where one is named.

    Attributes:
        header, subjects: the lines that begin the run.
        waivers: what is expected to fail.
        file: where lines are appended.
        judged: the record of each cell so far.
    """

    header: RunLine
    subjects: Sequence[SubjectLine]
    waivers: Waivers = field(default_factory=Waivers)
    file: RecordFile | None = None
    judged: dict[Cell, Record] = field(default_factory=dict)

    def begin(self) -> None:
        """Append what begins the run."""
        if self.file is not None:
            self.file.write(self.header, *self.subjects)

    def resume(self, runs: Iterable[Run], path: str, cells: Iterable[Cell]) -> int:
        """Take over the verdicts on ``cells`` of ``runs``, and say how many; UsageError where they are of another run."""
        wanted = set(cells)
        for run in runs:
            self._require_same(run, path)
            for line in run.verdicts:
                if line.cell in wanted:
                    self.judged[line.cell] = self.waivers.apply(line.cell, line.record)
        return len(self.judged)

    def _require_same(self, run: Run, path: str) -> None:
        reason = self.header.differs(run.header)
        own = {line.spec: line for line in self.subjects}
        for spec, line in run.subjects.items():
            reason = reason or (own[spec].differs(line) if spec in own else "")
        if reason:
            raise UsageError(f"--resume {shown(path)} is of another run: {reason}")

    def add(self, judged: Iterable[Judged]) -> Iterator[Cell]:
        """Keep each record as it is made, and append it."""
        for cell, record in judged:
            self.judged[cell] = self.waivers.apply(cell, record)
            if self.file is not None:
                self.file.write(verdict_line(self.header.run, cell, self.judged[cell]))
            yield cell

    def explained(self, spec: tuple[str, ...], found: Iterable[Cause]) -> None:
        """Append the causes of a subject's failures, where that is still possible."""
        self._append(*(cause_line(self.header.run, spec, cause) for cause in found))

    def end(self, reason: str, code: int) -> None:
        """Append how the run ended, where that is still possible."""
        self._append(EndLine(run=self.header.run, reason=reason, exit=code))

    def _append(self, *lines: CauseLine | EndLine) -> None:
        try:
            if self.file is not None:
                self.file.write(*lines)
        except RecordsError:
            return


def cause_line(run: str, spec: tuple[str, ...], cause: Cause) -> CauseLine:
    """What is recorded of a cause."""
    return CauseLine(
        run=run,
        spec=spec,
        law=cause.lead.law,
        statement=cause.statement,
        laws=tuple(record.law for record in cause.alike),
        follows=tuple(record.law for record in cause.follows),
        suspects=tuple(NamedSuspect(**suspect) for suspect in cause.suspects),
        findings=tuple(FoundOut(**finding) for finding in cause.findings),
    )


def read(path: str) -> list[Run]:
    """``read_records``, whose errors are of usage."""
    try:
        return read_records(path)
    except RecordsError as error:
        raise UsageError(str(error)) from error


def opened(path: str) -> RecordFile:
    """A file for records; UsageError where it cannot be written."""
    try:
        return RecordFile(path)
    except RecordsError as error:
        raise UsageError(str(error)) from error


def subject_lines(subjects: Iterable[Asked], header: RunLine) -> list[SubjectLine]:
    """What is recorded of the subjects of a run."""
    return [asked.line(header.run) for asked in subjects]
