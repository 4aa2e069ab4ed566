"""The laws as parameters of a user's own pytest test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mla_spec.front.waived import OUTCOMES
from mla_spec.installed import all_laws
from mla_spec.judging.check import judge
from mla_spec.judging.law import Law, Options
from mla_spec.judging.plan import Judged
from mla_spec.judging.verdict import merge
from mla_spec.judging.waivers import Waivers, read_waivers
from mla_spec.subjects.contract import require_subject, subject_name


class Check:
    """One law, to be called with a subject inside a test."""

    def __init__(self, law: Law, options: Options, waivers: Waivers = Waivers()) -> None:
        self.law = law
        self.options = options
        self.waivers = waivers

    def __call__(self, subject: object) -> None:
        """Run the law; skips where it is unsupported and fails with the record's text where it does not hold."""
        report_to_pytest(judge(self.law, subject, self.options, self.waivers), self.waivers)


def parametrize_with_checks(
    subjects: Iterable[object], *, options: Options = Options(), waivers: str | os.PathLike[str] | None = None
) -> Callable[[Any], Any]:
    """Decorate ``def test(subject, check): check(subject)`` to run every law on every subject.

    Args:
        waivers: a file of expected failures; those that happen are reported as xfailed.

    Raises:
        TypeError: a subject offers nothing or declares itself wrongly.
        ValueError: a waiver is none, or has expired.
    """
    expected = Waivers() if waivers is None else read_waivers(os.fspath(waivers))
    parameters = []
    for subject in subjects:
        require_subject(subject)
        for name, law in all_laws().items():
            check = Check(law, options, expected)
            parameters.append(pytest.param(subject, check, id=f"{subject_name(subject)}-{name}"))
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
