"""The laws as parameters of a user's own pytest test."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from mla_spec.front.waived import OUTCOMES
from mla_spec.judging.check import find_laws, judge
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Law, Options
from mla_spec.judging.plan import Judged, plan
from mla_spec.judging.session import Asked, run_in
from mla_spec.judging.verdict import merge
from mla_spec.judging.waivers import Waivers, read_waivers
from mla_spec.subjects.contract import require_subject, subject_name
from mla_spec.subjects.description import Description
from mla_spec.subjects.process import LIMIT
from mla_spec.subjects.violation import UnknownSubject


class Check:
    """One law, to be called with a subject inside a test."""

    def __init__(self, law: Law, options: Options, waivers: Waivers = Waivers()) -> None:
        self.law = law
        self.options = options
        self.waivers = waivers

    def __call__(self, subject: object) -> None:
        """Run the law; skips where it is unsupported and fails with the record's text where it does not hold."""
        judged = _judge_named(self.law, subject, self.options) if isinstance(subject, str) else None
        if judged is None:
            report_to_pytest(judge(self.law, subject, self.options, self.waivers), self.waivers)
        else:
            report_to_pytest([(cell, self.waivers.apply(cell, record)) for cell, record in judged], self.waivers)


@cache
def _pool() -> WorkerPool:
    """The processes of subjects that are given by name, until Python ends."""
    pool = WorkerPool(timeout=LIMIT)
    atexit.register(pool.__exit__, None, None, None)
    return pool


@cache
def _declared(subject: str) -> Description | UnknownSubject:
    try:
        return _pool().describe(Options(spec=(subject,))).result()
    except UnknownSubject as error:
        return error


def _judge_named(law: Law, subject: str, options: Options) -> list[Judged]:
    """The cells of a law on a subject in a process of its own."""
    declared = _declared(subject)
    if isinstance(declared, UnknownSubject):
        pytest.fail(str(declared), pytrace=False)
    asked = Asked(replace(options, spec=(subject,)), None, declared)
    cells = plan([(asked.spec, asked.dtypes)], [law.name], options.seed)
    return list(run_in(_pool(), cells, {asked.spec: asked}, lambda cell: None))


def parametrize_with_checks(
    subjects: Iterable[object], *, options: Options = Options(), waivers: str | os.PathLike[str] | None = None
) -> Callable[[Any], Any]:
    """Decorate ``def test(subject, check): check(subject)`` to run every law on every subject, or every elementary one where ``options.quick``.

    Args:
        subjects: objects, or names as for ``mla-spec check``. A name is made in a process of its own, which it can spoil as it
            likes; an object is in this one, and so is what its results are judged by.
        waivers: a file of expected failures; those that happen are reported as xfailed.

    Raises:
        TypeError: a subject offers nothing or declares itself wrongly.
        ValueError: a waiver is none, or has expired.
    """
    expected = Waivers() if waivers is None else read_waivers(os.fspath(waivers))
    parameters = []
    for subject in subjects:
        if not isinstance(subject, str):
            require_subject(subject)
        label = subject if isinstance(subject, str) else subject_name(subject)
        for law in find_laws([], quick=options.quick):
            check = Check(law, options, expected)
            parameters.append(pytest.param(subject, check, id=f"{label}-{law.name}"))
    return pytest.mark.parametrize(("subject", "check"), parameters)


def report_to_pytest(judged: list[Judged], waivers: Waivers) -> None:
    """Make the records of a law the outcome of the running test."""
    OUTCOMES.extend(waivers.outcomes(judged))
    record = merge([record for _, record in judged])
    if record.verdict == "unsupported":
        pytest.skip(record.message)
    if not record.holds:
        pytest.fail(record.text(), pytrace=False)
    if record.waived:
        pytest.xfail(record.waived)
