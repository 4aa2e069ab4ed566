"""The laws as parameters of a user's own pytest test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mla_spec.installed import all_laws
from mla_spec.judging.law import Law, Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.contract import require_subject, subject_name


class Check:
    """One law, to be called with a subject inside a test."""

    def __init__(self, law: Law, options: Options) -> None:
        self.law = law
        self.options = options

    def __call__(self, subject: object) -> None:
        """Run the law; skips where it is unsupported and fails with the record's text where it does not hold."""
        report_to_pytest(run_law(self.law, subject, self.options))


def parametrize_with_checks(subjects: Iterable[object], *, options: Options = Options()) -> Callable[[Any], Any]:
    """Decorate ``def test(subject, check): check(subject)`` to run every law on every subject.

    Raises:
        TypeError: a subject offers nothing or declares itself wrongly.
    """
    parameters = []
    for subject in subjects:
        require_subject(subject)
        for name, law in all_laws().items():
            parameters.append(pytest.param(subject, Check(law, options), id=f"{subject_name(subject)}-{name}"))
    return pytest.mark.parametrize(("subject", "check"), parameters)


def report_to_pytest(record: Record) -> None:
    """Make a record the outcome of the running test."""
    if record.verdict == "unsupported":
        pytest.skip(record.message)
    if record.verdict != "pass":
        pytest.fail(record.text(), pytrace=False)
