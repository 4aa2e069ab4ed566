"""How a law is run on a subject."""

from __future__ import annotations

import math
import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import hypothesis
import torch
from hypothesis import Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from mla_spec.bounds.error_bound import InvalidBound
from mla_spec.bounds.profile import Profile
from mla_spec.installed import quick_laws
from mla_spec.judging.anatomy import Anatomy
from mla_spec.judging.law import Law, Options, Production, Run
from mla_spec.judging.narrowing import NOT_MADE_FOR, narrowing
from mla_spec.judging.quick import small
from mla_spec.judging.separation import History, by_regime, separation
from mla_spec.judging.verdict import (
    Record,
    TrivialCase,
    VacuousCase,
    Verdict,
    merge,
)
from mla_spec.operations.case import Case
from mla_spec.operations.extent import Most, beyond
from mla_spec.subjects.description import Description, declared_by
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.find import elsewhere
from mla_spec.subjects.memory import filled_memory, give_back_memory
from mla_spec.subjects.near import Handle, gone, there
from mla_spec.subjects.process import HANGS, SubjectDied, SubjectHung
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import (
    NoAnswer,
    NotExported,
    NotOffered,
    SubjectCrashed,
    UnknownSubject,
    Unsupported,
    Violation,
    raised,
    subject_code,
)


class Provider(HypothesisProvider):
    """Draws every example anew, from the seed alone.

    Hypothesis's own backend repeats parts of earlier examples, which is no use where the values come from a seed. It also
    mixes in integers that it finds in the source of local modules, so that equal seeds would not give equal cases.
    """

    def _maybe_draw_constant(self, *arguments: Any, **options: Any) -> None:
        return None


BACKEND = "mla-spec"
AVAILABLE_PROVIDERS[BACKEND] = f"{__name__}.{Provider.__name__}"


def run_law(law: Law, subject: object, options: Options = Options()) -> Record:
    """Run a law on a subject in every dtype that is asked for, and say what came of it."""
    return merge(list(run_dtypes(law, subject, options)))


def run_dtypes(law: Law, subject: object, options: Options = Options()) -> Iterator[Record]:
    """Run a law on a subject, dtype after dtype; a record of each, or one that says why the law does not run."""
    try:
        declared = declared_by(subject)
    except (SubjectCrashed, UnknownSubject) as error:
        message = f"what it declares cannot be read: {error}"
        yield Record(law.name, type(subject).__name__, "crashed", message=message)
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


def answers_from(options: Options) -> str:
    """Where the subject's answers come from: "pipe", "files", or "" of a Python object."""
    return "" if options.spec is None else elsewhere(options.spec[0])


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
    return shlex.join(["mla-spec", "check", *options.spec, "--law", law, "--case", case.id, *device])


def _verdict_of(error: Exception, options: Options) -> Verdict:
    if answers_from(options) == "files" and isinstance(error, NotExported | NoAnswer):  # else a subject made it up
        return "unsupported" if isinstance(error, NotExported) else "incomplete"
    if isinstance(error, SubjectCrashed):
        return "crashed"
    return "incomplete" if isinstance(error, VacuousCase | InvalidBound) else "fail"


_FAILURES = (Violation, SubjectCrashed, VacuousCase, InvalidBound, NotOffered)

REPETITIONS = 5
"""How often the case of a failure that did not come back is run again, to say how often it does."""


SHRINKING = 30.0
"""Seconds that may be spent on cases which end the subject's process, while a smaller one is looked for."""


class TimeIsUp(BaseException):
    """No smaller failing case is looked for any more. Hypothesis lets it pass, as it does Ctrl-C."""


class Attempt(Protocol):
    """What becomes of the cases of a law."""

    smallest: Case | None

    def __call__(self, case: Case) -> None:
        """Run a case."""

    def require_time(self) -> None:
        """Raise TimeIsUp where a smaller failing case has been looked for long enough."""


class _Attempts:
    """Runs cases of one law in one dtype, and keeps what the record says of them.

    The first one runs twice where ``twice``: a subject may be another when it is called for the second time.

    Attributes:
        cases: how many ran up to the first failure, and with it.
        trivial: how many of these no subject could have failed, and why the last of them was.
        refused: how many of these the subject refused, and why the last of them was.
        last: the case that ran last.
        failure: the first failure, and its case.
        smallest: the case that failed last: each that fails while a smaller one is looked for is smaller.
        since: when the first one failed.
        history: every case, and whether it failed.
        ratios: of each of them the largest error / bound, None where nothing was held against a bound.
    """

    def __init__(self, law: Law, run: Run, options: Options, make: Callable[[], Driver], *, twice: bool) -> None:
        self.law, self.run, self.options, self.make = law, run, options, make
        self.twice = twice and law.grown is None
        self.deaths = _Deaths()
        self.cases = 0
        self.trivial = (0, "")
        self.refused = (0, "")
        self.last: Case | None = None
        self.failure: tuple[Exception, Case] | None = None
        self.smallest: Case | None = None
        self.since: float | None = None
        self.history: History = []
        self.ratios: list[float | None] = []
        self._wrong: list[Anatomy] = []

    def __call__(self, case: Case) -> None:
        if self.deaths.spent > SHRINKING:
            self.deaths.again(case)
            return
        self.cases += self.failure is None
        self.last, self.run.case_id, self.run.compared, self.run.last = case, case.id, None, None
        self.run.anatomy, self.run.case_worst = {}, None
        self.history.append((case, False))
        self.ratios.append(None)
        if self.options.announce is not None:
            self.options.announce(case)
        try:
            if reason := beyond(case, self.run.supports):
                raise Unsupported(reason)
            self.deaths.counted(case, lambda: self._check(case))
            if self.run.compared == 0:
                raise TrivialCase("no output has an element")
            if self.twice:
                self.twice = False
                self.deaths.counted(case, lambda: self._check(case))
            self.ratios[-1] = self.run.case_worst
        except TrivialCase as reason:
            self.trivial = self.trivial[0] + (self.failure is None), str(reason)
        except Unsupported as reason:
            self.refused = self.refused[0] + (self.failure is None), str(reason)
        except _FAILURES as error:
            self.failure = self.failure or (error, case)
            self.smallest, self.since = case, self.since or time.monotonic()
            self._keep_evidence(case)
            raise

    def given(self, case: Case) -> None:
        """Run a case that somebody wrote down: the law may not be made for such."""
        try:
            self(case)
        except _FAILURES:
            raise
        except Exception as error:
            raise VacuousCase(f"this law cannot be judged by this case: {raised(error)}") from error

    def _check(self, case: Case) -> None:
        try:
            if gone(self.run.driver):
                self.run.driver = self.make()
            self.law.check(self.run, case)
            if isinstance(self.run.driver, Handle):
                self.run.driver.process.require_silence()
        except SystemExit as error:  # no law asks for it: it comes of what a subject computes when it is read
            raise SubjectCrashed(raised(error)) from error

    def _keep_evidence(self, case: Case) -> None:
        """Note that ``case`` failed: the last such case is the smallest, and the one with the most elements is kept too."""
        self.history[-1] = (case, True)
        if self.run.anatomy:
            excess = float(self.run.anatomy["excess"])
            self.ratios[-1] = excess if self.run.anatomy["judged"] == "within" and math.isfinite(excess) else None
            found = {"case": case.id, **self.run.anatomy}
            self._wrong = [found, max([*self._wrong[1:], found], key=lambda each: math.prod(each["shape"]))]

    def require_time(self) -> None:
        """Raise TimeIsUp where a smaller failing case has been looked for long enough."""
        if self.since is not None and time.monotonic() > self.since + self.options.patience:
            raise TimeIsUp

    @property
    def evidence(self) -> list[Anatomy]:
        """The anatomies of the smallest failing case and of the richest, once where they are one."""
        return self._wrong[:1] if len({each["case"] for each in self._wrong}) == 1 else self._wrong

    def flaky(self) -> tuple[Exception, Case, str]:
        """The first failure and its case, where its inputs gave none when they were repeated, and how often they do."""
        assert self.failure is not None
        error, case = self.failure
        count = sum(self._fails(case) for _ in range(REPETITIONS))
        often = f"this came back in {count} of {REPETITIONS} repetitions of the same inputs: the subject is not deterministic"
        return error, case, f"{error}\n{often}"

    def _fails(self, case: Case) -> bool:
        try:
            self(case)
        except _FAILURES:
            return True
        return False


class _Deaths:
    """Which cases have ended the subject's process, and the seconds that they took, those of the first hangs aside."""

    def __init__(self) -> None:
        self.spent, self.hangs = 0.0, 0
        self.known: dict[str, tuple[type[SubjectDied], str]] = {}
        self.first_hang: str | None = None

    def counted(self, case: Case, check: Callable[[], None]) -> None:
        """Run ``check``, and take note of its end."""
        start = time.monotonic()
        try:
            check()
            return
        except SubjectDied as death:
            kind, text = type(death), str(death)
        if kind is SubjectHung:  # a later one had less time, which is not what is wrong with it
            text = self.first_hang = self.first_hang or text
            self.hangs += 1
        if kind is not SubjectHung or self.hangs > HANGS:
            self.spent += time.monotonic() - start
        self.known.setdefault(case.id, (kind, text))
        self.again(case)

    def again(self, case: Case) -> None:
        """What the case came to, if it has ended a process; raised here alone, since Hypothesis tells failures by place."""
        if case.id in self.known:
            kind, text = self.known[case.id]
            raise kind(text)


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
        )

    def make() -> Driver:
        with subject_code():
            driver: Driver = there(Driver, subject, dtype, options.device)
            return driver

    name, run, attempt = declared.name, None, None
    try:
        run = Run(
            make(),
            declared.profile(dtype),
            declared.supports,
            compile=options.compile,
            isolated=options.isolated,
            production=options.production or Production(),
        )
    except SubjectCrashed as error:
        return record("crashed", f"what it declares cannot be read: {error}")
    attempt = _Attempts(law, run, options, make, twice=twice)
    try:
        if options.case is not None:
            attempt.given(options.case)
        else:
            generate(law, run, examples, options, attempt)
    except NotOffered as error:
        return record("unsupported", str(error))
    except Flaky:
        first, case, message = attempt.flaky()
        return record(_verdict_of(first, options), message, attempt.cases, case)
    except _FAILURES as error:
        convention = run.diagnosis() if isinstance(error, Violation) else ""
        help = narrowing(attempt.history) if isinstance(error, SubjectCrashed) else ""
        declare = f"{NOT_MADE_FOR} Supports({help})" if help else ""
        message = "\n".join(filter(None, (str(error), convention, declare)))
        return record(_verdict_of(error, options), message, attempt.cases, attempt.last)
    try:
        if isinstance(run.driver, Handle):
            run.driver.process.finish()
    except Violation as error:
        return record("fail", str(error), attempt.cases, attempt.last)
    if attempt.cases == 0:
        return record("unsupported", "no case fits what the subject supports")
    if attempt.refused[0] == attempt.cases:
        return record("unsupported", f"refused by the subject: {attempt.refused[1]}")
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
        note=run.note or run.coarseness,
        regimes=by_regime(attempt.history, attempt.ratios),
    )


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
            _draw(law, run, drawn, examples, replace(options, minimise=minimise), attempt)
        except TimeIsUp:
            failing = attempt.smallest
        except (VacuousCase, InvalidBound, NotOffered):
            if failing is None:
                raise
    if failing is not None:
        attempt(failing)
        raise Flaky("a failure did not come back")


def _first_failure(cases: Iterable[Case], attempt: Callable[[Case], None]) -> Case | None:
    """The first case that fails; what the subject turns out not to offer is raised."""
    for case in cases:
        try:
            attempt(case)
        except NotOffered:
            raise
        except _FAILURES:
            return case
    return None


def _draw(law: Law, run: Run, cases: Any, examples: int, options: Options, attempt: Attempt) -> None:
    """Run what Hypothesis draws from the strategy ``cases``."""

    @hypothesis.seed(zlib.crc32(f"{options.seed} {law.name} {run.profile.dtype}".encode()))
    @_settings(examples, (Phase.generate, Phase.shrink) if options.minimise else (Phase.generate,))
    @given(cases)
    def generated(case: Case) -> None:
        attempt.require_time()
        attempt(case)

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
