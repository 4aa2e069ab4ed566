"""How a law is run on a subject."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from hypothesis.errors import Flaky

from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.judging.attempts import Attempts
from mla_spec.judging.diagnosis import diagnosis, finding
from mla_spec.judging.drawing import FAILURES, answers_from, generate
from mla_spec.judging.law import Law, Options, Production, Run
from mla_spec.judging.narrowing import NOT_MADE_FOR, narrowing
from mla_spec.judging.separation import by_regime, separation
from mla_spec.judging.telltale import telltale
from mla_spec.judging.verdict import Record, VacuousCase, Verdict, merge
from mla_spec.operations.case import Case
from mla_spec.subjects.description import Description, declared_by
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.memory import filled_memory, give_back_memory
from mla_spec.subjects.near import Handle, there
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import (
    NoAnswer,
    NotExported,
    NotOffered,
    SubjectCrashed,
    SuiteFailed,
    UnknownSubject,
    Violation,
    raised,
    subject_code,
)


def run_law(law: Law, subject: object, options: Options = Options()) -> Record:
    """Run a law on a subject in every dtype that is asked for, and say what came of it."""
    return merge(list(run_dtypes(law, subject, options)))


def run_dtypes(law: Law, subject: object, options: Options = Options()) -> Iterator[Record]:
    """Run a law on a subject, dtype after dtype; a record of each, or one that says why the law does not run."""
    try:
        declared = declared_by(subject)
    except (SubjectCrashed, SuiteFailed, UnknownSubject) as error:
        message = f"what it declares cannot be read: {error}"
        verdict: Verdict = "incomplete" if isinstance(error, SuiteFailed) else "crashed"
        yield Record(law.name, type(subject).__name__, verdict, message=message)
        return
    supports, name = declared.supports, declared.name
    dtypes = asked_dtypes(supports, options)
    reason = why_not(law, declared, options)
    if reason:
        yield Record(law.name, name, "unsupported", message=reason)
        return
    spread = options.spread or len(dtypes)
    share = share_of(law, spread, options)
    if options.production is not None:
        options = replace(options, production=replace(options.production, budget=options.production.budget / spread))
    with _as_laws_want_it(subject, options):
        for dtype in dtypes:
            twice = dtype == supports.dtypes[0]
            record = replace(_run_dtype(law, subject, declared, dtype, share, options, twice=twice), dtype=dtype)
            yield record
            if options.until_failure and record.verdict in ("fail", "crashed"):
                break


def why_not(law: Law, declared: Description, options: Options) -> str:
    """Why a law does not run on a subject, or ""."""
    supports = declared.supports
    absent = [operation for operation in law.needs if operation not in declared.operations]
    reason = f"does not offer {', '.join(absent)}" if absent else ""
    reason = reason or law.unavailable(options) or supports.nothing_to_judge(law.needs) or law.missing(supports)
    reason = reason or law.out_of_reach(answers_from(options))
    if not reason and not asked_dtypes(supports, options):
        reason = f"supports none of the dtypes {', '.join(options.dtypes or ())}"
    return reason


def share_of(law: Law, spread: int, options: Options) -> int:
    """How many cases of a law are generated in a dtype, where examples are spread over so many."""
    return max(1, -(-options.count // (spread * law.cost)))


@contextmanager
def _as_laws_want_it(subject: object, options: Options) -> Iterator[None]:
    """Torch's threads and memory where the subject is; a process of its own always has them so."""
    if isinstance(subject, Handle):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with filled_memory(options.device):
            yield
    finally:
        torch.set_num_threads(before)
        give_back_memory(options.device)


def asked_dtypes(supports: Supports, options: Options) -> list[str]:
    """The dtypes in which a law runs on a subject that supports so much."""
    if options.case is not None:
        return [options.case.dtype]
    return [dtype for dtype in supports.dtypes if options.dtypes is None or dtype in options.dtypes]


def replay_command(law: str, case: Case, options: Options) -> str:
    """The command line that runs one case again; empty where none can find the subject."""
    if options.spec is None:
        return ""
    device: tuple[str, ...] = () if options.device == "cpu" else ("--device", options.device)
    if options.threads != 1:
        device += ("--threads", str(options.threads))
    if options.compile is not None:
        device += ("--compile", options.compile)
    if options.production is not None:
        device += ("--production",)
    if options.under:
        device += ("--under", options.under)
    return shlex.join(["mla-spec", "check", *options.spec, "--law", law, "--case", case.id, *device])


def _verdict_of(error: Exception, options: Options) -> Verdict:
    if answers_from(options) == "files" and isinstance(error, NotExported | NoAnswer):  # else a subject made it up
        return "unsupported" if isinstance(error, NotExported) else "incomplete"
    if isinstance(error, SubjectCrashed):
        return "crashed"
    return "incomplete" if isinstance(error, SuiteFailed | VacuousCase | InvalidBound) else "fail"


def _blamed(error: Exception, message: str) -> str:
    """The message, which says so where the suite is to blame."""
    return f"the suite itself failed, not the subject: {message}" if isinstance(error, SuiteFailed) else message


def _run_dtype(
    law: Law, subject: object, declared: Description, dtype: str, examples: int, options: Options, *, twice: bool
) -> Record:
    start = time.perf_counter()

    def record(verdict: Verdict, message: str, cases: int = 0, case: Case | None = None) -> Record:
        return Record(
            law.name,
            name,
            verdict,
            cases=cases,
            message=message,
            case="" if case is None else case.id,
            replay="" if case is None else replay_command(law.name, case, options),
            seconds=time.perf_counter() - start,
            note=run.note if run is not None else "",
            evidence=[] if attempt is None else attempt.evidence,
            separation={} if attempt is None else separation(attempt.history),
            regimes={} if attempt is None else by_regime(attempt.history, attempt.ratios),
            told=told,
        )

    def make() -> Driver:
        with subject_code():
            driver: Driver = there(Driver, subject, dtype, options.device)
            return driver

    name, run, attempt, told = declared.name, None, None, list[dict[str, str]]()
    try:
        run = Run(
            make(),
            declared.profile(dtype),
            declared.supports,
            compile=options.compile,
            isolated=options.isolated,
            production=options.production or Production(),
        )
    except (SubjectCrashed, SuiteFailed) as error:
        return record(_verdict_of(error, options), f"what it declares cannot be read: {error}")
    attempt = Attempts(law, run, options, make, twice=twice)
    try:
        if options.case is not None:
            attempt.given(options.case)
        else:
            generate(law, run, examples, options, attempt)
    except NotOffered as error:
        return record("unsupported", str(error))
    except Flaky:
        first, case, message = attempt.flaky()
        return record(_verdict_of(first, options), _blamed(first, message), attempt.cases, case)
    except FAILURES as error:
        conventions = run.obeyed() if isinstance(error, Violation) else ()
        help = narrowing(attempt.history) if isinstance(error, SubjectCrashed) else ""
        declare = f"{NOT_MADE_FOR} Supports({help})" if help else ""
        message = "\n".join(filter(None, (_blamed(error, str(error)), diagnosis(conventions), declare)))
        told += [finding(convention).as_dict() for convention in conventions]
        if options.tell and not told and isinstance(error, Violation) and attempt.last is not None:
            told += [each.as_dict() for each in telltale(subject, attempt.last, declared, options.device)]
        return record(_verdict_of(error, options), message, attempt.cases, attempt.last)
    except Exception as error:  # no case: what draws or counts them
        if not isinstance(subject, Handle):  # for debuggers
            raise
        return record("incomplete", _blamed(SuiteFailed(), raised(error)), attempt.cases, attempt.last)
    try:
        if isinstance(run.driver, Handle):
            run.driver.process.finish()
    except Violation as error:
        return record("fail", str(error), attempt.cases, attempt.last)
    if attempt.cases == 0:
        return record("unsupported", "no case fits what the subject supports")
    if attempt.refused[0] == attempt.cases:
        return record("unsupported", f"refused by the subject: {attempt.refused[1]}")
    vague, why = attempt.vague
    vagueness = f"{len(vague)} of {attempt.cases} cases say little: {why}" if vague else ""
    if attempt.too_vague:
        return record("incomplete", vagueness, attempt.cases, vague[-1])
    if attempt.trivial[0] + attempt.refused[0] == attempt.cases:
        why = f"no subject could have failed any of its {attempt.cases} cases: {attempt.trivial[1]}"
        return record("incomplete", why, attempt.cases, attempt.last)
    if run.loose and not run.sharp:
        run.leave_out(f"no case is long enough to be judged: {run.coarseness}")
    if attempt.refused[0]:
        refused = f"{attempt.refused[0]} of {attempt.cases} cases refused by the subject: {attempt.refused[1]}"
        run.note = "\n".join(filter(None, (run.note, refused)))
    verdict: Verdict = "incomplete" if run.left_out else "pass"
    seconds = time.perf_counter() - start
    return Record(
        law.name,
        name,
        verdict,
        attempt.cases,
        run.worst,
        run.worst_case,
        message=run.left_out,
        seconds=seconds,
        note="\n".join(filter(None, (run.note or run.coarseness, vagueness))),
        regimes=by_regime(attempt.history, attempt.ratios),
        spread=run.spread,
    )
