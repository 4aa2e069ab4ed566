"""What the laws see: cases by law, regime and dtype, and the planted bugs killed there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from mla_spec.installed import all_laws
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import EVERY_REGIME, Cell, Options, Reason
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import REGIMES, parse_case, regimes_of
from mla_spec.operations.case import Case
from mla_spec.properties.coverage_reasons import REASONS
from mla_spec.subjects.description import Description
from mla_spec.subjects.process import LIMIT
from mla_spec.subjects.supports import DTYPES
from mla_spec.subjects.violation import BrokenSubject
from mla_spec.text.table import format_table


@dataclass
class LawCount:
    """What one law saw on one subject."""

    law: str
    kinds: set[str] = field(default_factory=set)
    cases: Counter[Cell] = field(default_factory=Counter)

    def add(self, case: Case) -> None:
        """Count a case."""
        self.kinds.add(case.kind)
        self.cases.update((self.law, regime, case.dtype) for regime in regimes_of(case))


@dataclass(frozen=True)
class Coverage:
    """All cells of all laws.

    Attributes:
        records: of every law and subject.
        cases: that ran, by cell; 0 in cells where none did.
        killed: planted bugs, by the cell of the first case that killed each.
        reasons: those that explain empty cells.
    """

    records: tuple[Record, ...]
    cases: Counter[Cell]
    killed: dict[Cell, list[str]]
    reasons: tuple[Reason, ...]

    @property
    def unexplained(self) -> list[Cell]:
        """Empty cells for which no reason is stated."""
        return [cell for cell, n in self.cases.items() if n == 0 and self.reason(cell) is None]

    @property
    def idle_reasons(self) -> list[Reason]:
        """Reasons that explain nothing: the cells they name have cases, or do not exist."""
        empty = [cell for cell, n in self.cases.items() if n == 0]
        return [reason for reason in self.reasons if not any(reason.covers(cell) for cell in empty)]

    @property
    def failing(self) -> list[Record]:
        return [record for record in self.records if record.verdict not in ("pass", "unsupported")]

    @property
    def complete(self) -> bool:
        """No law fails, no empty cell is unexplained, and every reason is needed."""
        return not (self.unexplained or self.idle_reasons or self.failing)

    def reason(self, cell: Cell) -> Reason | None:
        return next((reason for reason in self.reasons if reason.covers(cell)), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "cells": [self._cell_as_dict(cell) for cell in self.cases],
            "records": [record.as_dict() for record in self.records],
        }

    def _cell_as_dict(self, cell: Cell) -> dict[str, Any]:
        law, regime, dtype = cell
        reason = self.reason(cell) if self.cases[cell] == 0 else None
        return {
            "operation": operation_of(law),
            "law": law,
            "regime": regime,
            "dtype": dtype,
            "cases": self.cases[cell],
            "killed": self.killed.get(cell, []),
            "reason": None if reason is None else reason.why,
        }


def operation_of(law: str) -> str:
    """What a law is about: the operations that it needs."""
    return ", ".join(all_laws()[law].needs)


def measure_coverage(
    specs: Sequence[str],
    matrix: Iterable[dict[str, Any]],
    options: Options,
    *,
    laws: Sequence[str] = (),
    jobs: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> Coverage:
    """Run laws, all unless some are named, on subjects in processes of their own, and count.

    Args:
        specs: names of subjects, as for ``mla-spec check``.
        options: ``examples`` of every law run, whatever a case of it costs.
        matrix: "bugs" of a kill matrix (``mla_spec.proof.selftest.Matrix.as_dict``).

    Raises:
        UnknownSubject: there is no such subject, or its own code does not let it be made.
    """
    counts = [LawCount(law) for _ in specs for law in laws or all_laws()]
    with WorkerPool(jobs, LIMIT) as pool:
        declared = [pool.describe(replace(options, spec=(spec,))) for spec in specs]
        names = [_name(future) for future in declared]
        asked = [(spec, name) for spec, name in zip(specs, names, strict=True) for _ in laws or all_laws()]
        running = [
            pool.submit(count.law, name, _counted(count, replace(options, spec=(spec,))))
            for count, (spec, name) in zip(counts, asked, strict=True)
        ]
        records = []
        for future in running:
            record = future.result()
            records.append(record)
            progress(f"[{len(records)}/{len(running)}] {record.law} [{record.subject}]")
    cases: Counter[Cell] = Counter()
    seen = {count.law for count in counts if count.kinds}
    for count in counts:
        regimes = [regime for kind in sorted(count.kinds) for regime, _ in REGIMES[kind]]
        for regime in regimes if count.law in seen else [EVERY_REGIME]:
            cases.update({(count.law, regime, dtype): 0 for dtype in DTYPES})
        cases.update(count.cases)
    return Coverage(tuple(records), cases, _killed(matrix), REASONS)


def _name(description: Future[Description]) -> str:
    declared = description.result()
    if declared.fault:
        raise BrokenSubject(declared.fault)
    return declared.name


def _counted(count: LawCount, options: Options) -> Options:
    """Options under which a law runs its examples whatever a case of it costs, and ``count`` hears of each."""
    return replace(options, announce=count.add, examples=options.count * all_laws()[count.law].cost)


def _killed(matrix: Iterable[dict[str, Any]]) -> dict[Cell, list[str]]:
    killed: dict[Cell, list[str]] = {}
    for bug in matrix:
        for record in bug["records"]:
            if record["law"] in bug["killed_by"] and record["case"]:
                case = parse_case(record["case"])
                for regime in regimes_of(case):
                    killed.setdefault((record["law"], regime, case.dtype), []).append(bug["bug"])
    return killed


def report(coverage: Coverage) -> str:
    """A row per law and regime with the cases of each dtype, then reasons, and what is wrong."""
    names = {dtype: dtype.replace("bfloat", "bf").replace("float", "fp") for dtype in DTYPES}
    header = ("operation", "law", "regime", *names.values(), "bugs killed")
    table = format_table([header, *_rows(coverage)])
    empty = Counter(coverage.reason(cell) for cell, n in coverage.cases.items() if n == 0)
    reasons = [
        f"empty: {n} cell{'s' * (n > 1)} of {', '.join(r.laws)}: {r.why}" for r, n in empty.items() if r is not None
    ]
    wrong = [f"no case and no reason: {row}" for row in _grouped(coverage.unexplained)]
    wrong += [f"this reason explains nothing: {', '.join(r.laws)}: {r.why}" for r in coverage.idle_reasons]
    wrong += [record.text() for record in coverage.failing]
    empties = sum(n == 0 for n in coverage.cases.values())
    total = sum(record.cases for record in coverage.records)
    summary = (
        f"{len(coverage.cases)} cells of {len(all_laws())} laws, {total} cases; {empties} cells are empty, "
        f"{len(coverage.unexplained)} of them without a reason"
    )
    return "\n\n".join("\n".join(part) for part in ([table], reasons, wrong, [summary]) if part)


def _grouped(cells: Iterable[Cell]) -> list[str]:
    """Cells that differ in the dtype only, as one."""
    dtypes: dict[tuple[str, str], list[str]] = {}
    for law, regime, dtype in cells:
        dtypes.setdefault((law, regime), []).append(dtype)
    return [f"{law}, {regime}: {', '.join(names)}" for (law, regime), names in dtypes.items()]


def _rows(coverage: Coverage) -> list[tuple[str, ...]]:
    rows = []
    for law, regime in dict.fromkeys(cell[:2] for cell in coverage.cases):
        cells = [(law, regime, dtype) for dtype in DTYPES]
        killed = {bug for cell in cells for bug in coverage.killed.get(cell, [])}
        counts = [str(coverage.cases[cell] or "-") for cell in cells]
        rows.append((operation_of(law), law, regime, *counts, str(len(killed) or "-")))
    return rows
