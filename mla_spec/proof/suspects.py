"""Which known fault gives the same wrong numbers as a subject: each is run on the very case that failed.

The subject is not needed: what it gave stands in the evidence of its record. A suspect that gives other numbers on the smallest
case, or on the one with the most elements, is cleared.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from mla_spec import installed
from mla_spec.installed import all_laws
from mla_spec.judging.anatomy import same_wrong_numbers
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import parse_case
from mla_spec.proof.hypotheses import HYPOTHESES
from mla_spec.proof.reach import operations_that_differ

PATIENCE = 10.0
"""Seconds that one case of one suspect may take."""


@dataclass(frozen=True)
class Suspect:
    """A fault that is known.

    Attributes:
        id: of the planted bug, or of the hypothesis.
        claim: what it does.
        spec: what finds a subject that has it.
        source: where it was reported; empty where it was not.
        symptom: what users saw; empty for a hypothesis.
        declare: what would make it right to declare; empty where nothing would.
        operations: those in which it differs from a correct subject.
        laws: those of which it is known that they find it.
    """

    id: str
    claim: str
    spec: str
    source: str = ""
    symptom: str = ""
    declare: str = ""
    operations: frozenset[str] = frozenset()
    laws: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What a record says of it."""
        names = ("id", "claim", "source", "symptom", "declare")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@cache
def suspects() -> tuple[Suspect, ...]:
    """Planted bugs that need neither a compiler nor a production load, and hypotheses."""
    bugs = [bug for bug in installed.planted_bugs().values() if bug.compile is None and bug.production is None]
    planted = [
        Suspect(
            bug.id,
            _first_line(bug.make),
            bug.spec,
            bug.source[0] if bug.source else "",
            bug.symptom,
            operations=frozenset(operations_that_differ(bug.make)),
            laws=bug.killed_by,
        )
        for bug in bugs
    ]
    general = [
        Suspect(
            each.id,
            each.claim,
            f"{each.make.__module__}:{each.make.__qualname__}",
            declare=each.declare,
            operations=frozenset(operations_that_differ(each.make)),
        )
        for each in HYPOTHESES
    ]
    return (*planted, *general)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


@contextmanager
def room(jobs: int = 1) -> Iterator[WorkerPool]:
    """Processes in which suspects run: some of them end theirs."""
    with WorkerPool(jobs, PATIENCE, share=True) as pool:
        yield pool


def named_suspects(
    record: Record, pool: WorkerPool, *, without: Iterable[str] = (), budget: float = 60.0
) -> list[dict[str, Any]]:
    """The suspects that give the same wrong numbers as a failing record, the likeliest first.

    Args:
        without: ids of suspects that are left out.
        budget: seconds after which no further suspect is run.
    """
    law = all_laws().get(record.law)
    if law is None or not record.case or record.verdict not in ("fail", "crashed"):
        return []
    left_out, end = set(without), time.monotonic() + budget
    candidates = [each for each in suspects() if each.operations & set(law.needs) and each.id not in left_out]
    candidates.sort(key=lambda each: (record.law not in each.laws, not each.source))
    cases = list(dict.fromkeys([record.case, *(each["case"] for each in record.evidence)]))
    found = []
    for each in candidates:
        if time.monotonic() > end:
            break
        if all(_tried(record, each, case, number, pool) for number, case in enumerate(cases)):
            found.append(each.as_dict())
    return found


def _tried(record: Record, suspect: Suspect, case: str, number: int, pool: WorkerPool) -> bool:
    """Whether a suspect shows on case ``number`` of the evidence what the subject does."""
    return _alike(record, pool.submit(record.law, suspect.id, _options(suspect, case, record)).result(), number)


def _options(suspect: Suspect, case: str, record: Record) -> Options:
    return Options(case=parse_case(case), minimise=False, spec=(suspect.spec,))


def _alike(record: Record, suspect: Record, number: int) -> bool:
    """Whether a suspect's record on case ``number`` of the evidence shows what the subject's does."""
    if record.verdict != suspect.verdict or bool(record.evidence) != bool(suspect.evidence):
        return False
    if not record.evidence:
        return _said(record) == _said(suspect)
    return same_wrong_numbers(record.evidence[number], suspect.evidence[0])


def _said(record: Record) -> str:
    """The message without the place in the source where an exception was raised."""
    return record.message.partition(" (")[0]
