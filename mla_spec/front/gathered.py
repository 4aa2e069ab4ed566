"""The records of several files, put together as those of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mla_spec.front.report import exit_code
from mla_spec.front.run import read
from mla_spec.judging.plan import Cell, Judged, plan
from mla_spec.judging.records import Run, SubjectLine
from mla_spec.judging.verdict import Record
from mla_spec.judging.waivers import Waivers
from mla_spec.text.terminal import UsageError, shown


def gather(paths: Iterable[str], waivers: Waivers | None = None) -> Gathered:
    """The runs of files; UsageError where one holds none, or one of another run."""
    gathered = Gathered(waivers)
    for path in dict.fromkeys(paths):
        runs = read(path)
        if not runs:
            raise UsageError(f"{shown(path)} holds no run")
        for run in runs:
            gathered.add(run, path)
    return gathered


@dataclass
class Gathered:
    """The records of several files as those of one run.

    Attributes:
        waivers: what is expected to fail, whatever the files say; None where they say it.
    """

    waivers: Waivers | None = None
    runs: list[Run] = field(default_factory=list)
    subjects: dict[tuple[str, ...], SubjectLine] = field(default_factory=dict)
    judged: dict[Cell, Record] = field(default_factory=dict)
    repeated: list[Cell] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def add(self, run: Run, path: str) -> None:
        """Add a run; UsageError where its verdicts cannot be put beside those of the others."""
        reason = self.runs[0].header.differs(run.header) if self.runs else ""
        for spec, line in run.subjects.items():
            reason = reason or self.subjects.setdefault(spec, line).differs(line)
        if reason:
            raise UsageError(f"{shown(path)} is of another run: {reason}")
        self.runs.append(run)
        for verdict in run.verdicts:
            self._add(verdict.cell, self._waived(verdict.cell, verdict.record))

    def _waived(self, cell: Cell, record: Record) -> Record:
        return record if self.waivers is None else self.waivers.apply(cell, record)

    def _needless(self) -> list[str]:
        return [] if self.missing or self.waivers is None else self.waivers.needless(self.judged.items())

    def _add(self, cell: Cell, record: Record) -> None:
        before = self.judged.get(cell)
        if before is None:
            self.judged[cell] = record
            return
        self.repeated.append(cell)
        if before.verdict != record.verdict:
            self.conflicts.append(f"{cell}: {before.verdict} in one run and {record.verdict} in another")
            self.judged[cell] = record if before.holds else before

    @property
    def cells(self) -> list[Cell]:
        """Those of the whole run, and what else the files have."""
        laws = list(dict.fromkeys(law for run in self.runs for law in run.header.laws))
        seed = self.runs[0].header.seed
        every = plan([(line.spec, line.dtypes) for line in self.subjects.values()], laws, seed)
        return list(dict.fromkeys([*every, *self.judged]))

    @property
    def missing(self) -> list[Cell]:
        """Cells of the whole run that no file has."""
        return [cell for cell in self.cells if cell not in self.judged]

    def ordered(self) -> list[Judged]:
        """What is judged, in the order of a run that is not divided."""
        return [(cell, self.judged[cell]) for cell in self.cells if cell in self.judged]

    def remarks(self) -> list[str]:
        """What is worth knowing, and no fault."""
        remarks = [f"{len(self.judged)} cells of {len(self.runs)} runs"]
        if self.repeated:
            remarks.append(f"{len(self.repeated)} records repeat a cell, such as {self.repeated[0]}")
        return remarks

    def faults(self) -> list[str]:
        """What makes the whole incomplete, or a violation: gaps, conflicts and waivers that are not needed."""
        faults = [f"conflict: {conflict}" for conflict in self.conflicts]
        if missing := self.missing:
            laws = Counter(cell.law for cell in missing)
            faults.append(f"{len(missing)} cells of {len(laws)} laws have no record, such as {missing[0]}")
        return faults + self._needless()

    @property
    def exit_code(self) -> int:
        """That of the whole run: 3 where cells are missing or records disagree."""
        code = exit_code(self.judged.values())
        if code != 1 and self._needless():
            return 1
        return code if code == 1 or not (self.missing or self.conflicts) else 3
