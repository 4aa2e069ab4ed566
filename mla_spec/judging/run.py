"""How a law is run on a subject."""

from __future__ import annotations

import shlex
import time
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from mla_spec.judging.law import Law, Options, Run
from mla_spec.judging.verdict import (
    Record,
    VacuousCase,
    Verdict,
    merge,
)
from mla_spec.operations.case import Case
from mla_spec.subjects.contract import (
    offers,
    profile_of,
    subject_name,
    supports_of,
)
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.memory import filled_memory
from mla_spec.subjects.violation import NotOffered, SubjectCrashed, Violation


class Provider(HypothesisProvider):
    """Draws every example anew, from the seed alone.

    Hypothesis's own backend repeats parts of earlier examples, which is no use where the values come from a seed. It also
    mixes in integers that it finds in the source of local modules, so that equal seeds would not give equal cases.
    """

    def _maybe_draw_constant(self, *arguments: Any, **options: Any) -> None:
        return None


BACKEND = "mla-spec"
AVAILABLE_PROVIDERS[BACKEND] = f"{__name__}.{Provider.__name__}"


def run_law(made: Law, subject: object, options: Options = Options()) -> Record:
    """Run a law on a subject, dtype after dtype until one fails, and say what came of it."""
    supports = supports_of(subject)
    name = subject_name(subject)
    absent = [operation for operation in made.needs if not offers(subject, operation)]
    reason = f"does not offer {', '.join(absent)}" if absent else made.unavailable(options) or made.missing(supports)
    dtypes = [d for d in supports.dtypes if options.dtypes is None or d in options.dtypes]
    if options.case is not None:
        dtypes = [options.case.dtype]
    if not reason and not dtypes:
        reason = f"supports none of the dtypes {', '.join(options.dtypes or ())}"
    if reason:
        return Record(made.name, name, "unsupported", message=reason)
    share = max(1, -(-options.examples // (len(dtypes) * made.cost)))
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        records = []
        with filled_memory(options.device):
            for dtype in dtypes:
                records.append(_run_dtype(made, subject, dtype, share, options))
                if records[-1].verdict not in ("pass", "incomplete"):
                    break
        return merge(records)
    finally:
        torch.set_num_threads(before)


def replay_command(law: str, case: Case, options: Options) -> str:
    """The command line that runs one case again; empty where none can find the subject."""
    if options.spec is None:
        return ""
    device: tuple[str, ...] = () if options.device == "cpu" else ("--device", options.device)
    if options.threads != 1:
        device += ("--threads", str(options.threads))
    if options.compile is not None:
        device += ("--compile", options.compile)
    return shlex.join(["mla-spec", "check", *options.spec, "--law", law, "--case", case.id, *device])


_VERDICTS: dict[type[Exception], Verdict] = {Violation: "fail", SubjectCrashed: "crashed", VacuousCase: "incomplete"}


_FLAKY = "the same inputs gave a violation once and none when repeated: the subject is not deterministic"


def _run_dtype(made: Law, subject: object, dtype: str, examples: int, options: Options) -> Record:
    driver = Driver(subject, dtype, options.device)
    profile, supports = profile_of(subject, dtype), supports_of(subject)
    run = Run(driver, profile, supports, compile=options.compile, isolated=options.isolated)
    cases = 0
    failed = False
    last: Case | None = None

    def attempt(case: Case) -> None:
        nonlocal cases, failed, last
        cases += not failed
        last, run.case_id = case, case.id
        if options.announce is not None:
            options.announce(case)
        try:
            made.check(run, case)
        except (Violation, SubjectCrashed, VacuousCase, NotOffered):
            failed = True
            raise

    name = subject_name(subject)
    start = time.perf_counter()
    try:
        if options.case is not None:
            attempt(options.case)
        else:
            _generate(made, run, examples, options, attempt)
    except NotOffered as error:
        return Record(made.name, name, "unsupported", message=str(error), seconds=time.perf_counter() - start)
    except (Violation, SubjectCrashed, VacuousCase, Flaky) as error:
        assert last is not None
        return Record(
            made.name,
            name,
            _VERDICTS.get(type(error), "fail"),
            cases=cases,
            message=_FLAKY if isinstance(error, Flaky) else str(error),
            case=last.id,
            replay=replay_command(made.name, last, options),
            seconds=time.perf_counter() - start,
        )
    return Record(made.name, name, "pass", cases, run.worst, run.worst_case, seconds=time.perf_counter() - start)


def _generate(made: Law, run: Run, examples: int, options: Options, attempt: Callable[[Case], None]) -> None:
    """Run the law's first cases, and then what Hypothesis draws; the last call of ``attempt`` is the smallest failure."""
    for case in made.first(run.supports, run.profile):
        attempt(case)
    cases = made.cases(run.supports, run.profile)
    if isinstance(cases, list):
        for case in cases:
            attempt(case)
        return

    @hypothesis.seed(zlib.crc32(f"{options.seed} {made.name} {run.driver.dtype}".encode()))
    @settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if options.minimise else (Phase.generate,),
        backend=BACKEND,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @given(cases)
    def generated(case: Case) -> None:
        attempt(case)

    generated()
