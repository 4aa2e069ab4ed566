"""The sensitivity card of a subject: the smallest fault of each kind that the laws would detect in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import hypothesis
from hypothesis import Phase, given, settings

from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.check import find_laws
from mla_spec.judging.drawing import BACKEND
from mla_spec.judging.law import Law, Options, Run
from mla_spec.judging.verdict import TrivialCase, VacuousCase
from mla_spec.operations.case import Case
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.faults import (
    FAULTS,
    Fault,
    Grade,
    emulated_kernel,
    injected,
)
from mla_spec.subjects.description import declared_by
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import SubjectCrashed, Unsupported, Violation
from mla_spec.text.table import format_table

LONG_ROWS = 2**22
"""Numbers in the cached rows of a case that is made long, at most."""


@dataclass(frozen=True)
class Sensitivity:
    """A row of the card.

    Attributes:
        fault, dtype: what was injected, and in which dtype.
        grades: those tried could be these, from the largest to the smallest fault.
        smallest: the smallest grade that was detected; None if not even the largest was.
        law, cases, case: which law detected it, after how many of its cases, and the id of the case that did.
    """

    fault: str
    dtype: str
    grades: tuple[Grade, ...]
    smallest: Grade | None
    law: str = ""
    cases: int = 0
    case: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Detector:
    """A law, and the cases on which it may detect a fault of subjects on a device."""

    law: Law
    cases: tuple[Case, ...]
    device: str = "cpu"

    def detect(self, subject: Any, dtype: str) -> tuple[int, Case] | None:
        """(how many cases it took, the case) until the law fails; None if it holds on all."""
        declared = declared_by(subject)
        run = Run(there(Driver, subject, dtype, self.device), declared.profile(dtype), declared.supports)
        for count, case in enumerate(self.cases, 1):
            run.case_id = case.id
            try:
                self.law.check(run, case)
            except (VacuousCase, InvalidBound, TrivialCase, Unsupported):
                continue
            except (Violation, SubjectCrashed):
                return count, case
        return None

    def lengthened(self, length: int) -> Detector:
        """The same law on those of its cases that can have sequences of ``length`` keys."""
        long = [replace(c, seqlens=(length,) * len(c.seqlens)) for c in self.cases if isinstance(c, DecodeCase)]
        kept = [c for c in long if length * len(c.seqlens) * (c.kv_lora_rank + c.qk_rope_head_dim) <= LONG_ROWS]
        return replace(self, cases=(*kept[:4], *self.cases))


def draw_cases(law: Law, supports: Supports, profile: Profile, count: int, seed: int) -> tuple[Case, ...]:
    """At most ``count`` different cases of a law, or its fixed ones; equal seeds give equal cases."""
    source = law.cases(supports, profile)
    if isinstance(source, list):
        return tuple(source)
    drawn: dict[str, Case] = {}

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        phases=(Phase.generate,),
        backend=BACKEND,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(source)
    def collect(case: Case) -> None:
        drawn[case.id] = case

    collect()
    return tuple(drawn.values())


def detectors_of(
    subject: Any, dtype: str, count: int, seed: int, laws: Iterable[str] = (), device: str = "cpu"
) -> list[Detector]:
    """Every law of ``decode``, of ``laws`` where some are named, that holds on the subject as it is."""
    declared, options = declared_by(subject), Options(device=device)
    supports, profile = declared.supports, declared.profile(dtype)
    laws_of_decode = [
        m for m in find_laws(laws) if m.needs == ("decode",) and not (m.missing(supports) or m.unavailable(options))
    ]
    detectors = [Detector(m, draw_cases(m, supports, profile, count, seed), device) for m in laws_of_decode]
    return [d for d in detectors if d.detect(subject, dtype) is None]


def _smallest(fault: Fault, subject: Any, dtype: str, detectors: list[Detector]) -> Sensitivity | None:
    """Bisect over the grades; None where none of them is a fault of this subject."""
    grades = tuple(grade for grade in fault.grades if injected(fault, subject, dtype, grade) is not None)
    if not grades:
        return None
    found = Sensitivity(fault.name, dtype, grades, None)
    detected, missed = -1, len(grades)
    while missed - detected > 1:
        middle = (detected + missed) // 2
        grade = grades[middle]
        able = [d.lengthened(int(grade)) for d in detectors] if fault.long else detectors
        # What detected a larger fault goes first.
        for detector in sorted(able, key=lambda d: d.law.name != found.law):
            hit = detector.detect(injected(fault, subject, dtype, grade), dtype)  # its process may have ended before
            if hit is not None:
                found = replace(found, smallest=grade, law=detector.law.name, cases=hit[0], case=hit[1].id)
                detected = middle
                break
        else:
            missed = middle
    return found


def sensitivity_card(
    subject: Any,
    *,
    dtypes: Iterable[str] | None = None,
    count: int = 20,
    seed: int = 0,
    laws: Iterable[str] = (),
    faults: Iterable[Fault] = FAULTS,
    device: str = "cpu",
    progress: Callable[[Sensitivity], None] = lambda row: None,
) -> list[Sensitivity]:
    """The smallest detected fault of each kind and dtype.

    Larger faults are taken to be detected where smaller ones are. A law that fails on the subject as it is detects nothing.

    Args:
        subject: offers ``decode``; it may be in a process of its own.
        count: cases per law, dtype and fault.
        seed: of the cases.
        laws: names of those that may detect; all of ``decode`` when empty.
        device: torch device of the tensors.
        progress: called with each row as it is made.

    Raises:
        ValueError: the subject has no ``decode`` or does not support a dtype, or no law has a name.
    """
    declared = declared_by(subject)
    if "decode" not in declared.operations:
        raise ValueError(f"{declared.name} does not offer decode, into which faults are injected")
    supported = declared.supports.dtypes
    dtypes = list(dtypes or supported)
    for dtype in dtypes:
        if dtype not in supported:
            raise ValueError(f"{declared.name} does not support {dtype}; it supports {', '.join(supported)}")
    faults, laws = list(faults), list(laws)
    rows: list[Sensitivity] = []
    for dtype in dtypes:
        detectors: dict[bool, list[Detector]] = {}
        for fault in faults:
            if fault.emulated not in detectors:
                honest = emulated_kernel(declared, dtype) if fault.emulated else subject
                detectors[fault.emulated] = detectors_of(honest, dtype, count, seed, laws, device)
            row = _smallest(fault, subject, dtype, detectors[fault.emulated])
            if row is not None:
                progress(row)
                rows.append(row)
    return rows


def report(rows: Iterable[Sensitivity]) -> str:
    """The card as a table."""
    table = [("fault", "dtype", "smallest detected", "of", "law", "cases")]
    for row in rows:
        smallest = "none" if row.smallest is None else str(row.smallest) or "yes"
        tried = f"{row.grades[0]} .. {row.grades[-1]}" if len(row.grades) > 1 else str(row.grades[0])
        table.append((row.fault.format("x"), row.dtype, smallest, tried, row.law, str(row.cases or "")))
    return format_table(table)
