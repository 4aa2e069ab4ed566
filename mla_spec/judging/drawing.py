"""Which cases a law runs on: its first ones, then what Hypothesis draws, then smaller ones where one fails."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import hypothesis
from hypothesis import Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.bounds.profile import Profile
from mla_spec.installed import quick_laws
from mla_spec.judging.law import Law, Options, Run
from mla_spec.judging.quick import small
from mla_spec.judging.verdict import VacuousCase
from mla_spec.operations.case import Case
from mla_spec.operations.case_limits import elements
from mla_spec.operations.extent import Most
from mla_spec.subjects.find import elsewhere
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, SuiteFailed, Violation


class Provider(HypothesisProvider):
    """Draws every example anew, from the seed alone.

    Hypothesis's own backend repeats parts of earlier examples, which is no use where the values come from a seed. It also
    mixes in integers that it finds in the source of local modules, so that equal seeds would not give equal cases.
    """

    def _maybe_draw_constant(self, *arguments: Any, **options: Any) -> None:
        return None


BACKEND = "mla-spec"


AVAILABLE_PROVIDERS[BACKEND] = f"{__name__}.{Provider.__name__}"


FAILURES = (Violation, SubjectCrashed, SuiteFailed, VacuousCase, InvalidBound, NotOffered)
"""What ends a case without a pass."""


class TimeIsUp(BaseException):
    """No smaller failing case is looked for any more. Hypothesis lets it pass, as it does Ctrl-C."""


class Attempt(Protocol):
    """What becomes of the cases of a law."""

    smallest: Case | None

    def __call__(self, case: Case, *, drawn: bool = False) -> None:
        """Run a case; where it was ``drawn``, its bound may turn out to say little."""

    def require_time(self) -> None:
        """Raise TimeIsUp where a smaller failing case has been looked for long enough."""


def generate(law: Law, run: Run, examples: int, options: Options, attempt: Attempt) -> None:
    """Run the law's first cases, and then what Hypothesis draws; the last call of ``attempt`` is the smallest failure.

    Where a first case fails, Hypothesis looks for a smaller one; where it finds none, the first one fails again, or the
    subject is not deterministic.
    """
    supports = small(run.supports, run.profile) if options.quick else run.supports
    cut = partial(Most.of(supports).cut, topk_multiple=supports.topk_multiple)
    cases = law.cases(supports, run.profile)
    minimise = options.minimise and answers_from(options) != "files"  # which hold no answers to smaller cases
    listed, drawn = (cases, None) if isinstance(cases, list) else ([], cases.map(cut))
    grown = () if law.grown is None else law.grown(run)
    begin = [case for case in options.begin if case.dtype == run.driver.dtype]
    begins = quick_laws().get(law.name, law.first) if options.quick else law.first
    first = map(cut, begins(supports, run.profile))
    failing = _first_failure(chain(begin, first, listed, grown), attempt)
    if drawn is not None and (failing is None or minimise):
        try:
            draw(law, run, drawn, examples, replace(options, minimise=minimise), attempt)
        except TimeIsUp:  # what was drawn may still be larger than the first case that failed
            failing = min((case for case in (failing, attempt.smallest) if case is not None), key=_size)
        except (SuiteFailed, VacuousCase, InvalidBound, NotOffered):
            if failing is None:
                raise
    if failing is not None:
        attempt(failing)
        raise Flaky("a failure did not come back")


def _size(case: Case) -> int:
    return sum(elements(case).values())


def _first_failure(cases: Iterable[Case], attempt: Callable[[Case], None]) -> Case | None:
    """The first case that fails; what the subject turns out not to offer is raised."""
    for case in cases:
        try:
            attempt(case)
        except NotOffered:
            raise
        except FAILURES:
            return case
    return None


def draw(law: Law, run: Run, cases: Any, examples: int, options: Options, attempt: Attempt) -> None:
    """Run what Hypothesis draws from the strategy ``cases``."""

    @hypothesis.seed(zlib.crc32(f"{options.seed} {law.name} {run.profile.dtype}".encode()))
    @_settings(examples, (Phase.generate, Phase.shrink) if options.minimise else (Phase.generate,))
    @given(cases)
    def generated(case: Case) -> None:
        attempt.require_time()
        attempt(case, drawn=True)

    generated()


def _settings(examples: int, phases: tuple[Phase, ...]) -> settings:
    return settings(
        max_examples=examples,
        phases=phases,
        backend=BACKEND,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )


def answers_from(options: Options) -> str:
    """Where the subject's answers come from: "pipe", "files", or "" of a Python object."""
    return "" if options.spec is None else elsewhere(options.spec[0])


def kind_of(law: Law) -> str:
    """The kind of a law's cases; "" where none can be made."""
    supports, profile = Supports(), Profile.default("float32")
    cases = law.cases(supports, profile)
    seen = [*law.first(supports, profile), *(cases if isinstance(cases, list) else ())]
    if not seen and not isinstance(cases, list):

        @hypothesis.seed(0)
        @_settings(1, (Phase.generate,))
        @given(cases)
        def drawn(case: Case) -> None:
            seen.append(case)

        drawn()
    return str(seen[0].kind) if seen else ""
