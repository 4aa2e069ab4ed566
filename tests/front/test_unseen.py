"""A report of a subject without LSE says what its outputs alone cannot show."""

from __future__ import annotations

from mla_spec.front.report import NO_LSE, UNSEEN_WITHOUT_LSE, report_of
from mla_spec.installed import all_laws
from mla_spec.judging.verdict import Record
from mla_spec.subjects.supports import Supports


def test_the_report_says_what_stays_unseen_where_laws_of_the_lse_do_not_apply() -> None:
    seen, unseen = Record("a_law", "kernel", "pass"), Record("b_law", "kernel", "unsupported", message=NO_LSE)
    assert UNSEEN_WITHOUT_LSE in report_of([seen, unseen])
    assert UNSEEN_WITHOUT_LSE not in report_of([seen])


def test_the_reason_is_that_of_the_laws() -> None:
    assert all_laws()["test_decode_lse_agrees_with_reference"].missing(Supports(lse=False)) == NO_LSE
